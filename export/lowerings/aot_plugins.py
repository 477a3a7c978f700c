"""Lowering for standard TensorRT of the custom ops to plugins whose kernels the engine holds.

Such a plugin is one kernel without scratch memory, so two of the three ops become two nodes with
tensors between them:

    DynamicMaskAttention    AttendShares → values, masses → JoinShares
    ExpertGather            RouteExperts → experts, weights → GatherExperts
    ValueGather             GatherValues

The nodes have no functions: a parser that does not find their plugins fails, where it would expand
a function without a word. `aot` asks for the ahead-of-time form (tensorrt.plugin).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from export.functions import doge_nodes
from plugins.aot_plugin import AotPlugin, Sizes
from plugins.custom_op import DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION
from plugins.dynamic_mask_attention.aot import ATTEND_SHARES, JOIN_SHARES, max_splits
from plugins.expert_gather.aot import GATHER_EXPERTS, ROUTE_EXPERTS, router_scratch
from plugins.kernel_spec import KernelSpec
from plugins.registry import DYNAMIC_MASK_ATTENTION, EXPERT_GATHER, VALUE_GATHER
from plugins.value_gather.aot import GATHER_VALUES

Attribute = int | float
_TYPES = {"int32": ir.DataType.INT32, "float32": ir.DataType.FLOAT}


def use_aot_plugins(model: ir.Model) -> int:
    """Replace the custom ops in place; after all other lowerings.

    Returns:
        How many plugin nodes the model has now.

    Raises:
        ValueError: a custom op that these plugins do not cover.
    """
    replaced = list(doge_nodes(model))
    for node in replaced:
        try:
            _REPLACEMENTS[node.op_type](node)
        except ValueError as error:
            raise ValueError(
                f"{node.op_type} ({node.name}) cannot be a plugin that the engine holds: {error}"
            ) from error
    for identifier in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[identifier]
    return sum(1 for _ in doge_nodes(model))


def layer_kernels(node: ir.Node, plugin: AotPlugin) -> tuple[KernelSpec, ...]:
    """The kernels of a plugin's node.

    Raises:
        ValueError: attributes, shapes or types that none covers.
    """
    attributes: dict[str, Attribute] = {
        name: node.attributes[name].as_int() if kind == "INT" else node.attributes[name].as_float()
        for name, kind in plugin.attributes.items()
    }
    return plugin.make_kernels(
        attributes,
        {name: _fixed(value) for name, value in _inputs(node, plugin)},
        {name: _dtype(value) for name, value in _inputs(node, plugin)},
    )


def _attend(node: ir.Node) -> None:
    query, key, value, score, write_index = _present(node)
    window, slots = node.attributes["keep_window_size"].as_int(), _fixed(key)[2]
    if slots < 0:
        raise ValueError("the number of slots in the cache varies")
    if 0 < window < slots:
        raise ValueError(
            f"queries keep {window} of {slots} keys, and these plugins keep all. Build for at most "
            f"{window} positions (--max-seq-len), or with another --plugin"
        )
    attributes = {
        "scale": node.attributes["scale"].as_float(),
        "max_splits": 1,
        "one_score_row": int(_fixed(score)[0] == 1),
    }
    shares = _insert(node, ATTEND_SHARES, (query, key, value, score, write_index), attributes)
    splits = max_splits(layer_kernels(shares, ATTEND_SHARES)[0], slots)
    shares.attributes["max_splits"] = ir.AttrInt64("max_splits", splits)
    joined = _insert(node, JOIN_SHARES, (query, *shares.outputs), {"max_splits": splits})
    _take_over(node, joined)


def _gather_experts(node: ir.Node) -> None:
    hidden, scores_x, scores_y, down, up = _present(node)
    top_k = node.attributes["top_k"].as_int()
    routed = _insert(
        node,
        ROUTE_EXPERTS,
        (scores_x, scores_y),
        {
            "top_k": top_k,
            "normalize": node.attributes["normalize"].as_int(),
            "scratch_size": router_scratch(top_k, _fixed(scores_x)[2]),
        },
    )
    experts, weights, _ = routed.outputs
    gathered = _insert(
        node,
        GATHER_EXPERTS,
        (hidden, down, up, experts, weights),
        {"weight_inside": node.attributes["weight_inside"].as_int()},
    )
    _take_over(node, gathered)


def _gather_values(node: ir.Node) -> None:
    attributes = {name: node.attributes[name].as_int() for name in GATHER_VALUES.attributes}
    _take_over(node, _insert(node, GATHER_VALUES, _present(node), attributes))


_REPLACEMENTS = {
    DYNAMIC_MASK_ATTENTION.name: _attend,
    EXPERT_GATHER.name: _gather_experts,
    VALUE_GATHER.name: _gather_values,
}


def _insert(
    before: ir.Node,
    plugin: AotPlugin,
    inputs: Sequence[ir.Value],
    attributes: Mapping[str, Attribute],
) -> ir.Node:
    """Put a plugin's node in front of another; its outputs have types, shapes and names."""
    assert attributes.keys() == plugin.attributes.keys(), plugin.name
    node = ir.node(
        plugin.name,
        inputs,
        attributes={
            **attributes,
            "plugin_namespace": PLUGIN_NAMESPACE,
            "plugin_version": PLUGIN_VERSION,
            "aot": 1,
        },
        domain=DOMAIN,
        num_outputs=len(plugin.outputs),
        name=f"{before.name}.{plugin.name}",
    )
    dtypes = {name: _dtype(value) for name, value in _inputs(node, plugin)}
    shapes = {name: tuple(value.shape or ()) for name, value in _inputs(node, plugin)}
    for name, value in zip(plugin.outputs, node.outputs, strict=True):
        value.name = f"{before.outputs[0].name}.{name}"
        kind = plugin.output_type(name, dtypes)
        value.type = ir.TensorType(_TYPES[kind]) if kind in _TYPES else inputs[0].type
        value.shape = ir.Shape(_dimensions(plugin, attributes, shapes, name))
    if before.graph is None:
        raise AssertionError("the node stands in a graph")
    layer_kernels(node, plugin)
    before.graph.insert_before(before, node)
    return node


def _take_over(old: ir.Node, new: ir.Node) -> None:
    """Let what reads the custom op read the plugin, which takes over name, shape and type."""
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.shape, after.type = before.name, before.shape, before.type
    before.name = None
    before.replace_all_uses_with(after)
    if old.graph is None:
        raise AssertionError("the node stands in a graph")
    old.graph.remove(old, safe=True)


def _dimensions(
    plugin: AotPlugin,
    attributes: Mapping[str, Attribute],
    shapes: Mapping[str, Sequence[int | ir.SymbolicDim]],
    name: str,
) -> tuple[int | ir.SymbolicDim, ...]:
    """An output's dimensions; quotients have no name."""
    sizes = Sizes(plugin, attributes, shapes, ceil_div=lambda top, bottom: ir.SymbolicDim(None))
    return sizes.output_shape(name)


def _present(node: ir.Node) -> tuple[ir.Value, ...]:
    """A node's inputs, none of which may be left out."""
    values = tuple(value for value in node.inputs if value is not None)
    if len(values) != len(node.inputs):
        raise ValueError("an input is missing")
    return values


def _inputs(node: ir.Node, plugin: AotPlugin) -> Iterator[tuple[str, ir.Value]]:
    yield from zip(plugin.inputs, _present(node), strict=True)


def _fixed(value: ir.Value) -> tuple[int, ...]:
    """Dimensions, -1 where they vary."""
    if value.shape is None:
        raise ValueError(f"{value.name} has no shape in the model")
    return tuple(size if isinstance(size, int) else -1 for size in value.shape)


def _dtype(value: ir.Value) -> str:
    """Numpy's name of a value's type."""
    if value.dtype is None:
        raise ValueError(f"{value.name} has no type in the model")
    return str(value.dtype.numpy())
