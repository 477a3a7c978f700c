"""What projections' weights look like in memory, and that packing loses nothing it should keep."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from export.lowerings.narrow_weights import quantize_blocks
from plugins.projection.packing import (
    PackedMatrix,
    WeightFormat,
    interleave_rows,
    pack_levels,
    pack_weights,
    unpack_levels,
    unpack_weights,
)

FLOAT32 = WeightFormat(kind="float32")
FLOAT16 = WeightFormat(kind="float16")
BFLOAT16 = WeightFormat(kind="bfloat16")
INT8 = WeightFormat(kind="int8")
INT4 = WeightFormat(kind="int4", group=32)
FORMATS = (
    FLOAT32,
    FLOAT16,
    BFLOAT16,
    INT8,
    INT4,
    WeightFormat(kind="int4", group=64),
    WeightFormat(kind="int4", group=128),
)
NARROW = tuple(fmt for fmt in FORMATS if fmt.kind in ("int8", "int4"))


def label(fmt: WeightFormat) -> str:
    return f"{fmt.kind}{fmt.group or ''}"


def random_matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@st.composite
def levels_and_scales(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, WeightFormat]:
    fmt = draw(st.sampled_from(NARROW))
    rows = draw(st.integers(1, 5))
    columns = fmt.columns_multiple * draw(st.integers(1, 4))
    end = 1 << (fmt.bits - 1)
    levels = draw(arrays.arrays(np.int8, (rows, columns), elements=st.integers(-end, end - 1)))
    shape = fmt.shapes(rows, columns)[1]
    dtype = np.float32 if fmt.kind == "int8" else np.float16
    numbers = st.floats(-1000, 1000, width=32 if fmt.kind == "int8" else 16)
    assert shape is not None
    return levels, draw(arrays.arrays(dtype, shape, elements=numbers)), fmt


@given(levels_and_scales())
@settings(max_examples=60, deadline=None)
def test_unpacking_gives_the_packed_levels_times_scales(
    case: tuple[np.ndarray, np.ndarray, WeightFormat],
) -> None:
    levels, scales, fmt = case
    packed = pack_levels(levels, scales, fmt)
    np.testing.assert_array_equal(unpack_levels(packed), levels)
    group = fmt.group or levels.shape[1]
    wide = np.repeat(scales.reshape(len(levels), -1).astype(np.float32), group, axis=1)
    np.testing.assert_array_equal(unpack_weights(packed), levels * wide)


@given(levels_and_scales())
@settings(max_examples=30, deadline=None)
def test_levels_that_reach_the_end_of_their_range_are_found_again(
    case: tuple[np.ndarray, np.ndarray, WeightFormat],
) -> None:
    levels, scales, fmt = case
    group = fmt.group or levels.shape[1]
    levels.reshape(len(levels), -1, group)[..., 0] = -(1 << (fmt.bits - 1))
    # Powers of two, so that neither a product nor a quotient is rounded.
    scales = np.where(scales < 0, -1, 1) * np.exp2(np.round(np.log2(np.abs(scales) + 1)))
    numbers = unpack_weights(pack_levels(levels, scales, fmt))
    again = pack_weights([numbers], fmt)
    np.testing.assert_array_equal(unpack_weights(again), numbers)
    np.testing.assert_array_equal(unpack_levels(again), levels)


@pytest.mark.parametrize("fmt", [FLOAT32, FLOAT16, BFLOAT16], ids=label)
def test_numbers_that_a_float_format_holds_are_kept(fmt: WeightFormat) -> None:
    numbers = random_matrix(5, 24).view(np.uint32) & np.uint32(0xFFFF0000)  # 7 bits of fraction
    numbers = numbers.view(np.float32)
    np.testing.assert_array_equal(unpack_weights(pack_weights([numbers], fmt)), numbers)


def test_bfloat16_rounds_to_nearest_and_ties_to_even() -> None:
    one, bit = np.float32(1).view(np.uint32), 1 << 16
    bits = np.array([one + bit // 2, one + bit // 2 + 1, one + 3 * bit // 2, one + bit // 2 - 1])
    numbers = np.zeros((1, 8), np.float32)
    numbers[0, :4] = bits.astype(np.uint32).view(np.float32)
    packed = pack_weights([numbers], BFLOAT16)
    assert packed.weights.dtype == np.uint16
    assert [int(b) - 0x3F80 for b in packed.weights[0, :4]] == [0, 1, 2, 0]


@pytest.mark.parametrize("fmt", NARROW, ids=label)
def test_no_weight_is_further_than_half_a_step_from_its_rounding(fmt: WeightFormat) -> None:
    numbers = random_matrix(7, 384)
    packed = pack_weights([numbers], fmt)
    assert packed.scales is not None
    step = np.abs(packed.scales.astype(np.float32)).reshape(7, -1)
    step = np.repeat(step, fmt.group or 384, axis=1)
    # Half a step more where a number lies on the side that has one level less.
    assert (np.abs(unpack_weights(packed) - numbers) <= 1.01 * step).all()
    near = np.abs(numbers) < step * ((1 << (fmt.bits - 1)) - 1)
    assert (np.abs(unpack_weights(packed) - numbers) <= 0.5001 * step)[near].all()


def test_left_number_of_a_pair_is_in_the_lower_half_of_its_byte() -> None:
    levels = np.zeros((2, 32), np.int8)
    levels[0, :4] = (-8, 7, 1, -3)
    levels[1, 30:] = (5, -6)
    packed = pack_levels(levels, np.ones((2, 1), np.float16), INT4)
    assert packed.weights.dtype == np.uint8
    assert packed.weights.shape == (2, 16)
    assert packed.weights[0].tolist() == [0xF0, 0x59, *([0x88] * 14)]
    assert packed.weights[1].tolist() == [*([0x88] * 15), 0x2D]


def test_each_group_has_its_own_scale() -> None:
    levels = np.ones((1, 128), np.int8)
    scales = np.array([[0.5, -2.0]], np.float16)
    packed = pack_levels(levels, scales, WeightFormat(kind="int4", group=64))
    assert unpack_weights(packed)[0].tolist() == [0.5] * 64 + [-2.0] * 64


def test_four_bits_lie_as_onnx_runtime_stores_them() -> None:
    numbers = random_matrix(3, 128)
    fmt = WeightFormat(kind="int4", group=64)
    stored, scales = quantize_blocks(numbers, 4, 64)
    levels = np.stack((stored & 15, stored >> 4), axis=-1).reshape(3, 128).astype(np.int8) - 8
    packed = pack_levels(levels, scales, fmt)
    np.testing.assert_array_equal(packed.weights, stored.reshape(3, -1))


def test_matrices_are_stored_rows_below_rows() -> None:
    q, k, dt = random_matrix(5, 32), random_matrix(3, 32, 1), random_matrix(1, 32, 2)
    packed = pack_weights([q, k, dt], FLOAT32)
    assert (packed.rows, packed.columns) == (9, 32)
    np.testing.assert_array_equal(unpack_weights(packed), np.concatenate([q, k, dt]))


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
def test_rows_do_not_influence_each_other(fmt: WeightFormat) -> None:
    first, second = random_matrix(2, 128), 100 * random_matrix(3, 128, 1)
    together = unpack_weights(pack_weights([first, second], fmt))
    np.testing.assert_array_equal(together[:2], unpack_weights(pack_weights([first], fmt)))
    np.testing.assert_array_equal(together[2:], unpack_weights(pack_weights([second], fmt)))


@pytest.mark.parametrize("fmt", FORMATS, ids=label)
def test_arrays_have_the_shapes_that_the_format_names(fmt: WeightFormat) -> None:
    packed: PackedMatrix = pack_weights([random_matrix(3, 256)], fmt)
    weights, scales = fmt.shapes(3, 256)
    assert packed.weights.shape == weights
    assert packed.weights.flags.c_contiguous
    assert (None if packed.scales is None else packed.scales.shape) == scales
    assert packed.weights.nbytes == 3 * 256 * fmt.bits // 8
    assert packed.weights.strides[0] % 16 == 0


@pytest.mark.parametrize("fmt", NARROW, ids=label)
def test_rows_of_zeros_stay_zeros(fmt: WeightFormat) -> None:
    assert not unpack_weights(pack_weights([np.zeros((2, 128), np.float32)], fmt)).any()


def test_rows_of_gate_and_up_alternate() -> None:
    gate, up = random_matrix(3, 8), random_matrix(3, 8, 1)
    rows = interleave_rows(gate, up)
    np.testing.assert_array_equal(rows[0::2], gate)
    np.testing.assert_array_equal(rows[1::2], up)


@pytest.mark.parametrize(
    ("fmt", "columns", "multiple"),
    [
        (FLOAT32, 6, 4),
        (FLOAT16, 12, 8),
        (BFLOAT16, 4, 8),
        (INT8, 24, 16),
        (INT4, 48, 32),
        (WeightFormat(kind="int4", group=128), 192, 128),
    ],
    ids=lambda value: label(value) if isinstance(value, WeightFormat) else str(value),
)
def test_columns_that_16_bytes_do_not_divide_are_refused(
    fmt: WeightFormat, columns: int, multiple: int
) -> None:
    message = f"{columns} columns cannot be stored as {fmt.kind}, expected a multiple of {multiple}"
    with pytest.raises(ValueError, match=message):
        pack_weights([random_matrix(2, columns)], fmt)


def test_what_cannot_be_stored_is_refused() -> None:
    numbers = random_matrix(2, 32)
    with pytest.raises(ValueError, match=re.escape("matrices of [32, 64] columns")):
        pack_weights([numbers, random_matrix(2, 64)], FLOAT32)
    with pytest.raises(ValueError, match="a weight is not finite in float16"):
        pack_weights([1e6 * numbers], FLOAT16)
    with pytest.raises(ValueError, match="a weight is not finite in bfloat16"):
        pack_weights([np.full((1, 8), np.finfo(np.float32).max)], BFLOAT16)
    with pytest.raises(ValueError, match="a scale is not finite in float16"):
        pack_weights([1e7 * numbers], INT4)
    with pytest.raises(ValueError, match="a weight is not finite in float32"):
        pack_weights([np.where(numbers > 1, np.nan, numbers)], INT8)
    with pytest.raises(ValueError, match="levels from -9 to 0, expected -8 to 7"):
        pack_levels(np.tile(np.int8([0, -9]), (1, 16)), np.ones((1, 1)), INT4)
    with pytest.raises(ValueError, match=re.escape("scales are (2,), expected (1, 1)")):
        pack_levels(np.zeros((1, 32), np.int8), np.ones(2), INT4)
    with pytest.raises(ValueError, match="float16 weights have no levels"):
        pack_levels(np.zeros((1, 32), np.int8), np.ones(1), FLOAT16)
    with pytest.raises(ValueError, match="expected one shape"):
        interleave_rows(numbers, numbers[:1])


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown weights 'int3'"):
        WeightFormat(kind="int3")
    with pytest.raises(ValueError, match="int4 weights in groups of 16, expected 32 or 64 or 128"):
        WeightFormat(kind="int4", group=16)
    with pytest.raises(ValueError, match="int8 weights in groups of 64, expected 0"):
        WeightFormat(kind="int8", group=64)
