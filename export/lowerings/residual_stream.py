"""The residual stream in float32 beside half-precision products.

TensorRT-RTX 1.7.1 makes a sum of half-precision tensors part of the product before it, and the
scaling of the residual and the norm behind the sum are then two kernels more. Where the stream is
float32 the three become one kernel, and a long sum of small terms is not rounded in every layer.
"""

from __future__ import annotations

import onnx_ir as ir

from export.lowerings.float_nodes import stay_float32, tapped


def keep_stream_float32(model: ir.Model) -> int:
    """Mark what makes and reads the residual stream; before the lowering to half precision.

    Marked are the sums, the scaled residuals, the norms, and the choice of tokens that get logits.
    The embedding table and everything behind a norm stay half.

    Returns:
        How many nodes were marked.
    """
    values = tapped(model.graph)
    stream = [value for name, value in values.items() if _is_stream(name)]
    marked: set[ir.Node] = set()
    while stream:
        value = stream.pop()
        producer = value.producer()
        if producer is not None and producer.op_type in {"Add", "GatherElements"}:
            marked.add(producer)
        for node in value.consumers():
            if node.op_type == "GatherElements" and node not in marked:
                stream.append(node.outputs[0])
            if node.op_type in {"RMSNormalization", "GatherElements"} or _scales(node):
                marked.add(node)
    for name, value in values.items():  # what the experts add to a gated MLP
        maker = value.producer()
        if maker is None:
            continue
        added = name.endswith(".mlp_output") and maker.op_type == "Add"
        if added or (name.endswith(".expert_output") and maker.op_type == "Reshape"):
            marked.add(maker)
    stay_float32(marked)
    return len(marked)


def _is_stream(name: str) -> bool:
    return name == "embedding" or (
        name.startswith("layers.") and name.endswith((".attention_residual", ".output"))
    )


def _scales(node: ir.Node) -> bool:
    """Whether the node multiplies the stream by a stored vector."""
    return node.op_type == "Mul" and any(
        value is not None and value.const_value is not None for value in node.inputs
    )
