"""One batch on an engine: its execution context, its stream and every buffer that a step uses.

Two batches run side by side on two lanes; nothing of a lane is shared. A step of one token a row is
bound once and then repeated: its inputs are written into pinned memory, three things are put on the
stream (copy in, engine, copy out), and the host waits once. Where the variant has a decode graph,
a second context on the same cache and stream runs steps whose tokens the device chooses, ahead of
what the host reads (`runtime/engines/ahead.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract import StepContract
from runtime.backends.base import Ids, Limits, Logits
from runtime.engines.ahead import AheadSteps, Certain, Uniform, ahead_bytes
from runtime.engines.cache_memory import CacheMemory, PlacedCache, cache_bytes
from runtime.engines.decode_graph import DecodeGraphContract
from runtime.engines.loaded_engine import LoadedEngine
from runtime.engines.repeated_step import Capturing, RepeatedStep
from runtime.engines.token_block import PlacedTokens, TokenBlock, token_block_bytes
from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.gpu.device_memory import DeviceBuffer, PinnedBuffer, Stream
from runtime.sampling_tail import EngineTailInputs

_FLOAT32_BYTES = 4


@dataclass
class _BoundStep:
    """Steps of one shape, whose shapes and addresses the context knows.

    Attributes:
        key: batch, length, logits and the row (None for all).
        tokens: where the small inputs go.
        offsets: [S] of each token behind its row's first.
        cache: where the cache tensors lie.
        logits: [B, M, V] pinned, None where they do not fit at once.
        logits_bytes: of the logits.
        repeated: what puts it on the stream.
    """

    key: tuple[int, int, int, int | None]
    tokens: PlacedTokens
    offsets: Ids
    cache: PlacedCache
    logits: Logits | None
    logits_bytes: int
    repeated: RepeatedStep = field(init=False)


@dataclass
class AheadRun:
    """One caller's run of steps ahead.

    Attributes:
        rules: how tokens are chosen.
        uniform: gives each row's number for the token behind so many.
        count: tokens taken so far.
        epoch: of the lane's steps when it began.
        positions: [B] slots of the next step that is put on the stream; of a row that goes on, its
            length and the steps on the stream.
    """

    rules: EngineTailInputs
    uniform: Callable[[int], Uniform]
    count: int = 0
    epoch: int = -1
    positions: Ids = field(default_factory=lambda: np.zeros(0, np.int64))


class EngineLane:
    """What one batch of sequences runs on.

    Attributes:
        rows: sequences of the batch, 0 before `begin`.
    """

    def __init__(
        self,
        engine: LoadedEngine[StepContract],
        cuda: CudaRuntime,
        limits: Limits,
        vocab_size: int,
        rows: int,
        decode_graph: LoadedEngine[DecodeGraphContract] | None = None,
    ) -> None:
        """Make the contexts and the buffers of a step, for any batch.

        Args:
            engine: what runs.
            cuda: where.
            limits: of the largest step.
            vocab_size: V.
            rows: of the batch that will begin; room for its cache is made sure of, not taken.
            decode_graph: chooses tokens by itself; None where the variant has none.

        Raises:
            BackendUnavailableError: too little memory, or no context.
        """
        self.rows = 0
        self._engine, self._decode_graph, self._cuda = engine, decode_graph, cuda
        self._limits, self._vocab_size = limits, vocab_size
        self._profiles = {name: engine.profile_index(name) for name in ("decode", "prefill")}
        self._profile: int | None = None
        self._bound: _BoundStep | None = None
        self._cache: CacheMemory | None = None
        self._context: Any = None
        self._failed = False
        self._capturing = Capturing(not engine.captures_graphs)
        self._ahead: AheadSteps | None = None
        self._in_step = threading.Lock()
        # What `close` does, the last first, each whatever becomes of the others.
        self._owned = ExitStack()
        try:
            self._allocate(rows)
        except BaseException:
            self._owned.close()
            raise

    def _allocate(self, rows: int) -> None:
        cuda, limits, contract = self._cuda, self._limits, self._engine.contract
        needs = lane_needs(contract, limits, self._vocab_size, rows)
        if (graph := self._decode_graph) is not None:
            needs["activations of the decode graph"] = graph.context_bytes
            needs["the choice of tokens"] = ahead_bytes(graph.contract, limits)
        self._engine.check_room(needs)  # for all of it, before anything is taken
        own = self._owned.callback
        self._stream = Stream(cuda)
        own(self._stream.close)
        self._tokens = TokenBlock(cuda, contract.tokens, limits)
        own(self._tokens.close)
        # Of one token a row; scoring takes more (`_reserve_logits`).
        logits_bytes = _logits_bytes(limits, self._vocab_size)
        self._host_logits = PinnedBuffer(cuda, "logits on their way", logits_bytes)
        own(self._host_logits.close)
        self._logits = DeviceBuffer(cuda, "logits", logits_bytes)
        own(lambda: self._logits.close())  # of whatever buffer there is then
        own(self._close_cache)
        self._context = self._engine.new_context()
        own(self._drop_context)
        own(self._unbind)
        if self._decode_graph is not None:
            self._ahead = AheadSteps(
                self._decode_graph, cuda, self._stream, limits, self._capturing
            )
            own(self._ahead.close)
        own(self._stream.wait)

    @property
    def usable(self) -> bool:
        """Whether another batch can begin: it is open and none of its steps has failed."""
        return self._context is not None and not self._failed

    def begin(self, rows: int) -> None:
        """Begin a batch of `rows` sequences with a zeroed cache.

        Raises:
            BackendUnavailableError: too little memory for the cache.
        """
        specs = self._engine.contract.past
        if rows != self.rows or self._cache is None:
            self.end()
            size = cache_bytes(specs, rows)
            advice = "end other programs on the GPU, or run fewer sequences at once"
            self._cuda.require_free({f"a cache of {rows} sequences": size}, advice)
            self._cache = CacheMemory(self._cuda, specs, rows)
            self.rows = rows
        self._cache.zero(self._stream)

    def end(self) -> None:
        """Give the cache's memory back; `begin` takes it again."""
        self._stream.wait()  # the last step may still write to it
        self._unbind()
        if self._ahead is not None:
            self._ahead.give_up()
            self._ahead.unbind()
        self._close_cache()

    def step(self, input_ids: Ids, write_index: Ids, logits_index: Ids, row: int | None) -> Logits:
        """Run the engine once; arguments and result as `Backend._step`.

        Raises:
            RuntimeError: another thread is in a step of this batch, an earlier step of it has
                failed, or this one does.
            ValueError: the lane is closed, or a shape that the engine was not built for.
        """
        with self._one_at_a_time():
            key = (*input_ids.shape, logits_index.shape[1], row)
            self._check_shape(*key[:3])
            self._give_up_ahead()
            bound = self._bound
            if bound is None or bound.key != key:
                bound = self._bind(key)
            ids, positions, slots, index = bound.tokens.arrays
            ids[:] = input_ids
            np.add(write_index[:, None], bound.offsets, out=positions)
            slots[:] = write_index
            index[:] = logits_index
            self._failed = True  # unless all of the step succeeds
            bound.repeated.put()
            logits = self._read_logits(bound)
            self._failed = False
            return logits

    def step_ahead(
        self,
        run: AheadRun,
        tokens: Ids,
        lengths: Ids,
        active: npt.NDArray[np.bool_],
        capacity: int,
    ) -> tuple[Ids, Certain]:
        """The tokens of the next step of a run, and whether each is certain; later ones go ahead.

        What is on the stream is given up, and the run begun anew, where something else has run on
        the lane or changed the lengths of rows that go on.

        Args:
            run: which; the caller counts the tokens it takes over in `run.count`.
            tokens: [B] that the step takes in.
            lengths: [B] of the cache before it; every active row has room for one token.
            active: [B] rows that go on; the others stay where they are.
            capacity: slots of a row.

        Returns:
            [B] int64, [B] bool.

        Raises:
            RuntimeError: as `step`.
            ValueError: the lane is closed.
        """
        with self._one_at_a_time():
            ahead, cache = self._ahead, self._cache
            if ahead is None or cache is None:
                raise AssertionError("a lane with a decode graph and a batch")
            self._failed = True  # unless all of the step succeeds
            expected = lengths[active] + ahead.in_flight
            if run.epoch != ahead.epoch or (run.positions[active] != expected).any():
                ahead.give_up()
                ahead.begin(tokens, run.rules, cache.place(None))
                run.epoch, run.positions = ahead.epoch, lengths.copy()
            while not ahead.full and (run.positions[active] < capacity).all():
                number = run.uniform(run.count + ahead.in_flight + 1)
                # A row that has ended may stand behind the last slot; what it writes is not read.
                ahead.put(np.minimum(run.positions, capacity - 1), number)
                run.positions = run.positions + active
            chosen, certain = ahead.take()
            self._failed = False
            return chosen, certain

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Of an open lane, none of whose steps has failed."""
        if not self._in_step.acquire(blocking=False):
            raise RuntimeError(
                "two threads step one cache at once; give each session its own (new_cache): an "
                "execution context runs one step at a time"
            )
        try:
            if self._context is None or self._cache is None:
                raise ValueError("this backend is closed; open another")
            if self._failed:
                raise RuntimeError(
                    "an earlier step on this cache has failed and its content is not known; make "
                    "another with new_cache"
                )
            yield
        finally:
            self._in_step.release()

    @property
    def runs_ahead(self) -> bool:
        """Whether it has a decode graph."""
        return self._ahead is not None

    def close(self) -> None:
        """Release everything, after errors too; harmless when called again.

        Another thread's step is waited for.
        """
        with self._in_step:
            self._owned.close()

    def _give_up_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.give_up()

    def _drop_context(self) -> None:
        self._context = None

    def _close_cache(self) -> None:
        cache, self._cache, self.rows = self._cache, None, 0
        if cache is not None:
            cache.close()

    def _check_shape(self, batch: int, length: int, wanted: int) -> None:
        limits = self._limits
        if not (1 <= batch <= limits.max_batch_size and 1 <= length <= limits.max_input_len):
            raise ValueError(
                f"a step of {batch} x {length} tokens is outside the engine's profiles, "
                f"{limits.max_batch_size} x {limits.max_input_len} at the most"
            )
        if not 1 <= wanted <= length:
            raise ValueError(f"a step of {length} tokens gives 1 to {length} logits, not {wanted}")

    def _bind(self, key: tuple[int, int, int, int | None]) -> _BoundStep:
        """Tell the context the shapes and addresses of the coming steps."""
        batch, length, wanted, row = key
        if self._cache is None:
            raise AssertionError("a batch has begun")
        self._unbind()
        self._select_profile("decode" if length == 1 else "prefill")
        engine, context, contract = self._engine, self._context, self._engine.contract
        tokens = self._tokens.place(batch, length, wanted)
        for spec, shape, address in zip(
            contract.tokens, tokens.shapes, tokens.addresses, strict=True
        ):
            engine.set_input(context, spec.name, shape, address)
        cache = self._cache.place(row)
        for past, present, address in zip(
            contract.past, contract.present, cache.addresses, strict=True
        ):
            shape = tuple(batch if isinstance(size, str) else size for size in past.shape)
            engine.set_input(context, past.name, shape, address)
            engine.set_address(context, present.name, address)  # in place: one address for both
        logits_bytes = batch * wanted * self._vocab_size * _FLOAT32_BYTES
        self._reserve_logits(logits_bytes)
        engine.set_address(context, contract.logits.name, self._logits.address)
        engine.check_shapes(context)
        fits = logits_bytes <= self._host_logits.size
        shape = (batch, wanted, self._vocab_size)
        bound = _BoundStep(
            key=key,
            tokens=tokens,
            offsets=np.arange(length),
            cache=cache,
            logits=self._host_logits.view(0, shape, np.float32) if fits else None,
            logits_bytes=logits_bytes,
        )
        bound.repeated = RepeatedStep(
            self._stream,
            lambda: self._enqueue(bound),
            self._capturing,
            worth=key[1:] == (1, 1, None),
        )
        self._bound = bound
        return bound

    def _unbind(self) -> None:
        bound, self._bound = self._bound, None
        if bound is not None:
            bound.repeated.close()

    def _select_profile(self, name: str) -> None:
        """Switch between decoding and prefill; every input shape is set again after it."""
        index = self._profiles[name]
        if index == self._profile:
            return
        self._profile = None
        if not self._context.set_optimization_profile_async(index, self._stream.handle):
            raise self._engine.failure(f"the {name} profile could not be selected")
        self._stream.synchronize()  # shapes are set for a profile that is in place
        self._profile = index

    def _enqueue(self, bound: _BoundStep) -> None:
        """Copy in, run, copy out; nothing waits."""
        stream = self._stream
        self._tokens.upload(bound.tokens, stream)
        bound.cache.fetch(stream)
        if not self._context.execute_async_v3(stream.handle):
            raise self._engine.failure("a step could not be put on the stream")
        bound.cache.store(stream)
        if bound.logits is not None:
            stream.download(self._host_logits, self._logits.address, bound.logits_bytes)

    def _read_logits(self, bound: _BoundStep) -> Logits:
        """Wait for a step and take its logits, the caller's own."""
        stream, host = self._stream, self._host_logits
        if bound.logits is not None:
            stream.synchronize()  # the logits are read now, and the inputs written next
            return bound.logits.copy()
        batch, _, wanted, _ = bound.key
        logits = np.empty((batch, wanted, self._vocab_size), np.float32)
        flat = logits.reshape(-1)
        piece = host.size // _FLOAT32_BYTES
        for begin in range(0, flat.size, piece):
            part = flat[begin : begin + piece]
            stream.download(host, self._logits.address + begin * _FLOAT32_BYTES, part.nbytes)
            stream.synchronize()  # the next piece goes through the same pinned memory
            part[:] = host.view(0, part.shape, np.float32)
        return logits

    def _reserve_logits(self, size: int) -> None:
        """Make room for the logits of scoring; never for a step that decodes."""
        if size <= self._logits.size:
            return
        advice = "score with a smaller --window"
        self._cuda.require_free({"logits of every token": size}, advice)
        larger = DeviceBuffer(self._cuda, "logits of every token", size)
        old, self._logits = self._logits, larger
        old.close()  # every step waits for its logits, so nothing uses it


def lane_needs(
    contract: StepContract, limits: Limits, vocab_size: int, rows: int
) -> dict[str, int]:
    """Device memory that a lane with a batch of `rows` takes beside its context, in bytes."""
    small = token_block_bytes(contract.tokens, limits) + _logits_bytes(limits, vocab_size)
    return {
        "tokens and logits": small,
        f"a cache of {rows} {'sequence' if rows == 1 else 'sequences'}": cache_bytes(
            contract.past, rows
        ),
    }


def _logits_bytes(limits: Limits, vocab_size: int) -> int:
    return limits.max_batch_size * vocab_size * _FLOAT32_BYTES
