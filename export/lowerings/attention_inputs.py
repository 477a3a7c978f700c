"""What attention reads, from one product, one norm and one kernel behind them, for TensorRT.

Queries, keys, values and, where no keys are selected by scores, what scores are made of are the
heads of one product [B, S, heads, D]. One reduction norms the heads of queries and keys and lets
the others pass: out = y · (1/rms(y) or 1) · (weight or 1), all in float32. Everything behind it
then depends on one tensor, and TensorRT-RTX 1.7.1 makes the rotation, the score and the writes into
all three caches one kernel.

z = dt_proj(v_proj(x)) is linear in x, so its rows can stand in the product as a head of their own,
padded to D. In half precision z is then rounded once instead of the values it comes from: errors of
the same size, but other ones, and equal tokens still get equal scores. Where a keep window selects
by scores, z is computed from the rounded values in float32 instead, as in the canonical model, and
the norm reads the heads of queries and keys alone (TensorRT-RTX 1.7.1 dies of a segmentation fault
where it reads all of them).

A seed has no such norm, and its values are no projection: there the product makes queries and keys,
the values are put behind them, and all are multiplied by 1 in float32, which changes no number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export.functions import doge_nodes
from export.lowerings.float_nodes import FloatNodes, tapped
from export.lowerings.graph_editor import GraphEditor, producer_of
from plugins.registry import DYNAMIC_MASK_ATTENTION

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class _Heads:
    """One kind of heads as the canonical model makes them.

    Attributes:
        value: [B, heads, S, D] what attention or the cache reads.
        product: the projection.
        norm: the norm of each head, None without one.
        rotation: the RotaryEmbedding, None without one.
        count: heads.
        size: D.
    """

    value: ir.Value
    product: ir.Node
    norm: ir.Node | None
    rotation: ir.Node | None
    count: int
    size: int


@dataclass(frozen=True, kw_only=True)
class _Score:
    """How a layer makes its mask scores, score = exp(factor · softplus(z)).

    Attributes:
        value: [B, N, S, 1].
        weight: [Nkv·D, N] of z, from the values.
        factor: [N].
    """

    value: ir.Value
    weight: Array
    factor: Array


def join_attention_inputs(editor: GraphEditor) -> int:
    """Rewrite every layer whose queries and keys, and mostly values, are made of one tensor.

    Args:
        editor: on the canonical model.

    Returns:
        How many layers were rewritten.

    Raises:
        ValueError: a layer that is not as the canonical model has it.
    """
    values = tapped(editor.graph)
    layers = 0
    for node in list(doge_nodes(editor.model)):
        if node.op_type != DYNAMIC_MASK_ATTENTION.name or node.inputs[0] is None:
            continue
        layer = (node.inputs[0].name or "").removesuffix(".query")
        heads = [_heads_of(values[f"{layer}.{kind}"]) for kind in ("query", "key", "value")]
        query, key, value = heads
        if query is None or key is None:
            continue
        if len({id(h.product.inputs[0]) for h in heads if h is not None}) != 1:
            continue
        if value is None:
            layers += _rewrite_seed(editor, layer, query, key, values[f"{layer}.value"])
            continue
        apart = node.attributes["keep_window_size"].as_int() > 0
        score = values.get(f"{layer}.score")
        found = None if score is None else _score_of(editor, score)
        _rewrite(editor, layer, (query, key, value), found, apart=apart)
        layers += 1
    editor.finish()
    return layers


def _heads_of(value: ir.Value) -> _Heads | None:
    """Follow a value back to its projection; None where something else makes it."""
    node, rotation, norm = value.producer(), None, None
    if node is not None and node.op_type == "RotaryEmbedding":
        rotation, node = node, _made(node)
    if node is None or node.op_type != "Transpose" or value.shape is None:
        return None
    node = _made(node)
    if node is not None and node.op_type == "RMSNormalization":
        norm, node = node, _made(node)
    if node is None or node.op_type != "Reshape":
        return None
    product = _made(node)
    if product is None or product.op_type != "MatMul":
        return None
    count, size = (int(str(value.shape[axis])) for axis in (1, 3))
    return _Heads(
        value=value, product=product, norm=norm, rotation=rotation, count=count, size=size
    )


def _made(node: ir.Node) -> ir.Node | None:
    return None if node.inputs[0] is None else node.inputs[0].producer()


def _score_of(editor: GraphEditor, value: ir.Value) -> _Score:
    by_head = producer_of(producer_of(value, "Unsqueeze").inputs[0], "Transpose")
    scaled = producer_of(producer_of(by_head.inputs[0], "Exp").inputs[0], "Mul")
    factor, softplus = scaled.inputs
    projection = producer_of(producer_of(softplus, "Where").inputs[1], "MatMul")
    return _Score(
        value=value,
        weight=editor.array(projection.inputs[1]),
        factor=editor.array(factor),
    )


def _rewrite(
    editor: GraphEditor,
    layer: str,
    heads: tuple[_Heads, _Heads, _Heads],
    score: _Score | None,
    *,
    apart: bool,
) -> None:
    query, key, value = heads
    D, rotated = query.size, query.count + key.count
    op = FloatNodes(editor)
    weights = [editor.array(h.product.inputs[1]) for h in heads]  # each [H, heads·D]
    if score is not None and not apart:
        z_weight = np.zeros((weights[2].shape[0], D), np.float32)
        z_weight[:, : len(score.factor)] = weights[2] @ score.weight
        weights.append(z_weight)
    packed = np.ascontiguousarray(np.concatenate(weights, axis=1))
    total = packed.shape[1] // D
    x = query.product.inputs[0]
    y = op("MatMul", x, editor.initializer(f"{layer}.attention_inputs.weight", packed))
    y = op("Reshape", y, editor.ints(0, 0, total, D))  # [B, S, total, D]
    turned = y
    if query.norm is not None and key.norm is not None:
        if apart:
            turned = _normed(editor, layer, op.slice(y, 0, rotated, 2), (query, key), rotated)
        else:
            turned = y = _normed(editor, layer, y, (query, key), total)

    turned = op("Transpose", op.slice(turned, 0, rotated, 2), perm=(0, 2, 1, 3))
    if query.rotation is not None:
        turned = op("RotaryEmbedding", turned, *query.rotation.inputs[1:])
    editor.replace(query.value, op.slice(turned, 0, query.count, 1))
    editor.replace(key.value, op.slice(turned, query.count, rotated, 1))
    values = op.slice(y, rotated, rotated + value.count, 2)  # [B, S, Nkv, D]
    editor.replace(value.value, op("Transpose", values, perm=(0, 2, 1, 3)))
    if score is not None:
        if apart:
            z = _z_from_values(editor, layer, values, score)
        else:
            z = op.slice(y, total - 1, total, 2)  # [B, S, 1, D]
            z = op("Transpose", op.slice(z, 0, len(score.factor), 3), perm=(0, 3, 1, 2))
        factor = editor.initializer(f"{layer}.score_factor", score.factor.reshape(-1, 1, 1))
        # Softplus needs no threshold: what expands it is stable for large numbers.
        editor.replace(score.value, op("Exp", op("Mul", factor, op("Softplus", z))))


def _rewrite_seed(
    editor: GraphEditor, layer: str, query: _Heads, key: _Heads, value: ir.Value
) -> bool:
    """Join queries, keys and what stands behind `value`; whether it is a layer of that kind."""
    by_head = value.producer()
    if by_head is None or by_head.op_type != "Transpose" or value.shape is None:
        return False
    if query.norm is not None or key.norm is not None or key.rotation is not None:
        return False
    D, rotated = query.size, query.count + key.count
    total = rotated + int(str(value.shape[1]))
    op, op32 = FloatNodes(editor), FloatNodes(editor, stay=True)
    weights = [editor.array(h.product.inputs[1]) for h in (query, key)]  # each [H, heads·D]
    packed = np.ascontiguousarray(np.concatenate(weights, axis=1))
    stored = editor.initializer(f"{layer}.attention_inputs.weight", packed)
    y = op("Reshape", op("MatMul", query.product.inputs[0], stored), editor.ints(0, 0, rotated, D))
    y = op("Concat", y, by_head.inputs[0], axis=2)  # [B, S, total, D]
    ones = editor.initializer(f"{total} heads of ones", np.ones((total, D), np.float32))
    y = op32("Mul", y, ones)

    def heads(begin: int, end: int) -> ir.Value:
        return op("Transpose", op.slice(y, begin, end, 2), perm=(0, 2, 1, 3))

    turned = heads(0, query.count)
    if query.rotation is not None:
        turned = op("RotaryEmbedding", turned, *query.rotation.inputs[1:])
    editor.replace(query.value, turned)
    editor.replace(key.value, heads(query.count, rotated))
    editor.replace(value, heads(rotated, total))
    return True


def _normed(
    editor: GraphEditor, layer: str, y: ir.Value, normed: tuple[_Heads, _Heads], total: int
) -> ir.Value:
    """Norm the first heads of y [B, S, total, D] and let the others pass, exactly."""
    count = sum(h.count for h in normed)
    op = FloatNodes(editor, stay=True)
    weight = np.ones((total, normed[0].size), np.float32)
    epsilons = set()
    at = 0
    for h in normed:
        if h.norm is None:
            raise AssertionError("asked for by the caller")
        weight[at : at + h.count] = editor.array(h.norm.inputs[1])
        epsilons.add(h.norm.attributes["epsilon"].as_float())
        at += h.count
    (epsilon,) = epsilons
    is_normed = (np.arange(total) < count)[:, None]  # [total, 1]
    mean = op("ReduceMean", op("Mul", y, y), editor.ints(-1), keepdims=1)
    scale = op("Reciprocal", op("Sqrt", op("Add", mean, editor.float(epsilon))))
    if count < total:
        chosen = editor.initializer(f"first {count} of {total} heads", is_normed)
        scale = op("Where", chosen, scale, editor.float(1.0))
    return op("Mul", op("Mul", y, scale), editor.initializer(f"{layer}.qk_norm.weight", weight))


def _z_from_values(editor: GraphEditor, layer: str, values: ir.Value, score: _Score) -> ir.Value:
    """dt_proj of values [B, S, Nkv, D] as a sum of products in float32: [B, N, S, 1]."""
    op = FloatNodes(editor, stay=True)
    flat = op("Reshape", values, editor.ints(0, 0, 1, len(score.weight)))
    weight = editor.initializer(f"{layer}.dt_proj.rows", np.ascontiguousarray(score.weight.T))
    z = op("ReduceSum", op("Mul", flat, weight), editor.ints(-1), keepdims=1)  # [B, S, N, 1]
    return op("Transpose", z, perm=(0, 2, 1, 3))
