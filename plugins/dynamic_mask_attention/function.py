"""The op as an ONNX function of standard operators; names follow the definition in op.py.

Selection uses TopK for its values alone, never for its order: TensorRT promises none among equals,
so equal scores at the threshold are counted slot by slot.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from plugins.onnx_function import FunctionBuilder, NodeBuilder
from plugins.registry import DYNAMIC_MASK_ATTENTION

FloatType = Literal["float32", "float16", "bfloat16"]
# Most negative finite numbers.
LOWEST: dict[FloatType, float] = {
    "float32": -3.4028234663852886e38,
    "float16": -65504.0,
    "bfloat16": -3.3895313892515355e38,
}


def make_function(
    *,
    scale: float,
    keep_window_size: int,
    query_heads: int,
    score_heads: int,
    attention_dtype: FloatType = "float32",
) -> ir.Function:
    """The body for one model.

    Args:
        scale: factor on q·k.
        keep_window_size: W, below C; 0 leaves the selection out.
        query_heads: Nq.
        score_heads: N.
        attention_dtype: dtype of query, key and value. Scores are float32 and compared so; the
            bias is clipped to this type's finite range before it is cast.
    """
    body = FunctionBuilder(DYNAMIC_MASK_ATTENTION)
    op = body.op
    query, key, value, score, write_index = body.inputs.values()

    S = op("Squeeze", op("Shape", query, start=2, end=3))
    C = op("Squeeze", op("Shape", key, start=2, end=3))
    new_slots = op("Range", body.int(0), S, body.int(1))
    query_slot = op("Add", op("Unsqueeze", write_index, body.ints(1)), new_slots)  # [B, S]
    query_slot = op("Unsqueeze", query_slot, body.ints(1, 3))  # [B, 1, S, 1]
    key_slot = op("Range", body.int(0), C, body.int(1))  # [C]
    visible = op("LessOrEqual", key_slot, query_slot)  # [B, 1, S, C]
    hidden = body.float(LOWEST["float32"])
    bias = op("Where", visible, op("Transpose", score, perm=(0, 1, 3, 2)), hidden)  # [B, N, S, C]
    if keep_window_size > 0:
        kept = keep_largest(body, bias, keep_window_size)
        bias = op("Where", kept, bias, hidden)
    groups = query_heads // score_heads
    if groups > 1:
        bias = op("Unsqueeze", bias, body.ints(2))
        bias = op("Expand", bias, body.ints(1, 1, groups, 1, 1))  # [B, N, Nq/N, S, C]
        heads_shape = op("Shape", query, start=0, end=3)
        bias_shape = op("Concat", heads_shape, op("Shape", key, start=2, end=3), axis=0)
        bias = op("Reshape", bias, bias_shape)  # [B, Nq, S, C]
    if attention_dtype != "float32":
        lowest = LOWEST[attention_dtype]
        bias = op("CastLike", op("Clip", bias, body.float(lowest), body.float(-lowest)), query)
    attended = op("Attention", query, key, value, bias, scale=scale)  # [B, Nq, S, D]
    attended = op("Transpose", attended, perm=(0, 2, 1, 3))
    attended = op("Reshape", attended, body.ints(0, 0, -1))
    return body.build([attended], attributes=("scale", "keep_window_size"))


def keep_largest(body: NodeBuilder, bias: ir.Value, keep_window_size: int) -> ir.Value:
    """Which entries of bias [B, N, S, C] are among each row's W best, lower slot first on ties.

    A row with fewer than W visible keys has the hidden score as its threshold: every visible key
    is above it.
    """
    op = body.op
    best, _ = body.op_outputs("TopK", 2, bias, body.ints(keep_window_size), axis=-1)
    threshold = op("ReduceMin", best, body.ints(-1), keepdims=1)  # [B, N, S, 1]
    above = op("Greater", bias, threshold)
    equal = op("Equal", bias, threshold)
    # Counts are exact in float32 up to 2^24 slots.
    above_count = op("ReduceSum", op("Cast", above, to=int(ir.DataType.FLOAT)), body.ints(-1))
    room = op("Sub", body.float(float(keep_window_size)), above_count)  # [B, N, S, 1]
    order = op("CumSum", op("Cast", equal, to=int(ir.DataType.FLOAT)), body.int(3))
    return op("Or", above, op("And", equal, op("LessOrEqual", order, room)))
