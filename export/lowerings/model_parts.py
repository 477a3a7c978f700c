"""Names of nodes that say which part of the model they belong to.

The builder's log says of each entry of a compiled plan which nodes it came from, by name. So every
node gets a name `<part>/<operator>_<number>`, where the part is `embedding`, `layers.<i>.attention`
or `layers.<i>.feed_forward`, `head`, or `tail` for what chooses a token behind the logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from export.lowerings.float_nodes import tapped

EMBEDDING, HEAD, TAIL = "embedding", "head", "tail"


def name_nodes_by_part(graph: ir.Graph) -> None:
    """Rename every node of the main graph; sorted, with its taps in place.

    A node belongs to the first part that needs it: tables of all layers to the first layer's
    attention, for instance.
    """
    parts: dict[ir.Node, str] = {}
    for part, value in _ends(graph):
        waiting = [value.producer()]
        while waiting:
            node = waiting.pop()
            if node is None or node in parts:
                continue
            parts[node] = part
            waiting += [None if v is None else v.producer() for v in node.inputs]
    for number, node in enumerate(graph):
        node.name = f"{parts.get(node, TAIL)}/{node.op_type}_{number}"


def _ends(graph: ir.Graph) -> Iterator[tuple[str, ir.Value]]:
    """Each part's last value, from the embedding to the logits."""
    values = tapped(graph)
    if EMBEDDING in values:
        yield EMBEDDING, values[EMBEDDING]
    layer = 0
    while f"layers.{layer}.output" in values:
        for part, tap in (("attention", "attention_residual"), ("feed_forward", "output")):
            if f"layers.{layer}.{tap}" in values:
                yield f"layers.{layer}.{part}", values[f"layers.{layer}.{tap}"]
        layer += 1
    if "logits" in values:
        yield HEAD, values["logits"]
