"""Projections as ONNX Runtime likes them: weights as its product reads them, one product per input.

A weight stands in the checkpoint as [out, in] and the canonical model transposes it. Here it is
stored transposed, or, where another node reads it too (a tied head), the product transposes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from export.lowerings.graph_editor import GraphEditor

# Projections that read one value and become one product, by the last part of their names.
PACKED = (("q_proj", "k_proj", "v_proj"), ("q_proj", "k_proj"), ("gate_proj", "up_proj"))


def store_weights_transposed(editor: GraphEditor) -> None:
    """Take out the Transpose in front of every product's weight."""
    for node in list(editor.graph):
        transpose = node.inputs[1].producer() if _is_product(node) and node.inputs[1] else None
        if transpose is None or transpose.op_type != "Transpose":
            continue
        stored = transpose.inputs[0]
        if stored is None or stored.const_value is None:
            continue
        readers = {reader for reader in stored.consumers() if reader is not transpose}
        if readers:
            product = editor.contrib("FusedMatMul", node.inputs[0], stored, transB=1)
            editor.replace(node.outputs[0], product)
        else:
            weight = np.ascontiguousarray(editor.array(transpose.outputs[0]))
            node.replace_input_with(1, editor.initializer(f"{stored.name}.transposed", weight))


def pack_projections(editor: GraphEditor, groups: Sequence[Sequence[str]] = PACKED) -> None:
    """Replace the products of one input by one product and a Split.

    Weights must be stored transposed already.
    """
    for products in list(_groups(editor, groups)):
        weights = [editor.array(product.inputs[1]) for product in products]
        name = " ".join(_stored_name(product) for product in products)
        packed = editor.initializer(name, np.concatenate(weights, axis=1))
        result = editor.op("MatMul", products[0].inputs[0], packed)
        sizes = editor.ints(*(weight.shape[1] for weight in weights))
        parts = editor.op_outputs("Split", len(products), result, sizes, axis=-1)
        for product, part in zip(products, parts, strict=True):
            editor.replace(product.outputs[0], part)


def _is_product(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and node.domain == ""


def _stored_name(node: ir.Node) -> str:
    weight = node.inputs[1]
    return "" if weight is None or weight.const_value is None else weight.name or ""


def _groups(editor: GraphEditor, groups: Sequence[Sequence[str]]) -> Iterator[list[ir.Node]]:
    by_input: dict[ir.Value, dict[str, ir.Node]] = {}
    for node in editor.graph:
        if (
            not _is_product(node)
            or node.inputs[0] is None
            or "_proj.weight" not in _stored_name(node)
        ):
            continue
        module = _stored_name(node).split("_proj.weight")[0].rpartition(".")[2] + "_proj"
        by_input.setdefault(node.inputs[0], {})[module] = node
    for nodes in by_input.values():
        for group in groups:
            if all(name in nodes for name in group):
                yield [nodes.pop(name) for name in group]
