"""A cache of 8-bit integers that is filled from one of float32.

ONNX Runtime computes a prompt through a cache of 8-bit integers at about half the speed of a
float32 one, so long prompts are computed by a model of their own, which has the same weights and a
float32 cache, and what that cached is rounded once, as GroupQueryAttention rounds a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

Floats = npt.NDArray[np.float32]
_LOWEST, _HIGHEST = -128, 127


@dataclass(frozen=True)
class PromptModel:
    """The model that computes long prompts.

    Attributes:
        open: loads it; called with the first long prompt, since it holds weights of its own.
        scales: [layers, 2, Nkv, D] float32, of each layer's keys and values.
        from_tokens: prompts of fewer new tokens are not worth it.
    """

    open: Callable[[], OnnxRuntimeBackend]
    scales: Floats
    from_tokens: int


def load_scales(path: Path) -> Floats:
    """Read what `save_scales` wrote: [layers, 2, Nkv, D] float32.

    Raises:
        ValueError: the file holds something else.
    """
    scales = np.load(path, allow_pickle=False)
    if scales.dtype != np.float32 or scales.ndim != 4 or scales.shape[1] != 2:
        raise ValueError(
            f"{path} holds {scales.dtype} {list(scales.shape)}, expected float32 "
            "[layers, 2, heads, size]; build the variant again"
        )
    return np.asarray(scales, np.float32)


def save_scales(path: Path, scales: Floats) -> None:
    """Write the scales [layers, 2, Nkv, D] of a cache."""
    np.save(path, scales, allow_pickle=False)


def fill_narrow(
    floats: Mapping[str, npt.NDArray[Any]],
    narrow: Mapping[str, npt.NDArray[Any]],
    row: int,
    slots: slice,
    scales: Floats,
) -> None:
    """Round slots of a float32 cache of one row into a row of a narrow one.

    Args:
        floats: by input name, [1, heads, C, size].
        narrow: likewise [B, heads, C, size], int8 keys and values; mask scores are copied.
        row: of `narrow`.
        slots: which.
        scales: [layers, 2, Nkv, D].
    """
    for name, target in narrow.items():
        source, scale = floats[name][0, :, slots], _scale(name, scales)
        if scale is None:
            target[row, :, slots] = source
            continue
        levels = source * (1 / scale)
        np.rint(levels, out=levels)
        target[row, :, slots] = np.clip(levels, _LOWEST, _HIGHEST, out=levels)


def widen(
    narrow: Mapping[str, npt.NDArray[Any]],
    floats: Mapping[str, npt.NDArray[Any]],
    row: int,
    slots: slice,
    scales: Floats,
) -> None:
    """The way back: what a row of a narrow cache stands for, into a float32 cache of one row."""
    for name, source in narrow.items():
        scale = _scale(name, scales)
        floats[name][0, :, slots] = source[row, :, slots] * (1 if scale is None else scale)


def _scale(name: str, scales: Floats) -> Floats | None:
    """[Nkv, 1, D], or None for mask scores, which stay as they are."""
    _, layer, kind = name.rsplit(".", 2)
    if kind == "score":
        return None
    return np.asarray(scales[int(layer), ("key", "value").index(kind), :, None])
