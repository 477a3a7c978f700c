"""Device memory, pinned host memory and a stream, each with one owner that gives it back.

Nothing here allocates unless its name says so, and whatever is closed stays closed: closing again
does nothing, using it is an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.base import BackendUnavailableError
from runtime.gpu.cuda_runtime import CudaRuntime, megabytes

# TensorRT takes addresses at multiples of this alone (IExecutionContext::setTensorAddress).
ADDRESS_ALIGNMENT = 256

Bytes = npt.NDArray[np.uint8]


def aligned(size: int) -> int:
    """`size` rounded up so that what follows is aligned."""
    return -(-size // ADDRESS_ALIGNMENT) * ADDRESS_ALIGNMENT


def as_bytes_size(shape: Sequence[int], item_size: int) -> int:
    """Bytes of an array of `shape` with items of `item_size` bytes."""
    return int(np.prod(shape, dtype=np.int64)) * item_size


class DeviceBuffer:
    """Device memory.

    Attributes:
        what: what it holds, for messages.
        size: in bytes.
    """

    def __init__(self, cuda: CudaRuntime, what: str, size: int) -> None:
        """Allocate it; its content is whatever was there.

        Raises:
            BackendUnavailableError: the GPU has no memory for it.
        """
        self.what, self.size = what, max(size, 1)
        self._cuda = cuda
        self._address: int | None = None
        self._address = int(_allocate(cuda, what, self.size, "cudaMalloc", self.size))

    @property
    def address(self) -> int:
        """Where it lies.

        Raises:
            ValueError: it was given back.
        """
        if self._address is None:
            raise ValueError(f"the memory for {self.what} was given back")
        return self._address

    def close(self) -> None:
        """Free it; nothing on a stream may use it any more."""
        if self._address is not None:
            address, self._address = self._address, None
            self._cuda.call("cudaFree", address)


class PinnedBuffer:
    """Page-locked host memory, which the GPU copies from and to beside the host's work.

    Attributes:
        what: what it holds, for messages.
        size: in bytes.
        address: where it lies.
    """

    def __init__(self, cuda: CudaRuntime, what: str, size: int) -> None:
        """Allocate it.

        Raises:
            BackendUnavailableError: the host has no memory for it.
        """
        self.what, self.size = what, max(size, 1)
        self._cuda = cuda
        self._bytes: Bytes | None = None
        flags = cuda.module.cudaHostAllocDefault
        self.address = int(_allocate(cuda, what, self.size, "cudaHostAlloc", self.size, flags))
        memory = (ctypes.c_uint8 * self.size).from_address(self.address)
        self._bytes = np.ctypeslib.as_array(memory)

    def view(self, offset: int, shape: Sequence[int], dtype: Any) -> npt.NDArray[Any]:
        """An array over a part of it; it must not be used when the buffer is closed.

        Raises:
            ValueError: the buffer was given back or is too small.
        """
        size = as_bytes_size(shape, np.dtype(dtype).itemsize)
        if self._bytes is None:
            raise ValueError(f"the pinned memory for {self.what} was given back")
        if offset + size > self.size:
            raise ValueError(f"{self.what}: {offset} + {size} bytes of {self.size}")
        array: npt.NDArray[Any] = self._bytes[offset : offset + size].view(dtype).reshape(shape)
        return array

    def close(self) -> None:
        """Free it; nothing on a stream may use it any more."""
        if self._bytes is not None:
            self._bytes = None
            self._cuda.call("cudaFreeHost", self.address)


class Stream:
    """A stream of its own, not the default one: work on it is done in order.

    Attributes:
        handle: an int, as TensorRT takes it.
    """

    def __init__(self, cuda: CudaRuntime) -> None:
        """Make one that does not wait for the default stream."""
        self._cuda = cuda
        self._stream: Any = None
        self._stream = cuda.call("cudaStreamCreateWithFlags", cuda.module.cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def upload(self, target: int, source: PinnedBuffer, size: int, offset: int = 0) -> None:
        """Copy pinned memory from a byte on; it must stay as it is until that is done."""
        kind = self._cuda.module.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(target, source.address + offset, size, kind)

    def download(self, target: PinnedBuffer, source: int, size: int, offset: int = 0) -> None:
        """Copy device memory to pinned memory from a byte on; it is there after `synchronize`."""
        kind = self._cuda.module.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(target.address + offset, source, size, kind)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy within device memory."""
        kind = self._cuda.module.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._copy(target, source, size, kind)

    def zero(self, buffer: DeviceBuffer) -> None:
        """Fill a buffer with zeros."""
        self._cuda.call("cudaMemsetAsync", buffer.address, 0, buffer.size, self._stream)

    def synchronize(self) -> None:
        """Wait until the stream has done all that was put on it."""
        self._cuda.call("cudaStreamSynchronize", self._stream)

    def wait(self) -> None:
        """Likewise before memory is given back: a stream that has failed is as good as idle."""
        if self._stream is not None:
            self._cuda.attempt("cudaStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], None]) -> CapturedGraph:
        """Record what `enqueue` puts on the stream instead of doing it.

        Raises:
            RuntimeError: something in it cannot be captured, or what `enqueue` raises; the stream
                is out of capture then.
        """
        mode = self._cuda.module.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda.call("cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except BaseException:
            _, graph = self._cuda.attempt("cudaStreamEndCapture", self._stream)
            if graph is not None and int(graph):
                self._cuda.call("cudaGraphDestroy", graph)
            raise
        graph = self._cuda.call("cudaStreamEndCapture", self._stream)
        try:
            runnable = self._cuda.call("cudaGraphInstantiate", graph, 0)
        finally:
            self._cuda.call("cudaGraphDestroy", graph)
        return CapturedGraph(self._cuda, runnable)

    def launch(self, graph: CapturedGraph) -> None:
        """Do what a graph recorded, with the addresses that it had."""
        self._cuda.call("cudaGraphLaunch", graph.handle, self._stream)

    def close(self) -> None:
        """Give it back, after it has done all that was put on it."""
        if self._stream is not None:
            self.wait()
            stream, self._stream = self._stream, None
            self._cuda.call("cudaStreamDestroy", stream)

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        self._cuda.call("cudaMemcpyAsync", target, source, size, kind, self._stream)


class Event:
    """A point on a stream that the host can wait for."""

    def __init__(self, cuda: CudaRuntime) -> None:
        """Make one that takes no times."""
        self._cuda = cuda
        self._event: Any = None
        flags = cuda.module.cudaEventDisableTiming
        self._event = cuda.call("cudaEventCreateWithFlags", flags)

    def record(self, stream: Stream) -> None:
        """Put it behind all that is on a stream now."""
        self._cuda.call("cudaEventRecord", self._event, stream.handle)

    def wait(self) -> None:
        """Wait until its stream has come to it."""
        self._cuda.call("cudaEventSynchronize", self._event)

    def close(self) -> None:
        """Give it back."""
        if self._event is not None:
            event, self._event = self._event, None
            self._cuda.call("cudaEventDestroy", event)


class CapturedGraph:
    """A CUDA graph that can be launched.

    Attributes:
        handle: of the executable graph.
    """

    def __init__(self, cuda: CudaRuntime, handle: Any) -> None:
        """Own an instantiated graph."""
        self._cuda = cuda
        self.handle: Any = handle

    def close(self) -> None:
        """Destroy it."""
        if self.handle is not None:
            handle, self.handle = self.handle, None
            self._cuda.call("cudaGraphExecDestroy", handle)


def _allocate(cuda: CudaRuntime, what: str, size: int, name: str, *arguments: Any) -> Any:
    status, address = cuda.attempt(name, *arguments)
    errors = cuda.module.cudaError_t
    if status == errors.cudaErrorMemoryAllocation:
        place = "GPU" if name == "cudaMalloc" else "page-locked host"
        raise BackendUnavailableError(
            f"too little {place} memory: {what} takes {megabytes(size)}, and "
            f"{megabytes(cuda.free_bytes())} of the GPU are free; end other programs, or build "
            "with a smaller --max-batch-size, --max-input-len or --max-seq-len"
        )
    if status != errors.cudaSuccess:
        raise RuntimeError(f"{name} for {what} failed: {status.name}")
    return address
