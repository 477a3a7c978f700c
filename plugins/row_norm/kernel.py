"""Triton kernel of the norm of rows.

Projections norm their input themselves; a prompt's experts read it row by row and want it stored.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def norm_rows(x, weight, output, eps, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """One row per program: weight · x / sqrt(mean(x²) + eps), all float32.

    x [T, COLUMNS], weight [COLUMNS]; written: output [T, COLUMNS].
    """
    row = tl.program_id(0).to(tl.int64) * COLUMNS
    column = tl.arange(0, BLOCK_COLUMNS)
    inside = column < COLUMNS
    number = tl.load(x + row + column, mask=inside, other=0.0)
    factor = tl.rsqrt(tl.sum(number * number, axis=0) / COLUMNS + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(output + row + column, number * factor * scale, mask=inside)
