"""Results of steps are read in order, a few steps behind."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.gpu.device_memory import DeviceBuffer, PinnedBuffer, Stream
from runtime.gpu.token_ring import TokenRing
from tests.fake_tensorrt.cuda import PATTERN, FakeCuda


class Steps:
    """Steps that each leave two numbers on a fake device."""

    def __init__(self) -> None:
        self.cuda = FakeCuda()
        runtime = CudaRuntime(self.cuda)
        self.stream = Stream(runtime)
        self.device = DeviceBuffer(runtime, "numbers", 16)
        self.ring = TokenRing(runtime, 16, depth=3)
        self._host = [PinnedBuffer(runtime, "a step", 16) for _ in range(8)]

    def run(self, number: int) -> None:
        host = self._host[number]
        host.view(0, (2,), np.int64)[:] = number, -number
        self.stream.upload(self.device.address, host, 16)
        self.ring.put(self.stream, self.device.address, 8)
        self.ring.put(self.stream, self.device.address + 8, 8, offset=8)
        self.ring.commit(self.stream)

    def take(self) -> tuple[int, int]:
        first = self.ring.take(0, (1,), np.int64)
        second = self.ring.take(8, (1,), np.int64)
        self.ring.release()
        return int(first[0]), int(second[0])

    def close(self) -> None:
        self.stream.wait()
        self.ring.close()
        self.ring.close()
        for buffer in (self.device, *self._host):
            buffer.close()
        self.stream.close()


def test_results_come_in_order_and_only_the_oldest_is_waited_for():
    steps = Steps()
    for number in range(3):
        steps.run(number)
    assert len(steps.ring) == 3
    assert steps.take() == (0, 0)
    assert len(steps.cuda.streams[steps.stream.handle].pending) == 6  # two steps, three things each
    steps.run(3)
    assert [steps.take() for _ in range(3)] == [(1, -1), (2, -2), (3, -3)]
    assert len(steps.ring) == 0
    assert "cudaStreamSynchronize" not in steps.cuda.calls
    steps.close()
    assert (steps.cuda.ledger.violations, steps.cuda.ledger.live) == ([], {})


def test_a_taken_array_is_the_callers_own():
    steps = Steps()
    steps.run(1)
    taken = steps.ring.take(0, (2,), np.int64)
    steps.ring.release()
    for number in (2, 3, 4):
        steps.run(number)
        steps.take()
    assert taken.tolist() == [1, -1]


def test_a_slot_is_used_again_only_when_its_step_was_taken():
    steps = Steps()
    for number in range(3):
        steps.run(number)
    with pytest.raises(ValueError, match="3 steps are on the stream; take one first"):
        steps.run(3)
    with pytest.raises(ValueError, match=r"8 \+ 16 bytes of a slot of 16"):
        steps.ring.put(steps.stream, steps.device.address, 16, offset=8)
    steps.ring.forget()
    assert len(steps.ring) == 0
    with pytest.raises(ValueError, match="no step is on the stream"):
        steps.take()


def test_nothing_is_there_before_it_is_waited_for():
    steps = Steps()
    steps.run(5)
    memory = steps.ring._memory.view(0, (8,), np.uint8)
    assert (memory == PATTERN).all()
    assert steps.take() == (5, -5)
