"""Choosing the next token inside the graph, by the rules of runtime/sampling.py.

The candidates are the `width` likeliest tokens, in the order in which the host draws: larger logit
first, equal ones lower id first. They come from two stages of TopK, blocks by their maxima, then
tokens of those blocks. That is exact, ties included: a block that stands before another one in
(maximum descending, place ascending) holds a token that stands before all tokens of the other, so
the first `width` tokens lie in the first `width` blocks.

What lies behind the candidates is known by its probability alone. Often that is enough to be sure
of the token; where it is not, `fits` is false and the host draws from the logits. docs/sampling.md
("In the graph") derives the bounds.

The nodes are standard ONNX, but which of equal values TopK and ArgMax take first is ONNX Runtime's
answer (the lower index, 1.32; the standard promises it for ArgMax alone), and TensorRT has no
float64: docs/sampling.md says what it would need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export.lowerings.graph_editor import GraphEditor
from plugins.onnx_function import OPSET, Attribute

# Tokens per block. Measured on 32768 logits: ArgMax is fastest over rows of 128, and 32 keeps both
# stages of TopK and the sums of the blocks near their best for 64 to 256 candidates.
_GREEDY_BLOCK = 128
_BLOCK = 32
# With fewer blocks than this many times the candidates, one TopK over all tokens is no slower.
_WORTHWHILE = 4
# The inputs of a tail, fields of runtime/sampling_tail.py's TailInputs: all [B] but `sample`, [].
_ROW_INPUTS = {
    "temperature": ir.DataType.FLOAT,
    "top_k": ir.DataType.INT64,
    "top_p": ir.DataType.DOUBLE,
    "min_p": ir.DataType.DOUBLE,
    "uniform": ir.DataType.FLOAT,
}
_OUTPUTS = {"next_id": ir.DataType.INT64, "fits": ir.DataType.BOOL}


@dataclass(frozen=True)
class Tail:
    """What a tail gives.

    Attributes:
        next_id: [B, 1] int64, like `input_ids`.
        fits: [B, 1] bool; where false, `next_id` means nothing and the host has to draw.
    """

    next_id: ir.Value
    fits: ir.Value


@dataclass(frozen=True, kw_only=True)
class _Candidates:
    """The likeliest tokens of each row, in the order of drawing.

    Attributes:
        count: C.
        values: [B, C] float32, their logits divided by the temperature.
        largest: [B, 1] float32, the first of them.
        positions: [B, C] int64, where they stand among the tokens of the gathered blocks.
        blocks: [B, C] int64, the blocks that were gathered, ascending; None for all of them.
        mass: [B, 1] float64, the sum of exp(value - largest value) over the whole vocabulary;
            None where the candidates are all of it.
    """

    count: int
    values: ir.Value
    largest: ir.Value
    positions: ir.Value
    blocks: ir.Value | None
    mass: ir.Value | None


def add_token_choice(
    editor: GraphEditor, logits: ir.Value, vocab_size: int, width: int = 256
) -> Tail:
    """Let the graph choose the next token, greedily or by sampling as its input `sample` says.

    One graph serves both, so that the weights are there once; the If costs 3 µs.

    Args:
        editor: on the graph that computes the logits; gets the inputs of `TailInputs` and the
            outputs `next_id` and `fits`.
        logits: [B, 1, V] float32.
        vocab_size: V.
        width: how many candidates are sorted; `tail_covers` has to know it.

    Returns:
        The two outputs.
    """
    graph = editor.graph
    batch = None if logits.shape is None else logits.shape[0]
    sample = ir.val("sample", ir.DataType.BOOL, [])
    rows = {name: ir.val(name, dtype, ir.Shape([batch])) for name, dtype in _ROW_INPUTS.items()}
    graph.inputs.extend([sample, *rows.values()])
    drawn, greedy = _Branch(editor, "drawn"), _Branch(editor, "greedy")
    drawn.end(add_sampling_tail(drawn, logits, rows, vocab_size, width))
    greedy.end(add_greedy_tail(greedy, logits, vocab_size))
    branches = {
        "then_branch": ir.AttrGraph("then_branch", drawn.graph),
        "else_branch": ir.AttrGraph("else_branch", greedy.graph),
    }
    choice = ir.node("If", [sample], branches, num_outputs=2)
    graph.append(choice)
    for output, (name, dtype) in zip(choice.outputs, _OUTPUTS.items(), strict=True):
        output.name, output.type, output.shape = name, ir.TensorType(dtype), ir.Shape([batch, 1])
        graph.outputs.append(output)
    return Tail(*choice.outputs)


def add_greedy_tail(editor: GraphEditor, logits: ir.Value, vocab_size: int) -> Tail:
    """Append the choice of the largest logit, of equal ones the lower id.

    ArgMax over a whole vocabulary is not vectorized in ONNX Runtime; the maxima of blocks, the
    first best block and the first best token in it cost less than half.

    Args:
        editor: on the graph that computes the logits.
        logits: [B, 1, V] float32.
        vocab_size: V.

    Returns:
        The values. `fits` is false where the largest logit is not finite; a NaN beside numbers may
        go unnoticed.
    """
    padded = _padded(editor, logits, vocab_size, _GREEDY_BLOCK)
    blocks = editor.op("Reshape", padded, editor.ints(0, -1, _GREEDY_BLOCK))  # [B, n, m]
    maxima = editor.op("ReduceMax", blocks, editor.ints(2), keepdims=0)
    block = editor.op("ArgMax", maxima, axis=1, keepdims=1)  # [B, 1]
    tokens = editor.op("GatherND", blocks, block, batch_dims=1)  # [B, m]
    token = editor.op("ArgMax", tokens, axis=1, keepdims=1)
    largest = editor.op("Abs", editor.op("GatherElements", maxima, block, axis=1))
    return Tail(
        next_id=editor.op(
            "Add", editor.op("Mul", block, _number(editor, np.int64(_GREEDY_BLOCK))), token
        ),
        fits=editor.op("Less", largest, _number(editor, np.float32(np.inf))),
    )


def add_sampling_tail(
    editor: GraphEditor,
    logits: ir.Value,
    rows: Mapping[str, ir.Value],
    vocab_size: int,
    width: int,
) -> Tail:
    """Append the choice of a token by temperature, top_k, top_p, min_p and a uniform number.

    Args:
        editor: on the graph that computes the logits.
        logits: [B, 1, V] float32.
        rows: the inputs of each row, [B], by the names of `TailInputs`.
        vocab_size: V.
        width: how many candidates are sorted; `top_k` may not lie between it and V.

    Returns:
        The values. `fits` is also false where a logit is NaN or the largest one infinite.
    """
    columns = {
        name: editor.op("Unsqueeze", value, editor.ints(1))
        for name, value in rows.items()
        if name != "temperature"
    }
    temperature = editor.op("Unsqueeze", rows["temperature"], editor.ints(1, 2))
    candidates = _candidates(editor, logits, temperature, vocab_size, width)
    rank, fits = _draw(editor, candidates, **columns)
    return Tail(next_id=_id_at(editor, candidates, rank), fits=fits)


class _Branch(GraphEditor):
    """One branch of an If; it reads the outer graph's values and stores its constants there."""

    def __init__(self, outer: GraphEditor, name: str) -> None:
        super().__init__(
            ir.Model(
                ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name), ir_version=10
            )
        )
        self._outer = outer
        self._values = 0

    def initializer(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """Store a tensor in the outer graph, or find it there."""
        return self._outer.initializer(name, array)

    def op_outputs(
        self, op_type: str, count: int, *inputs: ir.Value | None, **attributes: Attribute
    ) -> Sequence[ir.Value]:
        """Append a node; a branch may not use a name that the outer graph has."""
        outputs = super().op_outputs(op_type, count, *inputs, **attributes)
        for output in outputs:
            output.name = f"{self.graph.name}.{self._values}"
            self._values += 1
        return outputs

    def end(self, tail: Tail) -> None:
        """Make the tail's values the outputs of the branch."""
        for value, dtype in zip((tail.next_id, tail.fits), _OUTPUTS.values(), strict=True):
            value.type = ir.TensorType(dtype)
            self.graph.outputs.append(value)


def _candidates(
    editor: GraphEditor, logits: ir.Value, temperature: ir.Value, vocab_size: int, width: int
) -> _Candidates:
    """Sort the `width` likeliest tokens and weigh the rest; `temperature` is [B, 1, 1]."""
    # Divided as on the host: logits that differ may be equal after it, and order by id then.
    padded = _padded(editor, logits, vocab_size, _BLOCK)
    scaled = editor.op("Div", padded, temperature)
    scaled = editor.op("Reshape", scaled, editor.ints(0, -1, _BLOCK))  # [B, n, m]
    tokens, blocks, count = scaled, None, min(width, vocab_size)
    if vocab_size >= _WORTHWHILE * _BLOCK * width:
        maxima = editor.op("ReduceMax", scaled, editor.ints(2), keepdims=0)
        _, best = editor.op_outputs("TopK", 2, maxima, editor.ints(width), axis=1, sorted=0)
        # Ascending again, so that the gathered tokens are ordered by id.
        blocks, _ = editor.op_outputs("TopK", 2, best, editor.ints(width), axis=1, largest=0)
        place = editor.op("Unsqueeze", blocks, editor.ints(2))
        tokens = editor.op("GatherND", scaled, place, batch_dims=1)
    row = editor.op("Reshape", tokens, editor.ints(0, -1))
    values, positions = editor.op_outputs("TopK", 2, row, editor.ints(count), axis=1)
    largest = editor.op("Gather", values, editor.ints(0), axis=1)
    return _Candidates(
        count=count,
        values=values,
        largest=largest,
        positions=positions,
        blocks=blocks,
        mass=None if count == vocab_size else _mass(editor, scaled, largest),
    )


def _mass(editor: GraphEditor, scaled: ir.Value, largest: ir.Value) -> ir.Value:
    """The sum of exp(value - largest value) of [B, n, m] in float64, [B, 1].

    Blocks are summed in float32, which is accurate to 1e-7 for so few. Softmax is a third faster,
    but sums the whole row in float32 and is off by 4e-5 where many logits are equal.
    """
    shifted = editor.op("Sub", scaled, editor.op("Unsqueeze", largest, editor.ints(2)))
    sums = editor.op("ReduceSum", editor.op("Exp", shifted), editor.ints(2), keepdims=0)
    return editor.op("ReduceSum", _double(editor, sums), editor.ints(1))


def _draw(
    editor: GraphEditor,
    candidates: _Candidates,
    top_k: ir.Value,
    top_p: ir.Value,
    min_p: ir.Value,
    uniform: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """Which candidate the uniform number picks, and whether that is certain.

    Products with 0 and 1 stand where a Where would: it costs three times as much.

    Args:
        editor: on the graph.
        candidates: of each row.
        top_k: [B, 1] int64, as the rest.
        top_p: float64.
        min_p: float64.
        uniform: float32.

    Returns:
        [B, 1] int64 and [B, 1] bool.
    """

    def op(op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return editor.op(op_type, *inputs, **attributes)

    last = editor.ints(candidates.count - 1)
    weights = op("Exp", _double(editor, op("Sub", candidates.values, candidates.largest)))
    ranks = editor.initializer("sampling.ranks", np.arange(candidates.count, dtype=np.int64))
    kept = op("Mul", weights, _double(editor, op("Less", ranks, top_k)))
    mass = op("ReduceSum", kept, editor.ints(1))
    if candidates.mass is not None:
        # Also where top_k ends among the candidates, a NaN of the others comes through.
        beyond = op("Greater", top_k, _number(editor, np.int64(candidates.count)))
        mass = op("Max", mass, op("Mul", candidates.mass, _double(editor, beyond)))
    shares = op("Div", kept, mass)
    before = op("CumSum", shares, _number(editor, np.int64(1)), exclusive=1)
    up_to = op("Add", before, shares)
    eligible = op("And", op("Less", before, top_p), op("GreaterOrEqual", weights, min_p))
    nucleus = op("Mul", shares, _double(editor, eligible))
    least = most = op("ReduceSum", nucleus, editor.ints(1))
    if candidates.mass is not None:
        # The nucleus may go on behind the candidates where the last one belongs to it. Then its
        # share is at least top_p and at most that and one more token; with min_p, at least that of
        # the candidates and at most 1.
        final = op("Gather", nucleus, last, axis=1)
        cut = op("Ceil", min_p)
        bound = op("Add", op("Max", top_p, cut), final)
        most = op("Max", most, op("Min", bound, op("Sign", final)))
        least = op("Max", least, op("Sub", top_p, cut))
    number = _double(editor, uniform)
    above = op("Greater", up_to, op("Mul", number, most))
    rank = op("ArgMax", op("Cast", above, to=ir.DataType.FLOAT), axis=1, keepdims=1)
    fits = op("GatherElements", above, rank, axis=1)
    if candidates.mass is not None:
        begin = op("GatherElements", before, rank, axis=1)
        fits = op("And", fits, op("LessOrEqual", begin, op("Mul", number, least)))
    return rank, fits


def _id_at(editor: GraphEditor, candidates: _Candidates, rank: ir.Value) -> ir.Value:
    """The token's id, [B, 1]; a gathered block's tokens stand at its place among the gathered."""
    position = editor.op("GatherElements", candidates.positions, rank, axis=1)
    if candidates.blocks is None:
        return position
    size = _number(editor, np.int64(_BLOCK))
    place = editor.op("Div", position, size)
    block = editor.op("GatherElements", candidates.blocks, place, axis=1)
    return editor.op("Add", position, editor.op("Mul", editor.op("Sub", block, place), size))


def _padded(editor: GraphEditor, logits: ir.Value, vocab_size: int, block: int) -> ir.Value:
    """[B, 1, V] lengthened to whole blocks by logits that are never picked."""
    missing = -vocab_size % block
    if not missing:
        return logits
    return editor.op(
        "Pad", logits, editor.ints(0, 0, 0, 0, 0, missing), _number(editor, np.float32(-np.inf))
    )


def _number(editor: GraphEditor, number: np.generic) -> ir.Value:
    """A stored scalar."""
    return editor.initializer(f"{number.dtype} {number}", np.asarray(number))


def _double(editor: GraphEditor, value: ir.Value) -> ir.Value:
    return editor.op("Cast", value, to=ir.DataType.DOUBLE)
