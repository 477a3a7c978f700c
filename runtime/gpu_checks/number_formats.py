"""Numbers as a GPU stores them, by numpy's names of their types; numpy itself has no bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# The numpy type that holds each; bfloat16 is the upper half of a float32.
STORAGE: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
}
# Significant bits of each float type.
SIGNIFICANT_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}


def to_storage(values: Array, dtype: str) -> Array:
    """Round numbers to a type, to nearest and ties to even, and store them as it does."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(values, STORAGE[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1)  # finite numbers only: NaN could become infinite
    return (rounded >> 16).astype(np.uint16)


def from_storage(stored: Array, dtype: str) -> Array:
    """The numbers that are stored: float64 of a float type, integers as they are."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored if dtype == "int64" else stored.astype(np.float64)
