"""What a check of the GPU needs of a device; the CUDA driver's stands in `cuda_device.py`.

Nothing here knows PyTorch, and all of it can be played by host memory: tests do so and run the
kernels in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from plugins.launcher import Device, Launcher
from runtime.kernel_library import KernelLibrary

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What a device says about itself.

    Attributes:
        gpu: its name, compute capability and the CUDA version of its driver.
        kernel_module: what the driver's kernel module says of its version; None where it does not.
        multiprocessors: how many it has.
        memory_bytes: of the whole device.
        l2_bytes: of its last cache.
        clock_khz: of the multiprocessors at most.
        memory_clock_khz: at most; 0 where the driver does not tell.
        memory_bus_bits: width of the memory's bus.
    """

    gpu: Device
    kernel_module: str | None
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    clock_khz: int
    memory_clock_khz: int
    memory_bus_bits: int


class CheckDevice(Protocol):
    """Memory, one stream and its clock. Everything but `download` and `time` may return at once.

    Every method raises LaunchError with the driver's reason, also for what went wrong earlier on
    the stream.
    """

    @property
    def facts(self) -> DeviceFacts:
        """What the device says about itself."""

    @property
    def stream(self) -> int:
        """The stream that launches go to."""

    def open_launcher(self, library: KernelLibrary) -> Launcher:
        """Load a library's kernels.

        Raises:
            BackendUnavailableError: no code for this GPU, or its driver is too old.
            ValueError: a kernel is missing or altered.
        """

    def allocate(self, size: int) -> int:
        """Address of new memory, a multiple of 256; freed by `free` or `close`."""

    def free(self, address: int) -> None:
        """Give memory back once the stream has passed it; never raises."""

    def free_bytes(self) -> int:
        """Memory that could be allocated now."""

    def upload(self, address: int, content: npt.NDArray[Any]) -> None:
        """Copy a contiguous host array to the device."""

    def download(self, address: int, size: int) -> Bytes:
        """Copy device memory to the host once the stream has done all before it."""

    def fill(self, address: int, byte: int, size: int) -> None:
        """Set every byte of a piece of memory."""

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy within the device."""

    def time(self, enqueue: Callable[[], None], *, warmup: int, replays: int) -> list[float]:
        """Record what `enqueue` puts on the stream once, and time its repetition.

        Args:
            enqueue: launches, copies and fills; it may run once or many times, so it must not
                change what it does.
            warmup: repetitions before those that count.
            replays: repetitions that count, at least 1.

        Returns:
            Milliseconds of each repetition by the device's own clock, without gaps between them.
        """

    def answers(self) -> bool:
        """Whether the device still works; after a fault on the stream it does not."""

    def close(self) -> None:
        """Free everything; harmless when called again, and never raises."""
