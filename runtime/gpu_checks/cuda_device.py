"""The current NVIDIA GPU through the CUDA driver. **Never executed yet** on a real one.

What stands in for the driver in tests keeps host memory and runs no kernels: it shows that the
calls are those of the bindings, not what a GPU makes of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from plugins.launcher import CudaLauncher, LaunchError, current_device, open_driver
from runtime.gpu_checks.device import Bytes, DeviceFacts
from runtime.kernel_library import KernelLibrary

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


class CudaDevice:
    """Memory, a stream of its own, and events on it; see `CheckDevice`.

    Attributes:
        facts: what the GPU says about itself.
        stream: its stream.
    """

    def __init__(self, driver: Any) -> None:
        """Take the current device of `driver`, which is `cuda.bindings.driver`."""
        self._driver = driver
        self._memory: dict[int, Any] = {}
        self.facts = self._facts()
        self._stream = self._call("cuStreamCreate", 0)
        self.stream = int(self._stream)

    @classmethod
    def open(cls) -> Self:
        """The current device, else the first.

        Raises:
            LaunchError: cuda-python, the driver or a GPU is missing.
        """
        return cls(open_driver())

    def open_launcher(self, library: KernelLibrary) -> CudaLauncher:
        """Load a library's kernels; see `CheckDevice.open_launcher`."""
        return CudaLauncher(self._driver, library.binaries_for(self.facts.gpu))

    def allocate(self, size: int) -> int:
        """Address of new memory; the driver aligns it to 256 bytes and more."""
        memory = self._call("cuMemAlloc", max(size, 1))
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        """Give memory back; the driver waits for what uses it."""
        self._driver.cuMemFree(self._memory.pop(address))

    def free_bytes(self) -> int:
        """Memory that could be allocated now."""
        status, free, _ = self._driver.cuMemGetInfo()
        self._expect(status, "cuMemGetInfo")
        return int(free)

    def upload(self, address: int, content: npt.NDArray[Any]) -> None:
        """Copy a contiguous host array to the device."""
        if content.nbytes:
            self._call(
                "cuMemcpyHtoDAsync", address, content.ctypes.data, content.nbytes, self._stream
            )
            self._wait()  # the caller may change or drop the array

    def download(self, address: int, size: int) -> Bytes:
        """Copy device memory to the host once the stream has done all before it."""
        content = np.empty(size, np.uint8)
        if size:
            self._call("cuMemcpyDtoHAsync", content.ctypes.data, address, size, self._stream)
        self._wait()  # the caller reads the array
        return content

    def fill(self, address: int, byte: int, size: int) -> None:
        """Set every byte of a piece of memory."""
        if size:
            self._call("cuMemsetD8Async", address, byte, size, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy within the device."""
        if size:
            self._call("cuMemcpyDtoDAsync", target, source, size, self._stream)

    def time(self, enqueue: Callable[[], None], *, warmup: int, replays: int) -> list[float]:
        """Capture a graph, replay it, and read the events around each replay.

        All replays are put on the stream before the first event is waited for, so the GPU has work
        at hand and its clock sees no gaps that Python makes.
        """
        graph = self._capture(enqueue)
        events: list[Any] = []
        try:
            events += [self._call("cuEventCreate", 0) for _ in range(2 * replays)]
            for _ in range(warmup):
                self._call("cuGraphLaunch", graph, self._stream)
            for begin, end in zip(events[::2], events[1::2], strict=True):
                self._call("cuEventRecord", begin, self._stream)
                self._call("cuGraphLaunch", graph, self._stream)
                self._call("cuEventRecord", end, self._stream)
            self._wait()  # times can be read once both events have passed
            return [
                float(self._call("cuEventElapsedTime", begin, end))
                for begin, end in zip(events[::2], events[1::2], strict=True)
            ]
        finally:
            for event in events:
                self._driver.cuEventDestroy(event)
            self._driver.cuGraphExecDestroy(graph)

    def answers(self) -> bool:
        """Whether the device still works."""
        try:
            self._wait()
        except LaunchError:
            return False
        return True

    def close(self) -> None:
        """Free everything; harmless when called again, and never raises."""
        while self._memory:
            self._driver.cuMemFree(self._memory.popitem()[1])
        if self.stream:
            self._driver.cuStreamDestroy(self._stream)
            self.stream = 0

    def _capture(self, enqueue: Callable[[], None]) -> Any:
        """An executable graph of what `enqueue` puts on the stream."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except BaseException:
            with suppress(LaunchError):  # the first error says more, but the capture must end
                self._driver.cuGraphDestroy(self._call("cuStreamEndCapture", self._stream))
            raise
        captured = self._call("cuStreamEndCapture", self._stream)
        try:
            return self._call("cuGraphInstantiate", captured, 0)
        finally:
            self._driver.cuGraphDestroy(captured)

    def _wait(self) -> None:
        self._call("cuStreamSynchronize", self._stream)

    def _facts(self) -> DeviceFacts:
        kinds = self._driver.CUdevice_attribute
        device = self._call("cuCtxGetDevice")

        def attribute(name: str) -> int:
            kind = getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(self._call("cuDeviceGetAttribute", kind, device))

        return DeviceFacts(
            gpu=current_device(self._driver),
            kernel_module=kernel_module_version(),
            multiprocessors=attribute("MULTIPROCESSOR_COUNT"),
            memory_bytes=int(self._call("cuDeviceTotalMem", device)),
            l2_bytes=attribute("L2_CACHE_SIZE"),
            clock_khz=attribute("CLOCK_RATE"),
            memory_clock_khz=attribute("MEMORY_CLOCK_RATE"),
            memory_bus_bits=attribute("GLOBAL_MEMORY_BUS_WIDTH"),
        )

    def _call(self, function: str, *arguments: Any) -> Any:
        status, *values = getattr(self._driver, function)(*arguments)
        self._expect(status, function)
        return values[0] if values else None

    def _expect(self, status: Any, function: str) -> None:
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise LaunchError(f"{function} failed with {status.name}")


def kernel_module_version(file: Path = _KERNEL_MODULE) -> str | None:
    """Version of NVIDIA's kernel module, such as 580.82.07; None where it does not say."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None
