"""Runs plugins that an engine would hold in Triton's interpreter, with sizes as plain numbers."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch
from torch import Tensor

from plugins.aot_plugin import AotPlugin, Attributes, Sizes
from plugins.dynamic_mask_attention.aot import ATTEND_SHARES, JOIN_SHARES
from plugins.expert_gather.aot import GATHER_EXPERTS, ROUTE_EXPERTS, router_scratch
from tests.kernel_runs import Guarded, guarded

_TORCH_TYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "int32": torch.int32,
}  # fmt: skip


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def run_plugin(
    plugin: AotPlugin, attributes: Attributes, inputs: Mapping[str, Tensor], tactic: int = 1
) -> dict[str, Tensor]:
    """The outputs of one plugin, whose memory holds NaN before.

    Checked: nothing is written beside them, and inputs stay as they are.
    """
    shapes = {name: tuple(inputs[name].shape) for name in plugin.inputs}
    dtypes = {name: dtype_name(inputs[name]) for name in plugin.inputs}
    spec = plugin.make_kernels(attributes, shapes, dtypes)[tactic - 1]
    sizes = Sizes(plugin, attributes, shapes, spec=spec)
    given = {name: guarded(inputs[name]) for name in plugin.inputs}
    written = {
        name: Guarded(sizes.output_shape(name), _TORCH_TYPES[plugin.output_type(name, dtypes)])
        for name in plugin.outputs
    }
    module, _, function = spec.function.partition(":")
    kernel = getattr(importlib.import_module(module), function)
    kernel[sizes.grid(spec)](
        *(array.tensor for array in given.values()),
        *sizes.extras(),
        *(array.tensor for array in written.values()),
        **spec.constants,
    )
    for name, array in {**given, **written}.items():
        array.check(name)
    for name, array in given.items():
        assert torch.equal(
            array.tensor.view(torch.uint8), inputs[name].contiguous().view(torch.uint8)
        ), f"{name} was written"
    return {name: array.tensor for name, array in written.items()}


def attend(
    inputs: Mapping[str, Tensor], *, scale: float, max_splits: int, tactic: int = 1
) -> Tensor:
    """Dynamic mask attention by both of its plugins."""
    attributes = {
        "scale": scale,
        "max_splits": max_splits,
        "one_score_row": int(inputs["score"].shape[0] == 1),
    }
    shares = run_plugin(ATTEND_SHARES, attributes, inputs, tactic)
    joined = run_plugin(
        JOIN_SHARES, {"max_splits": max_splits}, {"query": inputs["query"], **shares}
    )
    return joined["attention_output"]


def gather_experts(
    inputs: Mapping[str, Tensor], *, top_k: int, weight_inside: int, normalize: int
) -> Tensor:
    """The expert gather by both of its plugins."""
    scratch_size = router_scratch(top_k, inputs["scores_x"].shape[2])
    routed = run_plugin(
        ROUTE_EXPERTS,
        {"top_k": top_k, "normalize": normalize, "scratch_size": scratch_size},
        inputs,
    )
    gathered = run_plugin(GATHER_EXPERTS, {"weight_inside": weight_inside}, {**inputs, **routed})
    return gathered["expert_output"]
