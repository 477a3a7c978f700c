"""Buffers and streams: one owner, one release, and words for what fails."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from runtime.backends.base import BackendUnavailableError
from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.gpu.device_memory import (
    ADDRESS_ALIGNMENT,
    DeviceBuffer,
    PinnedBuffer,
    Stream,
    aligned,
)
from tests.fake_tensorrt.cuda import FakeCuda, Status


@pytest.fixture
def cuda() -> Iterator[CudaRuntime]:
    fake = FakeCuda()
    yield CudaRuntime(fake)
    assert fake.ledger.live == {}
    assert fake.ledger.violations == []


def test_a_copy_there_and_back_gives_what_was_written(cuda: CudaRuntime) -> None:
    stream, buffer = Stream(cuda), DeviceBuffer(cuda, "numbers", 80)
    there, back = (PinnedBuffer(cuda, f"numbers, {way}", 80) for way in ("there", "back"))
    there.view(0, (2, 5), np.int64)[:] = np.arange(10).reshape(2, 5)
    stream.upload(buffer.address, there, 80)
    stream.download(back, buffer.address, 80)
    stream.synchronize()
    assert back.view(16, (8,), np.int64).tolist() == [*range(2, 10)]
    for owned in (there, back, buffer, stream):
        owned.close()
        owned.close()


def test_what_was_given_back_cannot_be_used(cuda: CudaRuntime) -> None:
    buffer, pinned = DeviceBuffer(cuda, "the cache", 8), PinnedBuffer(cuda, "the tokens", 8)
    with pytest.raises(ValueError, match=r"the tokens: 4 \+ 8 bytes of 8"):
        pinned.view(4, (1,), np.int64)
    buffer.close()
    pinned.close()
    with pytest.raises(ValueError, match="the memory for the cache was given back"):
        _ = buffer.address
    with pytest.raises(ValueError, match="the pinned memory for the tokens was given back"):
        pinned.view(0, (1,), np.int64)


@pytest.mark.parametrize(
    ("call", "make", "text"),
    [
        ("cudaMalloc", DeviceBuffer, "too little GPU memory: the cache takes 5.0 MB, and 24,000.0"),
        ("cudaHostAlloc", PinnedBuffer, "too little page-locked host memory: the cache takes 5.0"),
    ],
)
def test_memory_that_is_not_there_is_told_with_its_use(
    cuda: CudaRuntime, call: str, make: type[DeviceBuffer | PinnedBuffer], text: str
) -> None:
    cuda.module.failures[call] = Status.cudaErrorMemoryAllocation
    with pytest.raises(BackendUnavailableError, match=text):
        make(cuda, "the cache", 5_000_000)
    cuda.module.failures[call] = Status.cudaErrorIllegalAddress
    with pytest.raises(RuntimeError, match=f"{call} for the cache failed: cudaErrorIllegalAddress"):
        make(cuda, "the cache", 5_000_000)


def test_a_capture_does_nothing_until_it_is_launched(cuda: CudaRuntime) -> None:
    stream, buffer = Stream(cuda), DeviceBuffer(cuda, "numbers", 8)
    pinned = PinnedBuffer(cuda, "numbers", 8)
    graph = stream.capture(lambda: stream.zero(buffer))
    for expected in (False, True):
        stream.download(pinned, buffer.address, 8)
        stream.synchronize()
        assert (pinned.view(0, (1,), np.int64)[0] == 0) == expected
        stream.launch(graph)
    for owned in (stream, graph, buffer, pinned):
        owned.close()
        owned.close()


def test_a_capture_that_fails_leaves_the_stream_out_of_capture(cuda: CudaRuntime) -> None:
    stream = Stream(cuda)

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream.capture(fail)
    stream.synchronize()
    cuda.module.failures["cudaGraphInstantiate"] = Status.cudaErrorInvalidValue
    with pytest.raises(RuntimeError, match="cudaGraphInstantiate failed"):
        stream.capture(lambda: None)
    stream.close()


def test_sizes_are_rounded_up_to_what_tensorrt_takes() -> None:
    assert [aligned(n) for n in (0, 1, 256, 257)] == [0, 256, 256, 512]
    assert ADDRESS_ALIGNMENT == 256
