"""Named areas of one allocation."""

from __future__ import annotations

from collections.abc import Mapping

from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.gpu.device_memory import DeviceBuffer, aligned


class Arena:
    """Device memory cut into named areas, each at an address that suits every load.

    Attributes:
        sizes: bytes of each area.
    """

    def __init__(self, cuda: CudaRuntime, what: str, sizes: Mapping[str, int]) -> None:
        """Allocate; the content is whatever was there.

        Args:
            cuda: where.
            what: it is for, for messages.
            sizes: bytes of each area; an area of none has no address.

        Raises:
            BackendUnavailableError: too little memory.
        """
        self.sizes = dict(sizes)
        self._offsets: dict[str, int] = {}
        end = 0
        for name, size in self.sizes.items():
            self._offsets[name] = end
            end += aligned(size)
        self.buffer = DeviceBuffer(cuda, what, end)

    def address(self, name: str, offset: int = 0) -> int:
        """Where an area begins, or `offset` bytes behind.

        Raises:
            KeyError: no such area.
            ValueError: the offset is outside.
        """
        if not 0 <= offset < max(self.sizes[name], 1):
            raise ValueError(f"{name} has {self.sizes[name]} bytes, none at {offset}")
        return self.buffer.address + self._offsets[name] + offset

    def close(self) -> None:
        """Free it; nothing on a stream may use it any more."""
        self.buffer.close()


def arena_bytes(sizes: Mapping[str, int]) -> int:
    """What an arena of these areas takes."""
    return sum(aligned(size) for size in sizes.values())
