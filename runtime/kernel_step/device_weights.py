"""A model's packed weights on the device."""

from __future__ import annotations

import numpy as np

from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.gpu.device_memory import DeviceBuffer, PinnedBuffer, Stream
from runtime.kernel_step.packed_weights import PackedWeights

_PIECE = 32 << 20  # bytes on their way at once


class DeviceWeights:
    """A copy of every stored tensor, in one allocation.

    Attributes:
        size: in bytes.
    """

    def __init__(self, cuda: CudaRuntime, weights: PackedWeights) -> None:
        """Allocate, and copy.

        Raises:
            BackendUnavailableError: too little memory; says how much is needed.
        """
        self.size = weights.size
        self._offsets = weights.offsets
        self._buffer = DeviceBuffer(cuda, "weights", weights.size)
        try:
            self._upload(cuda, weights)
        except BaseException:
            self._buffer.close()
            raise

    def address(self, name: str) -> int:
        """Of a stored tensor; 0 for one that the model does not have."""
        offset = self._offsets.get(name)
        return 0 if offset is None else self._buffer.address + offset

    def close(self) -> None:
        """Free them; no lane may use them any more."""
        self._buffer.close()

    def _upload(self, cuda: CudaRuntime, weights: PackedWeights) -> None:
        stream = Stream(cuda)
        piece = PinnedBuffer(cuda, "weights on their way", min(_PIECE, weights.size))
        try:
            for name, array in weights.arrays():
                content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                for begin in range(0, content.size, piece.size):
                    part = content[begin : begin + piece.size]
                    piece.view(0, part.shape, np.uint8)[:] = part
                    stream.upload(self.address(name) + begin, piece, part.size)
                    stream.synchronize()  # the next piece goes through the same memory
        finally:
            stream.close()
            piece.close()
