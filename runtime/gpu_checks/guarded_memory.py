"""The arrays of one launch in one buffer, so that what a kernel should not write shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from runtime.gpu_checks.device import Bytes, CheckDevice
from runtime.gpu_checks.number_formats import Array

# A byte of which every float type makes NaN.
POISON = 0xFF
# Bytes in front of every array and behind the last, a multiple of any alignment that a kernel
# asks for.
GUARD = 256


class GuardedMemory:
    """Arrays between guards; whatever is not given is poison.

    Attributes:
        addresses: where each array lies on the device.
    """

    def __init__(
        self,
        device: CheckDevice,
        given: Mapping[str, Array],
        poisoned: Mapping[str, int],
        zeroed: Mapping[str, int],
    ) -> None:
        """Lay out the arrays; their content comes by `reset`.

        Args:
            device: where they lie.
            given: arrays with content.
            poisoned: bytes of arrays that hold poison.
            zeroed: bytes of arrays that hold zeros.
        """
        sizes = {name: array.nbytes for name, array in given.items()} | dict(poisoned)
        self._places: dict[str, slice] = {}
        end = 0
        for name, size in (sizes | dict(zeroed)).items():
            start = end + GUARD
            self._places[name] = slice(start, start + size)
            end = -(-(start + size) // GUARD) * GUARD
        self._image = np.full(end + GUARD, POISON, np.uint8)
        for name, array in given.items():
            self._image[self._places[name]] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for name in zeroed:
            self._image[self._places[name]] = 0
        self._device = device
        self._base = device.allocate(self._image.size)
        self.addresses = {name: self._base + place.start for name, place in self._places.items()}

    def reset(self) -> None:
        """Give every array its first content again."""
        self._device.upload(self._base, self._image)

    def read(self) -> Snapshot:
        """What is on the device now."""
        return Snapshot(self._places, self._image, self._device.download(self._base, self.size))

    @property
    def size(self) -> int:
        """Bytes of all arrays and guards."""
        return int(self._image.size)

    def close(self) -> None:
        """Free the buffer."""
        self._device.free(self._base)


class Snapshot:
    """The bytes of a `GuardedMemory` after a launch."""

    def __init__(self, places: Mapping[str, slice], before: Bytes, after: Bytes) -> None:
        """Compare `after` with `before`, both with the arrays at `places`."""
        self._places = places
        self._before = before
        self._after = after

    def bytes_of(self, name: str) -> Bytes:
        """The array's bytes."""
        return self._after[self._places[name]]

    def changed(self, name: str) -> bool:
        """Whether the array has other bytes than before."""
        place = self._places[name]
        return not np.array_equal(self._before[place], self._after[place])

    def broken_guards(self) -> list[str]:
        """Where something was written beside the arrays: `in front of NAME`, `behind NAME`."""
        broken = []
        end, last = 0, ""
        for name, place in self._places.items():
            if (self._after[end : place.start] != POISON).any():
                broken.append(f"between {last} and {name}" if last else f"in front of {name}")
            end, last = place.stop, name
        if (self._after[end:] != POISON).any():
            broken.append(f"behind {last}")
        return broken


@contextmanager
def guarded_memory(
    device: CheckDevice,
    given: Mapping[str, Array],
    poisoned: Mapping[str, int],
    zeroed: Mapping[str, int],
) -> Iterator[GuardedMemory]:
    """A `GuardedMemory` that is freed at the end."""
    memory = GuardedMemory(device, given, poisoned, zeroed)
    try:
        yield memory
    finally:
        memory.close()
