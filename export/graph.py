"""The network as a canonical ONNX model: bare `doge` nodes first, their functions attached after.

docs/export.md gives the reasons for each pass. In short: the exporter inlines any function it is
handed, so the custom ops become opaque nodes with schemas of their own; its optimizer may not
inline, nor fold the transposes of weights, or parameters lose their names; and what it records of
the exporting machine is removed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from export.functions import attach_functions
from model.contract import StepContract, step_contract
from model.doge import DogeForCausalLM
from model.generations import Generation
from model.step_ops import export_tap
from plugins.custom_op import DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION, CustomOp
from plugins.onnx_function import OPSET
from plugins.registry import DYNAMIC_MASK_ATTENTION, EXPERT_GATHER, VALUE_GATHER

MODEL_NAME = "model.onnx"
_NETWORK_PREFIX = "network."


def export_onnx(network: DogeForCausalLM, path: Path, *, max_seq_len: int) -> Path:
    """Write the canonical model `path` and, beside it, its weights as external data.

    Args:
        network: a float32 network on the CPU, as `rewrite_for_export` gives it.
        path: the `.onnx` file to write; `<path>.data` takes the weights.
        max_seq_len: C, slots of the cache, at most the network's positions.

    Returns:
        `path`.
    """
    ir.save(
        canonical_model(network, max_seq_len=max_seq_len), path, external_data=f"{path.name}.data"
    )
    return path


def canonical_model(network: DogeForCausalLM, *, max_seq_len: int) -> ir.Model:
    """The canonical ONNX model in memory; see `export_onnx`."""
    if network.generation.score_heads is None and any(
        getattr(module, "mask_bias", 0) is None for module in network.modules()
    ):
        raise ValueError(
            f"a network of generation {network.generation.name} is exported in the form that "
            "model.seed_rewrites.rewrite_for_export gives it"
        )
    contract = step_contract(network.config, network.generation, max_seq_len=max_seq_len)
    model = _trace(network, contract, max_seq_len)
    optimizer.optimize_ir(
        model,
        inline=False,
        should_fold=lambda node: False if node.op_type == "Transpose" else None,
    )
    _apply_taps(model.graph)
    _restore_parameter_names(model.graph, network.generation)
    _forget_exporting_machine(model)
    attach_functions(model)
    return model


class _Step(nn.Module):
    """The network's forward pass with flat inputs and outputs, as the contract lists them."""

    def __init__(self, network: DogeForCausalLM) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        logits_index: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        kinds = len(past) // self.network.config.num_hidden_layers
        caches = [tuple(past[i : i + kinds]) for i in range(0, len(past), kinds)]
        logits, presents = self.network(
            input_ids, position_ids, write_index, logits_index, caches, tap=export_tap
        )
        return (logits, *(tensor for present in presents for tensor in present))


def _trace(network: DogeForCausalLM, contract: StepContract, slots: int) -> ir.Model:
    # Sizes 0 and 1 would be taken for constants; these stand for any.
    B, S, M = 2, 3, 2
    tokens = torch.zeros(B, S, dtype=torch.int64)
    positions = torch.arange(S).expand(B, S).contiguous()
    past = [tensor for layer in network.new_cache(B, slots) for tensor in layer]
    arguments = (
        tokens,
        positions,
        torch.zeros(B, dtype=torch.int64),
        torch.zeros(B, M, dtype=torch.int64),
        past,
    )
    batch, sequence, wanted = (torch.export.Dim(name) for name in ("B", "S", "M"))
    dynamic_shapes = (
        {0: batch, 1: sequence},
        {0: batch, 1: sequence},
        {0: batch},
        {0: batch, 1: wanted},
        [{0: batch}] * len(past),
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch's own exporter
        # It warns that torchvision is missing, which nothing here needs.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            _Step(network).eval(),
            arguments,
            input_names=[spec.name for spec in contract.inputs],
            output_names=[spec.name for spec in contract.outputs],
            dynamic_shapes=dynamic_shapes,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
            custom_translation_table=_translations(),
        )
    if program is None:
        raise AssertionError("torch.onnx.export(dynamo=True) returns a program")
    return program.model


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How our torch ops become ONNX nodes.

    An op object with its own schema needs no global registration; onnxscript has no opset object
    as young as TensorScatter, so that one is made here as well.
    """
    domain = onnxscript.values.Opset(DOMAIN, 1)
    standard = onnxscript.values.Opset("", OPSET)
    plugin = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
    attention, experts, values = (
        onnxscript.values.Op(domain, op.name, _schema(op))
        for op in (DYNAMIC_MASK_ATTENTION, EXPERT_GATHER, VALUE_GATHER)
    )
    tap = onnxscript.values.Op(domain, "Tap", _tap_schema())

    def attend(query, key, value, score, write_index, scale, keep_window_size):  # type: ignore[no-untyped-def]
        return attention(
            query,
            key,
            value,
            score,
            write_index,
            scale=scale,
            keep_window_size=keep_window_size,
            **plugin,
        )

    def gather(hidden, scores_x, scores_y, down, up, top_k, weight_inside, normalize):  # type: ignore[no-untyped-def]
        return experts(
            hidden,
            scores_x,
            scores_y,
            down,
            up,
            top_k=top_k,
            weight_inside=int(weight_inside),
            normalize=int(normalize),
            **plugin,
        )

    def gather_values(scores, table, top_k, subset_sums):  # type: ignore[no-untyped-def]
        return values(scores, table, top_k=top_k, subset_sums=int(subset_sums), **plugin)

    def scatter(past, update, write_index):  # type: ignore[no-untyped-def]
        return standard.TensorScatter(past, update, write_index, axis=2)

    def mark(value, name):  # type: ignore[no-untyped-def]
        return tap(value, tap_name=name)

    return {
        torch.ops.doge.dynamic_mask_attention.default: attend,
        torch.ops.doge.expert_gather.default: gather,
        torch.ops.doge.value_gather.default: gather_values,
        torch.ops.doge.tensor_scatter.default: scatter,
        torch.ops.doge.tap.default: mark,
    }


def _schema(custom_op: CustomOp) -> onnx.defs.OpSchema:
    """Schema of a custom op: every float input of one type, attributes as declared."""
    schema = onnx.defs.OpSchema
    return schema(
        custom_op.name,
        DOMAIN,
        1,
        inputs=[
            schema.FormalParameter(
                name, "tensor(int64)" if name in custom_op.integer_inputs else "T"
            )
            for name in custom_op.inputs
        ],
        outputs=[schema.FormalParameter(name, "T") for name in custom_op.outputs],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
        attributes=[
            *(
                schema.Attribute(name, getattr(onnx.defs.OpSchema.AttrType, kind), "")
                for name, kind in custom_op.attributes.items()
            ),
            *(
                schema.Attribute(name, onnx.defs.OpSchema.AttrType.STRING, "")
                for name in ("plugin_namespace", "plugin_version")
            ),
        ],
    )


def _tap_schema() -> onnx.defs.OpSchema:
    schema = onnx.defs.OpSchema
    return schema(
        "Tap",
        DOMAIN,
        1,
        inputs=[schema.FormalParameter("value", "T")],
        outputs=[schema.FormalParameter("tapped", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[schema.Attribute("tap_name", schema.AttrType.STRING, "")],
    )


def _apply_taps(graph: ir.Graph) -> None:
    """Give each tapped value its name and take the Tap nodes out."""
    for node in list(graph):
        if node.domain != DOMAIN or node.op_type != "Tap":
            continue
        value, tapped = node.inputs[0], node.outputs[0]
        if value is None:
            raise AssertionError("a Tap has one input")
        tapped.replace_all_uses_with(value)
        value.name = node.attributes["tap_name"].as_string()
        graph.remove(node, safe=True)


def _restore_parameter_names(graph: ir.Graph, generation: Generation) -> None:
    """Name parameters as the checkpoint does, without the exporting wrapper's prefix."""
    for name in list(graph.initializers):
        value = graph.initializers.pop(name)
        value.name = generation.published_name(name.removeprefix(_NETWORK_PREFIX))
        graph.register_initializer(value)


def _forget_exporting_machine(model: ir.Model) -> None:
    """Clear the notes of nodes and values: they hold paths and are most of the file's size."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
    named: Sequence[ir.Value] = (*model.graph.inputs, *model.graph.initializers.values())
    for value in named:
        value.metadata_props.clear()
        value.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None
