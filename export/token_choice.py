"""The model that chooses tokens from logits, run behind every step of one token.

A model of its own rather than the end of each lowered one: it reads the logits where the step left
them and writes the next id where the next step reads it, for one call of about 4 µs, and serves
every variant and every prompt.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from export.lowerings.graph_editor import GraphEditor
from export.lowerings.sampling_tail import add_token_choice
from plugins.onnx_function import OPSET

# Candidates that are sorted; more cost more in every step, fewer send more steps to the host.
WIDTH = 256


def export_token_choice(path: Path, vocab_size: int) -> None:
    """Write the model: from `logits` [B, 1, V] and `TailInputs` to `next_id` and `fits`."""
    logits = ir.val("logits", ir.DataType.FLOAT, ["B", 1, vocab_size])
    graph = ir.Graph([logits], [], nodes=[], opset_imports={"": OPSET}, name="token_choice")
    model = ir.Model(graph, ir_version=11)
    editor = GraphEditor(model)
    add_token_choice(editor, logits, vocab_size, WIDTH)
    editor.finish()
    ir.save(model, path)
