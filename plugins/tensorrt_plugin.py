"""The custom ops as TensorRT plugins (`IPluginV3`), for both TensorRT products.

One class serves every op: what differs stands in the op's `CustomOp` and its `OpKernels`. An engine
built with plugins holds their attributes, not their kernels; a process that loads it needs the
kernels of the bundle and `register_plugins` before.

Calls, in TensorRT's order: `create_plugin` (build) from the ONNX node, `configure_plugin` for each
profile, `get_fields_to_serialize`; then, where the engine runs, `create_plugin` (run time) from
those fields, `attach_to_context`, `on_shape_change`, `enqueue`. `enqueue` puts launches on the
stream it is given and does nothing else, so a CUDA graph can capture it; a replay runs no Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from plugins.custom_op import PLUGIN_NAMESPACE, CustomOp
from plugins.hosted_plugin import (
    COUNTERS_FIELD,
    Attributes,
    HostedPlugin,
    PluginFields,
    make_hosted_class,
    make_hosted_creator,
)
from plugins.kernel_spec import OpKernels
from plugins.plugin_host import PluginError, PluginHost, told
from plugins.registry import OPS

__all__ = [
    "COUNTERS_FIELD",
    "PluginError",
    "PluginFields",
    "PluginHost",
    "deregister_plugins",
    "make_creator",
    "make_plugin_class",
    "register_plugins",
    "take_problems",
]

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}
_HALF_OR_FLOAT = ("FLOAT", "HALF", "BF16")


class _OpPlugin(HostedPlugin):
    """What the plugin of a custom op does; `make_plugin_class` gives it the op.

    Attributes:
        op: the custom op.
    """

    op: CustomOp
    interfaces = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime")

    def __init__(self, attributes: Attributes, counter_count: int = 0) -> None:
        """Make a plugin of an op's attributes."""
        super().__init__(attributes, counter_count)
        self._kernels: OpKernels | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}

    # Build.

    def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
        """The output has the type of the first input."""
        return [types[0]]

    def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
        """The op's `output_shape` in TensorRT's expressions."""
        del shape_inputs
        by_name = dict(zip(self.op.inputs, inputs, strict=True))
        sizes = []
        for rule in self.op.output_shape:
            size = None
            for factor in rule.split("*"):
                name, _, axis = factor.strip().partition(".")
                next_size = by_name[name][int(axis)]
                size = (
                    next_size
                    if size is None
                    else builder.operation(self.trt.DimensionOperation.PROD, size, next_size)
                )
            sizes.append(size)
        return [self.trt.DimsExprs(sizes)]

    def supports_format_combination(self, place: int, tensors: Any, input_count: int) -> bool:
        """Linear layout; int64 indices, float32 exact inputs, one float type for all others."""
        desc = tensors[place].desc
        if desc.format != self.trt.TensorFormat.LINEAR or input_count != len(self.op.inputs):
            return False
        kind = desc.type.name
        name = (*self.op.inputs, *self.op.outputs)[place]
        if name in self.op.integer_inputs:
            return bool(kind == "INT64")
        if name in self.op.exact_inputs:
            return bool(kind == "FLOAT")
        return kind in _HALF_OR_FLOAT and bool(desc.type == tensors[0].desc.type)

    @told
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Make the kernels of a profile's types, and count what its largest shapes need.

        Raises:
            PluginError: no kernel covers the profile.
        """
        descs = [*inputs, *outputs]
        kernels = self._make_kernels([tensor.desc for tensor in descs])
        self.host.check(kernels)
        largest = self._named([tuple(tensor.max) for tensor in descs])
        self.counter_count = max(self.counter_count, kernels.counters(largest))

    @told
    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Scratch memory in bytes for the largest shapes of the profile."""
        descs = [*inputs, *outputs]
        kernels = self._make_kernels([tensor.desc for tensor in descs])
        return kernels.workspace_bytes(self._named([tuple(tensor.max) for tensor in descs]))

    # Run time.

    @told
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Prepare for the shapes of the coming steps.

        Raises:
            PluginError: no kernel covers them, or the kernels are not loaded.
        """
        descs = [*inputs, *outputs]
        if any(size < 0 for desc in descs for size in desc.dims):
            return  # the builder asks before shapes are known
        self._kernels = self._make_kernels(descs)
        self._shapes = self._named([tuple(desc.dims) for desc in descs])
        self._find_launcher(spec.name for spec in self._kernels.specs)

    @told
    def enqueue(
        self,
        input_descs: Sequence[Any],
        output_descs: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Put the op's launches on the stream; the arguments are device addresses.

        Raises:
            PluginError: shapes that no kernel covers, too few counters, or a refused launch.
        """
        del input_descs, output_descs
        kernels, shapes = self._kernels, self._shapes
        if kernels is None:
            raise self._unready()
        names = (*self.op.inputs, *self.op.outputs)
        addresses = dict(zip(names, (*inputs, *outputs), strict=True))
        self._run(
            lambda: kernels.launches(shapes, addresses, int(workspace), self._counters),
            stream,
            kernels.counters(shapes),
        )

    def _make_kernels(self, descs: Sequence[Any]) -> OpKernels:
        shapes = self._named([tuple(desc.dims) for desc in descs])
        names = (*self.op.inputs, *self.op.outputs)
        kinds = [_DTYPES.get(desc.type.name, desc.type.name) for desc in descs]
        try:
            return self.op.make_kernels(
                self.attributes, shapes, dict(zip(names, kinds, strict=True))
            )
        except ValueError as error:
            raise PluginError(f"{self.op.name}: {error}") from error

    def _named(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return dict(zip((*self.op.inputs, *self.op.outputs), shapes, strict=True))


def make_plugin_class(trt: Any, op: CustomOp, host: PluginHost) -> type[Any]:
    """The plugin class of an op for one TensorRT product."""
    return make_hosted_class(trt, host, _OpPlugin, op=op, plugin_type=op.name, kinds=op.attributes)


def make_creator(trt: Any, op: CustomOp, host: PluginHost) -> Any:
    """The creator by which TensorRT makes an op's plugins: from ONNX nodes and from engines."""
    make = make_plugin_class(trt, op, host)
    return make_hosted_creator(trt, host, op.name, op.attributes, make)


class CreatorMaker(Protocol):
    """Makes the creator of one plugin."""

    def __call__(self, trt: Any, *, host: PluginHost) -> Any:
        """The creator, for one TensorRT product."""


# Creators must outlive every engine that uses them, and a registry takes each name once.
_HOSTS: dict[str, tuple[PluginHost, list[Any]]] = {}


def register_plugins(trt: Any, *more: CreatorMaker) -> PluginHost:
    """Register plugins with a TensorRT product, each once for a process: every op's, and others.

    Args:
        trt: the module `tensorrt_rtx` or `tensorrt`.
        more: what makes the creators of other plugins.

    Returns:
        What all plugins of that product share; add launchers to it before an engine is loaded.

    Raises:
        PluginError: TensorRT refuses a creator.
    """
    product = trt.__name__
    host, creators = _HOSTS.get(product, (PluginHost(), []))
    for maker in (*(partial(make_creator, op=op) for op in OPS), *more):
        creator = maker(trt, host=host)
        if creator.name in {known.name for known in creators}:
            continue
        if not trt.get_plugin_registry().register_creator(creator, PLUGIN_NAMESPACE):
            raise PluginError(f"{product} does not take the plugin {creator.name}")
        creators.append(creator)
    _HOSTS[product] = (host, creators)
    return host


def deregister_plugins(trt: Any) -> None:
    """Take the plugins out of the registry again, so that a parser expands the functions."""
    if found := _HOSTS.pop(trt.__name__, None):
        registry = trt.get_plugin_registry()
        for creator in found[1]:
            registry.deregister_creator(creator)


def take_problems(trt: Any) -> tuple[str, ...]:
    """What the plugins of a product have raised since this was last asked."""
    found = _HOSTS.get(trt.__name__)
    if found is None:
        return ()
    problems = tuple(found[0].problems)
    found[0].problems.clear()
    return problems
