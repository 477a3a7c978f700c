"""The network of an engine whose decoder layers are one plugin each, as an ONNX model.

Embedding, the rows of logits, the final norm and the head are TensorRT's, in the engine's number
format; everything between is `doge::DecoderLayer` nodes, behind which no function stands: only
TensorRT with that plugin reads the model. Weights are inputs of the nodes, packed as our kernels
read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export.lowerings.model_parts import EMBEDDING, HEAD
from export.step_weights import packed_arrays
from model.contract import TensorSpec, step_contract
from model.doge import DogeForCausalLM
from plugins.custom_op import DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION
from plugins.onnx_function import OPSET
from runtime.kernel_step.layer_plugin import LAYER_OP, STREAM_INPUTS, layer_inputs
from runtime.kernel_step.layer_spec import SHARED, LayerSpec, attribute_kinds

Array = npt.NDArray[Any]
# What a plan's entries of this part are: see export/lowerings/model_parts.py.
LAYER = "layer"
_IR_VERSION = 10
_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
}


def write_layer_model(network: DogeForCausalLM, spec: LayerSpec, path: Path) -> Path:
    """Write the model and, beside it, its weights.

    Args:
        network: in float32.
        spec: of its layers.
        path: of the `.onnx` file.

    Returns:
        `path`.

    Raises:
        ValueError: weights that the precision cannot hold.
    """
    ir.save(_Writer(network, spec).model(), path, external_data=f"{path.name}.data")
    return path


class _Writer:
    """One model while it is made."""

    def __init__(self, network: DogeForCausalLM, spec: LayerSpec) -> None:
        self._network = network
        self._spec = spec
        self._float = _DTYPES[spec.formats.float_kind]
        self._nodes: list[ir.Node] = []
        self._stored: dict[str, ir.Value] = {}
        self._contract = step_contract(
            network.config,
            network.generation,
            max_seq_len=spec.model.max_seq_len,
            cache_dtype=spec.formats.float_kind,
        )

    def model(self) -> ir.Model:
        """The whole model."""
        contract, hidden = self._contract, self._spec.model.hidden
        inputs = {spec.name: _value(spec) for spec in contract.inputs}
        for name, array in packed_arrays(self._network, self._spec.model, self._spec.formats):
            self._store(name, array)
        table = self._stored["embedding.weights"]
        stream = self._op(EMBEDDING, "Gather", [table, inputs["input_ids"]], axis=0)
        stream = self._cast(EMBEDDING, stream, ir.DataType.FLOAT)
        _describe(stream, "B", "S", hidden)
        first = self._store("first", np.array(0, np.int64))
        position = self._op(EMBEDDING, "Gather", [inputs["position_ids"], first], axis=1)
        position.dtype = ir.DataType.INT64
        present: list[ir.Value] = []
        where = {"write_index": inputs["write_index"], "position": position}
        for layer in range(self._spec.model.layers):
            stream, cache = self._layer(layer, {"x": stream, **where}, inputs)
            present += cache
        logits = self._head(stream, inputs["logits_index"])
        graph = ir.Graph(
            [*inputs.values()],
            [logits, *present],
            nodes=self._nodes,
            initializers=[*self._stored.values()],
            opset_imports={"": OPSET, DOMAIN: 1},
            name="layers",
        )
        return ir.Model(graph, ir_version=_IR_VERSION)

    def _layer(
        self, layer: int, stream: dict[str, ir.Value], inputs: dict[str, ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        """One plugin: the residual stream behind it, and the cache that it has written."""
        spec = self._spec
        past = {
            f"past.{kind}": inputs[f"past_key_values.{layer}.{kind}"] for kind in spec.cache_kinds
        }
        values = {
            name: self._stored[name if name in SHARED else f"layers.{layer}.{name}"]
            for name in spec.weights
        }
        reads = {**{name: stream[name] for name in STREAM_INPUTS}, **past, **values}
        outputs = {output.name: _value(output) for output in self._contract.present}
        cache = [outputs[f"present.{layer}.{kind}"] for kind in spec.cache_kinds]
        after = ir.val(f"layers.{layer}.output")
        _describe(after, "B", "S", spec.model.hidden)
        numbers = spec.attributes
        attributes: dict[str, Any] = {
            name: int(numbers[name]) if kind == "INT" else float(numbers[name])
            for name, kind in attribute_kinds().items()
        }
        node = ir.node(
            LAYER_OP,
            [reads[name] for name in layer_inputs(spec)],
            attributes={
                **attributes,
                "plugin_namespace": PLUGIN_NAMESPACE,
                "plugin_version": PLUGIN_VERSION,
            },
            domain=DOMAIN,
            outputs=[after, *cache],
            name=f"layers.{layer}.{LAYER}/{LAYER_OP}_{len(self._nodes)}",
        )
        self._nodes.append(node)
        return after, cache

    def _head(self, stream: ir.Value, index: ir.Value) -> ir.Value:
        """Logits [B, M, V] float32 of the tokens that `index` [B, M] names."""
        model = self._spec.model
        place = self._op(HEAD, "Unsqueeze", [index, self._store("last", np.array([-1], np.int64))])
        rows = self._op(HEAD, "GatherND", [stream, place], batch_dims=1)
        norm = self._stored["norm"]
        rows = self._op(HEAD, "RMSNormalization", [rows, norm], epsilon=model.eps)
        rows = self._cast(HEAD, rows, self._float)
        table = self._stored["embedding.weights" if model.tied else "head.weights"]
        columns = self._op(HEAD, "Transpose", [table], perm=[1, 0])
        logits = self._op(HEAD, "MatMul", [rows, columns])
        logits = self._cast(HEAD, logits, ir.DataType.FLOAT)
        logits.name = self._contract.logits.name
        logits.shape = ir.Shape(self._contract.logits.shape)
        logits.dtype = ir.DataType.FLOAT
        return logits

    def _store(self, name: str, array: Array) -> ir.Value:
        """A stored tensor; bits of bfloat16 as such, bytes of packed numbers as int8."""
        if array.dtype == np.uint16:
            array = array.view(ml_dtypes.bfloat16)
        elif array.dtype == np.uint8:
            array = array.view(np.int8)
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.tensor(array, name=name),
        )
        self._stored[name] = value
        return value

    def _op(self, part: str, operator: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        name = f"{part}/{operator}_{len(self._nodes)}"
        node = ir.node(operator, inputs, attributes=attributes, name=name)
        node.outputs[0].name = name
        self._nodes.append(node)
        return node.outputs[0]

    def _cast(self, part: str, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in another type; float32 models need no casts."""
        if self._float == ir.DataType.FLOAT:
            return value
        return self._op(part, "Cast", [value], to=int(dtype))


def _value(spec: TensorSpec) -> ir.Value:
    return ir.val(spec.name, _DTYPES[spec.dtype], ir.Shape(spec.shape))


def _describe(value: ir.Value, *sizes: int | str) -> None:
    """A float32 value of this shape."""
    value.dtype = ir.DataType.FLOAT
    value.shape = ir.Shape(sizes)
