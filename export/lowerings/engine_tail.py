"""Choosing the next token inside an engine, by the rules of runtime/sampling.py.

TensorRT has no float64, promises no order among equal values of TopK, and may divide and take
powers with a few roundings more than the host. So nothing here relies on any of that: the `width`
likeliest tokens are compared with each other in pairs, which gives each its place in the host's
order (larger logit first, of equal ones the lower id) and the mass before it, whatever order TopK
has left them in. A token is chosen where its place holds against every error that
docs/sampling.md ("In an engine") allows for; otherwise `fits` is false and the host draws from the
logits of another run of the same step.

Greedy choice is `top_k` 1: one path, no branches, which TensorRT would decide on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.lowerings.graph_editor import GraphEditor
from runtime.sampling_tail import ENGINE_TAIL_INPUTS

# TensorRT's TopK takes no more.
MOST_CANDIDATES = 3840
# Every weight, sum of weights and product below is right up to this share of itself (2^-16), beside
# what the quotients of logit and temperature add.
ROUNDING = 2.0**-16
# Beyond it the bounds, which are of first order, might not hold.
_MOST_ROUNDING = 2.0**-4
# What the power of a large argument may be off by, for each unit of the argument.
_POWER_ROUNDING = 2.0**-21
# Quotients that the host cannot tell from 0 or from each other; logits are never that small.
_TINY = 1e-30
# Tokens whose weights are summed first, so that no sum has many roundings in a row.
_BLOCK = 128
# Up to here `ROUNDING` holds, and ids and ranks are exact in float32.
_LARGEST_VOCABULARY = 2**17


@dataclass(frozen=True)
class EngineTail:
    """What the tail gives.

    Attributes:
        next_id: [B, 1] int64, an id of the vocabulary also where it means nothing.
        fits: [B, 1] bool; where false, the host has to draw.
    """

    next_id: ir.Value
    fits: ir.Value


def add_engine_tail(
    editor: GraphEditor, logits: ir.Value, vocab_size: int, width: int
) -> EngineTail:
    """Let the graph choose the next token; gets the inputs of `EngineTailInputs`.

    Args:
        editor: on the graph that computes the logits; its outputs are left to the caller.
        logits: [B, 1, V] float32.
        vocab_size: V.
        width: how many candidates are compared; `tail_covers` has to know it.

    Raises:
        ValueError: more candidates than TopK takes, or ids that float32 cannot hold.
    """
    if not 1 <= width <= MOST_CANDIDATES or vocab_size > _LARGEST_VOCABULARY:
        raise ValueError(
            f"a tail compares 1 to {MOST_CANDIDATES} candidates of at most {_LARGEST_VOCABULARY} "
            f"tokens, got {width} of {vocab_size}"
        )
    batch = None if logits.shape is None else logits.shape[0]
    rows = {name: ir.val(name, ir.DataType.FLOAT, ir.Shape([batch])) for name in ENGINE_TAIL_INPUTS}
    editor.graph.inputs.extend(rows.values())
    columns = {name: editor.op("Unsqueeze", value, editor.ints(1)) for name, value in rows.items()}
    tail = _Tail(editor, columns, editor.op("Squeeze", logits, editor.ints(1)), vocab_size, width)
    next_id, fits = tail.choose()
    for value, name, dtype in (
        (next_id, "next_id", ir.DataType.INT64),
        (fits, "fits", ir.DataType.BOOL),
    ):
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape([batch, 1])
    return EngineTail(next_id=next_id, fits=fits)


class _Tail:
    """The nodes of one tail; [B, C] candidates, [B, 1] numbers of a row."""

    def __init__(
        self,
        editor: GraphEditor,
        columns: Mapping[str, ir.Value],
        logits: ir.Value,
        vocab_size: int,
        width: int,
    ) -> None:
        self._editor = editor
        self._columns = columns
        self._logits = logits  # [B, V]
        self._vocab_size = vocab_size
        self._count = min(width, vocab_size)
        self._complete = self._count == vocab_size

    def choose(self) -> tuple[ir.Value, ir.Value]:
        """`next_id` and `fits`."""
        op, number, columns = self._op, self._number, self._columns
        values, ids = self._candidates()
        largest = op("ReduceMax", values, self._editor.ints(1))
        smallest = op("ReduceMin", values, self._editor.ints(1))
        top = op("Div", largest, columns["temperature"])
        shift = op("Sub", op("Div", values, columns["temperature"]), top)  # at most 0
        weights = op("Exp", shift)

        rounding = op(
            "Add", number(ROUNDING), op("Mul", columns["quotient_rounding"], op("Abs", top))
        )
        low, high = op("Sub", number(1), rounding), op("Add", number(1), rounding)
        # Closer logits may have equal quotients on the host, which orders these.
        gap = op("Add", op("Mul", columns["quotient_rounding"], op("Abs", values)), number(_TINY))
        rank, before, doubtful = self._places(values, ids, weights, gap)
        total = self._total(top, weights)

        # What top_k, then top_p, then min_p keep: for certain, and at most.
        top_k, top_p, min_p = (columns[name] for name in ("top_k", "top_p", "min_p"))
        counted = op("Less", rank, top_k)
        mass = self._sum(op("Where", counted, weights, number(0)))
        unseen = None
        if not self._complete:
            unseen = op("Greater", top_k, number(self._count))
            mass = op("Where", unseen, total, mass)
        nucleus = op("Mul", top_p, mass)
        steepness = op("Mul", op("Abs", shift), number(_POWER_ROUNDING))
        surely = self._all(
            counted,
            op("Less", op("Mul", before, high), op("Mul", nucleus, low)),
            # The likeliest tokens' share of the likeliest one is exactly 1.
            op(
                "Or",
                op("GreaterOrEqual", op("Mul", weights, op("Sub", low, steepness)), min_p),
                op("Equal", values, largest),
            ),
        )
        perhaps = self._all(
            counted,
            op("Less", op("Mul", before, low), op("Mul", nucleus, high)),
            op("GreaterOrEqual", op("Mul", weights, op("Add", high, steepness)), min_p),
        )

        # Bounds of the mass that is kept, which the uniform number is a share of.
        uncut = op("Where", op("Equal", min_p, number(0)), op("Min", top_p, number(1)), number(0))
        least = op(
            "Max", self._sum(op("Where", surely, weights, number(0))), op("Mul", uncut, mass)
        )
        most = self._sum(op("Where", perhaps, weights, number(0)))
        kept = self._sum(op("Cast", perhaps, to=ir.DataType.FLOAT))
        is_last = op("GreaterOrEqual", op("Add", rank, number(1)), kept)
        if unseen is not None:
            # All candidates may be kept: then others may be, too.
            beyond = op("And", unseen, op("Equal", kept, number(self._count)))
            smallest_weight = op("ReduceMin", weights, self._editor.ints(1))
            bound = op("Min", mass, op("Add", nucleus, smallest_weight))
            most = op("Where", beyond, bound, most)
            is_last = op("And", is_last, op("Not", beyond))

        uniform = columns["uniform"]
        begins = op(
            "LessOrEqual", op("Mul", before, high), op("Mul", op("Mul", uniform, least), low)
        )
        ends = op(
            "Greater",
            op("Mul", op("Add", before, weights), low),
            op("Mul", op("Mul", uniform, most), high),
        )
        conditions = [surely, op("Not", doubtful), begins, op("Or", ends, is_last)]
        if not self._complete:
            # Of the tokens that equal the last candidate, or nearly, some may be missing.
            above = op("Sub", values, smallest)
            conditions.append(op("Greater", above, gap))
        chosen = op("Where", self._all(*conditions), ids, number(-1))
        found = op("ReduceMax", chosen, self._editor.ints(1))
        fits = self._all(
            op("GreaterOrEqual", found, number(0)),
            op("Less", total, number(np.inf)),  # false for NaN, which any logit may bring in
            op("Less", rounding, number(_MOST_ROUNDING)),
        )
        return op("Cast", op("Max", found, number(0)), to=ir.DataType.INT64), fits

    def _candidates(self) -> tuple[ir.Value, ir.Value]:
        """Logits and ids (as float32) of the likeliest tokens, in no order."""
        if self._complete:
            every = np.arange(self._vocab_size, dtype=np.float32)[None]
            return self._logits, self._editor.initializer("sampling.ids", every)
        values, places = self._editor.op_outputs(
            "TopK", 2, self._logits, self._editor.ints(self._count), axis=1
        )
        return values, self._op("Cast", places, to=ir.DataType.FLOAT)

    def _places(
        self, values: ir.Value, ids: ir.Value, weights: ir.Value, gap: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """How many candidates stand before each in the host's order, and their weights.

        And whether equal quotients of logits that differ may swap it with another one.
        """
        op, editor = self._op, self._editor
        own, other = (op("Unsqueeze", values, editor.ints(axis)) for axis in (2, 1))
        own_id, other_id = (op("Unsqueeze", ids, editor.ints(axis)) for axis in (2, 1))
        larger, lower = op("Greater", other, own), op("Less", other_id, own_id)
        equal = op("Equal", other, own)
        before = op("Or", larger, op("And", equal, lower))
        distance = op("Abs", op("Sub", other, own))
        near = op("LessOrEqual", distance, op("Unsqueeze", gap, editor.ints(2)))
        swapped = self._all(near, op("Not", equal), op("Xor", larger, lower))
        weight = op("Where", before, op("Unsqueeze", weights, editor.ints(1)), self._number(0))
        swaps = op(
            "ReduceMax", op("Cast", swapped, to=ir.DataType.FLOAT), editor.ints(2), keepdims=0
        )
        return (
            op("ReduceSum", op("Cast", before, to=ir.DataType.FLOAT), editor.ints(2), keepdims=0),
            op("ReduceSum", weight, editor.ints(2), keepdims=0),
            op("Greater", swaps, self._number(0)),
        )

    def _total(self, top: ir.Value, weights: ir.Value) -> ir.Value:
        """The weights of the whole vocabulary, [B, 1]; no number where a logit is none."""
        if self._complete:
            return self._sum(weights)
        op, editor = self._op, self._editor
        scaled = op("Div", self._logits, self._columns["temperature"])
        weight = op("Exp", op("Sub", scaled, top))
        missing = -self._vocab_size % _BLOCK
        if missing:
            weight = op("Pad", weight, editor.ints(0, 0, 0, missing), self._number(0))
        blocks = op("Reshape", weight, editor.ints(0, -1, _BLOCK))
        return op("ReduceSum", op("ReduceSum", blocks, editor.ints(2), keepdims=0), editor.ints(1))

    def _sum(self, value: ir.Value) -> ir.Value:
        return self._op("ReduceSum", value, self._editor.ints(1))

    def _all(self, first: ir.Value, *others: ir.Value) -> ir.Value:
        for other in others:
            first = self._op("And", first, other)
        return first

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return self._editor.op(op_type, *inputs, **attributes)

    def _number(self, number: float) -> ir.Value:
        return self._editor.float(float(number))
