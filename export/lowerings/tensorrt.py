"""What TensorRT is given for an engine of one precision: every lowering it needs, in order."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from export.lowerings.aot_plugins import use_aot_plugins
from export.lowerings.attention_inputs import join_attention_inputs
from export.lowerings.engine_weights import WeightFormat, narrow_engine_weights
from export.lowerings.expert_sums import sum_experts
from export.lowerings.graph_editor import GraphEditor
from export.lowerings.half_precision import HalfType, lower_to_half
from export.lowerings.model_parts import name_nodes_by_part
from export.lowerings.query_heads import repeat_few_query_heads
from export.lowerings.residual_stream import keep_stream_float32
from export.lowerings.value_norm import give_values_their_own_norm

# The passes that change nothing but the plan, each a module of `export.lowerings`, in order.
PASSES = ("attention_inputs", "expert_sums", "query_heads", "residual_stream")


def lower_for_tensorrt(
    canonical: Path,
    folder: Path,
    dtype: str,
    *,
    weights: WeightFormat | None = None,
    plugins: bool = False,
    aot_plugins: bool = False,
    left_out: frozenset[str] = frozenset(),
) -> Path:
    """Write the lowered model and its weights into `folder`.

    Args:
        canonical: the canonical model.
        folder: an existing folder.
        dtype: numpy dtype name of the engine's activations, weights and cached keys and values.
        weights: a narrower format for the weights of products, with float16 alone.
        plugins: leave the custom ops as they are, for plugins to take them.
        aot_plugins: make the custom ops plugins whose kernels the engine holds.
        left_out: names of `PASSES` that are not run, to measure the others.

    Returns:
        The `.onnx` file.

    Raises:
        ValueError: a weight that `dtype` cannot hold, a graph that is not canonical, or a custom
            op that those plugins do not cover.
    """
    model = ir.load(canonical)
    give_values_their_own_norm(model)
    lower_for_fewer_kernels(
        model,
        half=dtype != "float32",
        plugins=plugins or aot_plugins,
        left_out=left_out,
    )
    if dtype != "float32":
        half: HalfType = "bfloat16" if dtype == "bfloat16" else "float16"
        lower_to_half(model, half)
    if weights is not None:
        narrow_engine_weights(model, weights)
    if aot_plugins:
        use_aot_plugins(model)
    _drop_unused_functions(model)
    name_nodes_by_part(model.graph)
    path = folder / f"{dtype}.onnx"
    ir.save(model, path, external_data=f"{path.name}.data")
    return path


def lower_for_fewer_kernels(
    model: ir.Model,
    *,
    half: bool,
    plugins: bool,
    left_out: frozenset[str] = frozenset(),
) -> None:
    """The passes that cut the compiled plan (docs/plan.md), on a float32 model.

    Args:
        model: the canonical model, changed in place.
        half: whether `lower_to_half` follows.
        plugins: whether plugins take the custom ops, which then stay as they are.
        left_out: names of `PASSES` that are not run, to measure the others.
    """
    editor = GraphEditor(model)
    wanted = [name for name in PASSES if name not in left_out]
    if "attention_inputs" in wanted:
        join_attention_inputs(editor)
    if "expert_sums" in wanted and not plugins:
        sum_experts(editor)
    if "query_heads" in wanted and not plugins and half:
        repeat_few_query_heads(editor)
    if "residual_stream" in wanted:
        keep_stream_float32(model)


def _drop_unused_functions(model: ir.Model) -> None:
    used = {node.op_identifier() for node in model.graph}
    for name in [name for name in model.functions if name not in used]:
        del model.functions[name]
