"""How kernels read a packed matrix: cut into tiles, by which constants and types."""

from __future__ import annotations

from typing import NamedTuple

from plugins.kernel_spec import TRITON_TYPES
from plugins.projection.packing import LOAD_BITS, WeightFormat

MAX_BATCH = 8
_WEIGHT_TYPES = {**TRITON_TYPES, "int8": "i8", "int4": "u8"}
_LABELS = {**TRITON_TYPES, "int8": "int8", "int4": "int4g"}
_MAX_ELEMENTS = 1 << 31  # the kernels count elements in int32
# The GPUs have 80 to 170 multiprocessors: with fewer programs some would have nothing to do, with
# several each, one reads weights while another finishes.
ENOUGH_PROGRAMS = 256
ENOUGH_HEAD_PROGRAMS = 1024
_FEW_PROGRAMS = 128
# What a thread can hold: 16-byte loads of weights on their way, and numbers of x in float32.
MAX_LOADS = 4
MAX_HEAD_LOADS = 8
_MAX_NUMBERS_OF_X = 64
_MANY_NUMBERS_OF_X = 16  # for a load of weights: then more loads would take all registers
_MAX_WARPS = 4


class Tile(NamedTuple):
    """What one program of a projection does."""

    batch: int  # sequences
    rows: int
    columns: int  # at a time
    warps: int

    @property
    def label(self) -> str:
        """Part of a variant's name."""
        return f"t{self.batch}x{self.rows}x{self.columns}"


def choose_tile(
    rows: int,
    columns: int,
    weights: WeightFormat,
    batch: int,
    enough_programs: int,
    max_loads: int,
) -> Tile:
    """Loads of 16 bytes, as many at once as a thread can hold, unless programs would be too few.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        weights: how it is stored.
        batch: most sequences of a launch.
        enough_programs: with so many, a thread may have more than one load at once.
        max_loads: of weights that a thread has at once.
    """
    per_load = LOAD_BITS // weights.bits
    numbers = max(_MAX_NUMBERS_OF_X, per_load)
    together = min(power_of_two(batch), numbers // per_load)
    warps = _MAX_WARPS
    # Of a row, a thread has at most so many loads that its part of x fits too.
    widest = 32 * warps * numbers // together
    wide = max(min(power_of_two(columns), widest), weights.group, per_load)
    loads_of_row = ceil_div(wide, per_load)
    loads = max_loads if together * per_load <= _MANY_NUMBERS_OF_X else MAX_LOADS
    while loads > 1 and rows * loads_of_row < enough_programs * loads * 32 * warps:
        loads //= 2
    while warps > 1 and rows * loads_of_row < _FEW_PROGRAMS * loads * 32 * warps:
        warps //= 2
    tall = max(loads * 32 * warps // loads_of_row, 2)
    return Tile(together, min(tall, power_of_two(rows)), wide, warps)


def choose_extra_tile(rows: int, columns: int, weights: WeightFormat, beside: Tile) -> Tile:
    """The tile of a small matrix in the programs of another's launch.

    As many programs as its loads fill: they run beside those of the larger matrix.

    Args:
        rows: of the small matrix.
        columns: of both.
        weights: how the small one is stored.
        beside: the larger one's tile, with which it shares sequences and warps.
    """
    per_load = LOAD_BITS // weights.bits
    widest = 32 * beside.warps * _MAX_NUMBERS_OF_X // beside.batch
    wide = min(power_of_two(columns), widest)
    tall = max(32 * beside.warps // ceil_div(wide, per_load), 1)
    return Tile(beside.batch, min(tall, power_of_two(rows)), wide, beside.warps)


def grid_rules(rows: int, tile: Tile, more_blocks: int = 0) -> tuple[str, str, str]:
    """Programs along x for blocks of sequences, along y for blocks of rows, and so many more."""
    # Programs that read the same weights are neighbours, so that one finds them in a cache.
    return f"ceil(batch / {tile.batch})", str(ceil_div(rows, tile.rows) + more_blocks), "1"


def matrix_constants(
    rows: int, columns: int, weights: WeightFormat, tile: Tile
) -> dict[str, int | str]:
    """The constants of `kernel.multiply_rows`."""
    return {
        "ROWS": rows,
        "COLUMNS": columns,
        "FORMAT": kernel_format(weights),
        "GROUP": weights.group,
        "BATCH": tile.batch,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
    }


def kernel_format(weights: WeightFormat) -> str:
    """What the kernel tells apart: a float's type it sees at its pointer."""
    return weights.kind if weights.kind in ("int8", "int4") else "float"


def weight_type(weights: WeightFormat) -> str:
    """Type of the pointer to a matrix."""
    return f"*{_WEIGHT_TYPES[weights.kind]}"


def scale_type(weights: WeightFormat) -> str:
    """Type of the pointer to its scales."""
    return "*fp16" if weights.kind == "int4" else "*fp32"


def format_label(weights: WeightFormat) -> str:
    """Part of a variant's name."""
    return f"{_LABELS[weights.kind]}{weights.group or ''}"


def matrix_problems(rows: int, columns: int, weights: WeightFormat, batch: int) -> list[str]:
    """Why no kernel multiplies by such a matrix."""
    problems = column_problems(columns, weights)
    if not 1 <= rows * columns < _MAX_ELEMENTS:
        problems.append(f"{rows} rows of {columns} columns, expected fewer than 2^31 weights")
    if not 1 <= batch <= MAX_BATCH:
        problems.append(f"a batch of {batch}, expected 1 to {MAX_BATCH}")
    return problems


def column_problems(columns: int, weights: WeightFormat) -> list[str]:
    """Why rows of so many columns cannot be stored."""
    try:
        weights.check_columns(columns)
    except ValueError as error:
        return [str(error)]
    return []


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below the number."""
    return 1 << (number - 1).bit_length()
