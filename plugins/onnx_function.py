"""Building the ONNX functions of custom ops: one opset, declared attributes, named values.

Bodies are built by plain Python rather than written as onnxscript functions, since their variants
(with and without selection, for instance) are picked when they are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import onnx_ir as ir
from onnx_ir import tape

from plugins.custom_op import DOMAIN, CustomOp

# The checker wants every function to import the model's own opset version, so there is one number.
OPSET = 24
# Both name the plugin on the node and have no meaning inside a body.
PLUGIN_ATTRIBUTES = ("plugin_namespace", "plugin_version")

Attribute = int | float | str | Sequence[int] | Sequence[float]


class NodeBuilder(Protocol):
    """What makes nodes: a function's body here, a graph that is lowered in `export/`."""

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Attribute) -> ir.Value:
        """Append a node with one output and return that output."""

    def op_outputs(
        self, op_type: str, count: int, *inputs: ir.Value, **attributes: Attribute
    ) -> Sequence[ir.Value]:
        """Append a node with `count` outputs and return them."""

    def ints(self, *numbers: int) -> ir.Value:
        """A constant int64 vector."""

    def int(self, number: int) -> ir.Value:
        """A constant int64 scalar."""

    def float(self, number: float) -> ir.Value:
        """A constant float32 scalar."""


class FunctionBuilder:
    """Collects the nodes of one function body.

    Attributes:
        inputs: the function's inputs by name.
    """

    def __init__(self, custom_op: CustomOp) -> None:
        self._custom_op = custom_op
        self._tape = tape.Tape()
        self.inputs = {name: ir.val(name) for name in custom_op.inputs}

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Attribute) -> ir.Value:
        """Append a node with one output and return that output."""
        return self._tape.op(op_type, inputs, attributes)

    def op_outputs(
        self, op_type: str, count: int, *inputs: ir.Value, **attributes: Attribute
    ) -> Sequence[ir.Value]:
        """Append a node with `count` outputs and return them."""
        return self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=count)

    def ints(self, *numbers: int) -> ir.Value:
        """A constant int64 vector."""
        return self.op("Constant", value_ints=numbers)

    def int(self, number: int) -> ir.Value:
        """A constant int64 scalar."""
        return self.op("Constant", value_int=number)

    def float(self, number: float) -> ir.Value:
        """A constant float32 scalar."""
        return self.op("Constant", value_float=number)

    def build(self, outputs: Sequence[ir.Value], attributes: Sequence[str]) -> ir.Function:
        """Finish the function.

        Args:
            outputs: values to return, in the order of the op's outputs.
            attributes: names of the attributes that the op's nodes carry. A node may only carry
                what its function declares; the body is made for fixed values and refers to none.
        """
        for value, name in zip(outputs, self._custom_op.outputs, strict=True):
            value.name = name
        graph = ir.Graph(
            list(self.inputs.values()),
            outputs,
            nodes=self._tape.nodes,
            opset_imports={"": OPSET},
            name=self._custom_op.name,
        )
        declared = [
            ir.Attr(name, ir.AttributeType.UNDEFINED, None)
            for name in (*attributes, *PLUGIN_ATTRIBUTES)
        ]
        return ir.Function(DOMAIN, self._custom_op.name, graph=graph, attributes=declared)
