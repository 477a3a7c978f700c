"""Adding typed nodes to the canonical model, and nodes that stay float32 in a half engine."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from export.lowerings.graph_editor import GraphEditor
from plugins.onnx_function import Attribute

# A note in `ir.Node.meta`, which is never written to a file.
_STAYS = "doge.stays_float32"


class FloatNodes:
    """Appends nodes whose results are float32, as everything in the canonical model is.

    Attributes:
        editor: on the model that gets them.
        stay: whether they stay float32 when the model is lowered to half precision.
    """

    def __init__(self, editor: GraphEditor, *, stay: bool = False) -> None:
        self.editor = editor
        self.stay = stay

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """Append a standard node with one output and return that output."""
        result = self.editor.op(op_type, *inputs, **attributes)
        result.type = ir.TensorType(ir.DataType.FLOAT)
        node = result.producer()
        if self.stay and node is not None:
            stay_float32([node])
        return result

    def slice(self, value: ir.Value, begin: int, end: int, axis: int) -> ir.Value:
        """Elements `begin` to `end` of one axis; one that is not from the end."""
        ints = self.editor.ints
        return self("Slice", value, ints(begin), ints(end), ints(axis))


def stay_float32(nodes: Iterable[ir.Node]) -> None:
    """Let nodes compute in float32 when the model is lowered to half precision."""
    for node in nodes:
        node.meta[_STAYS] = True


def stays_float32(node: ir.Node) -> bool:
    """Whether an earlier pass asked so."""
    return bool(node.meta.get(_STAYS, False))


def tapped(graph: ir.Graph) -> dict[str, ir.Value]:
    """The values of the main graph's nodes by name, those with fixed names among them."""
    return {value.name: value for node in graph for value in node.outputs if value.name}
