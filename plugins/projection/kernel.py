"""Triton kernels of the projections of a decode step, and of the head.

Each reads a matrix W of `packing.py` and multiplies it by the few rows of x that a decode step has,
one per sequence. A program takes BLOCK_ROWS rows of W and BATCH sequences. What surrounds the
product happens in the same launch:

    y = W · g       g = x                          without NORM
                    g = norm · x / rms(x)          with NORM, rms(x) = sqrt(mean(x²) + eps)

The division by rms(x) is left until after the product, so that no program waits for it. Everything
is float32 until a result is stored; the model rounds to its own type after the norm's division and
after each product.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def levels_of(byte):
    """The two levels of a byte of int4 weights as float32: the lower, and sixteen times the upper.

    The last bit of 2²³ as a float32 is worth 1, so a byte put there is added to it: operations on
    bits, where a conversion takes as long as four of them.
    """
    sum_bits = byte.to(tl.int32) | 0x4B000000
    lower = (sum_bits & 0x7FFFFF0F).to(tl.float32, bitcast=True) - (8388608.0 + 8.0)
    upper = (sum_bits & 0x7FFFFFF0).to(tl.float32, bitcast=True) - (8388608.0 + 8.0 * 16.0)
    return lower, upper


@triton.jit
def multiply_rows(
    x,
    norm,
    weights,
    scales,
    sequence,
    row,
    batch,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Rows of W times rows of x: y [BATCH, BLOCK_ROWS] float32.

    sequence [BATCH] and row [BLOCK_ROWS] say which; y is 0 where they are outside.
    """
    # Every tile has three axes, [BATCH, BLOCK_ROWS, columns], from the start: so that weights are
    # multiplied by the threads that load them.
    sequence3, row3 = sequence[:, None, None], row[None, :, None]
    is_sequence, is_row = sequence3 < batch, row3 < ROWS
    if FORMAT == "int8":
        row_scale = tl.load(scales + row, mask=row < ROWS, other=0.0)
    y = tl.zeros([BATCH, BLOCK_ROWS], dtype=tl.float32)
    squares = tl.zeros([BATCH, 1], dtype=tl.float32)
    for start in range(0, COLUMNS, BLOCK_COLUMNS):
        # Loads first and conversions after them, so that nothing waits before all are on their way.
        # Of two tiles that meet, Triton keeps the spread over threads of the one loaded last: that
        # of the weights.
        column = start + tl.arange(0, BLOCK_COLUMNS)[None, None, :]
        is_column = column < COLUMNS
        g = tl.load(x + sequence3 * COLUMNS + column, mask=is_sequence & is_column, other=0.0)
        if NORM:
            norm_weight = tl.load(norm + column, mask=is_column, other=0.0)
        if FORMAT == "int4":
            byte = start // 2 + tl.arange(0, BLOCK_COLUMNS // 2)[None, None, :]
            w = tl.load(
                weights + row3 * (COLUMNS // 2) + byte,
                mask=is_row & (byte < COLUMNS // 2),
                other=0,
            )
            group = start // GROUP + tl.arange(0, BLOCK_COLUMNS // GROUP)[None, None, :]
            scale = tl.load(
                scales + row3 * (COLUMNS // GROUP) + group,
                mask=is_row & (group < COLUMNS // GROUP),
                other=0.0,
            )
        else:
            w = tl.load(weights + row3 * COLUMNS + column, mask=is_row & is_column, other=0)
        g = g.to(tl.float32)
        if NORM:
            squares += tl.sum(g * g, axis=2)
            g *= norm_weight.to(tl.float32)
        if FORMAT == "int4":
            even, odd = tl.split(tl.reshape(g, [BATCH, 1, BLOCK_COLUMNS // 2, 2]))
            lower, upper = levels_of(w)
            product = even * lower + (odd * 0.0625) * upper
            by_group = tl.sum(
                tl.reshape(product, [BATCH, BLOCK_ROWS, BLOCK_COLUMNS // GROUP, GROUP // 2]), axis=3
            )
            y += tl.sum(by_group * scale.to(tl.float32), axis=2)
        else:
            y += tl.sum(g * w.to(tl.float32), axis=2)
    if FORMAT == "int8":
        y *= row_scale[None, :]
    if NORM:
        y *= tl.rsqrt(squares * (1.0 / COLUMNS) + eps)
    return y


@triton.jit
def project(
    x,
    norm,
    weights,
    scales,
    addend,
    residual,
    residual_weight,
    output,
    extra,
    extra_output,
    batch,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ADDEND: tl.constexpr,
    OUTPUT_STRIDE: tl.constexpr,
    EXTRA_ROWS: tl.constexpr,
    EXTRA_OFFSET: tl.constexpr,
    EXTRA_STRIDE: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EXTRA_BLOCK_ROWS: tl.constexpr,
    EXTRA_BLOCK_COLUMNS: tl.constexpr,
):
    """One projection; programs along x are blocks of sequences, y are blocks of rows.

    x [B, COLUMNS], norm [COLUMNS]; weights and scales as packed. Written, in its own type: output
    [B, OUTPUTS], rows OUTPUT_STRIDE apart, which may be `residual` itself. By EPILOGUE, with
    z = y + addend [B, OUTPUTS] where there is an ADDEND, else z = y:

        plain               z
        silu                SiLU(y)
        silu_product        SiLU(y_even) · y_odd, OUTPUTS = ROWS / 2
        residual            residual + z                      residual [B, OUTPUTS]
        scaled_residual     residual_weight · residual + z    residual_weight [OUTPUTS]

    With EXTRA_ROWS, the programs beyond those of W multiply a second matrix of floats, extra
    [EXTRA_ROWS, COLUMNS], by the same g. Written: float32 [B, EXTRA_ROWS] from number EXTRA_OFFSET
    of extra_output on, rows EXTRA_STRIDE apart; extra_output may be `output`.
    """
    sequence = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
    block = tl.program_id(1)
    if EXTRA_ROWS:
        BLOCKS: tl.constexpr = tl.cdiv(ROWS, BLOCK_ROWS)
        if block >= BLOCKS:
            extra_row = (block - BLOCKS) * EXTRA_BLOCK_ROWS + tl.arange(0, EXTRA_BLOCK_ROWS)
            products = multiply_rows(
                x, norm, extra, extra, sequence, extra_row, batch, eps, EXTRA_ROWS, COLUMNS,
                "float", 0, NORM, BATCH, EXTRA_BLOCK_ROWS, EXTRA_BLOCK_COLUMNS,
            )  # fmt: skip
            tl.store(
                extra_output + EXTRA_OFFSET + sequence[:, None] * EXTRA_STRIDE + extra_row[None, :],
                products,
                mask=(sequence < batch)[:, None] & (extra_row < EXTRA_ROWS)[None, :],
            )
            return
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    OUTPUTS: tl.constexpr = ROWS // 2 if EPILOGUE == "silu_product" else ROWS
    BLOCK_OUTPUTS: tl.constexpr = BLOCK_ROWS // 2 if EPILOGUE == "silu_product" else BLOCK_ROWS
    index = block * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    is_output = index < OUTPUTS
    element = sequence[:, None] * OUTPUTS + index[None, :]
    is_element = (sequence < batch)[:, None] & is_output[None, :]
    # What is added after the product is asked for before it.
    if ADDEND:
        added = tl.load(addend + element, mask=is_element, other=0.0)
    if EPILOGUE == "residual" or EPILOGUE == "scaled_residual":
        carried = tl.load(residual + element, mask=is_element, other=0.0)
    if EPILOGUE == "scaled_residual":
        weight = tl.load(residual_weight + index, mask=is_output, other=0.0)

    y = multiply_rows(
        x, norm, weights, scales, sequence, row, batch, eps, ROWS, COLUMNS, FORMAT, GROUP, NORM,
        BATCH, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    if EPILOGUE == "silu":
        y = y * tl.sigmoid(y)
    if EPILOGUE == "silu_product":
        gate, up = tl.split(tl.reshape(y, [BATCH, BLOCK_OUTPUTS, 2]))
        y = gate * tl.sigmoid(gate) * up
    if ADDEND:
        y += added.to(tl.float32)
    if EPILOGUE == "residual":
        y += carried.to(tl.float32)
    if EPILOGUE == "scaled_residual":
        y += weight.to(tl.float32)[None, :] * carried.to(tl.float32)
    target = sequence[:, None] * OUTPUT_STRIDE + index[None, :]
    tl.store(output + target, y.to(output.dtype.element_ty), mask=is_element)


@triton.jit
def read_rows(
    table,
    scales,
    row,
    is_row,
    column,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Numbers of a packed matrix: rows [R] by columns [C], float32 [R, C], 0 where outside."""
    mask = is_row[:, None] & (column < COLUMNS)[None, :]
    if FORMAT == "int4":
        byte = tl.load(
            table + row[:, None] * (COLUMNS // 2) + (column // 2)[None, :], mask=mask, other=0
        )
        lower, upper = levels_of(byte)
        value = tl.where((column % 2 == 0)[None, :], lower, upper * 0.0625)
        value *= tl.load(
            scales + row[:, None] * (COLUMNS // GROUP) + (column // GROUP)[None, :],
            mask=mask,
            other=0.0,
        ).to(tl.float32)
    else:
        value = tl.load(table + row[:, None] * COLUMNS + column[None, :], mask=mask, other=0).to(
            tl.float32
        )
        if FORMAT == "int8":
            value *= tl.load(scales + row, mask=is_row, other=0.0)[:, None]
    return value


@triton.jit
def key_of(logit, token):
    """An int64 for each logit that orders as (logit, -token) does, and holds the token.

    Flipping the other bits of a negative float32 makes its order that of whole numbers. What is no
    number counts as infinity, so that it is found (`is_finite`).
    """
    number = tl.where(logit != logit, float("inf"), logit)
    bits = tl.where(number == 0.0, 0.0, number).to(tl.int32, bitcast=True)  # -0 equals 0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def token_of(key):
    """The token that a key holds."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def is_finite(key):
    """Whether a key's logit is a finite number; of the largest key, whether all are but -inf."""
    high = (key >> 32).to(tl.int32)
    return (high < 0x7F800000) & (high > -0x7F800001)


@triton.jit
def head(
    x,
    norm,
    weights,
    scales,
    embedding,
    embedding_scales,
    best_keys,
    arrivals,
    logits,
    tokens,
    next_x,
    positions,
    ring,
    step,
    batch,
    last_slot,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    LOGITS: tl.constexpr,
    TOKENS: tl.constexpr,
    EMBEDDING: tl.constexpr,
    EMBEDDING_GROUP: tl.constexpr,
    ADVANCE: tl.constexpr,
    RING: tl.constexpr,
    RING_ROW: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    MAX_BATCH: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_EMBEDDING: tl.constexpr,
):
    """Final norm and a logit per token of the vocabulary; the grid is that of `project`.

    x [B, COLUMNS], norm [COLUMNS]. Written: with LOGITS, logits [B, ROWS] float32; with TOKENS,
    tokens [B], the largest logit's, of equal ones the lowest, and -1 where one is NaN or the
    largest is infinite; with an EMBEDDING format, next_x [B, COLUMNS], that token's row of the
    table, the first for -1. With ADVANCE, the next step is prepared: the tokens
    go to row step mod RING of ring [RING, RING_ROW], positions [B] grow by 1 up to last_slot, and
    step [1] int32 grows by 1.

    Scratch: best_keys [B, blocks of rows] int64, arbitrary before and after. Every program leaves
    its best there, and the last one to arrive takes the best of them; arrivals [1] int32 counts
    them and is 0 again afterwards.
    """
    sequence = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    y = multiply_rows(
        x, norm, weights, scales, sequence, row, batch, eps, ROWS, COLUMNS, FORMAT, GROUP, True,
        BATCH, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    is_sequence = sequence < batch
    is_row = row < ROWS
    if LOGITS:
        is_element = is_sequence[:, None] & is_row[None, :]
        tl.store(logits + sequence[:, None] * ROWS + row[None, :], y, mask=is_element)
    if TOKENS:
        lowest: tl.constexpr = -0x8000000000000000
        keys = tl.where(is_row[None, :], key_of(y, row[None, :]), lowest)
        tl.store(best_keys + sequence * blocks + block, tl.max(keys, axis=1), mask=is_sequence)
        tl.debug_barrier()  # every thread's keys are written before the arrival is counted
        earlier = tl.atomic_add(arrivals, 1, sem="acq_rel")
        if earlier == blocks * tl.num_programs(0) - 1:
            every = tl.arange(0, MAX_BATCH)
            is_any = every < batch
            best = tl.full([MAX_BATCH], lowest, dtype=tl.int64)
            for start in range(0, blocks, BLOCK_KEYS):
                place = start + tl.arange(0, BLOCK_KEYS)
                found = tl.load(
                    best_keys + every[:, None] * blocks + place[None, :],
                    mask=is_any[:, None] & (place < blocks)[None, :],
                    other=lowest,
                    cache_modifier=".cg",  # other multiprocessors wrote them
                )
                best = tl.maximum(best, tl.max(found, axis=1))
            token = tl.where(is_finite(best), token_of(best), -1)
            tl.store(tokens + every, token.to(tokens.dtype.element_ty), mask=is_any)
            if ADVANCE:
                now = tl.load(step)
                place = tl.load(positions + every, mask=is_any, other=0)
                tl.debug_barrier()  # every thread has read what one of them overwrites
                kept = token.to(ring.dtype.element_ty)
                tl.store(ring + now % RING * RING_ROW + every, kept, mask=is_any)
                place = tl.minimum(place + 1, last_slot)
                tl.store(positions + every, place, mask=is_any)
                tl.store(step, now + 1)
            if EMBEDDING != "none":
                row_of_table = tl.maximum(token, 0)
                for start in range(0, COLUMNS, BLOCK_EMBEDDING):
                    column = start + tl.arange(0, BLOCK_EMBEDDING)
                    value = read_rows(
                        embedding, embedding_scales, row_of_table, is_any, column, COLUMNS,
                        EMBEDDING, EMBEDDING_GROUP,
                    )  # fmt: skip
                    tl.store(
                        next_x + every[:, None] * COLUMNS + column[None, :],
                        value.to(next_x.dtype.element_ty),
                        mask=is_any[:, None] & (column < COLUMNS)[None, :],
                    )
            tl.store(arrivals, 0)


@triton.jit
def embed(
    tokens,
    table,
    scales,
    output,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Rows of the embedding table: output [B, COLUMNS] of tokens [B]; a program per sequence.

    The first token of a decode, and any that was sampled outside, comes from no `head`.
    """
    sequence = tl.program_id(0) + tl.arange(0, 1)
    column = tl.arange(0, BLOCK_COLUMNS)
    token = tl.load(tokens + sequence).to(tl.int32)
    value = read_rows(table, scales, token, sequence >= 0, column, COLUMNS, FORMAT, GROUP)
    tl.store(
        output + sequence[:, None] * COLUMNS + column[None, :],
        value.to(output.dtype.element_ty),
        mask=(column < COLUMNS)[None, :],
    )
