"""Attention as ONNX Runtime's GroupQueryAttention, which rotates and appends to the cache itself.

Its bias must be [batch or 1, heads or 1, S, total]: the scores of the slots in use, the same for
each of the S queries, and causality is its own. With S > 1 and a filled cache it takes one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export.functions import doge_nodes
from export.lowerings.graph_editor import GraphEditor, producer_of
from plugins.dynamic_mask_attention.function import LOWEST, keep_largest
from plugins.onnx_function import Attribute
from plugins.registry import DYNAMIC_MASK_ATTENTION

_INT8_CACHE: dict[str, Attribute] = {
    "kv_cache_bit_width": 8,
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
}


@dataclass(frozen=True)
class _Lengths:
    """What every layer shares.

    Attributes:
        last_slot: int32 [B], the last slot that each row fills in this step.
        total: int64 [1], slots in use, or all of them where keys are selected.
        total_int32: the same.
        per_query: int64 [4], the shape that repeats a bias for each of the S queries.
        query_slot: int64 [B, 1, S, 1], for the selection.
    """

    last_slot: ir.Value
    total: ir.Value
    total_int32: ir.Value
    per_query: ir.Value
    query_slot: ir.Value


@dataclass(frozen=True)
class _Heads:
    """A projection [B, S, heads·D], and what followed its split into heads."""

    packed: ir.Value
    norm: ir.Node | None
    rotary: ir.Node | None


@dataclass(frozen=True)
class CacheScales:
    """Scales of one layer's cache of 8-bit integers, a number for each channel.

    Attributes:
        key: float32 [Nkv, D].
        value: float32 [Nkv, D].
    """

    key: npt.NDArray[np.float32]
    value: npt.NDArray[np.float32]


def use_grouped_query_attention(
    editor: GraphEditor, scales: Sequence[CacheScales] | None = None
) -> None:
    """Replace every DynamicMaskAttention with the cache writes and rotations in front of it.

    Args:
        editor: on the canonical model.
        scales: one per layer caches keys and values as int8; None caches them as they are.
    """
    nodes = [n for n in doge_nodes(editor.model) if n.op_type == DYNAMIC_MASK_ATTENTION.name]
    lengths = _lengths(editor, nodes[0])
    for layer, node in enumerate(nodes):
        _replace(editor, node, lengths, None if scales is None else scales[layer])


def _lengths(editor: GraphEditor, node: ir.Node) -> _Lengths:
    op = editor.op
    write_index, past = node.inputs[4], producer_of(node.inputs[1], "TensorScatter").inputs[0]
    new = op("Shape", editor.graph.inputs[0], start=1, end=2)
    last = op("Sub", op("Add", write_index, new), editor.ints(1))  # [B]
    if node.attributes["keep_window_size"].as_int():
        total = op("Shape", past, start=2, end=3)
    else:
        total = op("Add", op("ReduceMax", last, keepdims=1), editor.ints(1))
    steps = op("Range", editor.int(0), op("Squeeze", new), editor.int(1))
    query_slot = op("Add", op("Unsqueeze", write_index, editor.ints(1)), steps)
    int32 = int(ir.DataType.INT32)
    return _Lengths(
        last_slot=op("Cast", last, to=int32),
        total=total,
        total_int32=op("Cast", total, to=int32),
        # Expand takes its input's own sizes where the shape says 1.
        per_query=op("Concat", editor.ints(1, 1), new, editor.ints(1), axis=0),
        query_slot=op("Unsqueeze", query_slot, editor.ints(1, 3)),
    )


def _replace(
    editor: GraphEditor, node: ir.Node, lengths: _Lengths, scales: CacheScales | None
) -> None:
    query, present_key, present_value = node.inputs[:3]
    write_key = producer_of(present_key, "TensorScatter")
    write_value = producer_of(present_value, "TensorScatter")
    q, k, v = (_heads(v) for v in (query, write_key.inputs[1], write_value.inputs[1]))
    query_heads, kv_heads = _count(query), _count(present_key)
    if q.rotary is None:
        raise ValueError(f"{node.name}: queries are rotated in every Doge")
    rotates_keys = k.rotary is not None
    cos, sin = q.rotary.inputs[1:3]
    queries = _normed(editor, q, query_heads)
    if not rotates_keys:
        tables = q.rotary.inputs[1:4]
        queries = editor.op("RotaryEmbedding", queries, *tables, num_heads=query_heads)
    attended, new_key, new_value = editor.contrib_outputs(
        "GroupQueryAttention",
        3,
        queries,
        _normed(editor, k, kv_heads),
        v.packed,
        write_key.inputs[0],
        write_value.inputs[0],
        lengths.last_slot,
        lengths.total_int32,
        cos if rotates_keys else None,
        sin if rotates_keys else None,
        None,
        _bias(editor, node, query_heads, lengths),
        *_scale_inputs(editor, present_key, scales),
        num_heads=query_heads,
        kv_num_heads=kv_heads,
        do_rotary=int(rotates_keys),
        scale=node.attributes["scale"].as_float(),
        **(_INT8_CACHE if scales is not None else {}),
    )
    editor.replace(node.outputs[0], attended)
    for old, new in ((present_key, new_key), (present_value, new_value)):
        if old is not None:
            editor.replace(old, new)
    if scales is not None:
        for cached in (write_key.inputs[0], write_value.inputs[0], new_key, new_value):
            if cached is not None:
                cached.type = ir.TensorType(ir.DataType.INT8)


def _scale_inputs(
    editor: GraphEditor, present_key: ir.Value | None, scales: CacheScales | None
) -> tuple[ir.Value | None, ...]:
    """No attention sink, then the scales of keys and values as [1, Nkv, 1, D]."""
    if scales is None or present_key is None:
        return ()
    layer = (present_key.name or "").removesuffix(".key")
    stored = (
        editor.initializer(f"{layer}.{kind}_scale", array[None, :, None].astype(np.float32))
        for kind, array in (("key", scales.key), ("value", scales.value))
    )
    return (None, *stored)


def _bias(
    editor: GraphEditor, node: ir.Node, query_heads: int, lengths: _Lengths
) -> ir.Value | None:
    """The scores in use as [B or 1, N, S, total]; None where they say nothing."""
    op, score = editor.op, node.inputs[3]
    heads = _count(score)
    if score is not None and score.const_value is not None and not editor.array(score).any():
        return None
    bias = op("Reshape", score, editor.ints(0, heads, 1, -1))  # [B or 1, N, 1, C]
    window = node.attributes["keep_window_size"].as_int()
    if window:
        key_slot = op("Range", editor.int(0), op("Squeeze", lengths.total), editor.int(1))
        visible = op("LessOrEqual", key_slot, lengths.query_slot)  # [B, 1, S, C]
        hidden = editor.float(LOWEST["float32"])
        bias = op("Where", visible, bias, hidden)
        bias = op("Where", keep_largest(editor, bias, window), bias, hidden)
    else:
        bias = op("Slice", bias, editor.ints(0), lengths.total, editor.ints(3))
        bias = op("Expand", bias, lengths.per_query)
    if heads not in (1, query_heads):
        rows = np.repeat(np.arange(heads), query_heads // heads)
        bias = op("Gather", bias, editor.initializer("score head of query head", rows), axis=1)
    return bias


def _count(value: ir.Value | None) -> int:
    size = None if value is None or value.shape is None else value.shape[1]
    if not isinstance(size, int):
        raise ValueError(f"{value and value.name} needs a fixed number of heads, got {size}")
    return size


def _normed(editor: GraphEditor, heads: _Heads, count: int) -> ir.Value:
    if heads.norm is None:
        return heads.packed
    return editor.contrib(
        "BranchwiseRMSNorm",
        heads.packed,
        heads.norm.inputs[1],
        num_branches=count,
        epsilon=heads.norm.attributes["epsilon"].as_float(),
    )


def _heads(value: ir.Value | None) -> _Heads:
    """Walk back from [B, heads, S, D] to what was split into heads."""
    found: dict[str, ir.Node] = {}
    name = value and value.name
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Reshape" and node.inputs[0] is not None:
            return _Heads(
                node.inputs[0], found.get("RMSNormalization"), found.get("RotaryEmbedding")
            )
        if node.op_type not in {"Transpose", "RMSNormalization", "RotaryEmbedding"}:
            break
        found[node.op_type] = node
        value = node.inputs[0]
    raise ValueError(f"{name} is no projection that is split into heads")
