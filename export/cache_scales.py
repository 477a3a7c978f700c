"""Scales for a cache of 8-bit integers, from what a float32 model caches of a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from export.lowerings.grouped_query_attention import CacheScales
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

# Room above the largest number seen, so that other text is seldom cut.
MARGIN = 1.1
_LARGEST = 127


def calibrate_cache(
    backend: OnnxRuntimeBackend, windows: Sequence[Sequence[int]]
) -> list[CacheScales]:
    """The scales of every layer's keys and values, per channel.

    Args:
        backend: the float32 model.
        windows: texts, each within the context.
    """
    largest: dict[str, np.ndarray] = {}
    for window in windows:
        ids = np.array([window], np.int64)
        cache = backend.new_cache(1, ids.shape[1])
        backend.prefill(ids, np.array([ids.shape[1]]), cache)
        for name, cached in backend.cached(cache).items():
            if not name.endswith(".score"):
                found = np.abs(cached[0, :, : ids.shape[1]]).max(axis=1)  # [Nkv, D]
                largest[name] = np.maximum(largest.get(name, found), found)
    scales = {name: _scale(found) for name, found in largest.items()}
    layers = sum(name.endswith(".key") for name in scales)
    return [
        CacheScales(
            key=scales[f"past_key_values.{layer}.key"],
            value=scales[f"past_key_values.{layer}.value"],
        )
        for layer in range(layers)
    ]


def _scale(largest: np.ndarray) -> np.ndarray:
    """A channel that is always zero gets a scale of one."""
    return np.where(largest > 0, largest * MARGIN / _LARGEST, 1).astype(np.float32)
