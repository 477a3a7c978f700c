"""Attach to a model the ONNX function of each custom op that its graph uses."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from plugins.custom_op import DOMAIN
from plugins.dynamic_mask_attention.function import FloatType
from plugins.registry import DYNAMIC_MASK_ATTENTION, OPS, VALUE_GATHER


def doge_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of the domain `doge` in the main graph, in order."""
    return (node for node in model.graph if node.domain == DOMAIN)


def attach_functions(model: ir.Model, attention_dtype: FloatType = "float32") -> None:
    """Give the model the body of each custom op; replaces bodies that it already has.

    Args:
        model: main graph with `doge` nodes whose attributes and head counts are the same for every
            node of one op type, as in every Doge.
        attention_dtype: dtype of queries, keys and values.

    Raises:
        ValueError: an op of the domain that is unknown, or nodes that need different bodies.
    """
    known = {op.name for op in OPS}
    settings: dict[str, dict[str, int | float]] = {}
    for node in doge_nodes(model):
        if node.op_type not in known:
            raise ValueError(
                f"unknown op {DOMAIN}::{node.op_type}; known: {', '.join(sorted(known))}"
            )
        found = _body_settings(node)
        if settings.setdefault(node.op_type, found) != found:
            raise ValueError(
                f"{DOMAIN}::{node.op_type}: nodes ask for different bodies, "
                f"{settings[node.op_type]} and {found}; a model has one body per op"
            )
    for op in OPS:
        if op.name not in settings:
            continue
        arguments: dict[str, object] = dict(settings[op.name])
        if op is DYNAMIC_MASK_ATTENTION:
            arguments["attention_dtype"] = attention_dtype
        function: ir.Function = op.load_function()(**arguments)
        model.functions[function.identifier()] = function
    model.graph.opset_imports[DOMAIN] = 1


def _body_settings(node: ir.Node) -> dict[str, int | float]:
    """What a node's body depends on, read from its attributes and its inputs' shapes."""
    if node.op_type == DYNAMIC_MASK_ATTENTION.name:
        return {
            "scale": node.attributes["scale"].as_float(),
            "keep_window_size": node.attributes["keep_window_size"].as_int(),
            "query_heads": _fixed_size(node, "query", 1),
            "score_heads": _fixed_size(node, "score", 1),
        }
    if node.op_type == VALUE_GATHER.name:
        return {
            "top_k": node.attributes["top_k"].as_int(),
            "subset_sums": bool(node.attributes["subset_sums"].as_int()),
            "num_rows": _fixed_size(node, "scores", 2),
        }
    return {
        "top_k": node.attributes["top_k"].as_int(),
        "weight_inside": bool(node.attributes["weight_inside"].as_int()),
        "normalize": bool(node.attributes["normalize"].as_int()),
        "heads": _fixed_size(node, "scores_x", 1),
        "num_keys": _fixed_size(node, "scores_x", 2),
    }


def _fixed_size(node: ir.Node, name: str, axis: int) -> int:
    op = next(op for op in OPS if op.name == node.op_type)
    value = node.inputs[op.inputs.index(name)]
    size = None if value is None or value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise ValueError(f"{node.name}: {name} needs a fixed size on axis {axis}, got {size}")
    return size
