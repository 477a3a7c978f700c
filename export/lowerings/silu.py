"""SiLU as one node of ONNX Runtime: QuickGelu with alpha 1 is x · sigmoid(x)."""

from __future__ import annotations

from export.lowerings.graph_editor import GraphEditor


def fuse_silu(editor: GraphEditor) -> None:
    """Replace every product of a value with its own Sigmoid."""
    for product in list(editor.graph):
        if product.op_type != "Mul":
            continue
        for value, gate in (product.inputs, product.inputs[::-1]):
            node = None if gate is None else gate.producer()
            if node is not None and node.op_type == "Sigmoid" and node.inputs[0] is value:
                fused = editor.contrib("QuickGelu", value, alpha=1.0)
                editor.replace(product.outputs[0], fused)
                break
