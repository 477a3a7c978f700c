"""Engines that do not load, or are not what their manifest says, and what is left of them."""

from __future__ import annotations

import gc
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from runtime.backends import open_backend
from runtime.backends.base import BackendUnavailableError
from runtime.bundle import Bundle
from tests.engine_runs import prefill
from tests.fake_tensorrt import FakeGpu, library
from tests.fake_tensorrt.cuda import Status
from tests.fake_tensorrt.engine_file import ACTIVATION_BYTES, WEIGHT_BYTES, add_fake_engine
from tests.fake_tensorrt.enums import CudaGraphStrategy, Specialization

PRODUCTS = ("tensorrt_rtx", "tensorrt")
CLOSING = ("cudaStreamSynchronize", "cudaFree", "cudaFreeHost", "cudaStreamDestroy")


def test_too_little_memory_for_the_engine_is_said_before_anything_is_loaded(
    engine_bundle: Bundle, gpu: FakeGpu
) -> None:
    gpu.cuda.total_bytes = WEIGHT_BYTES
    with pytest.raises(BackendUnavailableError) as error:
        open_backend("tensorrt_rtx", engine_bundle)
    text = str(error.value)
    assert "too little GPU memory: 3.0 MB are needed (weights 2.0 MB, tokens and logits" in text
    assert " 0.1 MB, a cache of 1 sequence 0.9 MB), 2.0 MB are free; end other programs" in text
    assert "cudaMalloc" not in gpu.cuda.calls


def test_activations_of_the_plan_count_before_anything_is_loaded(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu
) -> None:
    """The largest of its profiles; the engine itself says 1 MB here, once it is loaded."""
    plan = {"profiles": [{"activation_bytes": size} for size in (1_000_000, 7_000_000)]}
    bundle = add_fake_engine(engine_source, tmp_path / "bundle", details={"plan": plan})
    gpu.cuda.total_bytes = WEIGHT_BYTES + 7_000_000
    with pytest.raises(BackendUnavailableError, match=r"10\.0 MB are needed .*activations 7\.0 MB"):
        open_backend("tensorrt_rtx", bundle)
    assert gpu.cuda.used_bytes == 0
    gpu.cuda.total_bytes += 1_200_000
    open_backend("tensorrt_rtx", bundle).close()


def test_too_little_memory_for_a_context_is_said_before_it_is_made(
    engine_bundle: Bundle, gpu: FakeGpu
) -> None:
    gpu.cuda.total_bytes = WEIGHT_BYTES + ACTIVATION_BYTES + 500_000
    with pytest.raises(BackendUnavailableError, match=r"too little GPU memory: .*activations 1\.0"):
        open_backend("tensorrt_rtx", engine_bundle)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"aliases": {}}, "present.0.key shares the memory of None, expected past_key_values.0.k"),
        ({"inputs": []}, "it lacks .*input_ids"),
        ({"profiles": []}, "it has 0 profiles, expected 2"),
    ],
    ids=["aliases", "inputs", "profiles"],
)
def test_an_engine_that_is_not_what_its_manifest_says_is_refused(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu, changes: dict[str, Any], text: str
) -> None:
    bundle = add_fake_engine(engine_source, tmp_path / "bundle", **changes)
    with pytest.raises(ValueError, match=text) as error:
        open_backend("tensorrt_rtx", bundle)
    assert "is not what its manifest says" in str(error.value)
    assert gpu.cuda.ledger.live.get("engine", 0) <= 1  # the traceback may hold the last one


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("inputs", {"dtype": "float16"}, "past_key_values.0.key is HALF, expected float32"),
        (
            "inputs",
            {"shape": ["B", 2, 421, 32]},
            r"shape \(-1, 2, 421, 32\), expected \(-1, 2, 4",
        ),
        ("outputs", {}, "past_key_values.0.key is an output"),
    ],
    ids=["type", "shape", "direction"],
)
def test_a_cache_tensor_of_another_kind_is_refused(
    engine_source: Path,
    tmp_path: Path,
    gpu: FakeGpu,
    part: str,
    change: dict[str, Any],
    text: str,
) -> None:
    contract = Bundle.open(engine_source).contract
    specs = {"inputs": [s.as_dict() for s in contract.inputs], "outputs": [
        s.as_dict() for s in contract.outputs
    ]}  # fmt: skip
    (spec,) = (spec for spec in specs["inputs"] if spec["name"] == "past_key_values.0.key")
    specs["inputs"].remove(spec)
    specs[part].append({**spec, **change})
    bundle = add_fake_engine(engine_source, tmp_path / "bundle", **specs)
    with pytest.raises(ValueError, match=text):
        open_backend("tensorrt_rtx", bundle)


def test_profiles_that_differ_from_the_manifests_are_refused(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu
) -> None:
    probe = add_fake_engine(engine_source, tmp_path / "probe")
    profiles = [dict(p) for p in probe.variant("tensorrt_rtx").details["profiles"]]
    profiles[1] = {"name": "prefill", "inputs": {**profiles[1]["inputs"]}}
    profiles[1]["inputs"]["input_ids"] = [[1, 1], [1, 16], [3, 32]]
    bundle = add_fake_engine(engine_source, tmp_path / "bundle", profiles=profiles)
    with pytest.raises(ValueError, match=r"profile 1 of input_ids is .*32.*, expected .*64"):
        open_backend("tensorrt_rtx", bundle)


def test_an_engine_without_a_decode_profile_is_refused(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu
) -> None:
    probe = add_fake_engine(engine_source, tmp_path / "probe")
    profiles = [{**p, "name": "any"} for p in probe.variant("tensorrt_rtx").details["profiles"]]
    folder, details = tmp_path / "bundle", {"profiles": profiles}
    bundle = add_fake_engine(engine_source, folder, details=details)
    with pytest.raises(ValueError, match="has no profile 'decode', its manifest lists"):
        open_backend("tensorrt_rtx", bundle)


@pytest.mark.parametrize("product", PRODUCTS)
def test_whatever_call_of_opening_fails_is_named_and_nothing_is_left(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu, product: str
) -> None:
    bundle = add_fake_engine(engine_source, tmp_path / "bundle", backend=product)
    _open_and_close(product, bundle)
    names = [*gpu.cuda.calls]
    assert {"cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags"} <= {*names}
    # No GPU is another error (test_cuda_runtime.py), and what closing does comes below.
    for name in {*names} - {"cudaGetDeviceCount", *CLOSING}:
        gpu.cuda.failures[name] = Status.cudaErrorIllegalAddress
        with pytest.raises(RuntimeError, match=f"{name} .*cudaErrorIllegalAddress"):
            _open_and_close(product, bundle)
        assert name not in gpu.cuda.failures
        gc.collect()
        assert gpu.cuda.ledger.violations == []
        assert gpu.cuda.ledger.live == {}, name


def _open_and_close(product: str, bundle: Bundle) -> None:
    with closing(open_backend(product, bundle)) as backend:
        backend.new_cache(2)


@pytest.mark.parametrize("call", CLOSING)
def test_a_release_that_fails_keeps_nothing_else_from_being_released(
    engine_bundle: Bundle, gpu: FakeGpu, call: str
) -> None:
    backend = open_backend("tensorrt_rtx", engine_bundle)
    cache = backend.new_cache(2)
    prefill(backend, cache, [3], [4])
    gpu.cuda.failures[call] = Status.cudaErrorIllegalAddress
    if call == "cudaStreamSynchronize":
        backend.close()  # the stream has failed, and is as good as idle
    else:
        with pytest.raises(RuntimeError, match=f"{call} failed: cudaErrorIllegalAddress"):
            backend.close()
        (kind,) = gpu.cuda.ledger.live
        assert gpu.cuda.ledger.live == {kind: 1}, "the one whose release has failed"
        gpu.cuda.drop_leaked()


def test_no_runtime_configuration_is_an_error_that_says_so(
    engine_bundle: Bundle, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library._Engine, "create_runtime_config", lambda self: None)
    with pytest.raises(BackendUnavailableError, match="no runtime configuration could be made: "):
        open_backend("tensorrt_rtx", engine_bundle)


def test_a_library_that_captures_no_graphs_is_told_and_ours_are_used(
    engine_bundle: Bundle,
    gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    none = property(lambda self: CudaGraphStrategy.DISABLED, lambda self, wanted: None)
    monkeypatch.setattr(library._RtxConfig, "cuda_graph_strategy", none)
    with (
        caplog.at_level(logging.INFO, "runtime"),
        closing(open_backend("tensorrt_rtx", engine_bundle)) as backend,
    ):
        cache = backend.new_cache(1)
        for _ in range(4):
            prefill(backend, cache, [3])
    assert "tensorrt_rtx does not capture CUDA graphs here" in caplog.text
    assert gpu.cuda.calls["cudaGraphLaunch"] == 3


def test_kernels_of_a_shape_are_compiled_beside_the_run(
    engine_bundle: Bundle, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = "dynamic_shapes_kernel_specialization_strategy"
    monkeypatch.setattr(library._RtxConfig, option, Specialization.EAGER)
    with closing(open_backend("tensorrt_rtx", engine_bundle)) as backend:
        (engine,) = backend._engines  # type: ignore[attr-defined]
        assert getattr(engine._config, option) == Specialization.LAZY


def test_no_context_is_an_error_that_says_so_and_why(engine_bundle: Bundle, gpu: FakeGpu) -> None:
    gpu.trt.refuse.add("create_execution_context")
    with pytest.raises(BackendUnavailableError) as error:
        open_backend("tensorrt_rtx", engine_bundle)
    assert "no execution context could be made, which takes 1.0 MB of" in str(error.value)
    assert "createExecutionContext: out of device memory" in str(error.value)
