"""The op as an ONNX function of standard operators; names follow the definition in op.py.

Equal scores at the boundary of a TopK leave the set of experts to the backend: their weights are
equal, and a trained router gives no equal scores.
"""

from __future__ import annotations

import onnx_ir as ir

from plugins.onnx_function import FunctionBuilder
from plugins.registry import EXPERT_GATHER


def make_function(
    *, top_k: int, weight_inside: bool, normalize: bool, num_keys: int, heads: int
) -> ir.Function:
    """The body for one model, at any float type.

    Args:
        top_k: K experts per token and head.
        weight_inside: multiply by the weight before the activation instead of after.
        normalize: divide the weights by their sum.
        num_keys: n.
        heads: P.
    """
    body = FunctionBuilder(EXPERT_GATHER)
    op = body.op
    hidden, scores_x, scores_y, down, up = body.inputs.values()
    per_axis = min(top_k, num_keys)

    best_x, index_x = body.op_outputs("TopK", 2, scores_x, body.ints(per_axis), axis=-1)
    best_y, index_y = body.op_outputs("TopK", 2, scores_y, body.ints(per_axis), axis=-1)
    pairs = body.ints(0, heads, per_axis * per_axis)
    rows, columns = body.ints(-1), body.ints(-2)
    sums = op("Add", op("Unsqueeze", best_x, rows), op("Unsqueeze", best_y, columns))
    sums = op("Reshape", sums, pairs)  # [T, P, min(K, n)²]
    row_start = op("Mul", index_x, body.int(num_keys))
    experts = op("Add", op("Unsqueeze", row_start, rows), op("Unsqueeze", index_y, columns))
    experts = op("Reshape", experts, pairs)
    picked, position = body.op_outputs("TopK", 2, sums, body.ints(top_k), axis=-1)
    experts = op("GatherElements", experts, position, axis=-1)  # [T, P, K]
    weights = op("Softmax", picked, axis=-1)
    if normalize:
        weights = op("Div", weights, op("ReduceSum", weights, body.ints(-1)))

    experts = op("Reshape", experts, body.ints(0, heads * top_k))  # [T, P·K]
    weights = op("Reshape", weights, body.ints(0, heads * top_k))
    down_rows = op("Gather", down, experts)  # [T, P·K, H]
    up_rows = op("Gather", up, experts)
    product = op("MatMul", down_rows, op("Unsqueeze", hidden, rows))  # [T, P·K, 1]
    product = op("Squeeze", product, rows)
    if weight_inside:
        product = op("Mul", product, weights)
    activation = op("Mul", product, op("Sigmoid", product))  # SiLU
    if not weight_inside:
        activation = op("Mul", activation, weights)
    mixed = op("MatMul", op("Unsqueeze", activation, body.ints(1)), up_rows)  # [T, 1, H]
    mixed = op("Squeeze", mixed, body.ints(1))
    return body.build([mixed], attributes=("top_k", "weight_inside", "normalize"))
