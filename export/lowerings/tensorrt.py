"""What TensorRT is given for an engine of one precision: every lowering it needs, in order."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from export.lowerings.aot_plugins import use_aot_plugins
from export.lowerings.half_precision import HalfType, lower_to_half
from export.lowerings.value_norm import give_values_their_own_norm


def lower_for_tensorrt(
    canonical: Path, folder: Path, dtype: str, *, aot_plugins: bool = False
) -> Path:
    """Write the lowered model and its weights into `folder`.

    Args:
        canonical: the canonical model.
        folder: an existing folder.
        dtype: numpy dtype name of the engine's activations, weights and cached keys and values.
        aot_plugins: make the custom ops plugins whose kernels the engine holds.

    Returns:
        The `.onnx` file.

    Raises:
        ValueError: a weight that `dtype` cannot hold, a graph that is not canonical, or a custom
            op that those plugins do not cover.
    """
    model = ir.load(canonical)
    give_values_their_own_norm(model)
    if dtype != "float32":
        half: HalfType = "bfloat16" if dtype == "bfloat16" else "float16"
        lower_to_half(model, half)
    if aot_plugins:
        use_aot_plugins(model)
    path = folder / f"{dtype}.onnx"
    ir.save(model, path, external_data=f"{path.name}.data")
    return path
