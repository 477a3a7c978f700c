"""The small inputs of a step, side by side in one pinned and one device buffer: one copy a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from model.contract import DTYPE_BYTES, TensorSpec
from runtime.backends.base import Ids, Limits
from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.gpu.device_memory import DeviceBuffer, PinnedBuffer, Stream, aligned


@dataclass(frozen=True)
class PlacedTokens:
    """Where the inputs of a step of one shape lie.

    Attributes:
        shapes: of each input, in the contract's order.
        addresses: on the device.
        arrays: pinned arrays to write before the step, each of its shape.
        size: bytes to copy.
    """

    shapes: tuple[tuple[int, ...], ...]
    addresses: tuple[int, ...]
    arrays: tuple[Ids, ...]
    size: int


class TokenBlock:
    """`input_ids`, `position_ids`, `write_index` and `logits_index` of any step."""

    def __init__(self, cuda: CudaRuntime, specs: Sequence[TensorSpec], limits: Limits) -> None:
        """Allocate for the largest step.

        Raises:
            BackendUnavailableError: too little memory.
        """
        self._specs = tuple(specs)
        size = token_block_bytes(specs, limits)
        self.host = PinnedBuffer(cuda, "the tokens of a step, on their way", size)
        try:
            self.device = DeviceBuffer(cuda, "the tokens of a step", size)
        except BaseException:
            self.host.close()
            raise

    def place(self, batch: int, length: int, wanted: int) -> PlacedTokens:
        """Where the inputs lie of a step of `batch` rows, `length` tokens and `wanted` logits."""
        shapes = _shapes(self._specs, batch, length, wanted)
        addresses, arrays, offset = [], [], 0
        for spec, shape in zip(self._specs, shapes, strict=True):
            addresses.append(self.device.address + offset)
            arrays.append(self.host.view(offset, shape, spec.dtype))
            offset += aligned(prod(shape) * DTYPE_BYTES[spec.dtype])
        return PlacedTokens(shapes, tuple(addresses), tuple(arrays), offset)

    def upload(self, placed: PlacedTokens, stream: Stream) -> None:
        """Put the copy of a step's inputs on a stream."""
        stream.upload(self.device.address, self.host, placed.size)

    def close(self) -> None:
        """Free both buffers."""
        try:
            self.device.close()
        finally:
            self.host.close()


def token_block_bytes(specs: Sequence[TensorSpec], limits: Limits) -> int:
    """Bytes of a block for the largest step that `limits` allow."""
    longest = limits.max_input_len
    shapes = _shapes(specs, limits.max_batch_size, longest, longest)
    return sum(
        aligned(prod(shape) * DTYPE_BYTES[spec.dtype])
        for spec, shape in zip(specs, shapes, strict=True)
    )


def _shapes(
    specs: Sequence[TensorSpec], batch: int, length: int, wanted: int
) -> tuple[tuple[int, ...], ...]:
    sizes = {"B": batch, "S": length, "M": wanted}
    return tuple(
        tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
        for spec in specs
    )
