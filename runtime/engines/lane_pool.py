"""The lanes of a variant's engines: each serves one batch at a time, and the next one after it.

Making a lane takes memory and time (a context holds the activations of the largest profile, and the
first steps on it compile and capture), so a lane whose batch has ended is kept until the engine is
closed, or until its memory is wanted.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack

from model.contract import StepContract
from runtime.backends.base import BackendUnavailableError, Limits
from runtime.engines.decode_graph import DecodeGraphContract
from runtime.engines.lane import EngineLane
from runtime.engines.loaded_engine import LoadedEngine
from runtime.gpu.cuda_runtime import CudaRuntime


class LanePool:
    """Owns a variant's engines and their lanes."""

    def __init__(
        self,
        engine: LoadedEngine[StepContract],
        cuda: CudaRuntime,
        limits: Limits,
        vocab_size: int,
        decode_graph: LoadedEngine[DecodeGraphContract] | None = None,
    ) -> None:
        """Own engines, which are loaded or will be."""
        self._engine, self._decode_graph, self._cuda = engine, decode_graph, cuda
        self._limits, self._vocab_size = limits, vocab_size
        self._all: list[EngineLane] = []
        self._idle: list[EngineLane] = []
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

    def take(self, rows: int) -> EngineLane:
        """A lane on which a batch of `rows` has begun, its cache zero.

        Raises:
            BackendUnavailableError: too little memory, or no context.
            ValueError: the engine is closed.
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

    def give_back(self, lane: EngineLane) -> None:
        """Keep a lane for the next batch; one of which a step has failed is given up."""
        with self._lock:
            if not self.owns(lane):
                return  # closed with the engine
            if lane.usable:
                self._idle.append(lane)
            else:
                self._discard(lane)

    def owns(self, lane: EngineLane) -> bool:
        """Whether a lane is of this engine, and open."""
        return any(lane is own for own in self._all)

    def check_open(self) -> None:
        """Make sure that the engine is open.

        Raises:
            ValueError: it is closed.
        """
        if self._closed:
            raise ValueError("this backend is closed; open another")

    def close(self) -> None:
        """Save the runtime cache, release every lane, then the engine; for one caller, once."""
        with self._lock:
            self._closed = True
            lanes, self._all = self._all, []
            self._idle.clear()
        # Not under the lock: a lane waits for its step, and that thread may want to give back one.
        with ExitStack() as stack:  # the last is done first, each whatever becomes of the others
            engines: list[LoadedEngine[StepContract] | LoadedEngine[DecodeGraphContract]]
            engines = [self._engine, *([] if self._decode_graph is None else [self._decode_graph])]
            for engine in engines:
                stack.callback(engine.close)
            for lane in lanes:
                stack.callback(lane.close)
            for engine in engines:
                stack.callback(engine.save_runtime_cache)

    def _begin(self, rows: int) -> EngineLane:
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

    def _choose(self, rows: int) -> EngineLane:
        """An idle lane, one that has a cache of `rows` already before any other; else a new one."""
        for lane in sorted(self._idle, key=lambda idle: idle.rows != rows):
            self._idle.remove(lane)
            return lane
        return self._new(rows)

    def _new(self, rows: int) -> EngineLane:
        lane = EngineLane(
            self._engine, self._cuda, self._limits, self._vocab_size, rows, self._decode_graph
        )
        self._all.append(lane)
        return lane

    def _close_idle(self) -> None:
        for lane in tuple(self._idle):
            self._idle.remove(lane)
            self._discard(lane)

    def _discard(self, lane: EngineLane) -> None:
        self._all = [own for own in self._all if own is not lane]
        lane.close()
