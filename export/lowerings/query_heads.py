"""More query heads where TensorRT has no fused attention for few of them.

TensorRT-RTX 1.7.1 has a fused kernel for one query that reads the cached keys and values where they
lie, but for 4 heads and more only. With fewer it copies both caches for every head, in every layer
and step. Here each query head stands there several times; the output projection has rows of zeros
for the copies.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.functions import attach_functions, doge_nodes
from export.lowerings.float_nodes import FloatNodes
from export.lowerings.graph_editor import GraphEditor
from plugins.registry import DYNAMIC_MASK_ATTENTION

FUSED_HEADS = 4


def repeat_few_query_heads(editor: GraphEditor) -> int:
    """Rewrite every attention of fewer heads than `FUSED_HEADS`.

    Returns:
        How often each head stands there now, 1 where nothing was done.

    Raises:
        ValueError: an attention whose output goes elsewhere than into one projection.
    """
    times = 1
    for node in list(doge_nodes(editor.model)):
        query = node.inputs[0]
        if node.op_type != DYNAMIC_MASK_ATTENTION.name or query is None or query.shape is None:
            continue
        heads, size = (int(str(query.shape[axis])) for axis in (1, 3))
        times = -(-FUSED_HEADS // heads)
        if times > 1:
            _repeat(editor, node, query, heads, size, times)
    editor.finish()
    if times > 1:
        attach_functions(editor.model)  # bodies depend on the number of heads
    return times


def _repeat(
    editor: GraphEditor, node: ir.Node, query: ir.Value, heads: int, size: int, times: int
) -> None:
    op = FloatNodes(editor)
    shape = query.shape
    attended = node.outputs[0]
    readers = list(attended.consumers())
    if len(readers) != 1 or readers[0].op_type != "MatMul" or shape is None:
        raise ValueError(f"{node.name}: expected one projection behind it, found {readers}")
    copies = op("Expand", op("Unsqueeze", query, editor.ints(2)), editor.ints(1, 1, times, 1, 1))
    repeated = op("Reshape", copies, editor.ints(0, heads * times, -1, size))
    repeated.shape = ir.Shape([shape[0], heads * times, shape[2], size])
    node.replace_input_with(0, repeated)
    if attended.shape is not None:
        attended.shape = ir.Shape([*attended.shape[:2], heads * times * size])

    projection = readers[0]
    weight = editor.array(projection.inputs[1]).reshape(heads, 1, size, -1)
    rows = np.concatenate([weight, *[np.zeros_like(weight)] * (times - 1)], axis=1)
    rows = np.ascontiguousarray(rows.reshape(heads * times * size, -1))
    stored = f"{attended.name}.o_proj of {times} copies"
    projection.replace_input_with(1, editor.initializer(stored, rows))
