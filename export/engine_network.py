"""What is checked and set in a network between parsing and building."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.engine_config import EngineBuildError, EngineConfig
from model.contract import StepContract
from plugins.custom_op import DOMAIN


def check_network(network: Any, contract: StepContract) -> None:
    """The parsed network's inputs and outputs must be the contract's, name by name."""
    found_inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    found_outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    expected_inputs = [spec.name for spec in contract.inputs]
    expected_outputs = [spec.name for spec in contract.outputs]
    if found_inputs != expected_inputs or found_outputs != expected_outputs:
        raise EngineBuildError(
            f"the parsed network has inputs {found_inputs} and outputs {found_outputs}, the "
            f"contract {expected_inputs} and {expected_outputs}"
        )


def check_plugins(onnx_path: Path, config: EngineConfig, found: int) -> None:
    """Every custom op must have become a plugin layer, or none must have.

    When the parser finds no plugin for a node it expands the function without a word, and the
    engine is merely slow.
    """
    nodes = Counter(node.op_type for node in ir.load(onnx_path).graph if node.domain == DOMAIN)
    expected = 0 if config.plugin == "none" else nodes.total()
    if found != expected:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(nodes.items()))
        raise EngineBuildError(
            f"the model has {counts or 'no custom ops'}, and --plugin {config.plugin} asks for "
            f"{expected} plugin layers; the parsed network has {found}. The parser expands the "
            "function of a node whose plugin it does not find: its name, version or namespace "
            "differs from the node's"
        )


def allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Let the builder take several kernels for an attention that no fused one fits.

    Without this, a head count, a fixed length of 1 or float32 can fail the whole build. Layers
    arrive as plain ILayer; the class gives access to the attention behind one.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True
