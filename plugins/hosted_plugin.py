"""What every TensorRT plugin (`IPluginV3`) of the project does, whatever it computes.

A plugin is made of numbers alone: its attributes, which an ONNX node and a serialized engine hold,
and how many counters its kernels need. Kernels are found through the `PluginHost` of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from plugins.custom_op import PLUGIN_NAMESPACE, PLUGIN_VERSION, AttributeType
from plugins.kernel_spec import Launch
from plugins.launcher import Launcher, LaunchError
from plugins.plugin_host import PluginError, PluginHost, told

# Field of a serialized plugin beside its attributes.
COUNTERS_FIELD = "counters"
Attributes = Mapping[str, int | float]


class PluginFields:
    """Fields of a plugin with their numbers, which a collection of TensorRT's only points to.

    Attributes:
        collection: the fields; valid as long as this object lives.
    """

    def __init__(
        self,
        trt: Any,
        kinds: Mapping[str, AttributeType],
        values: Attributes,
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


class HostedPlugin:
    """What every plugin does; mixed into TensorRT's interfaces by `make_hosted_class`.

    Attributes:
        trt: the TensorRT module.
        host: what the process has loaded.
        interfaces: names of the interfaces in `trt` that it is mixed into.
        plugin_type: its name, the ONNX node's operator.
        kinds: type of each attribute by name.
        output_count: how many outputs it has.
        attributes: the node's.
        counter_count: counters that the largest profile needs, 0 before any was configured.
    """

    trt: Any
    host: PluginHost
    interfaces: tuple[str, ...]
    plugin_type: str
    kinds: Mapping[str, AttributeType]
    output_count: int = 1

    def __init__(self, attributes: Attributes, counter_count: int = 0) -> None:
        """Make a plugin; clones are made in the same way, since C++ holds part of the state."""
        for interface in self.interfaces:
            getattr(self.trt, interface).__init__(self)
        self.plugin_name = self.plugin_type
        self.plugin_version = PLUGIN_VERSION
        self.plugin_namespace = PLUGIN_NAMESPACE
        self.attributes = dict(attributes)
        self.counter_count = counter_count
        self.num_outputs = self.output_count
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

    def get_valid_tactics(self) -> list[int]:
        """There is one way to run it."""
        return []

    # Run time.

    def get_fields_to_serialize(self) -> Any:
        """All that the run time needs: the attributes, and how many counters."""
        self._fields = PluginFields(
            self.trt,
            {**self.kinds, COUNTERS_FIELD: "INT"},
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

    def _find_launcher(self, kernels: Iterable[str]) -> None:
        """Take the launcher of the kernels that the coming steps need.

        Raises:
            PluginError: they are not loaded.
        """
        if self._launcher is None and self.host.launchers:
            self._launcher = self.host.launcher_of(kernels)

    def _run(self, launches: Callable[[], Iterable[Launch]], stream: int, needed: int) -> None:
        """Put launches on a stream, and do nothing else: it may be captured.

        Args:
            launches: makes them.
            stream: TensorRT's.
            needed: counters that they use.

        Raises:
            PluginError: not attached, too few counters, shapes that no kernel covers, or a launch
                that is refused.
        """
        if self._launcher is None or not self._counters:
            raise self._unready()
        if needed > self.counter_count:
            raise PluginError(
                f"{self.plugin_type}: {needed} counters are needed, the profiles were built for "
                f"{self.counter_count}"
            )
        try:
            for launch in launches():
                self._launcher.launch(launch, int(stream))
        except (LaunchError, ValueError) as error:
            raise PluginError(f"{self.plugin_type}: {error}") from error

    def _unready(self) -> PluginError:
        return PluginError(
            f"{self.plugin_type}: enqueue before attach_to_context and on_shape_change, or no "
            "kernels"
        )


def make_hosted_class(
    trt: Any, host: PluginHost, mixin: type[HostedPlugin], **members: Any
) -> type[Any]:
    """A plugin class for one TensorRT product.

    Args:
        trt: the TensorRT module.
        host: what its plugins share.
        mixin: what they do.
        members: of the class, such as `plugin_type`.
    """
    members = {"trt": trt, "host": host, **members}
    name = members.get("plugin_type", getattr(mixin, "plugin_type", ""))
    bases = (mixin, *(getattr(trt, interface) for interface in mixin.interfaces))
    return type(f"{name}Plugin", bases, members)


def make_hosted_creator(
    trt: Any,
    host: PluginHost,
    name: str,
    kinds: Mapping[str, AttributeType],
    make: Callable[..., Any],
) -> Any:
    """The creator by which TensorRT makes plugins: from ONNX nodes and from engines.

    Args:
        trt: the TensorRT module.
        host: what its plugins share.
        name: of the plugin.
        kinds: type of each attribute by name; a node and an engine must have all of them.
        make: makes one of attributes and, from an engine, a number of counters.
    """

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = name
            self.plugin_version = PLUGIN_VERSION
            self.plugin_namespace = PLUGIN_NAMESPACE
            self.host = host
            self._fields = PluginFields(trt, kinds, dict.fromkeys(kinds, 0))
            self.field_names = self._fields.collection

        @told
        def create_plugin(self, layer: str, fields: Any, phase: Any) -> Any:
            given = {item.name: _number(item) for item in fields if item.name in kinds}
            if missing := kinds.keys() - given.keys():
                raise PluginError(f"{name} {layer}: no {', '.join(sorted(missing))} was given")
            if phase == trt.TensorRTPhase.BUILD:
                return make(given)
            counters = [_number(item) for item in fields if item.name == COUNTERS_FIELD]
            if len(counters) != 1:
                raise PluginError(
                    f"{name} {layer}: the engine has no field {COUNTERS_FIELD}; it was built by "
                    "another version of the project, build it again"
                )
            return make(given, int(counters[0]))

    return Creator()


def _number(item: Any) -> int | float:
    values = np.asarray(item.data).ravel()
    if values.size != 1:
        raise PluginError(f"field {item.name} has {values.size} numbers, expected 1")
    number: int | float = values[0].item()
    return number
