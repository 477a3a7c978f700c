"""Areas of one allocation."""

from __future__ import annotations

import pytest

from runtime.backends.base import BackendUnavailableError
from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.gpu.device_memory import ADDRESS_ALIGNMENT
from runtime.kernel_step.arena import Arena, arena_bytes
from tests.fake_tensorrt.cuda import FakeCuda

SIZES = {"a": 3, "b": 0, "c": 600, "d": 256}


def test_areas_lie_apart_at_aligned_addresses_of_one_allocation():
    cuda = FakeCuda()
    arena = Arena(CudaRuntime(cuda), "a test", SIZES)
    assert cuda.calls["cudaMalloc"] == 1
    assert cuda.used_bytes == arena_bytes(SIZES) == 256 + 0 + 768 + 256
    begins = {name: arena.address(name) for name in SIZES}
    assert not any(begin % ADDRESS_ALIGNMENT for begin in begins.values())
    assert begins["c"] >= begins["a"] + 3
    assert begins["d"] >= begins["c"] + 600
    assert begins["d"] + 256 <= arena.buffer.address + arena.buffer.size
    assert arena.address("c", 100) == begins["c"] + 100
    arena.close()
    arena.close()
    assert (cuda.ledger.live, cuda.used_bytes) == ({}, 0)


def test_what_is_outside_has_no_address():
    arena = Arena(CudaRuntime(FakeCuda()), "a test", SIZES)
    with pytest.raises(ValueError, match="c has 600 bytes, none at 600"):
        arena.address("c", 600)
    with pytest.raises(KeyError):
        arena.address("e")
    arena.close()
    with pytest.raises(ValueError, match="the memory for a test was given back"):
        arena.address("a")


def test_too_little_memory_says_what_it_is_for():
    cuda = FakeCuda()
    cuda.total_bytes = 1000
    with pytest.raises(BackendUnavailableError, match="too little GPU memory: a test takes"):
        Arena(CudaRuntime(cuda), "a test", SIZES)
