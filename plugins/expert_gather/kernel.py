"""Triton kernels of the expert gather; names follow the definition in op.py.

`route_experts` picks the experts of each token and head, `gather_experts` adds up their rows. No
sort is needed: of two axes in descending order, the pair at ranks (i, j) stands behind the
(i+1)·(j+1) - 1 pairs at ranks up to (i, j), so only pairs with (i+1)·(j+1) ≤ K can be among the K
best: 50 of 256 for K = 16, 280 of 4096 for K = 64. A rank is counted, not sorted for.

Scores are added in float32. In float32 the picks are exactly `pick_experts`; in half precision they
are those of `pick_experts(scores_x.float(), scores_y.float(), K)`, where the definition rounds a
sum to half precision and so sees more equal sums.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-untyped-calls

import triton
import triton.language as tl


@triton.constexpr_function
def first_pair(row: int, top_k: int, per_axis: int) -> int:
    """How many candidate pairs (i, j) have i < row; they are numbered by i, then by j."""
    return sum(min(top_k // (i + 1), per_axis) for i in range(row))


@triton.jit
def count_before(scores, values, COUNT: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """How many of the COUNT numbers at `scores` come before each of `values` [BLOCK], their copy.

    Before it come larger ones, and equal ones at a lower index. A loop over a few rivals at a time,
    since all comparisons at once spill registers from 48 picks on. Rivals come from memory, where
    every thread may read them: passing them between threads (`tl.gather`) takes two barriers a
    step. They lie along axis 0, so that a thread counts for its own values.
    """
    index = tl.arange(0, BLOCK)
    before = tl.zeros([STEP, BLOCK], dtype=tl.int32)
    for start in range(0, COUNT, STEP):
        rival = start + tl.arange(0, STEP)
        score = tl.load(scores + rival, mask=rival < COUNT, other=float("-inf")).to(tl.float32)
        wins = (score[:, None] > values[None, :]) | (
            (score[:, None] == values[None, :]) & (rival[:, None] < index[None, :])
        )
        before += wins.to(tl.int32)
    return tl.sum(before, axis=0)


@triton.jit
def route_head(
    scores_x,
    scores_y,
    best_scores,
    best_keys,
    pair_sums,
    experts,
    weights,
    NUM_KEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    PER_AXIS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KEYS_BLOCK: tl.constexpr,
    PAIRS_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The K best experts of one head of one token, and their weights.

    scores_x, scores_y [n]. Written: experts [K] int32, weights [K] float32. Scratch: best_scores
    and best_keys [2, min(K, n)], pair_sums [number of candidates].
    """
    best_scores_y = best_scores + PER_AXIS
    best_keys_y = best_keys + PER_AXIS

    # The best keys of both axes in order. Padding stands behind every key: an equal score at a
    # higher index.
    key = tl.arange(0, KEYS_BLOCK)
    is_key = key < NUM_KEYS
    x = tl.load(scores_x + key, mask=is_key, other=float("-inf")).to(tl.float32)
    y = tl.load(scores_y + key, mask=is_key, other=float("-inf")).to(tl.float32)
    rank_x = count_before(scores_x, x, NUM_KEYS, KEYS_BLOCK, STEP)
    rank_y = count_before(scores_y, y, NUM_KEYS, KEYS_BLOCK, STEP)
    tl.store(best_scores + rank_x, x, mask=rank_x < PER_AXIS)
    tl.store(best_keys + rank_x, key, mask=rank_x < PER_AXIS)
    tl.store(best_scores_y + rank_y, y, mask=rank_y < PER_AXIS)
    tl.store(best_keys_y + rank_y, key, mask=rank_y < PER_AXIS)
    tl.debug_barrier()  # threads read best keys that others wrote

    # Candidate pairs in the order of (i, j): of equal sums the lower one comes first.
    PAIRS: tl.constexpr = first_pair(PER_AXIS, TOP_K, PER_AXIS)
    pair = tl.arange(0, PAIRS_BLOCK)
    i = tl.zeros([PAIRS_BLOCK], dtype=tl.int32)
    j = pair
    for row in tl.static_range(1, PER_AXIS):
        first = first_pair(row, TOP_K, PER_AXIS)
        i += (pair >= first).to(tl.int32)
        j = tl.where(pair >= first, pair - first, j)
    is_pair = pair < PAIRS
    best_x = tl.load(best_scores + i, mask=is_pair, other=float("-inf"))
    best_y = tl.load(best_scores_y + j, mask=is_pair, other=float("-inf"))
    key_x = tl.load(best_keys + i, mask=is_pair, other=0)
    key_y = tl.load(best_keys_y + j, mask=is_pair, other=0)
    sums = best_x + best_y
    tl.store(pair_sums + pair, sums, mask=is_pair)
    tl.debug_barrier()  # every thread reads all sums
    rank = count_before(pair_sums, sums, PAIRS, PAIRS_BLOCK, STEP)
    is_pick = is_pair & (rank < TOP_K)

    weight = tl.where(is_pick, tl.exp(sums - tl.max(sums, axis=0)), 0.0)
    weight = weight / tl.sum(weight, axis=0)
    if NORMALIZE:
        weight = weight / tl.sum(weight, axis=0)
    tl.store(experts + rank, key_x * NUM_KEYS + key_y, mask=is_pick)
    tl.store(weights + rank, weight, mask=is_pick)


@triton.jit
def route_experts(
    scores_x,
    scores_y,
    best_scores,
    best_keys,
    pair_sums,
    experts,
    weights,
    NUM_KEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    PER_AXIS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KEYS_BLOCK: tl.constexpr,
    PAIRS_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The K best experts of each token and head, and their weights; a program for each.

    scores_x, scores_y [T, P, n]. Written: experts [T, P, K] int32 in the definition's order and
    weights [T, P, K] float32. Scratch, arbitrary before and after: best_scores float32 and
    best_keys int32 [T, P, 2, min(K, n)], and pair_sums float32 [T, P, number of candidates].
    """
    PAIRS: tl.constexpr = first_pair(PER_AXIS, TOP_K, PER_AXIS)
    head = tl.program_id(0).to(tl.int64)  # of T·P
    route_head(
        scores_x + head * NUM_KEYS, scores_y + head * NUM_KEYS,
        best_scores + head * (2 * PER_AXIS), best_keys + head * (2 * PER_AXIS),
        pair_sums + head * PAIRS, experts + head * TOP_K, weights + head * TOP_K,
        NUM_KEYS, TOP_K, PER_AXIS, NORMALIZE, KEYS_BLOCK, PAIRS_BLOCK, STEP,
    )  # fmt: skip


@triton.jit
def mix_experts(
    u,
    down,
    up,
    down_scales,
    up_scales,
    experts,
    weights,
    first,
    HIDDEN: tl.constexpr,
    PICKS: tl.constexpr,
    MIXED_PICKS: tl.constexpr,
    WEIGHT_INSIDE: tl.constexpr,
    SCALED: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
    PICKS_BLOCK: tl.constexpr,
):
    """The sum of a_e · up_e over MIXED_PICKS of a token's picks from `first` on: [HIDDEN_BLOCK].

    u: the token, float32 [HIDDEN_BLOCK]. experts, weights [PICKS]. down, up [E, H]; with SCALED a
    row is multiplied by its number in down_scales or up_scales [E].
    """
    h = tl.arange(0, HIDDEN_BLOCK)
    in_row = h < HIDDEN
    mixed = tl.zeros([PICKS_BLOCK, HIDDEN_BLOCK], dtype=tl.float32)
    for start in range(0, MIXED_PICKS, PICKS_BLOCK):
        pick = first + start + tl.arange(0, PICKS_BLOCK)
        is_pick = pick < PICKS
        expert = tl.load(experts + pick, mask=is_pick, other=0)
        weight = tl.load(weights + pick, mask=is_pick, other=0.0)
        # 64 bits: E·H is bounded by memory only.
        element = expert.to(tl.int64)[:, None] * HIDDEN + h[None, :]
        is_element = is_pick[:, None] & in_row[None, :]
        down_e = tl.load(down + element, mask=is_element, other=0)
        up_e = tl.load(up + element, mask=is_element, other=0)
        if SCALED:
            down_scale = tl.load(down_scales + expert, mask=is_pick, other=0.0)
            up_scale = tl.load(up_scales + expert, mask=is_pick, other=0.0)
        z = tl.sum(u[None, :] * down_e.to(tl.float32), axis=1)
        if SCALED:
            z *= down_scale
        if WEIGHT_INSIDE:
            z = z * weight
            a = z * tl.sigmoid(z)
        else:
            a = z * tl.sigmoid(z) * weight
        if SCALED:
            a *= up_scale
        mixed += a[:, None] * up_e.to(tl.float32)
    return tl.sum(mixed, axis=0)


@triton.jit
def gather_experts(
    hidden,
    down,
    up,
    experts,
    weights,
    partial_sums,
    arrivals,
    output,
    HIDDEN: tl.constexpr,
    PICKS: tl.constexpr,
    SPLITS: tl.constexpr,
    PICKS_PER_SPLIT: tl.constexpr,
    WEIGHT_INSIDE: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
    PICKS_BLOCK: tl.constexpr,
):
    """The sum over a token's P·K picks of a_e · up_e; programs along x are tokens, y are splits.

    hidden [T, H]; down, up [E, H]; experts int32 and weights float32 [T, P·K] of `route_experts`.
    Written: output [T, H]. With several splits each program writes its share to partial_sums
    [T, SPLITS, H] float32, and the last one to arrive adds them up, in the order of splits
    whichever it is; arrivals [T] int32 counts them and is 0 again afterwards.
    """
    tl.static_assert(SPLITS == 1 or PICKS_PER_SPLIT % PICKS_BLOCK == 0, "splits overlap")
    token = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    h = tl.arange(0, HIDDEN_BLOCK)
    in_row = h < HIDDEN
    u = tl.load(hidden + token * HIDDEN + h, mask=in_row, other=0.0).to(tl.float32)

    result = mix_experts(
        u, down, up, down, up, experts + token * PICKS, weights + token * PICKS,
        split * PICKS_PER_SPLIT, HIDDEN, PICKS, PICKS_PER_SPLIT, WEIGHT_INSIDE, False, HIDDEN_BLOCK,
        PICKS_BLOCK,
    )  # fmt: skip

    if SPLITS == 1:
        tl.store(output + token * HIDDEN + h, result.to(output.dtype.element_ty), mask=in_row)
    else:
        shares = partial_sums + token * (SPLITS * HIDDEN) + h
        tl.store(shares + split * HIDDEN, result, mask=in_row)
        tl.debug_barrier()  # every thread's share is written before the arrival is counted
        earlier = tl.atomic_add(arrivals + token, 1, sem="acq_rel")
        if earlier == SPLITS - 1:
            total = tl.zeros([HIDDEN_BLOCK], dtype=tl.float32)
            for share in tl.static_range(SPLITS):
                # From L2: other multiprocessors wrote the shares.
                total += tl.load(
                    shares + share * HIDDEN, mask=in_row, other=0.0, cache_modifier=".cg"
                )
            tl.store(output + token * HIDDEN + h, total.to(output.dtype.element_ty), mask=in_row)
            tl.store(arrivals + token, 0)
