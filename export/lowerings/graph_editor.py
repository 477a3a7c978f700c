"""Editing a graph in place: add nodes anywhere, replace values, tidy up once at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from plugins.onnx_function import Attribute

# The domain of ONNX Runtime's own operators.
CONTRIB = "com.microsoft"


class GraphEditor:
    """Adds nodes to the end of a model's main graph; `finish` brings them into order.

    Attributes:
        model: the model that is edited.
        graph: its main graph.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph

    def initializer(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """Store a tensor under `name`, or find the one that is stored there."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.tensor(array, name=name),
        )
        self.graph.register_initializer(value)
        return value

    def ints(self, *numbers: int) -> ir.Value:
        """A stored int64 vector."""
        return self.initializer(f"ints[{','.join(map(str, numbers))}]", np.array(numbers, np.int64))

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """Append a standard node with one output and return that output.

        None leaves an input out.
        """
        return self.op_outputs(op_type, 1, *inputs, **attributes)[0]

    def op_outputs(
        self, op_type: str, count: int, *inputs: ir.Value | None, **attributes: Attribute
    ) -> Sequence[ir.Value]:
        """Append a standard node with `count` outputs and return them."""
        return self._append("", op_type, count, inputs, attributes)

    def contrib(self, op_type: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """Like `op`, with an operator of ONNX Runtime's own."""
        return self.contrib_outputs(op_type, 1, *inputs, **attributes)[0]

    def contrib_outputs(
        self, op_type: str, count: int, *inputs: ir.Value | None, **attributes: Attribute
    ) -> Sequence[ir.Value]:
        """Like `op_outputs`, with an operator of ONNX Runtime's own."""
        self.graph.opset_imports.setdefault(CONTRIB, 1)
        return self._append(CONTRIB, op_type, count, inputs, attributes)

    def _append(
        self,
        domain: str,
        op_type: str,
        count: int,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Attribute],
    ) -> Sequence[ir.Value]:
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, num_outputs=count)
        self.graph.append(node)
        return node.outputs

    def array(self, value: ir.Value | None) -> npt.NDArray[Any]:
        """The stored tensor behind `value`, which may be a transposed initializer.

        Raises:
            ValueError: the value is computed.
        """
        if value is not None and value.const_value is not None:
            return value.const_value.numpy()
        node = None if value is None else value.producer()
        if node is not None and node.op_type == "Transpose":
            return self.array(node.inputs[0]).transpose(node.attributes["perm"].as_ints())
        raise ValueError(f"{value} is computed, expected a stored tensor")

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let everything that reads `old` read `new`, which takes over its name and type."""
        if old.is_graph_output():
            self.graph.outputs[self.graph.outputs.index(old)] = new
        old.replace_all_uses_with(new)
        name, old.name = old.name, None
        new.name = name
        new.type = old.type
        if new.shape is None:
            new.shape = old.shape

    def finish(self) -> None:
        """Drop what nothing reads and sort the nodes."""
        RemoveUnusedNodesPass()(self.model)
        TopologicalSortPass()(self.model)
        unused = [name for name, v in self.graph.initializers.items() if not v.uses()]
        for name in unused:
            del self.graph.initializers[name]

    def int(self, number: int) -> ir.Value:
        """A stored int64 scalar."""
        return self.initializer(f"int {number}", np.array(number, np.int64))

    def float(self, number: float) -> ir.Value:
        """A stored float32 scalar."""
        return self.initializer(f"float {number!r}", np.array(number, np.float32))


def producer_of(value: ir.Value | None, op_type: str) -> ir.Node:
    """The node that makes `value`, which must be an `op_type`.

    Raises:
        ValueError: it is another node, or none.
    """
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type:
        found = "nothing" if node is None else node.op_type
        raise ValueError(f"{value and value.name} comes from {found}, expected {op_type}")
    return node
