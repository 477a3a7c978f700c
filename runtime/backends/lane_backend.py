"""What backends that run on lanes of a GPU share: their caches, and how everything is released."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Self

import numpy as np

from runtime.backends.base import Backend, Cache
from runtime.gpu.copy_speed import copy_bytes_per_s
from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.gpu.lane_pool import AnyLane, LanePool

if TYPE_CHECKING:
    from types import TracebackType


@dataclass(kw_only=True)
class LaneCache(Cache, Generic[AnyLane]):
    """The sequences of one batch on a lane, which is this batch's alone.

    When the cache is closed, or nothing refers to it any more, its lane serves another batch.

    Attributes:
        lane: a stream, and the memory of steps and cache; None once the cache is closed.
    """

    lane: AnyLane | None = field(repr=False)
    _give_back: Callable[[], object] = field(init=False, repr=False, default=lambda: None)

    def close(self) -> None:
        """Let another batch have the lane; harmless when called again."""
        self.lane = None
        self._give_back()


class LaneBackend(Backend, Generic[AnyLane]):
    """A backend whose batches run on lanes; a subclass makes the pool of them."""

    def __init__(self, cuda: CudaRuntime) -> None:
        """Note how much memory is free before anything is taken."""
        self._cuda, self._free_before = cuda, cuda.free_bytes()

    def _own(self, lanes: LanePool[AnyLane]) -> None:
        """Give caches lanes of this pool from now on, and close it with the backend."""
        self._lanes = lanes
        # Also where nobody closes the backend, but for the end of the process: the driver takes
        # everything then, and half of Python is gone.
        self._close = weakref.finalize(self, lanes.close)
        self._close.atexit = False

    def device_facts(self) -> dict[str, Any]:
        """What a benchmark tells of the GPU, JSON-ready; memory is what is taken now, in MiB."""
        speed = copy_bytes_per_s(self._cuda)
        return {
            "gpu": str(self._cuda.gpu()),
            "runtime_cache": "none",
            "memory_mb": mebibytes(self._free_before - self._cuda.free_bytes()),
            "copy_gb_per_s": None if speed is None else round(speed / 1e9, 3),
        }

    def new_cache(self, batch_size: int, capacity: int | None = None) -> LaneCache[AnyLane]:
        """Zeroed cache; its buffers always have `max_seq_len` slots.

        Raises:
            BackendUnavailableError: too little memory; says how much is needed.
            ValueError: as in the base class, or the backend is closed.
        """
        slots = self.check_cache_size(batch_size, capacity)
        lane = self._lanes.take(batch_size)
        cache = LaneCache(capacity=slots, lengths=np.zeros(batch_size, np.int64), lane=lane)
        give_back = weakref.finalize(cache, self._lanes.give_back, lane)
        give_back.atexit = False
        cache._give_back = give_back
        return cache

    def close(self) -> None:
        """Free every lane and what lanes run on; harmless when called again."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _lane_of(self, cache: Cache) -> AnyLane:
        """The lane of a cache of this backend.

        Raises:
            TypeError: a cache of another backend.
            ValueError: the cache or the backend is closed.
        """
        if not isinstance(cache, LaneCache):
            raise TypeError(f"a cache of {type(cache).__name__} does not belong to this backend")
        self._lanes.check_open()
        lane: AnyLane | None = cache.lane
        if lane is None:
            raise ValueError("this cache is closed; take another from new_cache")
        if not self._lanes.owns(lane):
            raise TypeError("this cache is of another backend; take one from this one's new_cache")
        return lane


def mebibytes(size: int) -> float:
    """Bytes in MiB, to a tenth."""
    return round(size / 2**20, 1)
