"""One batch on our kernels: its stream, the memory that its steps write, and its cache.

Steps of one token a sequence are recorded once as CUDA graphs and replayed: positions, tokens and
lengths lie on the device, and a step leaves the next one's there. Prompts are launched kernel by
kernel, as they are long and seldom alike.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from plugins.kernel_spec import Launch
from plugins.launcher import Launcher, LaunchError
from runtime.backends.base import Ids, Logits
from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.gpu.device_memory import CapturedGraph, PinnedBuffer, Stream
from runtime.gpu.token_ring import TokenRing
from runtime.kernel_step.areas import cache_row_bytes
from runtime.kernel_step.arena import Arena, arena_bytes
from runtime.kernel_step.choice_rules import ChoiceRules
from runtime.kernel_step.decode_step import DecodeStep, Ending
from runtime.kernel_step.device_weights import DeviceWeights
from runtime.kernel_step.persistent import TOKENS_PER_LAUNCH
from runtime.kernel_step.places import Places
from runtime.kernel_step.step_kernels import StepKernels

_LESS = "end other programs on the GPU, or build with a smaller --max-batch-size or --max-seq-len"
_INT64 = 8
_STAGING = 1 << 18  # bytes of what tokens are chosen by on their way at once
# Each row has one token when the device begins to choose: the count that `TokenChooser` begins at.
_FIRST_STEP = 1
# Launches of several steps on the stream at once: the host reads one's tokens while another runs.
_LAUNCHES_AHEAD = 2
# The residual stream stays where it is from layer to layer.
_IN_PLACE = {"x_between": "x", "x_out": "x"}


class KernelLane:
    """What one batch of sequences runs on.

    Attributes:
        rows: sequences of the batch, 0 before `begin`.
    """

    def __init__(
        self,
        kernels: StepKernels,
        weights: DeviceWeights,
        cuda: CudaRuntime,
        launcher: Launcher,
        rows: int,
    ) -> None:
        """Allocate everything that any batch will need but its cache.

        Args:
            kernels: what steps launch.
            weights: of the model, on the device.
            cuda: where.
            launcher: has the kernels' code.
            rows: of the batch that will begin; room for its cache is made sure of, not taken.

        Raises:
            BackendUnavailableError: too little memory; says how much is needed.
        """
        self.rows = 0
        self._kernels, self._weights = kernels, weights
        self._cuda, self._launcher = cuda, launcher
        self._cache: Arena | None = None
        self._graphs: dict[Ending, CapturedGraph] = {}
        self._persistent: dict[int, Launch] = {}  # by steps of a launch
        self._failed = False
        self._open = True
        self._steps = 0  # that were begun, passes of prompts among them
        self._finished = 0
        self._run: object = None
        self._in_step = threading.Lock()
        self._owned = ExitStack()
        try:
            self._allocate(rows)
        except BaseException:
            self._owned.close()
            raise

    def _allocate(self, rows: int) -> None:
        cuda, kernels, own = self._cuda, self._kernels, self._owned.callback
        areas = kernels.areas
        cuda.require_free(lane_needs(kernels, rows), _LESS)
        self._stream = Stream(cuda)
        own(self._stream.close)
        own(self._close_cache)
        self._areas = Arena(cuda, "what steps write", areas)
        own(self._areas.close)
        # Ids, positions and indices on their way in; logits on their way out.
        self._tokens_in = self._pinned("tokens", areas["tokens"])
        self._positions_in = self._pinned("positions", areas["positions"])
        self._index_in = self._pinned("indices of logits", areas["logits_index"])
        self._logits_out = self._pinned("logits", areas["logits"])
        self._staging = self._pinned("what tokens are chosen by", _STAGING)
        self._ring = TokenRing(cuda, max(kernels.batch, TOKENS_PER_LAUNCH) * _INT64)
        own(self._ring.close)
        own(self._close_graphs)
        own(self._stream.wait)
        self._stream.zero(self._areas.buffer)  # counters among them

    def _pinned(self, what: str, size: int) -> PinnedBuffer:
        buffer = PinnedBuffer(self._cuda, what, size)
        self._owned.callback(buffer.close)
        return buffer

    @property
    def usable(self) -> bool:
        """Whether none of its steps has failed and it is open."""
        return self._open and not self._failed

    def begin(self, rows: int) -> None:
        """Begin a batch of `rows` sequences with a zeroed cache; no step is running.

        Graphs that were recorded for a batch of that size go on to serve.

        Raises:
            BackendUnavailableError: too little memory for the cache; says how much is needed.
        """
        if self._cache is not None:
            self._end_run()
        self._steps = self._finished = 0
        if self._cache is None or rows != self.rows:
            self._close_graphs()
            self._close_cache()
            self._cuda.require_free(_cache_needs(self._kernels, rows), _LESS)
            self._cache = Arena(self._cuda, "the cache", self._kernels.cache_areas(rows))
            self.rows = rows
        self._stream.zero(self._cache.buffer)

    def step(self, input_ids: Ids, write_index: Ids, logits_index: Ids, row: int | None) -> Logits:
        """Run one step; arguments and result as `Backend._step`.

        Raises:
            RuntimeError: another thread is in a step of this batch, an earlier step of it has
                failed, or this one does; names the kernel where it is known.
            ValueError: the lane is closed.
        """
        with self._exclusive():
            batch, length = input_ids.shape
            self._end_run()
            self._steps += 1
            self._put(self._tokens_in, "tokens", input_ids)
            self._put(self._positions_in, "positions", write_index)
            if length == 1 and row is None:
                self._launch((self._step.embed(self._places(None), batch),))
                self._decode("logits")
                return self._read_logits(batch).reshape(batch, 1, -1)
            places = self._places(row)
            index = logits_index + length * np.arange(batch)[:, None]
            self._put(self._index_in, "logits_index", index)
            prompt = self._kernels.prompt
            self._launch(prompt.launches(places, batch, length, index.size))
            logits = np.empty((index.size, self._kernels.model.vocab_size), np.float32)
            for first in range(0, index.size, self._kernels.batch):
                count = min(self._kernels.batch, index.size - first)
                self._launch((prompt.logits_launch(places, first, count),))
                logits[first : first + count] = self._read_logits(count)
            return logits.reshape(*index.shape, -1)

    def choose_ahead(
        self, tokens: Ids, positions: Ids, rules: ChoiceRules, steps: int
    ) -> Iterator[Ids]:
        """Decode and choose on the device, and read what was chosen a few steps behind.

        The host puts steps on the stream and waits for the oldest one's tokens alone; of those with
        a persistent kernel, for the tokens of the oldest launch.

        Args:
            tokens: [B] int64 to begin with.
            positions: [B] int64, their slots.
            rules: what tokens are chosen by.
            steps: how many tokens may follow.

        Yields:
            [B] int64, the caller's own; -1 for a row whose logits have no largest number.

        Raises:
            RuntimeError: as `step`.
            ValueError: the lane is closed, or another step has run on it since the last item.
        """
        with self._exclusive():
            self._end_run()
            self._run = run = object()
            first = np.array([_FIRST_STEP], np.int32)
            areas: dict[str, npt.NDArray[Any]] = {
                "tokens": tokens,
                "positions": positions,
                "step": first,
                **rules.areas,
            }
            for area, numbers in areas.items():
                self._upload(area, numbers)
            self._launch((self._step.embed(self._places(None), self.rows),))
        ring, begun = self._ring, 0
        at_once = self._tokens_at_once(rules.ending)
        ahead = ring.depth if at_once == 1 else _LAUNCHES_AHEAD
        counts: deque[int] = deque()
        while True:
            self._check_run(run)
            with self._exclusive():
                while begun < steps and len(ring) < ahead:
                    counts.append(min(at_once, steps - begun))
                    self._steps += counts[-1]
                    area = self._decode(rules.ending, counts[-1])
                    size = counts[-1] * self.rows * _INT64
                    ring.put(self._stream, self._areas.address(area), size)
                    ring.commit(self._stream)
                    begun += counts[-1]
                if not len(ring):
                    return
                count = counts.popleft()
                chosen: Ids = ring.take(0, (count, self.rows), np.int64)
                ring.release()
                self._finished += count
            for row in chosen:
                self._check_run(run)
                yield row

    def close(self) -> None:
        """Release everything, after errors too; harmless when called again."""
        with self._in_step:
            self._open = False
            self._owned.close()

    @property
    def _step(self) -> DecodeStep:
        return self._kernels.step_for(self.rows)

    def _tokens_at_once(self, ending: Ending) -> int:
        """Tokens of a row that one launch chooses."""
        persistent = self._kernels.persistent is not None
        return TOKENS_PER_LAUNCH if persistent and self.rows == 1 and ending == "greedy" else 1

    def _check_run(self, run: object) -> None:
        if self._run is not run:  # an error of the caller's, which leaves the cache as it is
            raise ValueError("another step has run on this cache; decode anew from there")

    def _exclusive(self) -> _Exclusive:
        return _Exclusive(self)

    def _end_run(self) -> None:
        """Wait until nothing is on the stream: what it reads is written now."""
        self._run = None
        self._stream.synchronize()
        self._ring.forget()
        self._finished = self._steps

    def _decode(self, ending: Ending, count: int = 1) -> str:
        """Put steps of one token on the stream; names the area that has the tokens then.

        One step is recorded when it is first wanted; more are a launch of the persistent kernel, as
        is one step where that serves the ending.
        """
        persistent = self._kernels.persistent
        if persistent is not None and self._tokens_at_once(ending) > 1:
            if count not in self._persistent:
                self._persistent[count] = persistent.launch(self._places(None), count)
            self._launch((self._persistent[count],))
            return "chosen"
        if ending not in self._graphs:
            launches = self._step.launches(self._places(None), self.rows, ending)
            self._graphs[ending] = self._stream.capture(lambda: self._launch(launches))
        self._stream.launch(self._graphs[ending])
        return "tokens"

    def _upload(self, area: str, numbers: npt.NDArray[Any]) -> None:
        """Copy numbers to the device and wait until they are there."""
        content = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)
        address = self._areas.address(area)
        for begin in range(0, content.size, self._staging.size):
            piece = content[begin : begin + self._staging.size]
            self._staging.view(0, piece.shape, np.uint8)[:] = piece
            self._stream.upload(address + begin, self._staging, piece.size)
            self._stream.synchronize()

    def _launch(self, launches: tuple[Launch, ...]) -> None:
        for launch in launches:
            self._launcher.launch(launch, self._stream.handle)

    def _told(self, error: LaunchError | RuntimeError) -> str:
        """An error with the step that it is of.

        What goes wrong on the GPU is found when the host waits; a recorded step is launched whole,
        so CUDA names neither the step nor the kernel then.
        """
        first, last = self._finished + 1, max(self._steps, self._finished + 1)
        if isinstance(error, LaunchError) or first == last:
            return f"step {last} of this batch: {error}"
        return f"one of the steps {first} to {last} of this batch: {error}"

    def _put(self, pinned: PinnedBuffer, area: str, numbers: Ids) -> None:
        pinned.view(0, numbers.shape, np.int64)[:] = numbers
        self._stream.upload(self._areas.address(area), pinned, numbers.nbytes)

    def _read_logits(self, rows: int) -> Logits:
        shape = (rows, self._kernels.model.vocab_size)
        size = rows * shape[1] * np.dtype(np.float32).itemsize
        self._stream.download(self._logits_out, self._areas.address("logits"), size)
        self._stream.synchronize()
        logits: Logits = self._logits_out.view(0, shape, np.float32).copy()
        return logits

    def _places(self, row: int | None) -> Places:
        """Addresses for all sequences, or for one alone."""
        sizes = cache_row_bytes(self._kernels.model, self._kernels.formats)

        def cache(layer: int, kind: str) -> int:
            assert self._cache is not None  # a batch has begun
            return self._cache.address(f"layers.{layer}.{kind}", (row or 0) * sizes[kind])

        def area(name: str) -> int:
            return self._areas.address(_IN_PLACE.get(name, name))

        return Places(weight=self._weights.address, area=area, cache=cache)

    def _close_graphs(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._persistent.clear()  # they hold the cache's addresses, too

    def _close_cache(self) -> None:
        cache, self._cache, self.rows = self._cache, None, 0
        if cache is not None:
            cache.close()


class _Exclusive:
    """One use of a lane at a time; what fails inside leaves the lane unusable."""

    def __init__(self, lane: KernelLane) -> None:
        self._lane = lane

    def __enter__(self) -> None:
        lane = self._lane
        if not lane._in_step.acquire(blocking=False):
            raise RuntimeError(
                "two threads step one cache at once; give each session its own (new_cache)"
            )
        problem: Exception | None = None
        if not lane._open:
            problem = ValueError("this backend is closed; open another")
        elif lane._failed:
            problem = RuntimeError(
                "an earlier step on this cache has failed and its content is not known; make "
                "another with new_cache"
            )
        if problem is not None:
            lane._in_step.release()
            raise problem
        lane._failed = True  # unless all of it succeeds

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        lane = self._lane
        lane._failed = kind is not None
        lane._in_step.release()
        if isinstance(error, LaunchError | RuntimeError):
            raise RuntimeError(lane._told(error)) from error


def lane_needs(kernels: StepKernels, rows: int) -> dict[str, int]:
    """Device memory that a lane takes, in bytes by what it is for."""
    return {
        **_cache_needs(kernels, rows),
        "what steps write": arena_bytes(kernels.areas),
    }


def _cache_needs(kernels: StepKernels, rows: int) -> dict[str, int]:
    what = f"a cache of {rows} {'sequence' if rows == 1 else 'sequences'}"
    return {what: arena_bytes(kernels.cache_areas(rows))}
