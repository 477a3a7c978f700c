"""What is checked and set in a network between parsing and building."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.engine_config import EngineBuildError, EngineConfig
from plugins.custom_op import DOMAIN
from runtime.engines.decode_graph import EngineInterface

# Layers that read keys and values where they lie.
_READS_CACHE = frozenset({"ATTENTION_INPUT", "ATTENTION_OUTPUT", "PLUGIN_V3", "SHAPE"})


def check_network(network: Any, contract: EngineInterface) -> None:
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


def check_cache_in_place(network: Any, contract: EngineInterface, plugin: str) -> None:
    """No layer may copy the cache: each tensor is written where it lies and read from there.

    Each input of the cache is read by one layer, but for its shape, which writes the tokens of the
    step and whose output is the network's. Keys and values, which are large, are then read by
    attention alone. The parser multiplies keys by a number on the way; in the compiled plan
    attention does that itself. Scores may be read by anything: the mask that is made of them is
    larger than they are.

    Args:
        network: parsed.
        contract: which tensors are the cache.
        plugin: of the engine; with `layer` plugins write the cache.

    Raises:
        EngineBuildError: names every layer that breaks this.
    """
    readers, writers = _links(network)
    writes = "PLUGIN_V3" if plugin == "layer" else "KV_CACHE_UPDATE"
    problems = []
    for past, present in contract.aliases:
        kinds = [layer.type.name for layer in readers.get(past, [])]
        kinds = [kind for kind in kinds if kind != "SHAPE"]
        if kinds != [writes]:
            problems.append(f"{past} is read by {kinds}, expected one {writes}")
        maker = writers.get(present)
        if maker is None or maker not in readers.get(past, []):
            problems.append(f"{present} is not made by the layer that reads {past}")
    large = {spec.name for spec in contract.past if spec.shape[-1] != 1}
    for past, present in contract.aliases:
        if past in large:
            problems += _copies(present, readers)
    if problems:
        raise EngineBuildError(f"the parsed network copies the cache: {'; '.join(problems)}")


def _links(network: Any) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The layers that read each tensor, and the one that makes it, by the tensor's name."""
    readers: dict[str, list[Any]] = {}
    writers: dict[str, Any] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for place in range(layer.num_inputs):
            tensor = layer.get_input(place)
            if tensor is not None and layer not in readers.setdefault(tensor.name, []):
                readers[tensor.name].append(layer)
        writers |= {layer.get_output(place).name: layer for place in range(layer.num_outputs)}
    return readers, writers


def _copies(present: str, readers: Mapping[str, list[Any]]) -> Iterator[str]:
    """What reads keys or values and is neither attention nor a question for their shape."""
    for layer in readers.get(present, []):
        kind = layer.type.name
        if kind in _READS_CACHE or _is_scale_of_attention(layer, readers):
            continue
        shapes = [list(layer.get_output(i).shape) for i in range(layer.num_outputs)]
        yield f"{present} is read by {kind} {layer.name}, which makes {shapes}"


def _is_scale_of_attention(layer: Any, readers: Mapping[str, list[Any]]) -> bool:
    if layer.type.name != "ELEMENTWISE":
        return False
    sizes = [prod(layer.get_input(place).shape) for place in range(layer.num_inputs)]
    behind = [reader.type.name for reader in readers.get(layer.get_output(0).name, [])]
    return 1 in sizes and behind == ["ATTENTION_INPUT"]


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
