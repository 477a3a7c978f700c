"""The expert gather for TensorRT: the whole grid of sums, and two sums over gathered rows.

Expert i·n + j has the sum of router scores x_i and y_j, so the best places in the flattened grid of
sums are the experts: one TopK instead of three and no gathers of indices. That is more numbers to
choose from, and in decoding far fewer kernels. Products with the gathered rows are written as Mul
and ReduceSum, which TensorRT-RTX 1.7.1 fuses with the Gather in front and the activation behind.

With one head and the weight outside, exp(s_k - s_first) is divided by its sum at the very end. That
sum is taken over rows [K, H] like the result beside it, so that both are one kernel.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.functions import doge_nodes
from export.lowerings.float_nodes import FloatNodes
from export.lowerings.graph_editor import GraphEditor
from plugins.registry import EXPERT_GATHER

# Larger grids keep the op's function, which sorts each axis first.
LARGEST_GRID = 4096
# TensorRT-RTX 1.7.1 takes two kernels for the best few of more places than this, and one for the
# best 32; then 32 are taken and the first of them used.
_FEW_OF = 1024
_AT_ONCE = 32


def sum_experts(editor: GraphEditor) -> int:
    """Replace every ExpertGather whose grid has at most `LARGEST_GRID` places.

    Returns:
        How many were replaced.
    """
    replaced = 0
    for node in list(doge_nodes(editor.model)):
        if node.op_type != EXPERT_GATHER.name:
            continue
        scores = node.inputs[1]
        if scores is None or scores.shape is None:
            raise ValueError(f"{node.name}: the router's scores have no shape")
        heads, n = (int(str(size)) for size in scores.shape[1:])
        if n * n <= LARGEST_GRID:
            editor.replace(node.outputs[0], _summed(editor, node, heads, n))
            replaced += 1
    editor.finish()
    return replaced


def _summed(editor: GraphEditor, node: ir.Node, heads: int, n: int) -> ir.Value:
    """The experts' sum [T, H] of a node whose scores are [T, heads, n]."""
    hidden, scores_x, scores_y, down, up = node.inputs
    top_k = node.attributes["top_k"].as_int()
    inside = bool(node.attributes["weight_inside"].as_int())
    ints = editor.ints
    op = FloatNodes(editor)
    grid = op("Add", op("Unsqueeze", scores_x, ints(-1)), op("Unsqueeze", scores_y, ints(-2)))
    grid = op("Reshape", grid, ints(0, heads, n * n))
    taken = max(top_k, _AT_ONCE) if n * n > _FEW_OF else top_k
    picked, experts = editor.op_outputs("TopK", 2, grid, ints(taken), axis=-1)  # [T, P, taken]
    picked.type = ir.TensorType(ir.DataType.FLOAT)
    experts.type = ir.TensorType(ir.DataType.INT64)
    if taken > top_k:  # they are sorted
        picked = op.slice(picked, 0, top_k, 2)
        experts = editor.op("Slice", experts, ints(0), ints(top_k), ints(2))
        experts.type = ir.TensorType(ir.DataType.INT64)
    experts = editor.op("Reshape", experts, ints(0, heads * top_k))
    experts.type = ir.TensorType(ir.DataType.INT64)
    down_rows, up_rows = op("Gather", down, experts), op("Gather", up, experts)  # [T, P·K, H]

    op32 = FloatNodes(editor, stay=True)
    products = op32("Mul", down_rows, op("Unsqueeze", hidden, ints(1)))
    product = op32("ReduceSum", products, ints(-1), keepdims=0)  # [T, P·K]
    late = heads == 1 and not inside
    weights = _shares(editor, picked, heads * top_k, late=late)
    if inside:
        product = op32("Mul", product, weights)
    activation = op32("Mul", product, op32("Sigmoid", product))
    if not inside:
        activation = op32("Mul", activation, weights)
    rows = op32("Mul", op32("Unsqueeze", activation, ints(-1)), up_rows)
    result = op32("ReduceSum", rows, ints(1), keepdims=0)  # [T, H]
    if late:
        width = editor.array(up).shape[1]
        ones = editor.initializer(f"{width} ones", np.ones(width, np.float32))
        repeated = op32("Mul", op32("Unsqueeze", weights, ints(-1)), ones)
        result = op32("Div", result, op32("ReduceSum", repeated, ints(1), keepdims=0))
    return result


def _shares(editor: GraphEditor, picked: ir.Value, count: int, *, late: bool) -> ir.Value:
    """Weights [T, count] of the picked scores [T, P, K]: softmax, or exp alone when `late`.

    A softmax over all K sums to 1 already, so `normalize` changes nothing.
    """
    op = FloatNodes(editor, stay=True)
    if not late:
        return op("Reshape", op("Softmax", picked, axis=-1), editor.ints(0, count))
    flat = op("Reshape", picked, editor.ints(0, count))
    first = op.slice(flat, 0, 1, 1)  # the largest: TopK sorts
    return op("Exp", op("Sub", flat, first))
