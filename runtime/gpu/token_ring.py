"""What steps leave for the host, read a few steps behind.

The host puts steps on a stream without waiting; each leaves a few bytes (the tokens that it chose)
in pinned memory of its own. They are read in order, and only the oldest is ever waited for.
"""

from __future__ import annotations

from collections import deque
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.gpu.device_memory import Event, PinnedBuffer, Stream

# Steps that are on the stream before the oldest one's tokens are read: the host's work of one step
# is hidden behind so many on the GPU. A text that ends has run so many steps too far.
LEAD = 3


class TokenRing:
    """Pinned memory for the results of `depth` steps that are on a stream at once.

    Attributes:
        depth: how many.
        slot_bytes: of one step's results.
    """

    def __init__(self, cuda: CudaRuntime, slot_bytes: int, depth: int = LEAD + 1) -> None:
        """Allocate it.

        Raises:
            BackendUnavailableError: the host has no memory for it.
        """
        self.depth, self.slot_bytes = depth, slot_bytes
        self._next = 0
        self._pending: deque[int] = deque()
        self._owned = ExitStack()
        try:
            self._memory = PinnedBuffer(cuda, "results of steps", depth * slot_bytes)
            self._owned.callback(self._memory.close)
            self._events = [self._event(cuda) for _ in range(depth)]
        except BaseException:
            self._owned.close()
            raise

    def _event(self, cuda: CudaRuntime) -> Event:
        event = Event(cuda)
        self._owned.callback(event.close)
        return event

    def __len__(self) -> int:
        """Steps whose results were not taken yet."""
        return len(self._pending)

    def put(self, stream: Stream, source: int, size: int, offset: int = 0) -> None:
        """Put a copy of a step's result on the stream, into the slot that `commit` closes.

        Args:
            stream: the step's.
            source: address of the result.
            size: in bytes.
            offset: bytes from the slot's begin.

        Raises:
            ValueError: more than a slot holds, or `depth` steps are on the stream already.
        """
        if offset + size > self.slot_bytes:
            raise ValueError(f"{offset} + {size} bytes of a slot of {self.slot_bytes}")
        if len(self._pending) >= self.depth:
            raise ValueError(f"{self.depth} steps are on the stream; take one first")
        stream.download(self._memory, source, size, self._next * self.slot_bytes + offset)

    def commit(self, stream: Stream) -> None:
        """Close the slot of a step, all of whose copies are on the stream."""
        self._events[self._next].record(stream)
        self._pending.append(self._next)
        self._next = (self._next + 1) % self.depth

    def take(self, offset: int, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """Wait for the oldest step and read a part of its results; `release` forgets them.

        Returns:
            The caller's own array.

        Raises:
            ValueError: no step is on the stream.
        """
        if not self._pending:
            raise ValueError("no step is on the stream")
        slot = self._pending[0]
        self._events[slot].wait()
        found: npt.NDArray[Any] = self._memory.view(slot * self.slot_bytes + offset, shape, dtype)
        return np.array(found)

    def release(self) -> None:
        """Let the oldest step's slot be used again."""
        self._pending.popleft()

    def forget(self) -> None:
        """Drop all results; the stream has come to its end."""
        self._pending.clear()

    def close(self) -> None:
        """Give the memory back; nothing on a stream may write to it any more."""
        self._pending.clear()
        self._owned.close()
