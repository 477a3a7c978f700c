"""The cache tensors of one batch in device memory, and where those of one of its rows lie."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod

from model.contract import DTYPE_BYTES, TensorSpec
from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.gpu.device_memory import ADDRESS_ALIGNMENT, DeviceBuffer, Stream


@dataclass(frozen=True)
class PlacedCache:
    """Where a step finds the cache of all rows, or of one.

    Attributes:
        addresses: of each tensor, in the contract's order; the step reads and writes there.
        copies: (address in the cache, address in the step, bytes) of tensors whose row does not
            begin at an address that TensorRT takes: copied there before the step, back behind it.
    """

    addresses: tuple[int, ...]
    copies: tuple[tuple[int, int, int], ...] = ()

    def fetch(self, stream: Stream) -> None:
        """Put on the stream what comes before the step."""
        for cache, step, size in self.copies:
            stream.copy(step, cache, size)

    def store(self, stream: Stream) -> None:
        """Put on the stream what comes behind the step."""
        for cache, step, size in self.copies:
            stream.copy(cache, step, size)


class CacheMemory:
    """Buffers of `rows` sequences, one a cache tensor; past and present are the same memory."""

    def __init__(self, cuda: CudaRuntime, specs: Sequence[TensorSpec], rows: int) -> None:
        """Allocate; the content is whatever was there.

        Raises:
            BackendUnavailableError: too little memory.
        """
        self._row_bytes = [row_bytes(spec) for spec in specs]
        self._owned = ExitStack()
        self._buffers: list[DeviceBuffer] = []
        # By the tensor's number, for those of which a row alone may not begin at its address.
        self._one_row: dict[int, DeviceBuffer] = {}
        try:
            for number, (spec, size) in enumerate(zip(specs, self._row_bytes, strict=True)):
                self._buffers.append(self._own(DeviceBuffer(cuda, spec.name, rows * size)))
                if rows > 1 and size % ADDRESS_ALIGNMENT:
                    buffer = DeviceBuffer(cuda, f"one row of {spec.name}", size)
                    self._one_row[number] = self._own(buffer)
        except BaseException:
            self.close()
            raise

    def zero(self, stream: Stream) -> None:
        """Put zeroing on a stream."""
        for buffer in self._buffers:
            stream.zero(buffer)

    def place(self, row: int | None) -> PlacedCache:
        """Where all rows lie (None), or one."""
        if row is None:
            return PlacedCache(tuple(buffer.address for buffer in self._buffers))
        addresses, copies = [], []
        for number, (buffer, size) in enumerate(zip(self._buffers, self._row_bytes, strict=True)):
            address = buffer.address + row * size
            if address % ADDRESS_ALIGNMENT:
                copies.append((address, self._one_row[number].address, size))
                address = self._one_row[number].address
            addresses.append(address)
        return PlacedCache(tuple(addresses), tuple(copies))

    def close(self) -> None:
        """Free every buffer; nothing on a stream may use them any more."""
        self._buffers.clear()
        self._one_row.clear()
        self._owned.close()

    def _own(self, buffer: DeviceBuffer) -> DeviceBuffer:
        self._owned.callback(buffer.close)
        return buffer


def row_bytes(spec: TensorSpec) -> int:
    """Bytes of one sequence's part of a cache tensor."""
    sizes = [size for size in spec.shape if isinstance(size, int)]
    return prod(sizes) * DTYPE_BYTES[spec.dtype]


def cache_bytes(specs: Sequence[TensorSpec], rows: int) -> int:
    """Bytes that `CacheMemory` takes of the device."""
    sizes = [row_bytes(spec) for spec in specs]
    misaligned = sum(size for size in sizes if size % ADDRESS_ALIGNMENT) if rows > 1 else 0
    return rows * sum(sizes) + misaligned
