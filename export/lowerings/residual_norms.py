"""A residual sum and the norm that reads it as one node of ONNX Runtime."""

from __future__ import annotations

from export.lowerings.graph_editor import GraphEditor


def fuse_residual_norms(editor: GraphEditor) -> None:
    """Replace Add and the RMSNormalization behind it by SkipSimplifiedLayerNormalization."""
    for norm in list(editor.graph):
        total = norm.inputs[0] if norm.op_type == "RMSNormalization" else None
        add = None if total is None else total.producer()
        if total is None or add is None or add.op_type != "Add":
            continue
        normed, _, _, summed = editor.contrib_outputs(
            "SkipSimplifiedLayerNormalization",
            4,
            add.inputs[1],
            add.inputs[0],
            norm.inputs[1],
            epsilon=norm.attributes["epsilon"].as_float(),
        )
        editor.replace(norm.outputs[0], normed)
        editor.replace(total, summed)
