"""What an engine with kernels of its own needs before its model is parsed: PTX, and the plugins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.aot_ptx import compile_ptx
from export.functions import doge_nodes
from export.lowerings.aot_plugins import layer_kernels
from plugins.aot_registry import AOT_PLUGINS
from plugins.kernel_spec import KernelSpec
from plugins.tensorrt_aot import AotHost, register_aot_plugins
from runtime.tensorrt_module import load_plugin_module

_PLUGINS = {plugin.name: plugin for plugin in AOT_PLUGINS}


@dataclass(frozen=True, kw_only=True)
class AotRegistration:
    """What was registered for one model.

    Attributes:
        layers: plugin layers that the parsed network must have.
        host: shared by all plugins: `used` names the kernels that the builder asked for, and
            `problems` says why a plugin failed where the builder does not.
    """

    layers: int
    host: AotHost


def register_aot(trt: Any, model_path: Path, targets: Sequence[str]) -> AotRegistration:
    """Compile the kernels of a model's plugins and register these; before the model is parsed.

    Args:
        trt: the module `tensorrt`.
        model_path: a model that `lower_for_tensorrt` wrote with `aot_plugins`.
        targets: the GPU that is built for, `sm90`: standard TensorRT builds for the one present.

    Raises:
        BackendUnavailableError: the product has no such plugins, or Triton is not installed.
        KernelCompileError: a kernel that TensorRT cannot take.
        ValueError: several targets, a model that was not lowered so, or a node that no kernel
            covers.
    """
    if len(targets) != 1:
        raise ValueError(
            f"an engine that holds its kernels is built for the GPU present; name one target, got "
            f"{', '.join(targets)}"
        )
    trtp = load_plugin_module(trt)
    layers = list(model_kernels(ir.load(model_path)))
    codes = compile_ptx((spec for specs in layers for spec in specs), targets[0])
    host = register_aot_plugins(trt, trtp)
    host.codes = codes
    host.used = set()
    host.problems = []
    return AotRegistration(layers=len(layers), host=host)


def model_kernels(model: ir.Model) -> Iterator[tuple[KernelSpec, ...]]:
    """The kernels of each plugin node.

    Raises:
        ValueError: a custom op that was not lowered to plugins, or a node that no kernel covers.
    """
    for node in doge_nodes(model):
        if node.op_type not in _PLUGINS:
            raise ValueError(
                f"{node.op_type} ({node.name}) is no plugin whose kernel an engine holds; "
                "lower the model with aot_plugins"
            )
        yield layer_kernels(node, _PLUGINS[node.op_type])
