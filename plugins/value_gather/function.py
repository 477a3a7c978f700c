"""The op as an ONNX function of standard operators; names follow the definition in op.py.

Ranks are counted by comparing every pair of rows rather than taken from a TopK: N is a handful, and
TensorRT promises no order among equals.
"""

from __future__ import annotations

import onnx_ir as ir

from plugins.onnx_function import FunctionBuilder
from plugins.registry import VALUE_GATHER
from plugins.value_gather.subsets import value_subsets


def make_function(*, top_k: int, subset_sums: bool, num_rows: int) -> ir.Function:
    """The body for one model, at any float type.

    Args:
        top_k: K rows per token and head.
        subset_sums: whether the table holds the sums of every set of K rows.
        num_rows: N.
    """
    body = FunctionBuilder(VALUE_GATHER)
    op = body.op
    scores, table = body.inputs.values()

    other = op("Unsqueeze", scores, body.ints(-2))  # [T, R, 1, N]
    own = op("Unsqueeze", scores, body.ints(-1))  # [T, R, N, 1]
    row = op("Range", body.int(0), body.int(num_rows), body.int(1))
    earlier = op("Less", row, op("Unsqueeze", row, body.ints(-1)))  # [N, N]: a' < a
    beaten = op(
        "Or", op("Greater", other, own), op("And", op("Equal", other, own), earlier)
    )  # [T, R, N, N]
    rank = op("ReduceSum", op("Cast", beaten, to=int(ir.DataType.FLOAT)), body.ints(-1), keepdims=0)
    picked = op("Less", rank, body.float(float(top_k)))  # [T, R, N]
    if subset_sums:
        # The set as a number with one bit per row, then its place in the table.
        subset_of = [0] * 2**num_rows
        for number, subset in enumerate(value_subsets(num_rows, top_k)):
            subset_of[sum(2**a for a in subset)] = number
        bits = body.ints(*(2**a for a in range(num_rows)))
        chosen = op("Mul", op("Cast", picked, to=int(ir.DataType.INT64)), bits)
        chosen = op("ReduceSum", chosen, body.ints(-1), keepdims=0)  # [T, R]
        rows = op("Gather", table, op("Gather", body.ints(*subset_of), chosen))  # [T, R, H]
        gathered = op("ReduceSum", rows, body.ints(1), keepdims=0)
    else:
        count = op("CastLike", picked, table)
        count = op("ReduceSum", count, body.ints(1), keepdims=0)  # [T, N], heads that pick a row
        gathered = op("MatMul", count, table)
    return body.build([gathered], attributes=("top_k", "subset_sums"))
