"""Host memory in place of a GPU, with kernels in Triton's interpreter: sections run on it whole."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from plugins.kernel_spec import Launch
from plugins.launcher import Device, LaunchError
from runtime.gpu_checks.device import DeviceFacts
from runtime.kernel_library import KernelLibrary
from tests.interpreter import InterpreterLauncher

ALIGNMENT = 256
FACTS = DeviceFacts(
    gpu=Device(name="Host GPU 1", compute_capability=(8, 9), driver_version=(13, 0)),
    kernel_module="580.1",
    multiprocessors=2,
    memory_bytes=1 << 30,
    l2_bytes=0,
    clock_khz=1_000_000,
    memory_clock_khz=10_000_000,
    memory_bus_bits=64,
)
# What is done to a launch's memory after it: (launch, device) -> None.
Mischief = Callable[[Launch, "HostDevice"], None]


class HostDevice:
    """Addresses are those of numpy arrays; everything happens at once.

    `lost` makes it behave like a GPU after a fault. `l2_bytes` decides how many sets of inputs are
    made for timings.
    """

    stream = 0

    def __init__(self, *, l2_bytes: int = 0, mischief: Mischief | None = None) -> None:
        self.facts = replace(FACTS, l2_bytes=l2_bytes)
        self.mischief = mischief
        self.lost = False
        self.launched: list[Launch] = []
        self._memory: dict[int, np.ndarray] = {}

    def open_launcher(self, library: KernelLibrary) -> HostLauncher:
        specs = [spec for use in library.uses for spec in use.make_kernels().specs]
        return HostLauncher(self, InterpreterLauncher(specs))

    def allocate(self, size: int) -> int:
        self._check()
        memory = np.full(size + ALIGNMENT, 0xAB, np.uint8)
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._memory[address] = memory
        return address

    def free(self, address: int) -> None:
        del self._memory[address]

    def free_bytes(self) -> int:
        return 64 << 20

    def upload(self, address: int, content: np.ndarray) -> None:
        self._check()
        at(address, content.nbytes)[:] = content.reshape(-1).view(np.uint8)

    def download(self, address: int, size: int) -> np.ndarray:
        self._check()
        return at(address, size).copy()

    def fill(self, address: int, byte: int, size: int) -> None:
        self._check()
        at(address, size)[:] = byte

    def copy(self, target: int, source: int, size: int) -> None:
        self._check()
        at(target, size)[:] = at(source, size)

    def time(self, enqueue: Callable[[], None], *, warmup: int, replays: int) -> list[float]:
        for _ in range(warmup):
            enqueue()
        times = []
        for _ in range(replays):
            begin = time.perf_counter()
            enqueue()
            times.append(1e3 * (time.perf_counter() - begin))
        return times

    def answers(self) -> bool:
        return not self.lost

    def close(self) -> None:
        self._memory.clear()

    @property
    def allocated(self) -> int:
        """How many pieces of memory were not freed."""
        return len(self._memory)

    def _check(self) -> None:
        if self.lost:
            raise LaunchError("the call failed with CUDA_ERROR_ILLEGAL_ADDRESS")


class HostLauncher:
    """Interprets launches, and does mischief after each where the device says so."""

    def __init__(self, device: HostDevice, interpreter: InterpreterLauncher) -> None:
        self._device = device
        self._interpreter = interpreter

    def launch(self, launch: Launch, stream: int) -> None:
        self._interpreter.launch(launch, stream)
        self._device.launched.append(launch)
        if self._device.mischief is not None:
            self._device.mischief(launch, self._device)

    def zeros(self, count: int) -> int:
        address = self._device.allocate(4 * count)
        self._device.fill(address, 0, 4 * count)
        return address

    def close(self) -> None:
        pass


def at(address: int, size: int) -> np.ndarray:
    """The bytes at an address of this process."""
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
