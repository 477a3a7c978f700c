"""Mask scores from the layer's input by one small product instead of two projections in a row.

z = dt_proj(v_proj(x)) is linear in x. Softplus needs no threshold here: ONNX Runtime's is stable.
(sigmoid(-z)^(-A) would be a node shorter and is not used: ONNX Runtime's Sigmoid is accurate
absolutely, not relatively, and put g3's logits off by 1e-3.) Where nothing is selected by scores,
they are made and cached once per query head, so that attention needs no repetition; a single score
for all heads stays single.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export.lowerings.graph_editor import GraphEditor, producer_of


def compose_mask_scores(editor: GraphEditor, query_heads: int, *, per_query_head: bool) -> int:
    """Rewrite the scores of every layer; before projections are packed.

    Args:
        editor: on the canonical model, weights stored transposed.
        query_heads: Nq.
        per_query_head: cache one score per query head instead of one per score head.

    Returns:
        How many scores a cached key has now, 0 for a model that caches none.
    """
    scores = [
        value
        for node in editor.graph
        for value in node.outputs
        if (value.name or "").startswith("layers.") and (value.name or "").endswith(".score")
    ]
    heads = 0
    for score in scores:
        heads = _rewrite(editor, score, query_heads, per_query_head=per_query_head)
    return heads


def _rewrite(
    editor: GraphEditor, score: ir.Value, query_heads: int, *, per_query_head: bool
) -> int:
    by_head = producer_of(producer_of(score, "Unsqueeze").inputs[0], "Transpose")
    exponential = producer_of(by_head.inputs[0], "Exp")
    factor, softplus = producer_of(exponential.inputs[0], "Mul").inputs
    projection = producer_of(producer_of(softplus, "Where").inputs[1], "MatMul")
    values = producer_of(projection.inputs[0], "MatMul")
    weight = editor.array(values.inputs[1]) @ editor.array(projection.inputs[1])  # [H, N]
    power = editor.array(factor)
    groups = query_heads // len(power) if per_query_head and len(power) > 1 else 1
    heads = len(power) * groups
    layer = (score.name or "").removesuffix(".score")

    def stored(name: str, array: npt.NDArray[np.float32]) -> ir.Value:
        return editor.initializer(f"{layer}.{name}", np.repeat(array, groups, axis=-1))

    z = editor.op("MatMul", values.inputs[0], stored("score_proj", weight))  # [B, S, heads]
    result = editor.op("Mul", stored("score_factor", power), editor.op("Softplus", z))
    result = editor.op("Exp", result)
    if heads == 1:  # [B, S, 1] is [B, 1, S, 1] but for an axis
        result = editor.op("Unsqueeze", result, editor.ints(1))
    else:
        result = editor.op("Transpose", result, perm=(0, 2, 1))
        result = editor.op("Unsqueeze", result, editor.ints(3))
    shape = score.shape
    editor.replace(score, result)
    if shape is None:
        raise ValueError(f"{result.name} has no shape")
    result.shape = ir.Shape([shape[0], heads, *shape[2:]])
    (scatter,) = result.consumers()
    for cached in (scatter.inputs[0], scatter.outputs[0]):
        if cached is not None and cached.shape is not None:
            cached.shape = ir.Shape([cached.shape[0], heads, *cached.shape[2:]])
    return heads
