"""What is said where there is no GPU to run on, and of the GPU that there is."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.backends.base import BackendUnavailableError
from runtime.gpu.cuda_runtime import CudaRuntime, load_cuda, megabytes, require_gpu
from tests.fake_tensorrt.cuda import FakeCuda, Status


@pytest.mark.parametrize(
    ("driver", "gpus", "text"),
    [
        (0, 1, "no NVIDIA driver of the CUDA 13 series was found"),
        (12080, 1, r"goes up to CUDA 12.8, engines need one of the CUDA 13 series; install a new"),
        (13000, 0, "no usable NVIDIA GPU: the driver finds none"),
    ],
    ids=["no driver", "old driver", "no GPU"],
)
def test_machine_that_cannot_run_an_engine_is_told_what_it_lacks(
    driver: int, gpus: int, text: str
) -> None:
    cuda = FakeCuda()
    cuda.driver, cuda.gpus = driver, gpus
    with pytest.raises(BackendUnavailableError, match=text) as error:
        require_gpu(cuda)
    assert "--backend onnxruntime" in str(error.value)


def test_driver_that_fails_is_named() -> None:
    cuda = FakeCuda()
    cuda.failures["cudaGetDeviceCount"] = Status.cudaErrorIllegalAddress
    with pytest.raises(BackendUnavailableError, match="no usable NVIDIA GPU"):
        require_gpu(cuda)


def test_cuda_python_without_a_driver_is_told_what_it_lacks() -> None:
    """The real bindings; a machine with a GPU of the series has nothing to be told."""
    pytest.importorskip("cuda.bindings.runtime")
    try:
        load_cuda()
    except BackendUnavailableError as error:
        assert "driver" in str(error) or "GPU" in str(error)


def test_functions_and_constants_that_are_called_are_those_of_the_bindings() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    names = [name for name in dir(FakeCuda) if name.startswith("cuda")]
    assert len(names) > 20
    for name in names:
        assert hasattr(runtime, name), name
    for kind in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode"):
        for member in getattr(FakeCuda, kind):
            assert int(getattr(getattr(runtime, kind), member.name)) == int(member)
    assert int(runtime.cudaHostAllocDefault) == FakeCuda.cudaHostAllocDefault
    assert int(runtime.cudaStreamNonBlocking) == FakeCuda.cudaStreamNonBlocking


def test_arguments_are_those_that_the_bindings_take() -> None:
    """Without a driver every call gives a status; a wrong argument would be a TypeError."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    cuda = CudaRuntime(runtime)
    if cuda.attempt("cudaGetDeviceCount")[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU here, which these calls would reach")
    stream = runtime.cudaStream_t()
    graph, runnable = runtime.cudaGraph_t(), runtime.cudaGraphExec_t()
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    upload = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    calls: list[tuple[Any, ...]] = [
        ("cudaGetDevice",),
        ("cudaGetDeviceProperties", 0),
        ("cudaMemGetInfo",),
        ("cudaMalloc", 8),
        ("cudaHostAlloc", 8, runtime.cudaHostAllocDefault),
        ("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking),
        ("cudaMemcpyAsync", 256, 512, 8, upload, stream),
        ("cudaMemsetAsync", 256, 0, 8, stream),
        ("cudaStreamBeginCapture", stream, mode),
        ("cudaStreamEndCapture", stream),
        ("cudaGraphInstantiate", graph, 0),
        ("cudaGraphDestroy", graph),
        ("cudaGraphLaunch", runnable, stream),
        ("cudaGraphExecDestroy", runnable),
        ("cudaStreamSynchronize", stream),
        ("cudaStreamDestroy", stream),
        ("cudaFree", 0),
        ("cudaFreeHost", 0),
    ]
    for name, *arguments in calls:
        status, _ = cuda.attempt(name, *arguments)
        assert status != runtime.cudaError_t.cudaSuccess, name


def test_gpu_is_described_by_name_architecture_and_driver() -> None:
    gpu = CudaRuntime(FakeCuda()).gpu()
    assert str(gpu) == "NVIDIA GeForce RTX 4090 (sm89, driver up to CUDA 13.0)"
    assert gpu.target == "sm89"
    assert gpu.file_word == "nvidia-geforce-rtx-4090"


def test_bytes_are_told_rounded_up() -> None:
    assert [megabytes(n) for n in (0, 1, 100_001, 1_500_000_000)] == [
        "0.0 MB",
        "0.1 MB",
        "0.2 MB",
        "1,500.0 MB",
    ]
