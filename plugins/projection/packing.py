"""How the weights of projections are stored for the kernels, and how numbers become such weights.

A matrix [rows, columns] has an output per row. Its rows lie one after another without padding:

    float32, float16, bfloat16    the numbers themselves, bfloat16 as its bits
    int8     a level per number, -128 to 127, and a float32 scale per row
    int4     levels -8 to 7, each plus 8 in half a byte, of two neighbours the left one in the low
             half, and a float16 scale per row and group of columns

A weight is its level times its scale. Scales have either sign: the largest number of a row or group
gets the end of the range that has one level more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

WeightKind = Literal["float32", "float16", "bfloat16", "int8", "int4"]
# A group of 32 is what a load of 16 bytes holds; longer ones share a scale among several threads.
GROUPS = (32, 64, 128)
# A load of 16 bytes must not reach into the next row.
LOAD_BITS = 128
_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
_STORED: dict[WeightKind, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int8": np.int8,
    "int4": np.uint8,
}


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How a matrix of weights is stored.

    Attributes:
        kind: type of a weight.
        group: columns that share a scale; of int4 alone, else 0.
    """

    kind: WeightKind
    group: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _BITS:
            raise ValueError(f"unknown weights {self.kind!r}, expected one of {', '.join(_BITS)}")
        allowed = GROUPS if self.kind == "int4" else (0,)
        if self.group not in allowed:
            raise ValueError(
                f"{self.kind} weights in groups of {self.group}, expected "
                f"{' or '.join(map(str, allowed))}"
            )

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return _BITS[self.kind]

    @property
    def columns_multiple(self) -> int:
        """The number of columns must be a multiple of it."""
        return self.group or LOAD_BITS // self.bits

    def check_columns(self, columns: int) -> None:
        """Raise ValueError unless rows of so many columns can be stored."""
        if columns < 1 or columns % self.columns_multiple:
            raise ValueError(
                f"{columns} columns cannot be stored as {self.kind}, expected a multiple of "
                f"{self.columns_multiple}"
            )

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Shape of the stored weights, and of the scales if there are any."""
        if self.kind == "int4":
            return (rows, columns // 2), (rows, columns // self.group)
        return (rows, columns), (rows,) if self.kind == "int8" else None


@dataclass(frozen=True, kw_only=True)
class PackedMatrix:
    """A matrix as the kernels read it.

    Attributes:
        format: how it is stored.
        rows: outputs.
        columns: inputs.
        weights: C-contiguous: float32, float16, bits of bfloat16 as uint16 or int8 [rows, columns],
            or uint8 [rows, columns / 2] of int4.
        scales: float32 [rows] of int8, float16 [rows, columns / group] of int4, else None.
    """

    format: WeightFormat
    rows: int
    columns: int
    weights: npt.NDArray[Any]
    scales: npt.NDArray[Any] | None


def interleave_rows(gate: npt.NDArray[Any], up: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows of two matrices in turn, as the epilogue `silu_product` takes them.

    Args:
        gate: [I, H].
        up: [I, H].

    Returns:
        [2·I, H]: gate's first row, up's first row, gate's second.

    Raises:
        ValueError: the shapes differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate is {gate.shape}, up is {up.shape}; expected one shape")
    return np.stack((gate, up), axis=1).reshape(-1, gate.shape[1])


def pack_weights(
    matrices: Sequence[npt.NDArray[np.floating[Any]]], weight_format: WeightFormat
) -> PackedMatrix:
    """Store matrices as one, rows below rows; levels are rounded to nearest.

    Args:
        matrices: each [rows, columns], any float type, one number of columns.
        weight_format: how to store them.

    Raises:
        ValueError: columns that differ or cannot be stored, or a weight or a scale that is not
            finite in its stored type.
    """
    columns = sorted({matrix.shape[1] for matrix in matrices})
    if len(columns) != 1:
        raise ValueError(f"matrices of {columns} columns, expected one number of columns")
    weight_format.check_columns(columns[0])
    matrix = np.concatenate([matrix.astype(np.float32) for matrix in matrices])
    _check_finite(matrix, "a weight", "float32")
    if weight_format.kind == "bfloat16":
        rounded = _bfloat16_bits(matrix)
        _check_finite(_float_of_bits(rounded), "a weight", "bfloat16")
        return _packed(weight_format, columns[0], rounded)
    if weight_format.kind in ("float32", "float16"):
        with np.errstate(over="ignore"):  # reported below, with what to do about it
            stored = matrix.astype(_STORED[weight_format.kind])
        _check_finite(stored, "a weight", weight_format.kind)
        return _packed(weight_format, columns[0], stored)
    return pack_levels(*_round(matrix, weight_format), weight_format)


def pack_levels(
    levels: npt.NDArray[np.int8], scales: npt.NDArray[np.floating[Any]], weight_format: WeightFormat
) -> PackedMatrix:
    """Store a matrix that has been rounded already.

    Args:
        levels: [rows, columns] int8, of int4 from -8 to 7.
        scales: [rows] of int8, [rows, columns / group] of int4; rounded to their stored type.
        weight_format: int8 or int4.

    Raises:
        ValueError: no such format, levels out of range, shapes that do not fit, or a scale that is
            not finite in its stored type.
    """
    if weight_format.kind not in ("int8", "int4"):
        raise ValueError(f"{weight_format.kind} weights have no levels, expected int8 or int4")
    rows, columns = levels.shape
    weight_format.check_columns(columns)
    expected = weight_format.shapes(rows, columns)[1]
    if scales.shape != expected:
        raise ValueError(f"scales are {scales.shape}, expected {expected}")
    with np.errstate(over="ignore"):
        stored_scales = scales.astype(_scale_type(weight_format))
    _check_finite(stored_scales, "a scale", stored_scales.dtype.name)
    if weight_format.kind == "int8":
        return _packed(weight_format, columns, levels.astype(np.int8), stored_scales)
    if levels.size and not -8 <= levels.min() <= levels.max() <= 7:
        raise ValueError(f"levels from {levels.min()} to {levels.max()}, expected -8 to 7")
    halves = (levels + 8).astype(np.uint8)
    weights = halves[:, 0::2] | (halves[:, 1::2] << np.uint8(4))
    return _packed(weight_format, columns, weights, stored_scales)


def unpack_weights(packed: PackedMatrix) -> npt.NDArray[np.float32]:
    """The numbers that the kernels compute with, float32 [rows, columns]: exact."""
    if packed.scales is None:
        if packed.format.kind == "bfloat16":
            return _float_of_bits(packed.weights)
        return packed.weights.astype(np.float32)
    scales = packed.scales.astype(np.float32)
    numbers: npt.NDArray[np.float32] = unpack_levels(packed).astype(np.float32)
    if packed.format.kind == "int8":
        numbers *= scales[:, None]
    else:
        numbers *= np.repeat(scales, packed.format.group, axis=1)
    return numbers


def unpack_levels(packed: PackedMatrix) -> npt.NDArray[np.int8]:
    """The levels of an int8 or int4 matrix, int8 [rows, columns].

    Raises:
        ValueError: a matrix of floats.
    """
    if packed.scales is None:
        raise ValueError(f"{packed.format.kind} weights have no levels, expected int8 or int4")
    if packed.format.kind == "int8":
        return packed.weights.copy()
    halves = np.stack((packed.weights & 15, packed.weights >> 4), axis=-1)
    return halves.reshape(packed.rows, packed.columns).astype(np.int8) - np.int8(8)


def _packed(
    weight_format: WeightFormat,
    columns: int,
    weights: npt.NDArray[Any],
    scales: npt.NDArray[Any] | None = None,
) -> PackedMatrix:
    assert weights.dtype == _STORED[weight_format.kind]
    return PackedMatrix(
        format=weight_format,
        rows=len(weights),
        columns=columns,
        weights=np.ascontiguousarray(weights),
        scales=None if scales is None else np.ascontiguousarray(scales),
    )


def _scale_type(weight_format: WeightFormat) -> type[np.floating[Any]]:
    return np.float32 if weight_format.kind == "int8" else np.float16


def _round(
    matrix: npt.NDArray[np.float32], weight_format: WeightFormat
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.floating[Any]]]:
    """Nearest levels, of scales that are already as they will be stored."""
    rows, columns = matrix.shape
    blocks = matrix.reshape(rows, -1, weight_format.group or columns)
    end = 1 << (weight_format.bits - 1)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)[..., 0]
    with np.errstate(over="ignore"):
        scales = (largest / np.float32(-end)).astype(_scale_type(weight_format))
    divisor = scales.astype(np.float32)[..., None]
    levels = np.divide(blocks, divisor, out=np.zeros_like(blocks), where=divisor != 0)
    levels = np.clip(np.rint(levels), -end, end - 1).reshape(rows, columns).astype(np.int8)
    return levels, scales[:, 0] if weight_format.kind == "int8" else scales


def _bfloat16_bits(matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Finite numbers rounded to nearest, ties to even; numpy has no bfloat16."""
    bits = matrix.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def _float_of_bits(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _check_finite(numbers: npt.NDArray[Any], what: str, stored: str) -> None:
    if not np.isfinite(numbers).all():
        raise ValueError(f"{what} is not finite in {stored}; choose another format for its matrix")
