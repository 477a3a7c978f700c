"""Triton kernels of the projections of a prompt, many tokens at once, and of choosing rows.

A matrix W of `plugins/projection/packing.py` is multiplied by every token's x on tensor cores:

    y = W · g       g = x                          without NORM
                    g = norm · x / rms(x)          with NORM, rms(x) = sqrt(mean(x²) + eps)

A program takes BLOCK_TOKENS tokens and BLOCK_ROWS rows of W. The division by rms(x) comes before
the product: x itself may be too large for a float16. Levels of int8 and int4 weights are multiplied
as they are, exactly, and their scales come after; g is rounded to the type of the product. All else
is float32 until a result is stored.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-untyped-calls

import triton
import triton.language as tl

from plugins.projection.kernel import levels_of


@triton.jit
def reciprocal_rms(
    x,
    token,
    tokens,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """1 / rms of rows of x, float32 [BLOCK_TOKENS]."""
    squares = tl.zeros([BLOCK_TOKENS, BLOCK_COLUMNS], dtype=tl.float32)
    for start in range(0, COLUMNS, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        g = tl.load(
            x + token.to(tl.int64)[:, None] * COLUMNS + column[None, :],
            mask=(token < tokens)[:, None] & (column < COLUMNS)[None, :],
            other=0.0,
        ).to(tl.float32)
        squares += g * g
    return tl.rsqrt(tl.sum(squares, axis=1) * (1.0 / COLUMNS) + eps)


@triton.jit
def multiply_tokens(
    x,
    norm,
    weights,
    scales,
    token,
    row,
    tokens,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Rows of W times rows of x: y [BLOCK_TOKENS, BLOCK_ROWS] float32, 0 where outside."""
    is_token, is_row = token < tokens, row < ROWS
    rows_of_x = x + token.to(tl.int64)[:, None] * COLUMNS
    if NORM:
        factor = reciprocal_rms(x, token, tokens, eps, COLUMNS, BLOCK_TOKENS, BLOCK_COLUMNS)
    y = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], dtype=tl.float32)
    for start in range(0, COLUMNS, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        is_column = column < COLUMNS
        g = tl.load(
            rows_of_x + column[None, :], mask=is_token[:, None] & is_column[None, :], other=0.0
        )
        if NORM:
            norm_weight = tl.load(norm + column, mask=is_column, other=0.0)
        if FORMAT == "int4":
            # A tile lies within a group of columns, whose scale a row has once.
            byte = start // 2 + tl.arange(0, BLOCK_COLUMNS // 2)
            w = tl.load(
                weights + row[:, None] * (COLUMNS // 2) + byte[None, :],
                mask=is_row[:, None],
                other=0,
            )
            group_scale = tl.load(
                scales + row * (COLUMNS // GROUP) + start // GROUP, mask=is_row, other=0.0
            )
            lower, upper = levels_of(w)
            w = tl.interleave(lower, upper * 0.0625)
        else:
            w = tl.load(
                weights + row[:, None] * COLUMNS + column[None, :],
                mask=is_row[:, None] & is_column[None, :],
                other=0,
            )
        g = g.to(tl.float32)
        if NORM:
            g = g * factor[:, None] * norm_weight[None, :]
        if FORMAT == "int4":
            product = tl.dot(g.to(DOT), tl.trans(w.to(DOT)), input_precision="ieee")
            y += product * group_scale.to(tl.float32)[None, :]
        else:
            y = tl.dot(g.to(DOT), tl.trans(w.to(DOT)), y, input_precision="ieee")
    if FORMAT == "int8":
        y *= tl.load(scales + row, mask=is_row, other=0.0)[None, :]
    return y


@triton.jit
def project_prompt(
    x,
    norm,
    weights,
    scales,
    addend,
    residual,
    residual_weight,
    output,
    tokens,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ADDEND: tl.constexpr,
    DOT: tl.constexpr,
    OUTPUT_OFFSET: tl.constexpr,
    OUTPUT_STRIDE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One projection of T tokens; programs along x are blocks of tokens, y are blocks of rows.

    x [T, COLUMNS], norm [COLUMNS] float32; weights and scales as packed. Written, in its own type:
    token t's numbers from OUTPUT_OFFSET + t · OUTPUT_STRIDE on. The epilogues are those of
    `plugins.projection.kernel.project`, of float32 tensors [T, OUTPUTS]; output may be `residual`.
    """
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    block = tl.program_id(1)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    TYPE: tl.constexpr = (
        tl.float16 if DOT == "float16" else (tl.bfloat16 if DOT == "bfloat16" else tl.float32)
    )
    y = multiply_tokens(
        x, norm, weights, scales, token, row, tokens, eps, ROWS, COLUMNS, FORMAT, GROUP, NORM,
        TYPE, BLOCK_TOKENS, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip

    OUTPUTS: tl.constexpr = ROWS // 2 if EPILOGUE == "silu_product" else ROWS
    BLOCK_OUTPUTS: tl.constexpr = BLOCK_ROWS // 2 if EPILOGUE == "silu_product" else BLOCK_ROWS
    index = block * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    is_output = index < OUTPUTS
    is_element = (token < tokens)[:, None] & is_output[None, :]
    element = token.to(tl.int64)[:, None] * OUTPUTS + index[None, :]
    if EPILOGUE == "silu":
        y = y * tl.sigmoid(y)
    if EPILOGUE == "silu_product":
        gate, up = tl.split(tl.reshape(y, [BLOCK_TOKENS, BLOCK_OUTPUTS, 2]))
        y = gate * tl.sigmoid(gate) * up
    if ADDEND:
        y += tl.load(addend + element, mask=is_element, other=0.0)
    if EPILOGUE == "residual":
        y += tl.load(residual + element, mask=is_element, other=0.0)
    if EPILOGUE == "scaled_residual":
        carried = tl.load(residual + element, mask=is_element, other=0.0)
        weight = tl.load(residual_weight + index, mask=is_output, other=0.0)
        y += weight[None, :] * carried
    target = OUTPUT_OFFSET + token.to(tl.int64)[:, None] * OUTPUT_STRIDE + index[None, :]
    tl.store(output + target, y.to(output.dtype.element_ty), mask=is_element)


@triton.jit
def gather_rows(x, index, output, COLUMNS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Rows of x [T, COLUMNS] by index [M]: output [M, COLUMNS]; a program for each."""
    place = tl.program_id(0)
    row = tl.load(index + place).to(tl.int64)
    for start in range(0, COLUMNS, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        is_column = column < COLUMNS
        value = tl.load(x + row * COLUMNS + column, mask=is_column, other=0.0)
        tl.store(output + place.to(tl.int64) * COLUMNS + column, value, mask=is_column)
