"""Weights of 8 or 4 bits in an engine whose arithmetic is float16.

Each product with a stored weight reads it through a DequantizeLinear, which TensorRT-RTX keeps in
the engine as narrow as it is and fuses with the product. Weights w become q · scale, with scales
in float16 and no zero points, as TensorRT wants them:

  int8  one scale per output, the largest number of it at 127
  fp8   e4m3, one scale per output, the largest number of it at 448, the largest there is
  int4  one scale per block of inputs, of several tried the one with the least squared error
        (`narrow_weights.round_blocks`, the same search as for the CPU)

What stays as it is (docs/engine_precisions.md has the measurements): tables that are looked up,
among them the experts' and a tied head. With int4 a head of its own and what routes tokens are
int8: beside a float16 product of the same value TensorRT-RTX 1.7.1 would widen a narrow weight in
every step, to make both one product. So is the projection behind attention, whose output it copies
for a product with blocks of 4 bits and for no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export.lowerings.graph_editor import GraphEditor
from export.lowerings.narrow_weights import KEPT, fitting_block_size, levels_of, round_blocks

WeightFormat = Literal["int8", "int4", "fp8"]
WEIGHT_FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
WEIGHT_FORMAT_BITS: dict[WeightFormat, Literal[4, 8]] = {"int8": 8, "int4": 4, "fp8": 8}
INT4_BLOCK_SIZE = 64
_HEAD = "lm_head.weight"
# Parts of names of what has at least 8 bits.
_EIGHT_BITS = ("router_gate", "value_gate", "o_proj", _HEAD)
# Parts of names of what stays float16. Of dt_proj there are but a few rows, and the mask follows
# from them.
ENGINE_KEPT = (*(part for part in KEPT if part not in _EIGHT_BITS), "dt_proj")
_FP8_LARGEST = np.float32(448)  # of e4m3

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class NarrowWeight:
    """A weight as the engine stores it.

    Attributes:
        stored: the narrow numbers, in the shape of the weight.
        scales: float16; [outputs], or of int4 the weight's shape with a scale in place of a block.
        axis: of the outputs, or of int4 that of the inputs, along which the blocks run.
        block_size: inputs that share a scale; 0 where an output has one.
    """

    stored: Array
    scales: npt.NDArray[np.float16]
    axis: int
    block_size: int


@dataclass(frozen=True, kw_only=True)
class _Product:
    """A product with a stored weight.

    Attributes:
        node: MatMul or Gemm.
        weight: the initializer, [outputs, inputs] or [inputs, outputs].
        inputs_axis: 1 or 0, of the two.
        weights: the format that the weight gets.
    """

    node: ir.Node
    weight: ir.Value
    inputs_axis: int
    weights: WeightFormat


def narrow_engine_weights(model: ir.Model, weights: WeightFormat) -> tuple[str, ...]:
    """Rewrite every product with a stored float16 weight, at the end of a lowering to float16.

    Products of one value become one, which TensorRT-RTX 1.7.1 does by itself with float16 weights
    and not with narrow ones. That changes no number.

    Args:
        model: lowered, and changed in place.
        weights: the format of the weights.

    Returns:
        Names of the weights that were rewritten; of joined ones, with a space between.

    Raises:
        ValueError: no product has such a weight, or one has inputs that no block of int4 divides.
    """
    editor = GraphEditor(model)
    _join_products(editor, list(_products(editor.graph, weights)))
    names = []
    for product in list(_products(editor.graph, weights)):
        weight = product.weight
        try:
            array = editor.array(weight).astype(np.float32)
            narrow = narrowed(array, product.weights, product.inputs_axis)
        except ValueError as error:
            raise ValueError(f"{weight.name}: {error}") from error
        _replace(editor, weight, narrow, product.weights)
        names.append(weight.name or "")
    if not names:
        raise ValueError(
            f"no product of the model has a stored float16 weight to make {weights}; lower it to "
            "float16 first"
        )
    editor.finish()
    return tuple(names)


def narrowed(
    weight: npt.NDArray[np.float32],
    weights: WeightFormat,
    inputs_axis: int,
    block_size: int = INT4_BLOCK_SIZE,
) -> NarrowWeight:
    """Round a weight.

    Args:
        weight: [outputs, inputs] or [inputs, outputs].
        weights: the format.
        inputs_axis: 1 or 0, of the two.
        block_size: of int4; where it does not divide the inputs, the largest power of two below it
            that does, and at least 16, is taken.

    Raises:
        ValueError: inputs that are no multiple of 16, of int4.
    """
    rows = np.ascontiguousarray(weight if inputs_axis == 1 else weight.T)  # [outputs, inputs]
    block = rows.shape[1]
    if weights == "int4":
        block = _block_size(rows.shape[1], block_size)
    blocks = rows.reshape(-1, block)
    if weights == "fp8":
        scales = _stored_scales(np.abs(blocks).max(-1) / _FP8_LARGEST)
        levels = (blocks / scales[:, None].astype(np.float32)).astype(ml_dtypes.float8_e4m3fn)
    else:
        bits = WEIGHT_FORMAT_BITS[weights]
        scales = _stored_scales(round_blocks(blocks, bits, positive=True)[1])
        rounded = levels_of(blocks, scales.astype(np.float32), bits)
        levels = rounded.astype(np.int8 if bits == 8 else ml_dtypes.int4)
    stored, scales = levels.reshape(rows.shape), scales.reshape(len(rows), -1)
    if inputs_axis == 0:
        stored, scales = np.ascontiguousarray(stored.T), np.ascontiguousarray(scales.T)
    if weights == "int4":
        return NarrowWeight(stored=stored, scales=scales, axis=inputs_axis, block_size=block)
    return NarrowWeight(stored=stored, scales=scales.ravel(), axis=1 - inputs_axis, block_size=0)


def weight_format(precision: str) -> WeightFormat | None:
    """The format of the weights of an engine's precision, None where it is that of everything."""
    return next((weights for weights in WEIGHT_FORMATS if weights == precision), None)


def format_in_engine(
    name: str, shape: tuple[int, ...], weights: WeightFormat, *, tied: bool
) -> WeightFormat | None:
    """The format of a checkpoint's tensor, from its name and shape alone; None for float16.

    Args:
        name: in the checkpoint.
        shape: of the tensor.
        weights: the format of the weights.
        tied: whether the head is the embedding.
    """
    is_linear = name.endswith(("_proj.weight", "router_gate.weight"))
    is_linear |= name == _HEAD and not tied
    return _format_of(name, weights) if len(shape) == 2 and is_linear else None


def narrow_bytes(shape: tuple[int, ...], weights: WeightFormat) -> int:
    """What a weight [outputs, inputs] and its scales take."""
    outputs, inputs = shape
    scales = outputs
    if weights == "int4":
        scales *= inputs // _block_size(inputs, INT4_BLOCK_SIZE)
    return outputs * inputs * WEIGHT_FORMAT_BITS[weights] // 8 + 2 * scales


def _format_of(name: str, weights: WeightFormat) -> WeightFormat | None:
    if any(part in name for part in ENGINE_KEPT):
        return None
    return "int8" if weights == "int4" and any(part in name for part in _EIGHT_BITS) else weights


def _block_size(inputs: int, block_size: int) -> int:
    if inputs % 16:
        raise ValueError(
            f"{inputs} inputs are no multiple of 16, the smallest block of int4; take --precision "
            "int8 or fp8"
        )
    return fitting_block_size(inputs, block_size)


def _stored_scales(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Scales in float16, rounded up: then no number lies beyond the range; of zeros one is 1."""
    stored = scales.astype(np.float16)
    low = stored.astype(np.float32) < scales
    stored[low] = np.nextafter(stored[low], np.float16(np.inf))
    stored[scales == 0] = 1  # TensorRT takes no scale of 0
    return stored


def _products(graph: ir.Graph, weights: WeightFormat) -> Iterator[_Product]:
    """Products whose stored float16 weight no other node reads."""
    for value in graph.initializers.values():
        if value.dtype != ir.DataType.FLOAT16 or value.shape is None or len(value.shape) != 2:
            continue
        uses, chosen = list(value.uses()), _format_of(value.name or "", weights)
        if len(uses) != 1 or chosen is None:
            continue
        if product := _product(uses[0].node, uses[0].idx, value, chosen):
            yield product


def _product(node: ir.Node, place: int, weight: ir.Value, weights: WeightFormat) -> _Product | None:
    """The product that reads `weight` at this place, itself or transposed; None where none does."""
    if node.domain:
        return None
    if node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]:
        uses = list(node.outputs[0].uses())
        if len(uses) != 1:
            return None
        found = _product(uses[0].node, uses[0].idx, weight, weights)
        return None if found is None else replace(found, inputs_axis=1 - found.inputs_axis)
    if place != 1 or node.op_type not in {"MatMul", "Gemm"}:
        return None
    transposed = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    axis = 1 if transposed else 0
    return _Product(node=node, weight=weight, inputs_axis=axis, weights=weights)


def _join_products(editor: GraphEditor, products: Sequence[_Product]) -> None:
    """Make MatMuls of one value one, whose result is split."""
    by_value: dict[tuple[ir.Value, WeightFormat], list[_Product]] = {}
    for product in products:
        value = product.node.inputs[0]
        if value is not None and product.node.op_type == "MatMul":
            by_value.setdefault((value, product.weights), []).append(product)
    for (value, _), group in by_value.items():
        if len(group) == 1:
            continue
        arrays = [editor.array(p.weight) for p in group]
        rows = [a if p.inputs_axis == 1 else a.T for a, p in zip(arrays, group, strict=True)]
        joined = editor.initializer(
            " ".join(p.weight.name or "" for p in group), np.concatenate(rows)
        )
        result = _typed(
            editor.op("MatMul", value, _typed(editor.op("Transpose", joined, perm=(1, 0))))
        )
        sizes = editor.ints(*(len(part) for part in rows))
        parts = editor.op_outputs("Split", len(group), result, sizes, axis=-1)
        for product, part in zip(group, parts, strict=True):
            editor.replace(product.node.outputs[0], part)
    editor.finish()


def _typed(value: ir.Value) -> ir.Value:
    value.type = ir.TensorType(ir.DataType.FLOAT16)
    return value


def _replace(
    editor: GraphEditor, weight: ir.Value, narrow: NarrowWeight, weights: WeightFormat
) -> None:
    attributes = {"axis": narrow.axis}
    if narrow.block_size:
        attributes["block_size"] = narrow.block_size
    wide = editor.op(
        "DequantizeLinear",
        editor.initializer(f"{weight.name}.{weights}", narrow.stored),
        editor.initializer(f"{weight.name}.{weights}.scale", narrow.scales),
        **attributes,
    )
    _typed(wide).shape = weight.shape
    weight.replace_all_uses_with(wide)
