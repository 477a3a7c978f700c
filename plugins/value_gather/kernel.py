"""Triton kernel of the value gather; names follow the definition in op.py.

Rows are few, so a row's rank is counted by comparing it with every other, in all heads at once.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-untyped-calls

import triton
import triton.language as tl


@triton.constexpr_function
def binomial(number: int, count: int) -> int:
    """How many sets of `count` of `number` things there are."""
    result = 1
    for factor in range(1, count + 1):
        result = result * (number - factor + 1) // factor
    return result


@triton.jit
def number_subsets(
    is_pick,
    NUM_HEADS_BLOCK: tl.constexpr,
    NUM_ROWS_BLOCK: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """The place of each set of K rows in lexicographic order: is_pick [R, N] to [R] int64.

    The sets behind {a_1 < … < a_K} are those that agree with it up to some a_k, where they have a
    larger row: for each k, the sets of K-k+1 of the N-1-a_k rows above a_k.
    """
    picks = is_pick.to(tl.int64)
    choose = TOP_K - (tl.cumsum(picks, axis=1) - picks)  # K-k+1 at the k-th pick
    above = NUM_ROWS - 1 - tl.arange(0, NUM_ROWS_BLOCK).to(tl.int64)[None, :]
    behind = tl.full([NUM_HEADS_BLOCK, NUM_ROWS_BLOCK], 1, dtype=tl.int64)
    for factor in tl.static_range(1, TOP_K + 1):
        behind = tl.where(factor <= choose, behind * (above - factor + 1) // factor, behind)
    behind = tl.sum(tl.where(is_pick, behind, 0), axis=1)
    return binomial(NUM_ROWS, TOP_K) - 1 - behind


@triton.jit
def sum_rows(
    scores,
    table,
    h,
    NUM_HEADS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    SUBSET_SUMS: tl.constexpr,
    HIDDEN: tl.constexpr,
    NUM_HEADS_BLOCK: tl.constexpr,
    NUM_ROWS_BLOCK: tl.constexpr,
):
    """Numbers h [C] of the sum of the rows that one token's heads pick, float32 [C].

    scores [R, N] of the token; table [N, H], with SUBSET_SUMS [C(N, K), H].
    """
    in_row = h < HIDDEN
    head = tl.arange(0, NUM_HEADS_BLOCK)
    row = tl.arange(0, NUM_ROWS_BLOCK)

    is_score = (head < NUM_HEADS)[:, None] & (row < NUM_ROWS)[None, :]
    # Padding stands behind every row: an equal score at a higher number.
    score = tl.load(
        scores + head[:, None] * NUM_ROWS + row[None, :],
        mask=is_score,
        other=float("-inf"),
    ).to(tl.float32)
    own, rival = score[:, :, None], score[:, None, :]
    wins = (rival > own) | ((rival == own) & (row[None, None, :] < row[None, :, None]))
    is_pick = is_score & (tl.sum(wins.to(tl.int32), axis=2) < TOP_K)  # [R, N]

    if SUBSET_SUMS:
        number = number_subsets(is_pick, NUM_HEADS_BLOCK, NUM_ROWS_BLOCK, NUM_ROWS, TOP_K)
        values = tl.load(
            table + number[:, None] * HIDDEN + h[None, :],
            mask=(head < NUM_HEADS)[:, None] & in_row[None, :],
            other=0.0,
        )
        result = tl.sum(values.to(tl.float32), axis=0)
    else:
        count = tl.sum(is_pick.to(tl.int32), axis=0)  # [N] heads that pick a row
        values = tl.load(
            table + row[:, None] * HIDDEN + h[None, :],
            mask=(count > 0)[:, None] & in_row[None, :],
            other=0.0,
        )
        result = tl.sum(count.to(tl.float32)[:, None] * values.to(tl.float32), axis=0)
    return result


@triton.jit
def gather_values(
    scores,
    table,
    output,
    NUM_HEADS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    SUBSET_SUMS: tl.constexpr,
    HIDDEN: tl.constexpr,
    NUM_HEADS_BLOCK: tl.constexpr,
    NUM_ROWS_BLOCK: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
):
    """The sum of the rows that a token's heads pick; programs along x are tokens, y are parts of H.

    scores [T, R, N]; table [N, H], with SUBSET_SUMS [C(N, K), H]. Written: output [T, H].
    """
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HIDDEN_BLOCK + tl.arange(0, HIDDEN_BLOCK)
    in_row = h < HIDDEN
    result = sum_rows(
        scores + token * (NUM_HEADS * NUM_ROWS), table, h, NUM_HEADS, NUM_ROWS, TOP_K, SUBSET_SUMS,
        HIDDEN, NUM_HEADS_BLOCK, NUM_ROWS_BLOCK,
    )  # fmt: skip
    tl.store(output + token * HIDDEN + h, result.to(output.dtype.element_ty), mask=in_row)


@triton.jit
def seed_values(
    x,
    norm,
    scores,
    table,
    output,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    SUBSET_SUMS: tl.constexpr,
    HIDDEN: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
    NUM_HEADS_BLOCK: tl.constexpr,
    NUM_ROWS_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
):
    """The seed's values: a token's normed x times the rows that its heads pick.

    x [T, H], norm [H]; scores float32 [T, R, N]; table as in `gather_values`. Written: output
    float32 [T, H] from number OFFSET on, rows STRIDE apart.
    Programs along x are tokens, y are parts of H.
    """
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HIDDEN_BLOCK + tl.arange(0, HIDDEN_BLOCK)
    in_row = h < HIDDEN
    column = tl.arange(0, ROW_BLOCK)
    whole = tl.load(x + token * HIDDEN + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
    part = tl.load(x + token * HIDDEN + h, mask=in_row, other=0.0).to(tl.float32)
    weight = tl.load(norm + h, mask=in_row, other=0.0).to(tl.float32)
    values = sum_rows(
        scores + token * (NUM_HEADS * NUM_ROWS), table, h, NUM_HEADS, NUM_ROWS, TOP_K, SUBSET_SUMS,
        HIDDEN, NUM_HEADS_BLOCK, NUM_ROWS_BLOCK,
    )  # fmt: skip
    normed = part * tl.rsqrt(tl.sum(whole * whole, axis=0) / HIDDEN + eps) * weight
    tl.store(output + OFFSET + token * STRIDE + h, normed * values, mask=in_row)
