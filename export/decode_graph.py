"""The model of a decode graph: a lowered model whose last nodes choose the next token."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from export.lowerings.engine_tail import add_engine_tail
from export.lowerings.graph_editor import GraphEditor

# Candidates that are compared. Plans have as many entries with 64 as with 3840; fewer send more
# steps to the host (docs/sampling.md, "In an engine").
WIDTH = 512
# The part of the model that its nodes are named after.
SAMPLING = "sampling"


def write_decode_graph(lowered: Path, width: int = WIDTH) -> Path:
    """Write a copy of a lowered model that gives the next token instead of logits.

    The copy stands beside the model and shares its file of weights.

    Args:
        lowered: what `lower_for_tensorrt` wrote.
        width: candidates that are compared.

    Returns:
        The `.onnx` file.

    Raises:
        ValueError: a model without logits of a fixed vocabulary.
    """
    model = ir.load(lowered)
    graph = model.graph
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    shape = None if logits is None else logits.shape
    if logits is None or shape is None or not isinstance(shape[-1], int):
        raise ValueError(f"{lowered} has no logits of a fixed vocabulary")
    before = set(graph)
    graph.outputs.remove(logits)
    editor = GraphEditor(model)
    tail = add_engine_tail(editor, logits, shape[-1], width)
    graph.outputs[:0] = [tail.next_id, tail.fits]
    editor.finish()
    for number, node in enumerate(graph):
        if node not in before:
            node.name = f"{SAMPLING}/{node.op_type}_{number}"
    path = lowered.with_name(f"{lowered.stem}.decode.onnx")
    ir.save(model, path)
    return path
