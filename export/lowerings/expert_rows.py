"""The expert gather for ONNX Runtime: fewer candidates, fewer nodes.

With each axis sorted, the pair of ranks (i, j), counted from 1, can be among the best K sums only
if i·j ≤ K: every pair of ranks up to i and up to j is at least as large. That leaves 50 candidates
of 256 for K = 16.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.functions import doge_nodes
from export.lowerings.graph_editor import GraphEditor
from plugins.registry import EXPERT_GATHER


def gather_expert_rows(editor: GraphEditor) -> None:
    """Replace every ExpertGather by standard and contrib nodes."""
    for node in [n for n in doge_nodes(editor.model) if n.op_type == EXPERT_GATHER.name]:
        rows = _lowered(editor, node)  # [T, 1, H]
        readers = list(node.outputs[0].uses())
        if readers and all(user.op_type == "Reshape" and place == 0 for user, place in readers):
            for user, _ in readers:
                user.replace_input_with(0, rows)
        else:
            editor.replace(node.outputs[0], editor.op("Squeeze", rows, editor.ints(1)))


def _lowered(editor: GraphEditor, node: ir.Node) -> ir.Value:
    """The experts' sum as [T, 1, H]."""
    op = editor.op
    hidden, scores_x, scores_y, down, up = node.inputs
    top_k = node.attributes["top_k"].as_int()
    if scores_x is None or scores_x.shape is None:
        raise ValueError(f"{node.name}: the router's scores have no shape")
    heads, n = (int(str(size)) for size in scores_x.shape[1:])
    per_axis = editor.ints(min(top_k, n))
    best_x, index_x = editor.op_outputs("TopK", 2, scores_x, per_axis, axis=-1)
    best_y, index_y = editor.op_outputs("TopK", 2, scores_y, per_axis, axis=-1)
    rows, columns = _candidates(min(top_k, n), top_k)
    x, y = editor.initializer("expert ranks x", rows), editor.initializer("expert ranks y", columns)
    sums = op("Add", op("Gather", best_x, x, axis=-1), op("Gather", best_y, y, axis=-1))
    picked, position = editor.op_outputs("TopK", 2, sums, editor.ints(top_k), axis=-1)
    first = op("Mul", op("Gather", index_x, x, axis=-1), editor.int(n))
    experts = op("Add", first, op("Gather", index_y, y, axis=-1))
    experts = op("GatherElements", experts, position, axis=-1)  # [T, P, K]
    weights = op("Softmax", picked, axis=-1)
    if node.attributes["normalize"].as_int():
        weights = op("Div", weights, op("ReduceSum", weights, editor.ints(-1)))
    if heads > 1:
        flat = editor.ints(0, heads * top_k)
        experts, weights = op("Reshape", experts, flat), op("Reshape", weights, flat)
        rows_of = op("Unsqueeze", weights, editor.ints(1))  # [T, 1, P·K]
    else:
        experts, rows_of = op("Squeeze", experts, editor.ints(1)), weights  # [T, K], [T, 1, K]
    down_rows, up_rows = op("Gather", down, experts), op("Gather", up, experts)  # [T, P·K, H]
    flattened = hidden.producer() if hidden is not None else None
    if flattened is not None and flattened.op_type == "Reshape":
        width = editor.array(up).shape[1]
        tokens = op("Reshape", flattened.inputs[0], editor.ints(-1, 1, width))  # [T, 1, H]
    else:
        tokens = op("Unsqueeze", hidden, editor.ints(1))  # [T, 1, H]
    product = editor.contrib("FusedMatMul", tokens, down_rows, transB=1)  # [T, 1, P·K]
    inside = node.attributes["weight_inside"].as_int()
    if inside:
        product = op("Mul", product, rows_of)
    activation = editor.contrib("QuickGelu", product, alpha=1.0)
    if not inside:
        activation = op("Mul", activation, rows_of)
    return op("MatMul", activation, up_rows)


def _candidates(per_axis: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(i, j) for i in range(per_axis) for j in range(per_axis) if (i + 1) * (j + 1) <= top_k]
    rows, columns = np.array(pairs, np.int64).T
    return rows, columns
