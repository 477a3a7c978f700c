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

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from plugins.custom_op import PLUGIN_NAMESPACE, PLUGIN_VERSION, AttributeType, CustomOp
from plugins.kernel_spec import OpKernels
from plugins.launcher import Launcher, LaunchError
from plugins.plugin_host import PluginError, PluginHost, told
from plugins.registry import OPS

# Fields of a serialized plugin beside the op's attributes.
COUNTERS_FIELD = "counters"
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}
_HALF_OR_FLOAT = ("FLOAT", "HALF", "BF16")


class PluginFields:
    """Fields of a plugin with their numbers, which a collection of TensorRT's only points to.

    Attributes:
        collection: the fields; valid as long as this object lives.
    """

    def __init__(
        self,
        trt: Any,
        kinds: Mapping[str, AttributeType],
        values: Mapping[str, int | float],
    ) -> None:
        """Hold `values`, an int32 or a float32 each as `kinds` says."""
        types = trt.PluginFieldType
        self._arrays = {
            name: np.array([values[name]], np.int32 if kind == "INT" else np.float32)
            for name, kind in kinds.items()
        }
        self.collection = trt.PluginFieldCollection(
            [
                trt.PluginField(
                    name, self._arrays[name], types.INT32 if kind == "INT" else types.FLOAT32
                )
                for name, kind in kinds.items()
            ]
        )


class _OpPlugin:
    """What every plugin does; mixed into TensorRT's interfaces by `make_plugin_class`.

    Attributes:
        op: the custom op.
        trt: the TensorRT module.
        host: what the process has loaded.
        attributes: the node's.
        counter_count: counters that the largest profile needs, 0 before any was configured.
    """

    op: CustomOp
    trt: Any
    host: PluginHost

    def __init__(self, attributes: Mapping[str, int | float], counter_count: int = 0) -> None:
        """Make a plugin; clones are made in the same way, since C++ holds part of the state."""
        trt = self.trt
        for base in (
            trt.IPluginV3,
            trt.IPluginV3OneCore,
            trt.IPluginV3OneBuild,
            trt.IPluginV3OneRuntime,
        ):
            base.__init__(self)
        self.num_outputs = 1
        self.plugin_name = self.op.name
        self.plugin_version = PLUGIN_VERSION
        self.plugin_namespace = PLUGIN_NAMESPACE
        self.attributes = dict(attributes)
        self.counter_count = counter_count
        self._kernels: OpKernels | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._launcher: Launcher | None = None
        self._counters = 0

    # Core.

    def get_capability_interface(self, kind: Any) -> Any:
        """Every capability is this object's."""
        del kind
        return self

    def clone(self) -> Any:
        """Another plugin of the same attributes."""
        return type(self)(self.attributes, self.counter_count)

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

    def get_valid_tactics(self) -> list[int]:
        """There is one way to run it."""
        return []

    # Run time.

    def get_fields_to_serialize(self) -> Any:
        """All that the run time needs: the attributes, and how many counters."""
        self._fields = PluginFields(
            self.trt,
            {**self.op.attributes, COUNTERS_FIELD: "INT"},
            {**self.attributes, COUNTERS_FIELD: self.counter_count},
        )
        return self._fields.collection

    @told
    def attach_to_context(self, context: Any) -> Any:
        """A clone for one execution context, with counters of its own.

        Memory is taken here: later calls may stand in the capture of a CUDA graph. Which kernels
        it launches is known with the shapes; counters may come from any launcher.

        Raises:
            LaunchError: the driver has no memory.
        """
        del context
        attached = self.clone()
        if self.host.launchers:
            attached._counters = self.host.launchers[-1][1].zeros(self.counter_count)
        return attached

    def set_tactic(self, tactic: int) -> None:
        """There is one."""
        del tactic

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
        if self._launcher is None and self.host.launchers:
            self._launcher = self.host.launcher_of(spec.name for spec in self._kernels.specs)

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
        if self._kernels is None or self._launcher is None or not self._counters:
            raise PluginError(
                f"{self.op.name}: enqueue before attach_to_context and on_shape_change, or no "
                "kernels"
            )
        if (needed := self._kernels.counters(self._shapes)) > self.counter_count:
            raise PluginError(
                f"{self.op.name}: {needed} counters are needed, the profiles were built for "
                f"{self.counter_count}"
            )
        addresses = dict(zip((*self.op.inputs, *self.op.outputs), (*inputs, *outputs), strict=True))
        try:
            launches = self._kernels.launches(
                self._shapes, addresses, int(workspace), self._counters
            )
            for launch in launches:
                self._launcher.launch(launch, int(stream))
        except (LaunchError, ValueError) as error:
            raise PluginError(f"{self.op.name}: {error}") from error

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
    bases = (
        _OpPlugin,
        trt.IPluginV3,
        trt.IPluginV3OneCore,
        trt.IPluginV3OneBuild,
        trt.IPluginV3OneRuntime,
    )
    return type(f"{op.name}Plugin", bases, {"op": op, "trt": trt, "host": host})


def make_creator(trt: Any, op: CustomOp, host: PluginHost) -> Any:
    """The creator by which TensorRT makes an op's plugins: from ONNX nodes and from engines."""
    plugin_class = make_plugin_class(trt, op, host)
    attributes = op.attributes

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = op.name
            self.plugin_version = PLUGIN_VERSION
            self.plugin_namespace = PLUGIN_NAMESPACE
            self.host = host
            self._fields = PluginFields(trt, attributes, dict.fromkeys(attributes, 0))
            self.field_names = self._fields.collection

        @told
        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            given = {item.name: _number(item) for item in fields if item.name in attributes}
            if missing := attributes.keys() - given.keys():
                raise PluginError(f"{op.name} {name}: no {', '.join(sorted(missing))} was given")
            if phase == trt.TensorRTPhase.BUILD:
                return plugin_class(given)
            counters = [_number(item) for item in fields if item.name == COUNTERS_FIELD]
            if len(counters) != 1:
                raise PluginError(
                    f"{op.name} {name}: the engine has no field {COUNTERS_FIELD}; it was built by "
                    "another version of the project, build it again"
                )
            return plugin_class(given, int(counters[0]))

    return Creator()


def _number(item: Any) -> int | float:
    values = np.asarray(item.data).ravel()
    if values.size != 1:
        raise PluginError(f"field {item.name} has {values.size} numbers, expected 1")
    number: int | float = values[0].item()
    return number


# Creators must outlive every engine that uses them, and a registry takes each name once.
_HOSTS: dict[str, tuple[PluginHost, list[Any]]] = {}


def register_plugins(trt: Any) -> PluginHost:
    """Register every op's plugin with a TensorRT product; once for a process.

    Args:
        trt: the module `tensorrt_rtx` or `tensorrt`.

    Returns:
        What all plugins of that product share; add launchers to it before an engine is loaded.

    Raises:
        PluginError: TensorRT refuses a creator.
    """
    product = trt.__name__
    if product not in _HOSTS:
        host = PluginHost()
        creators = [make_creator(trt, op, host) for op in OPS]
        registry = trt.get_plugin_registry()
        for op, creator in zip(OPS, creators, strict=True):
            if not registry.register_creator(creator, PLUGIN_NAMESPACE):
                raise PluginError(f"{product} does not take the plugin {op.name}")
        _HOSTS[product] = (host, creators)
    return _HOSTS[product][0]


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
