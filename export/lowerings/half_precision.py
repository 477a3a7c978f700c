"""Lowering to float16 or bfloat16 for TensorRT, which takes precision from the model alone.

Everything becomes half precision except the mask scores and what earlier passes marked by
`stay_float32`. What computes, caches and compares scores stays float32, so the engine selects the
same keys as the float32 model and exp(A · softplus(·)), which overflows float16 above 11.09,
cannot. Logits are cast back to float32, as the contract says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import onnx_ir as ir

from export.functions import attach_functions
from export.lowerings.float_nodes import stays_float32
from plugins.custom_op import DOMAIN
from plugins.dynamic_mask_attention.function import LOWEST
from plugins.registry import DYNAMIC_MASK_ATTENTION

HalfType = Literal["float16", "bfloat16"]
_IR_TYPES: dict[HalfType, ir.DataType] = {
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


def lower_to_half(model: ir.Model, dtype: HalfType) -> None:
    """Rewrite the canonical model in place.

    Args:
        model: canonical model; its initializers are replaced, not written to.
        dtype: what activations, weights and cached keys and values become.

    Raises:
        ValueError: a weight is too large for `dtype`, or a node that the pass does not know.
    """
    half = _IR_TYPES[dtype]
    graph = model.graph
    kept = _score_nodes(graph) | {node for node in graph if stays_float32(node)}
    for value in _float_values(graph, kept):
        value.dtype = half
    _convert_initializers(graph, kept, half, dtype)
    _cast_between(graph, kept, half)
    _cast_logits(graph)
    attach_functions(model, attention_dtype=dtype)


def _score_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that compute or cache mask scores, and nothing of the values that scores come from."""
    named = {value.name: value for value in _values(graph) if value.name}
    scores = {
        name: value
        for name, value in named.items()
        if name.startswith("layers.") and name.endswith(".score")
    }
    cached = any(_is_score(value) for value in graph.inputs)
    if cached != bool(scores):
        raise ValueError(
            f"mask scores are {'cached' if cached else 'not cached'}, but {len(scores)} values are "
            "named layers.<i>.score; lower the canonical model"
        )
    nodes: set[ir.Node] = set()
    for name, score in scores.items():
        value = named[name.removesuffix("score") + "value"]
        nodes |= _ancestors([score]) - _ancestors([value])
        nodes |= {node for node in score.consumers() if node.op_type == "TensorScatter"}
    return nodes


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph:
        yield from node.outputs


def _ancestors(values: Iterable[ir.Value]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    waiting = [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        waiting += [value.producer() for value in node.inputs if value is not None]
    return found


def _float_values(graph: ir.Graph, kept: set[ir.Node]) -> Iterator[ir.Value]:
    """Inputs and node outputs that become half precision."""
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT and not _is_score(value):
            yield value
    for node in graph:
        if node.op_type in {"Constant", "Cast", "CastLike"}:
            raise ValueError(
                f"the lowering to half precision does not know {node.op_type} nodes ({node.name}); "
                "the canonical model has none in its main graph"
            )
        if node in kept:
            continue
        yield from (value for value in node.outputs if value.dtype == ir.DataType.FLOAT)


def _is_score(value: ir.Value) -> bool:
    return value.name is not None and value.name.endswith(".score")


def _reads_bias(node: ir.Node, place: int) -> bool:
    """Whether an input is the score or bias of attention, which the op takes as float32."""
    return (
        node.domain == DOMAIN
        and node.op_type == DYNAMIC_MASK_ATTENTION.name
        and place == DYNAMIC_MASK_ATTENTION.inputs.index("score")
    )


def _is_mask_bias(value: ir.Value) -> bool:
    """Whether a stored tensor stands where a generation with scores has its cached scores."""
    uses = list(value.uses())
    return bool(uses) and all(_reads_bias(use.node, use.idx) for use in uses)


def _clip_mask_bias(value: ir.Value, dtype: HalfType) -> None:
    """Keep the bias in float32, and hidden keys above those that are not there yet.

    The op clips its bias to the half type's range, where both would meet at the lowest number.
    """
    if value.const_value is None:
        raise AssertionError("an initializer has a tensor")
    clipped = np.maximum(value.const_value.numpy(), np.float32(LOWEST[dtype] / 2))
    value.const_value = ir.tensor(clipped, name=value.name)


def _convert_initializers(
    graph: ir.Graph, kept: set[ir.Node], half: ir.DataType, dtype: HalfType
) -> None:
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        uses = [use for use in value.uses() if use.node not in kept]
        if value.uses() and not uses:
            continue
        if _is_mask_bias(value):
            _clip_mask_bias(value, dtype)
            continue
        array = tensor.numpy().astype(half.numpy())
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"{value.name} has numbers that {dtype} cannot hold; use bf16 or fp32")
        if len(uses) == len(list(value.uses())):
            value.const_value = ir.tensor(array, name=value.name)
            value.dtype = half
            continue
        name = f"{value.name}.{dtype}"  # float32 for some nodes, half for others
        copy = ir.Value(
            name=name,
            shape=value.shape,
            type=ir.TensorType(half),
            const_value=ir.tensor(array, name=name),
        )
        graph.register_initializer(copy)
        for use in uses:
            use.node.replace_input_with(use.idx, copy)


def _cast_between(graph: ir.Graph, kept: set[ir.Node], half: ir.DataType) -> None:
    """Cast to float32 what the kept nodes read from the rest of the graph, and back."""
    casts: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        wanted, other = half, ir.DataType.FLOAT
        if node in kept:
            wanted, other = other, half
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != other or _reads_bias(node, index):
                continue
            if value.is_initializer():
                continue  # a table that is converted by itself, or one that stays float32
            if value not in casts:
                casts[value] = _insert_cast(node, value, wanted)
            node.replace_input_with(index, casts[value])


def _insert_cast(before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    cast = ir.node("Cast", [value], attributes={"to": dtype})
    output = cast.outputs[0]
    output.name, output.shape, output.dtype = f"{value.name}.cast", value.shape, dtype
    if before.graph is None:
        raise AssertionError("the node stands in a graph")
    before.graph.insert_before(before, cast)
    return output


def _cast_logits(graph: ir.Graph) -> None:
    logits = graph.outputs[0]
    producer = logits.producer()
    if producer is None or logits.name != "logits":
        raise ValueError(f"the first output is {logits.name}, expected logits")
    cast = ir.node("Cast", [logits], attributes={"to": ir.DataType.FLOAT})
    output = cast.outputs[0]
    logits.name = "logits.half"
    output.name, output.shape, output.dtype = "logits", logits.shape, ir.DataType.FLOAT
    graph.insert_after(producer, cast)
    graph.outputs[0] = output
