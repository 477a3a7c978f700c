"""Triton kernel that ends a feed-forward block with experts, in a decode step.

    output = residual + (down · a + sum of the picked experts)

The product with `down` is what `plugins.projection.kernel.project` would do; the experts depend on
the router's scores and on the block's input alone, so both run beside each other in one launch, and
whoever comes last adds up.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-untyped-calls

import triton
import triton.language as tl

from plugins.expert_gather.kernel import first_pair, mix_experts, route_head
from plugins.projection.kernel import multiply_rows


@triton.jit
def add_up(
    stream,
    residual_weight,
    products,
    shares,
    output,
    sequence,
    ROWS: tl.constexpr,
    SCALED_RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
):
    """One sequence's output, from what the programs left: in an order of its own, whoever does it.

    stream, products, output [B, H]; shares [B, SPLITS, H]; residual_weight [H].
    """
    h = tl.arange(0, ROWS_BLOCK)
    in_row = h < ROWS
    place = sequence * ROWS + h
    carried = tl.load(stream + place, mask=in_row, other=0.0).to(tl.float32)
    if SCALED_RESIDUAL:
        carried *= tl.load(residual_weight + h, mask=in_row, other=0.0).to(tl.float32)
    # From L2: other multiprocessors wrote them.
    product = tl.load(products + place, mask=in_row, other=0.0, cache_modifier=".cg")
    mixed = tl.zeros([ROWS_BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        share = shares + (sequence * SPLITS + split) * ROWS
        mixed += tl.load(share + h, mask=in_row, other=0.0, cache_modifier=".cg")
    result = carried + (product + mixed)
    tl.store(output + place, result.to(output.dtype.element_ty), mask=in_row)


@triton.jit
def expert_down(
    x,
    weights,
    scales,
    stream,
    norm,
    residual_weight,
    router,
    down,
    up,
    down_scales,
    up_scales,
    best_scores,
    best_keys,
    pair_sums,
    experts,
    expert_weights,
    products,
    shares,
    arrivals,
    output,
    batch,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED_RESIDUAL: tl.constexpr,
    SCALED_EXPERTS: tl.constexpr,
    HEADS: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    PER_AXIS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WEIGHT_INSIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    PICKS_PER_SPLIT: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    KEYS_BLOCK: tl.constexpr,
    PAIRS_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    PICKS_BLOCK: tl.constexpr,
):
    """The end of a block with experts; programs along x are blocks of BATCH sequences.

    Along y come first BATCH · SPLITS programs for the experts, a sequence's share of its picks
    each, since they take longest; then those of blocks of rows of the product. Every program of a
    sequence counts its arrival, and the last one adds up. Before that nothing is written to
    `output` [B, H], so it may be `stream` itself.

    x [B, I]; weights and scales as packed, of [H, I]. stream [B, H] is the residual stream: what
    is carried on, and normed by `norm` [H] what the experts read. router [B, 2, P, n] float32, the
    scores of both axes. down, up [E, H], with SCALED_EXPERTS levels with a number for each row in
    down_scales and up_scales [E]. residual_weight [H] with SCALED_RESIDUAL.

    Scratch, arbitrary before and after: of each sequence, share and head best_scores float32 and
    best_keys int32 [2, min(K, n)], pair_sums float32 [candidates], experts int32 and
    expert_weights float32 [K]; products [B, H] and shares [B, SPLITS, H] float32. arrivals [B]
    int32 counts and is 0 again afterwards.
    """
    tl.static_assert(SPLITS == 1 or PICKS_PER_SPLIT % PICKS_BLOCK == 0, "splits overlap")
    PICKS: tl.constexpr = HEADS * TOP_K
    PAIRS: tl.constexpr = first_pair(PER_AXIS, TOP_K, PER_AXIS)
    EXPERT_PROGRAMS: tl.constexpr = BATCH * SPLITS
    PROGRAMS: tl.constexpr = SPLITS + tl.cdiv(ROWS, BLOCK_ROWS)  # of a sequence
    sequence = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
    block = tl.program_id(1)
    mixes = block < EXPERT_PROGRAMS
    own = tl.program_id(0) * BATCH + tl.where(mixes, block // SPLITS, 0)
    if own >= batch:
        return

    if mixes:
        split = block % SPLITS
        h = tl.arange(0, ROWS_BLOCK)
        in_row = h < ROWS
        u = tl.load(stream + own * ROWS + h, mask=in_row, other=0.0).to(tl.float32)
        norm_weight = tl.load(norm + h, mask=in_row, other=0.0).to(tl.float32)
        u *= tl.rsqrt(tl.sum(u * u, axis=0) / ROWS + eps)
        u *= norm_weight
        unit = own * SPLITS + split
        for head in range(HEADS):
            scores_x = router + (own * (2 * HEADS) + head) * NUM_KEYS
            one = unit * HEADS + head
            route_head(
                scores_x, scores_x + HEADS * NUM_KEYS, best_scores + one * (2 * PER_AXIS),
                best_keys + one * (2 * PER_AXIS), pair_sums + one * PAIRS, experts + one * TOP_K,
                expert_weights + one * TOP_K, NUM_KEYS, TOP_K, PER_AXIS, NORMALIZE, KEYS_BLOCK,
                PAIRS_BLOCK, STEP,
            )  # fmt: skip
        tl.debug_barrier()  # threads read picks that others wrote
        share = mix_experts(
            u, down, up, down_scales, up_scales, experts + unit * PICKS,
            expert_weights + unit * PICKS, split * PICKS_PER_SPLIT, ROWS, PICKS, PICKS_PER_SPLIT,
            WEIGHT_INSIDE, SCALED_EXPERTS, ROWS_BLOCK, PICKS_BLOCK,
        )  # fmt: skip
        tl.store(shares + unit * ROWS + h, share, mask=in_row)
    else:
        row = (block - EXPERT_PROGRAMS) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        y = multiply_rows(
            x, x, weights, scales, sequence, row, batch, eps, ROWS, COLUMNS, FORMAT, GROUP, False,
            BATCH, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
        tl.store(
            products + sequence[:, None] * ROWS + row[None, :],
            y,
            mask=(sequence < batch)[:, None] & (row < ROWS)[None, :],
        )

    tl.debug_barrier()  # all of a program's results are written before its arrival is counted
    served = tl.where(mixes, sequence == own, sequence < batch)
    earlier = tl.atomic_add(arrivals + sequence, 1, mask=served, sem="acq_rel")
    is_last = (served & (earlier == PROGRAMS - 1)).to(tl.int32)
    if tl.sum(is_last, axis=0) > 0:
        for place in range(BATCH):
            one = tl.program_id(0) * BATCH + place
            if tl.sum(tl.where(sequence == one, is_last, 0), axis=0) > 0:
                add_up(
                    stream, residual_weight, products, shares, output, one, ROWS, SCALED_RESIDUAL,
                    SPLITS, ROWS_BLOCK,
                )  # fmt: skip
        tl.store(arrivals + sequence, 0, mask=is_last > 0)
