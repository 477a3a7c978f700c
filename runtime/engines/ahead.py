"""Steps of the decode graph, put on the stream ahead of what the host has read.

A step needs nothing of the host but its positions and uniform numbers, which it knows ahead: the
token is copied from the output to the next step's input on the device. Of each step the host gets
the tokens and whether they are certain, a few steps behind (`runtime/gpu/token_ring.py`).

The token is copied, and not written where it is read: TensorRT lets outputs share the memory of
inputs only where the engine says so (`get_aliased_input_tensor`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from model.contract import DTYPE_BYTES, TensorSpec
from runtime.backends.base import Ids, Limits
from runtime.engines.cache_memory import PlacedCache
from runtime.engines.decode_graph import DecodeGraphContract
from runtime.engines.loaded_engine import LoadedEngine
from runtime.engines.repeated_step import Capturing, RepeatedStep
from runtime.gpu.cuda_runtime import CudaRuntime
from runtime.gpu.device_memory import DeviceBuffer, PinnedBuffer, Stream, aligned
from runtime.gpu.token_ring import TokenRing
from runtime.sampling_tail import EngineTailInputs

Uniform = npt.NDArray[np.float32]
Certain = npt.NDArray[np.bool_]

# Written before each step; the other inputs hold until a run begins anew.
_EACH_STEP = ("position_ids", "write_index", "uniform")


@dataclass(frozen=True)
class _Area:
    """One small tensor's place in the block: bytes from its part's begin."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class _Part:
    """Small tensors side by side, copied at once."""

    def __init__(self, specs: Sequence[TensorSpec], rows: int) -> None:
        self.areas: dict[str, _Area] = {}
        self.size = 0
        for spec in specs:
            self.areas[spec.name] = _Area(self.size, _shape(spec, rows), spec.dtype)
            self.size += aligned(self.areas[spec.name].size)


class _Block:
    """The device block of a batch: what each step is told, what a run is told, what steps give."""

    def __init__(self, contract: DecodeGraphContract, rows: int) -> None:
        small = (*contract.tokens, *contract.rules)
        self.step = _Part([spec for spec in small if spec.name in _EACH_STEP], rows)
        self.run = _Part([spec for spec in small if spec.name not in _EACH_STEP], rows)
        self.choice = _Part(contract.choice, rows)

    @property
    def size(self) -> int:
        return self.step.size + self.run.size + self.choice.size

    def offset(self, name: str) -> int:
        begin = 0
        for part in (self.step, self.run, self.choice):
            if name in part.areas:
                return begin + part.areas[name].offset
            begin += part.size
        raise AssertionError(f"{name} is one of the small tensors")


class AheadSteps:
    """The decode graph's context on a lane, and the steps of it that are on the stream.

    Attributes:
        epoch: grows whenever what is on the stream is given up; a run that began before it has to
            begin anew.
    """

    def __init__(
        self,
        engine: LoadedEngine[DecodeGraphContract],
        cuda: CudaRuntime,
        stream: Stream,
        limits: Limits,
        capturing: Capturing,
    ) -> None:
        """Make the context and the buffers of any batch.

        Raises:
            BackendUnavailableError: too little memory, or no context.
        """
        self.epoch = 0
        self._engine, self._stream, self._capturing = engine, stream, capturing
        self._rows = 0
        self._addresses: tuple[int, ...] = ()
        self._layout = _Block(engine.contract, limits.max_batch_size)
        self._repeated: RepeatedStep | None = None
        self._context: Any = None
        self._begun = 0
        self._owned = ExitStack()
        try:
            self._allocate(cuda, limits)
        except BaseException:
            self._owned.close()
            raise

    def _allocate(self, cuda: CudaRuntime, limits: Limits) -> None:
        own, layout = self._owned.callback, self._layout
        self._block = DeviceBuffer(cuda, "the choice of tokens", layout.size)
        own(self._block.close)
        self._ring = TokenRing(cuda, layout.choice.size)
        own(self._ring.close)
        size = self._ring.depth * layout.step.size
        self._step_host = PinnedBuffer(cuda, "positions on their way", size)
        own(self._step_host.close)
        self._run_host = PinnedBuffer(cuda, "rules on their way", layout.run.size)
        own(self._run_host.close)
        self._context = self._engine.new_context()
        own(self._drop_context)
        if not self._context.set_optimization_profile_async(
            self._engine.profile_index("decode"), self._stream.handle
        ):
            raise self._engine.failure("the decode profile could not be selected")
        self._stream.synchronize()
        own(self.unbind)
        own(self._stream.wait)

    @property
    def in_flight(self) -> int:
        """Steps on the stream whose tokens were not taken."""
        return len(self._ring)

    @property
    def full(self) -> bool:
        """Whether one has to be taken before another step is put on the stream."""
        return len(self._ring) >= self._ring.depth

    def begin(self, tokens: Ids, rules: EngineTailInputs, cache: PlacedCache) -> None:
        """Begin a run, with nothing on the stream.

        Args:
            tokens: [B], of its first step.
            rules: how tokens are chosen; `uniform` comes with each step.
            cache: of all rows.
        """
        rows = len(tokens)
        if (rows, cache.addresses) != (self._rows, self._addresses):
            self._bind(rows, cache)
        part = self._layout.run
        values = {"input_ids": tokens[:, None], "logits_index": 0, **rules.feeds()}
        for name, area in part.areas.items():
            self._run_host.view(area.offset, area.shape, area.dtype)[:] = values[name]
        start = self._block.address + self._layout.step.size
        self._stream.upload(start, self._run_host, part.size)

    def put(self, positions: Ids, uniform: Uniform) -> None:
        """Put a step on the stream.

        Args:
            positions: [B] slot of each row's token.
            uniform: [B].
        """
        if self._repeated is None:
            raise AssertionError("a run has begun")
        part, layout, stream = self._layout.step, self._layout, self._stream
        # Of the step whose slot this was, the tokens were taken: its copies are done.
        slot = self._begun % self._ring.depth * part.size
        self._begun += 1
        values = {
            "position_ids": positions[:, None],
            "write_index": positions,
            "uniform": uniform,
        }
        for name, area in part.areas.items():
            self._step_host.view(slot + area.offset, area.shape, area.dtype)[:] = values[name]
        stream.upload(self._block.address, self._step_host, part.size, slot)
        self._repeated.put()
        chosen = self._block.address + layout.offset("next_id")
        self._ring.put(stream, chosen, layout.choice.size)
        self._ring.commit(stream)

    def take(self) -> tuple[Ids, Certain]:
        """Wait for the oldest step: its tokens [B], and whether each is certain [B]."""
        taken = self._ring.take(0, (self._layout.choice.size,), np.uint8)
        self._ring.release()
        tokens, fits = (
            taken[area.offset : area.offset + area.size].view(area.dtype)
            for area in self._layout.choice.areas.values()
        )
        return tokens, fits

    def give_up(self) -> None:
        """Wait for what is on the stream and forget it."""
        self.epoch += 1
        if len(self._ring):
            self._stream.synchronize()  # steps of before must not write into slots of later ones
            self._ring.forget()

    def close(self) -> None:
        """Release everything, after errors too; harmless when called again."""
        self.epoch += 1
        self._owned.close()

    def _bind(self, rows: int, cache: PlacedCache) -> None:
        """Tell the context the shapes and addresses of the coming steps."""
        self.unbind()
        engine, contract = self._engine, self._engine.contract
        layout = self._layout = _Block(contract, rows)
        base = self._block.address
        for spec in (*contract.tokens, *contract.rules):
            address = base + layout.offset(spec.name)
            engine.set_input(self._context, spec.name, _shape(spec, rows), address)
        for past, present, address in zip(
            contract.past, contract.present, cache.addresses, strict=True
        ):
            engine.set_input(self._context, past.name, _shape(past, rows), address)
            engine.set_address(self._context, present.name, address)
        for spec in contract.choice:
            engine.set_address(self._context, spec.name, base + layout.offset(spec.name))
        engine.check_shapes(self._context)
        self._rows, self._addresses = rows, cache.addresses
        self._repeated = RepeatedStep(self._stream, self._enqueue, self._capturing, worth=True)

    def _enqueue(self) -> None:
        """The engine, and its token on the way to the next step; nothing waits."""
        stream, base, layout = self._stream, self._block.address, self._layout
        if not self._context.execute_async_v3(stream.handle):
            raise self._engine.failure("a step could not be put on the stream")
        size = layout.choice.areas["next_id"].size
        stream.copy(base + layout.offset("input_ids"), base + layout.offset("next_id"), size)

    def unbind(self) -> None:
        """Forget the addresses of a batch; nothing of it is on the stream any more."""
        repeated, self._repeated = self._repeated, None
        self._rows, self._addresses = 0, ()
        if repeated is not None:
            repeated.close()

    def _drop_context(self) -> None:
        self._context = None


def _shape(spec: TensorSpec, rows: int) -> tuple[int, ...]:
    """Of a step of one token a row."""
    sizes = {"B": rows, "S": 1, "M": 1}
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def ahead_bytes(contract: DecodeGraphContract, limits: Limits) -> int:
    """Device memory that `AheadSteps` takes beside its context."""
    return _Block(contract, limits.max_batch_size).size
