"""A decoder layer as one TensorRT plugin: the launches of our kernels, and nothing of TensorRT's.

Its inputs are the residual stream, where a step's tokens go in the cache and in the rotation, the
layer's cache, and its weights as our kernels read them. Its outputs are the residual stream behind
the layer and the cache, which shares the memory of its input. Weights, rotary tables and the cache
are written and read in place, everything between lies in the workspace that TensorRT gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plugins.hosted_plugin import (
    Attributes,
    HostedPlugin,
    make_hosted_class,
    make_hosted_creator,
)
from plugins.plugin_host import PluginError, PluginHost, told
from runtime.kernel_step.layer_spec import LayerSpec, attribute_kinds
from runtime.kernel_step.layer_work import LayerMemory, work_of

LAYER_OP = "DecoderLayer"
# The inputs before the cache and the weights.
STREAM_INPUTS = ("x", "write_index", "position")
# TensorRT's names of the types of stored tensors. It has no plain uint8 for plugins: the bytes of
# packed 4-bit numbers go as int8.
_WEIGHT_TYPES = {
    "float32": "FLOAT", "float16": "HALF", "uint16": "BF16", "int8": "INT8", "uint8": "INT8",
}  # fmt: skip
_CACHE_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


class _LayerPlugin(HostedPlugin):
    """What the plugin of a decoder layer does."""

    # The second version of the builder's interface is the one that knows aliased outputs.
    interfaces = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuildV2", "IPluginV3OneRuntime")
    plugin_type = LAYER_OP
    kinds = attribute_kinds()

    def __init__(self, attributes: Attributes, counter_count: int = 0) -> None:
        """Make a plugin of a layer's numbers.

        Raises:
            PluginError: no layer has such numbers, or no kernel covers them.
        """
        try:
            spec = LayerSpec.from_attributes(attributes)
            self.work = work_of(spec)
        except ValueError as error:
            raise PluginError(f"{LAYER_OP}: {error}") from error
        self.output_count = 1 + len(spec.cache_kinds)
        self._input_names = layer_inputs(spec)
        self._cache_places = range(len(STREAM_INPUTS), len(STREAM_INPUTS) + len(spec.cache_kinds))
        self._types = _types(spec)
        super().__init__(attributes, counter_count or self.work.counters)
        self._step: tuple[int, int] | None = None

    # Build.

    def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
        """The stream's and the cache's."""
        return [types[0], *(types[place] for place in self._cache_places)]

    def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
        """Those of the stream and of the cache."""
        del shape_inputs, builder
        return [self.trt.DimsExprs(inputs[0])] + [
            self.trt.DimsExprs(inputs[place]) for place in self._cache_places
        ]

    def get_aliased_input(self, output: int) -> int:
        """Each cache tensor is written where it is read."""
        return -1 if output == 0 else self._cache_places[output - 1]

    def supports_format_combination(self, place: int, tensors: Any, input_count: int) -> bool:
        """Linear layout and the type that the kernels read."""
        desc = tensors[place].desc
        linear = desc.format == self.trt.TensorFormat.LINEAR
        known = input_count == len(self._input_names)
        return bool(linear and known and desc.type.name == self._types[place])

    @told
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Check that the profile and the weights are what the kernels were made for.

        Raises:
            PluginError: they are not, or kernels were not compiled.
        """
        del outputs
        self.host.check(self.work)
        self._check_shapes([tuple(tensor.max) for tensor in inputs])

    @told
    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """Scratch memory in bytes for the largest shapes of the profile."""
        del outputs
        batch, tokens, _ = inputs[0].max
        return self.work.workspace_bytes(batch, tokens)

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
        self._check_shapes([tuple(desc.dims) for desc in inputs])
        batch, tokens, _ = inputs[0].dims
        try:
            self.work.check(batch, tokens)
        except ValueError as error:
            raise PluginError(f"{LAYER_OP}: {error}") from error
        self._step = batch, tokens
        self._find_launcher(spec.name for spec in self.work.specs)

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
        """Put the layer's launches on the stream; the arguments are device addresses.

        Raises:
            PluginError: a cache tensor that is to be written elsewhere, too few counters, or a
                refused launch.
        """
        del input_descs, output_descs
        if self._step is None:
            raise self._unready()
        batch, tokens = self._step
        moved = [
            kind
            for kind, place, address in zip(
                self.work.spec.cache_kinds, self._cache_places, outputs[1:], strict=True
            )
            if int(inputs[place]) != int(address)
        ]
        if moved:
            raise PluginError(
                f"{LAYER_OP}: the cached {', '.join(moved)} is read at one address and written at "
                "another; give past and present of a layer one address"
            )
        names = self._input_names
        addresses = {name: int(address) for name, address in zip(names, inputs, strict=True)}
        memory = LayerMemory(
            x=addresses["x"],
            x_out=int(outputs[0]),
            write_index=addresses["write_index"],
            position=addresses["position"],
            cache={kind: addresses[f"past.{kind}"] for kind in self.work.spec.cache_kinds},
            weights={name: addresses[name] for name in self.work.spec.weights},
            workspace=int(workspace),
            counters=self._counters,
        )
        self._run(lambda: self.work.launches(memory, batch, tokens), stream, self.work.counters)

    def _check_shapes(self, shapes: Sequence[tuple[int, ...]]) -> None:
        spec = self.work.spec
        model = spec.model
        named = dict(zip(self._input_names, shapes, strict=True))
        batch, tokens = named["x"][:2] if len(named["x"]) == 3 else (-1, -1)
        rows = (batch, model.key_heads, model.slots, model.head_size)
        expected: dict[str, tuple[int, ...]] = {
            "x": (batch, tokens, model.hidden),
            "write_index": (batch,),
            "position": (batch,),
            "past.key": rows,
            "past.value": rows,
            "past.score": (batch, model.score_heads, model.slots, 1),
            **{name: tensor.shape for name, tensor in spec.weights.items()},
        }
        problems = [
            f"{name} is {list(shape)}, expected {list(expected[name])}"
            for name, shape in named.items()
            if shape != expected[name]
        ]
        if batch > spec.max_batch_size or tokens > spec.max_input_len:
            problems.append(
                f"x has {batch} x {tokens} tokens, expected at most {spec.max_batch_size} x "
                f"{spec.max_input_len}"
            )
        if problems:
            raise PluginError(f"{LAYER_OP} was made for other shapes: {'; '.join(problems)}")


def layer_inputs(spec: LayerSpec) -> tuple[str, ...]:
    """Names of a layer's inputs, in order: the stream, the cache as `past.*`, and the weights."""
    return (*STREAM_INPUTS, *(f"past.{kind}" for kind in spec.cache_kinds), *spec.weights)


def _types(spec: LayerSpec) -> tuple[str, ...]:
    """TensorRT's name of the type of every input and output."""
    kept = _CACHE_TYPES[spec.formats.float_kind]
    cache = ["FLOAT" if kind == "score" else kept for kind in spec.cache_kinds]
    weights = [_WEIGHT_TYPES[tensor.dtype.name] for tensor in spec.weights.values()]
    return ("FLOAT", "INT64", "INT64", *cache, *weights, "FLOAT", *cache)


def make_layer_creator(trt: Any, *, host: PluginHost) -> Any:
    """The creator by which TensorRT makes a layer's plugins."""
    made = make_hosted_class(trt, host, _LayerPlugin)
    return make_hosted_creator(trt, host, LAYER_OP, attribute_kinds(), made)
