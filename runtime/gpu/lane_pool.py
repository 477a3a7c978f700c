"""The lanes of a backend: each serves one batch at a time, and the next one after it.

Making a lane takes memory and time (its buffers, and its first steps compile or capture), so a lane
whose batch has ended is kept until the backend is closed, or until its memory is wanted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Generic, Protocol, TypeVar

from runtime.backends.base import BackendUnavailableError


class Lane(Protocol):
    """What one batch runs on.

    Attributes:
        rows: sequences of the batch.
    """

    rows: int

    @property
    def usable(self) -> bool:
        """Whether another batch can begin on it."""

    def begin(self, rows: int) -> None:
        """Begin a batch of `rows` sequences with a zeroed cache.

        Raises:
            BackendUnavailableError: too little memory for the cache.
        """

    def close(self) -> None:
        """Release everything; harmless when called again."""


AnyLane = TypeVar("AnyLane", bound=Lane)


class LanePool(Generic[AnyLane]):
    """Owns the lanes of a backend and closes them before what they run on."""

    def __init__(
        self,
        make: Callable[[int], AnyLane],
        *,
        first: Sequence[Callable[[], object]] = (),
        last: Sequence[Callable[[], object]] = (),
    ) -> None:
        """Own no lane yet.

        Args:
            make: a lane that has room for a batch of so many sequences.
            first: what closing does before any lane is closed.
            last: what it does behind; all is done whatever becomes of the rest.
        """
        self._make, self._first, self._last = make, tuple(first), tuple(last)
        self._all: list[AnyLane] = []
        self._idle: list[AnyLane] = []
        self._closed = False
        # Reentrant: a cache that is collected gives its lane back wherever Python collects it.
        self._lock = threading.RLock()

    def add(self) -> None:
        """Make a lane before any batch wants it.

        Raises:
            BackendUnavailableError: too little memory, or no context.
        """
        with self._lock:
            self._idle.append(self._new(1))

    def take(self, rows: int) -> AnyLane:
        """A lane on which a batch of `rows` has begun, its cache zero.

        Raises:
            BackendUnavailableError: too little memory, or no context.
            ValueError: the backend is closed.
        """
        with self._lock:
            self.check_open()
            try:
                return self._begin(rows)
            except BackendUnavailableError:
                if not self._idle:
                    raise
                self._close_idle()  # their memory may be what is missing
                return self._begin(rows)

    def give_back(self, lane: AnyLane) -> None:
        """Keep a lane for the next batch; one of which a step has failed is given up."""
        with self._lock:
            if not self.owns(lane):
                return  # closed with the backend
            if lane.usable:
                self._idle.append(lane)
            else:
                self._discard(lane)

    def owns(self, lane: AnyLane) -> bool:
        """Whether a lane is of this pool, and open."""
        return any(lane is own for own in self._all)

    def check_open(self) -> None:
        """Make sure that the backend is open.

        Raises:
            ValueError: it is closed.
        """
        if self._closed:
            raise ValueError("this backend is closed; open another")

    def close(self) -> None:
        """Release every lane, between what comes first and last; for one caller, once."""
        with self._lock:
            self._closed = True
            lanes, self._all = self._all, []
            self._idle.clear()
        # Not under the lock: a lane waits for its step, and that thread may want to give back one.
        with ExitStack() as stack:  # the last is done first
            for act in (*reversed(self._last), *(lane.close for lane in lanes)):
                stack.callback(act)
            for act in reversed(self._first):
                stack.callback(act)

    def _begin(self, rows: int) -> AnyLane:
        lane = self._choose(rows)
        try:
            lane.begin(rows)
        except BackendUnavailableError:
            self.give_back(lane)
            raise
        except BaseException:
            self._discard(lane)
            raise
        return lane

    def _choose(self, rows: int) -> AnyLane:
        """An idle lane, one that has a cache of `rows` already before any other; else a new one."""
        for lane in sorted(self._idle, key=lambda idle: idle.rows != rows):
            self._idle.remove(lane)
            return lane
        return self._new(rows)

    def _new(self, rows: int) -> AnyLane:
        lane = self._make(rows)
        self._all.append(lane)
        return lane

    def _close_idle(self) -> None:
        for lane in tuple(self._idle):
            self._idle.remove(lane)
            self._discard(lane)

    def _discard(self, lane: AnyLane) -> None:
        self._all = [own for own in self._all if own is not lane]
        lane.close()
