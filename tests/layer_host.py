"""Runs the model of an engine whose layers are plugins on host memory, as TensorRT would call it.

Standard nodes are run by ONNX's own evaluator. A `DecoderLayer` node becomes a plugin through the
calls that TensorRT makes, with TensorRT-RTX's own classes of fields and types; its kernels run in
Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from export.layer_model import write_layer_model
from model.doge import DogeForCausalLM
from plugins.plugin_host import PluginHost
from runtime.backends.base import Backend, Cache
from runtime.kernel_step.layer_plugin import LAYER_OP, make_layer_creator
from runtime.kernel_step.layer_spec import LayerSpec
from runtime.kernel_step.layer_work import LayerWork
from runtime.tensorrt_module import load_tensorrt
from tests.interpreter import InterpreterLauncher

trt = load_tensorrt("tensorrt_rtx")
STREAM = 1234
_TYPES = {
    "float32": trt.DataType.FLOAT,
    "float16": trt.DataType.HALF,
    "bfloat16": trt.DataType.BF16,
    "int8": trt.DataType.INT8,
    "int64": trt.DataType.INT64,
}
_ALIGNMENT = 256


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy at an address that device allocations have."""
    place = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    shift = -place.ctypes.data % _ALIGNMENT
    copy = place[shift : shift + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def described(array: np.ndarray) -> SimpleNamespace:
    return SimpleNamespace(
        dims=tuple(array.shape),
        type=_TYPES[array.dtype.name],
        format=trt.TensorFormat.LINEAR,
    )


def profiled(array: np.ndarray, largest: tuple[int, ...], varies: set[int]) -> SimpleNamespace:
    """A tensor as `configure_plugin` sees it; dimensions that vary are -1, and 1 in most steps."""
    desc = described(array)
    desc.dims = tuple(-1 if axis in varies else size for axis, size in enumerate(array.shape))
    least = tuple(1 if axis in varies else size for axis, size in enumerate(array.shape))
    return SimpleNamespace(desc=desc, min=least, opt=least, max=largest)


class HostLauncher(InterpreterLauncher):
    """Takes launches on TensorRT's stream; counters are host memory, too."""

    def __init__(self, specs):
        super().__init__(specs)
        self.counters: list[np.ndarray] = []

    def zeros(self, count):
        self.counters.append(aligned(np.zeros(max(count, 1), np.int32)))
        return self.counters[-1].ctypes.data

    def launch(self, launch, stream=0):
        assert stream == STREAM, "the stream that TensorRT gave"
        super().launch(launch)


class HostLayers:
    """The layers of one model as plugins, from node to `enqueue`.

    Attributes:
        host: what they share.
        launcher: what runs their kernels.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self.host = PluginHost()
        specs = LayerWork(spec).specs
        self.launcher = HostLauncher(specs)
        self.host.launchers.append((frozenset(s.name for s in specs), self.launcher))
        self.creator = make_layer_creator(trt, host=self.host)
        self.workspaces: dict[str, int] = {}
        self._attached: dict[str, Any] = {}

    def built(self, node: onnx.NodeProto) -> Any:
        """What the builder makes of a node: of the attributes, those that the creator declares."""
        declared = {field.name: field.type for field in self.creator.field_names}
        arrays = {}
        for attribute in node.attribute:
            if attribute.name in declared:
                is_float = declared[attribute.name] == trt.PluginFieldType.FLOAT32
                number = onnx.helper.get_attribute_value(attribute)
                arrays[attribute.name] = np.array([number], np.float32 if is_float else np.int32)
        fields = [trt.PluginField(name, arrays[name], declared[name]) for name in arrays]
        collection = trt.PluginFieldCollection(fields)
        return self.creator.create_plugin(node.name, collection, trt.TensorRTPhase.BUILD)

    def run(self, node: onnx.NodeProto, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """The outputs of one layer: the stream, and the cache that was written in place."""
        arrays = [aligned(np.asarray(array)) for array in inputs]
        plugin = self._attached.get(node.name)
        if plugin is None:
            plugin = self._attached[node.name] = self._attach(node, arrays)
        stream = aligned(np.full_like(arrays[0], np.nan))
        cache = [
            arrays[plugin.get_aliased_input(output)] for output in range(1, plugin.num_outputs)
        ]
        outputs = [stream, *cache]
        descs = [described(a) for a in arrays], [described(a) for a in outputs]
        plugin.on_shape_change(*descs)
        size = plugin.work.workspace_bytes(*arrays[0].shape[:2])
        assert size <= self.workspaces[node.name]
        guarded = aligned(np.full(size + _ALIGNMENT, 255, np.uint8))
        plugin.enqueue(
            *descs,
            [array.ctypes.data for array in arrays],
            [array.ctypes.data for array in outputs],
            guarded.ctypes.data,
            STREAM,
        )
        assert (guarded[size:] == 255).all(), "written behind the workspace"
        assert not any(counters.any() for counters in self.launcher.counters)
        return outputs

    def _attach(self, node: onnx.NodeProto, arrays: list[np.ndarray]) -> Any:
        built = self.built(node)
        sizes = []
        for tokens in (1, self.spec.max_input_len):  # the two profiles
            inputs, outputs = self._profile(built, arrays, tokens)
            clone = built.clone()  # state of one clone is not another's
            clone.configure_plugin(inputs, outputs)
            tensors = [*inputs, *outputs]
            for place in range(len(tensors)):
                assert clone.supports_format_combination(place, tensors, len(inputs))
            sizes.append(clone.get_workspace_size(inputs, outputs))
        assert 0 < sizes[0] <= sizes[1]
        self.workspaces[node.name] = sizes[1]
        fields = built.get_fields_to_serialize()
        loaded = self.creator.create_plugin(node.name, fields, trt.TensorRTPhase.RUNTIME)
        return loaded.attach_to_context(None)

    def _profile(self, built: Any, arrays: list[np.ndarray], tokens: int) -> tuple[Any, Any]:
        batch = self.spec.max_batch_size
        moving = 3 + len(self.spec.cache_kinds)
        inputs = []
        for place, array in enumerate(arrays):
            varies = {0} if place < moving else set()
            largest = (batch, *array.shape[1:]) if place < moving else tuple(array.shape)
            if place == 0:
                largest = (batch, tokens, array.shape[2])
                varies |= {1} if tokens > 1 else set()
            inputs.append(profiled(array, largest, varies))
        places = [0, *(built.get_aliased_input(o) for o in range(1, built.num_outputs))]
        return inputs, [inputs[place] for place in places]


@dataclass(kw_only=True)
class HostCache(Cache):
    """The cache tensors by input."""

    arrays: dict[str, np.ndarray]


class HostBackend(Backend):
    """Steps of a model whose layers are plugins.

    Attributes:
        layers: the plugins.
    """

    name = "host"
    variant = "layer"

    def __init__(self, network: DogeForCausalLM, spec: LayerSpec, folder: Path, limits) -> None:
        config = network.config
        self.limits, self.vocab_size = limits, config.vocab_size
        self.router_mode = config.router_mode if config.is_moe else None
        self.model = onnx.load(str(write_layer_model(network, spec, folder / "layers.onnx")))
        self.layers = layers = HostLayers(spec)

        class Layer(OpRun):
            op_domain = "doge"

            def _run(self, *inputs, **attributes):
                return tuple(layers.run(self.onnx_node, list(inputs)))

        Layer.__name__ = LAYER_OP
        self._evaluator = ReferenceEvaluator(self.model, new_ops=[Layer])

    @classmethod
    def open(cls, bundle, variant, threads):
        raise AssertionError("made of a network")

    def new_cache(self, batch_size, capacity=None):
        types = {1: np.float32, 10: np.float16, 16: ml_dtypes.bfloat16}
        arrays = {}
        for given in self.model.graph.input:
            if given.name.startswith("past_key_values."):
                tensor = given.type.tensor_type
                shape = [batch_size, *(d.dim_value for d in tensor.shape.dim[1:])]
                arrays[given.name] = np.zeros(shape, types[tensor.elem_type])
        slots = self.check_cache_size(batch_size, capacity)
        return HostCache(capacity=slots, lengths=np.zeros(batch_size, np.int64), arrays=arrays)

    def _step(self, input_ids, write_index, logits_index, cache, row):
        rows = slice(None) if row is None else slice(row, row + 1)
        arrays = {name: array[rows] for name, array in cache.arrays.items()}
        positions = write_index[:, None] + np.arange(input_ids.shape[1])
        return self.run(input_ids, positions, write_index, logits_index, arrays)

    def run(self, input_ids, position_ids, write_index, logits_index, cache):
        """Logits of a step; the arrays of `cache` are written in place."""
        tokens = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "write_index": write_index,
            "logits_index": logits_index,
        }
        names = [output.name for output in self.model.graph.output]
        found = dict(zip(names, self._evaluator.run(None, tokens | cache), strict=True))
        for name, array in cache.items():
            array[...] = found[name.replace("past_key_values", "present")]
        return found["logits"]

    def close(self):
        pass
