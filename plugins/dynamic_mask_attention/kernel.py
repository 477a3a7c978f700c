"""Triton kernels of dynamic mask attention; names follow the definition in op.py.

`keep_threshold` says which keys each query keeps, where some are dropped. `attend_decode` serves a
few queries: the visible keys are split over programs, which join their results. `attend_prompt`
serves many: a tile of queries walks over blocks of keys. `append_rows` comes before both in steps
that are ours alone, where `attend_decode` does not do its part itself.

The slot of a query is read from device memory, so a captured CUDA graph serves every length. Slots
beyond a query's own are not read, whatever they hold: their scores count as -inf here, not as the
definition's most negative finite number, which differs only where every kept key has that score.
Logits, softmax and sums are float32.

A key's address is a 64-bit offset of its head plus a 32-bit one within the head (launches.py holds
C·D to that).

The file is long because what can run in one launch stands in one kernel.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-untyped-calls

import triton
import triton.language as tl

# Two bits of the threshold are found per pass over the scores.
_PASSES = tl.constexpr(16)
# The largest logit so far starts here: below every logit but -inf, and finite, so that differences
# of two of them are numbers.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def visible_images(scores, slot, end, visible):
    """Whole numbers in the order of float scores, uint32 [queries, slots]; 0 for what is not seen.

    Both zeros have one image, and no score has the image 0.

    scores: [C], of which `end` are seen by some query. slot: [slots]. visible: [queries], how many
    slots each query sees.
    """
    score = tl.load(scores + slot, mask=slot < end, other=0.0).to(tl.float32)
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    # Set the sign bit of what is positive, flip all bits of what is negative.
    image = (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)
    return tl.where(slot[None, :] < visible[:, None], image[None, :], 0)


@triton.jit
def score_of_image(image):
    """The float score that has this image."""
    bits = image.to(tl.int32, bitcast=True)
    return (bits ^ ((~bits >> 31) | -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def keep_threshold(
    score,
    write_index,
    threshold,
    limit,
    S,
    C,
    keep_window_size,
    score_row_stride,
    N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Which keys stay: those with score > threshold, or score = threshold and slot <= limit.

    The threshold is the W-th best visible score. Its image is found from the top bit down, as the
    largest number that at least W images reach; then equal scores are counted in slot order.

    score: [B or 1, N, C], rows `score_row_stride` apart, 0 where all share one. write_index: [B].
    threshold float32, limit int32: [B, N, S]. Programs: queries / BLOCK_S, N, B.
    """
    n = tl.program_id(1)
    b = tl.program_id(2)
    query = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    start = tl.load(write_index + b).to(tl.int32)
    visible = tl.minimum(start + query + 1, C)
    last_query = tl.minimum(tl.program_id(0) * BLOCK_S + BLOCK_S, S) - 1
    end = tl.minimum(start + last_query + 1, C)
    # Where no query drops a key, the loops do not run.
    end = tl.where(end > keep_window_size, end, 0)
    scores = score + b * score_row_stride + n.to(tl.int64) * C

    one = tl.full([BLOCK_S], 1, tl.uint32)
    found = tl.zeros([BLOCK_S], tl.uint32)
    for step in range(_PASSES):
        bit = one << (30 - 2 * step)
        reach_1 = tl.zeros([BLOCK_S, BLOCK_C], tl.int32)
        reach_2 = tl.zeros([BLOCK_S, BLOCK_C], tl.int32)
        reach_3 = tl.zeros([BLOCK_S, BLOCK_C], tl.int32)
        for first in range(0, end, BLOCK_C):
            slot = first + tl.arange(0, BLOCK_C)
            image = visible_images(scores, slot, end, visible)
            reach_1 += (image >= (found + bit)[:, None]).to(tl.int32)
            reach_2 += (image >= (found + 2 * bit)[:, None]).to(tl.int32)
            reach_3 += (image >= (found + 3 * bit)[:, None]).to(tl.int32)
        digit = (tl.sum(reach_1, 1) >= keep_window_size).to(tl.uint32)
        digit += (tl.sum(reach_2, 1) >= keep_window_size).to(tl.uint32)
        digit += (tl.sum(reach_3, 1) >= keep_window_size).to(tl.uint32)
        found += digit * bit

    above = tl.zeros([BLOCK_S, BLOCK_C], tl.int32)
    for first in range(0, end, BLOCK_C):
        slot = first + tl.arange(0, BLOCK_C)
        image = visible_images(scores, slot, end, visible)
        above += (image > found[:, None]).to(tl.int32)
    room = keep_window_size - tl.sum(above, 1)
    last_kept = tl.zeros([BLOCK_S], tl.int32)
    passed = tl.zeros([BLOCK_S], tl.int32)
    for first in range(0, end, BLOCK_C):
        slot = first + tl.arange(0, BLOCK_C)
        image = visible_images(scores, slot, end, visible)
        equal = (image == found[:, None]).to(tl.int32)
        order = passed[:, None] + tl.cumsum(equal, 1)
        fills = (equal > 0) & (order == room[:, None])
        last_kept += tl.sum(tl.where(fills, slot[None, :], 0), 1)
        passed += tl.sum(equal, 1)

    everything = visible <= keep_window_size
    target = (b * N + n).to(tl.int64) * S + query
    lowest = tl.where(everything, float("-inf"), score_of_image(found))
    tl.store(threshold + target, lowest, mask=query < S)
    tl.store(limit + target, tl.where(everything, C, last_kept), mask=query < S)


@triton.jit
def head_vector(
    row,
    norm_weight,
    cos,
    sin,
    eps,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One head of a projection's row, float32 [BLOCK_D]: normed and rotated where asked.

    row: [D]. norm_weight: float32 [D]. cos, sin: float32 [D/2], the angles of the position.
    """
    d = tl.arange(0, BLOCK_D)
    x = tl.load(row + d, mask=d < D, other=0.0).to(tl.float32)
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        x = x * factor * tl.load(norm_weight + d, mask=d < D, other=0.0)
    if ROTATE:
        HALF: tl.constexpr = D // 2
        low = d < HALF
        partner = tl.where(low, d + HALF, d - HALF)
        y = tl.load(row + partner, mask=d < D, other=0.0).to(tl.float32)
        if NORM:
            y = y * factor * tl.load(norm_weight + partner, mask=d < D, other=0.0)
        angle = tl.where(low, d, d - HALF)
        x *= tl.load(cos + angle, mask=d < D, other=0.0)
        x += tl.where(low, -y, y) * tl.load(sin + angle, mask=d < D, other=0.0)
    return x


@triton.jit
def mask_score(row, A, dtype: tl.constexpr):
    """exp(A · softplus(row)) of one key, as the score cache of `dtype` holds it, float32."""
    dt = tl.load(row).to(tl.float32)
    softplus = tl.maximum(dt, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(dt)))
    return tl.exp(tl.load(A) * softplus).to(dtype).to(tl.float32)


@triton.jit
def join_shares(
    partial_values,
    partial_masses,
    used,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Attention of one query head from what `used` programs left of it, float32 [BLOCK_D]."""
    d = tl.arange(0, BLOCK_D)
    split = tl.arange(0, MAX_SPLITS)
    there = split < used
    mass_place = partial_masses + split * (2 * GROUP)
    top = tl.load(mass_place, mask=there, other=_LOWEST, cache_modifier=".cg")
    mass = tl.load(mass_place + 1, mask=there, other=0.0, cache_modifier=".cg")
    value_place = partial_values + split[:, None] * (GROUP * D) + d[None, :]
    inside = there[:, None] & (d < D)[None, :]
    value = tl.load(value_place, mask=inside, other=0.0, cache_modifier=".cg")
    weight = tl.exp(top - tl.max(top, 0))
    return tl.sum(weight[:, None] * value, 0) / tl.sum(weight * mass, 0)


@triton.jit
def attend_keys(
    queries,
    keys,
    values,
    scores,
    begin,
    end,
    g,
    C,
    lowests,
    lasts,
    NQ: tl.constexpr,
    NKV: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SELECT: tl.constexpr,
):
    """Attention of a group's query heads to slots begin to end, lane by lane.

    queries: a scaled query, float32 [BLOCK_D], for each head. keys, values: [C, D] of key/value
    head g. scores: [N, C]. lowests, lasts: threshold and last slot of each head, with SELECT.
    Gives for each head the largest logit [BLOCK_N], the sum of p [BLOCK_N] and of p·v
    [BLOCK_N, BLOCK_D] of every lane; p is exp(logit - largest).
    """
    GROUP: tl.constexpr = NQ // NKV
    # Heads of a group share their scores, or each has its own to read.
    SHARED: tl.constexpr = NKV % N == 0
    d = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_N)
    tops = ()
    masses = ()
    sums = ()
    for _ in tl.static_range(GROUP):
        tops += (tl.full([BLOCK_N], _LOWEST, tl.float32),)
        masses += (tl.zeros([BLOCK_N], tl.float32),)
        sums += (tl.zeros([BLOCK_N, BLOCK_D], tl.float32),)
    for first in range(begin, end, BLOCK_N):
        slot = first + lane
        seen = slot < end
        inside = seen[:, None]
        if D != BLOCK_D:
            inside = inside & (d < D)[None, :]
        place = slot[:, None] * D + d[None, :]
        k = tl.load(keys + place, mask=inside, other=0.0)
        v = tl.load(values + place, mask=inside, other=0.0)
        k = k.to(tl.float32)
        v = v.to(tl.float32)
        new_tops = ()
        new_masses = ()
        new_sums = ()
        for h in tl.static_range(GROUP):
            if h == 0 or not SHARED:
                n = (g * GROUP + h) * N // NQ
                bias = tl.load(scores + n.to(tl.int64) * C + slot, mask=seen, other=0.0)
                bias = bias.to(tl.float32)
                kept = seen
                if SELECT:
                    equal = (bias == lowests[h]) & (slot <= lasts[h])
                    kept = kept & ((bias > lowests[h]) | equal)
            x = tl.sum(queries[h][None, :] * k, 1) + bias
            x = tl.where(kept, x, float("-inf"))
            top = tl.maximum(tops[h], x)
            p = tl.exp(x - top)
            fade = tl.exp(tops[h] - top)
            new_tops += (top,)
            new_masses += (masses[h] * fade + p,)
            new_sums += (sums[h] * fade[:, None] + p[:, None] * v,)
        tops = new_tops
        masses = new_masses
        sums = new_sums
    return tops, masses, sums


@triton.jit
def attend_decode(
    query,
    key,
    value,
    score,
    write_index,
    threshold,
    limit,
    partial_values,
    partial_masses,
    counters,
    output,
    position,
    query_norm,
    key_norm,
    cos,
    sin,
    A,
    S,
    C,
    splits,
    score_row_stride,
    scale,
    eps,
    NQ: tl.constexpr,
    NKV: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARE_STEP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SELECT: tl.constexpr,
    APPEND: tl.constexpr,
    QK_NORM: tl.constexpr,
    ROTATE_QUERY: tl.constexpr,
    ROTATE_KEY: tl.constexpr,
    SCORE: tl.constexpr,
):
    """Attention of a few queries, one share of the keys of one key/value head per program.

    A program has all query heads of its key/value head. Every lane of a block keeps a softmax of
    its own, so the loop over keys exchanges nothing between threads but the sums of q·k; lanes are
    joined at the end. The last program to finish joins the shares and puts the counter back to 0.

    query: [B, Nq, S, D]; with APPEND rows [B, (Nq + 2·Nkv)·D (+ N with SCORE)] of one token each.
    key, value: [B, Nkv, C, D]. score: [B or 1, N, C], rows `score_row_stride` apart. write_index:
    [B]. output: [B, S, Nq·D]. threshold, limit: [B, N, S], read with SELECT.
    partial_values float32 [B·S, Nkv, splits, Nq/Nkv, D] and partial_masses (largest logit and sum)
    [B·S, Nkv, splits, Nq/Nkv, 2] are scratch. counters: int32 [B·S, Nkv].
    Programs: splits, Nkv, B·S.

    With APPEND, S = 1 and slot write_index[b] is not read but written: key and value of the new
    token come from its row, the key normed (QK_NORM) and rotated (ROTATE_KEY) by the row of
    `cos` and `sin` [positions, D/2] that position[b] names, and its score, with SCORE, from the
    row's last numbers and `A` [N]. The query is treated alike (QK_NORM, ROTATE_QUERY). The program
    with the last share writes them.
    """
    GROUP: tl.constexpr = NQ // NKV
    ROW: tl.constexpr = (NQ + 2 * NKV) * D + (N if SCORE else 0)
    split = tl.program_id(0)
    g = tl.program_id(1)
    row = tl.program_id(2)
    b = row // S
    s = row % S
    i = tl.load(write_index + b).to(tl.int32) + s
    visible = tl.minimum(i + 1, C)
    share = tl.cdiv(tl.cdiv(visible, splits), SHARE_STEP) * SHARE_STEP
    used = tl.cdiv(visible, share)
    if split >= used:
        return
    begin = split * share
    end = tl.minimum(begin + share, visible)
    appends = split == used - 1
    if APPEND:
        end = tl.minimum(end, i)

    d = tl.arange(0, BLOCK_D)
    head_start = (b * NKV + g).to(tl.int64) * C * D
    keys = key + head_start
    values = value + head_start
    scores = score + b * score_row_stride
    thresholds = threshold + (b * N).to(tl.int64) * S + s
    limits = limit + (b * N).to(tl.int64) * S + s
    token = query + b.to(tl.int64) * ROW
    cos_row = cos
    sin_row = sin
    if ROTATE_QUERY or ROTATE_KEY:
        turn = tl.load(position + b) * (D // 2)
        cos_row += turn
        sin_row += turn

    queries = ()
    lowests = ()
    lasts = ()
    for h in tl.static_range(GROUP):
        a = g * GROUP + h
        if SELECT:
            n = a * N // NQ
            lowests += (tl.load(thresholds + n * S),)
            lasts += (tl.load(limits + n * S),)
        if APPEND:
            q = head_vector(
                token + a * D, query_norm, cos_row, sin_row, eps, QK_NORM, ROTATE_QUERY, D, BLOCK_D
            )
        else:
            q_row = query + ((b * NQ + a).to(tl.int64) * S + s) * D
            q = tl.load(q_row + d, mask=d < D, other=0.0).to(tl.float32)
        queries += (q * scale,)

    tops, masses, sums = attend_keys(
        queries, keys, values, scores, begin, end, g, C, lowests, lasts,
        NQ, NKV, N, D, BLOCK_D, BLOCK_N, SELECT,
    )  # fmt: skip

    if APPEND:
        new_k = head_vector(
            token + (NQ + g) * D, key_norm, cos_row, sin_row, eps, QK_NORM, ROTATE_KEY, D, BLOCK_D
        ).to(key.dtype.element_ty)
        new_v = tl.load(token + (NQ + NKV + g) * D + d, mask=d < D, other=0.0)
        new_v = new_v.to(value.dtype.element_ty)
        written = d < tl.where(appends, D, 0)
        tl.store(keys + i * D + d, new_k, mask=written)
        tl.store(values + i * D + d, new_v, mask=written)
        new_k = new_k.to(tl.float32)
        new_v = new_v.to(tl.float32)

    target = output + row.to(tl.int64) * (NQ * D) + g * (GROUP * D)
    part = ((row.to(tl.int64) * NKV + g) * splits + split) * GROUP
    for h in tl.static_range(GROUP):
        top = tl.max(tops[h], 0)
        if APPEND:
            a = g * GROUP + h
            n = a * N // NQ
            new_score = scores + n.to(tl.int64) * C + i
            if SCORE:
                dt = token + (NQ + 2 * NKV) * D + n
                bias = mask_score(dt, A + n, score.dtype.element_ty)
                # Of the heads that share a score, the first writes it.
                writes = appends & (a % (NQ // N) == 0)
                tl.store(new_score, bias.to(score.dtype.element_ty), mask=writes)
            else:
                bias = tl.load(new_score).to(tl.float32)
            x = tl.sum(queries[h] * new_k, 0) + bias
            x = tl.where(appends, x, float("-inf"))
            top = tl.maximum(top, x)
        weight = tl.exp(tops[h] - top)
        mass = tl.sum(masses[h] * weight, 0)
        attended = tl.sum(sums[h] * weight[:, None], 0)
        if APPEND:
            p = tl.exp(x - top)
            mass += p
            attended += p * new_v
        if used == 1:
            tl.store(target + h * D + d, attended / mass, mask=d < D)
        else:
            tl.store(partial_values + (part + h) * D + d, attended, mask=d < D)
            tl.store(partial_masses + (part + h) * 2, top)
            tl.store(partial_masses + (part + h) * 2 + 1, mass)

    if used > 1:
        # Every thread's partial results are written before one thread says so, and read by a
        # program that has seen all others say so, past the cache of its own processor (.cg).
        tl.debug_barrier()
        counter = counters + row * NKV + g
        if tl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
            first_part = (row.to(tl.int64) * NKV + g) * splits * GROUP
            for h in tl.static_range(GROUP):
                result = join_shares(
                    partial_values + (first_part + h) * D,
                    partial_masses + (first_part + h) * 2,
                    used,
                    GROUP,
                    D,
                    BLOCK_D,
                    MAX_SPLITS,
                )
                tl.store(target + h * D + d, result, mask=d < D)
            tl.store(counter, 0)


@triton.jit
def append_rows(
    rows,
    query,
    key,
    value,
    score,
    write_index,
    position,
    query_norm,
    key_norm,
    cos,
    sin,
    A,
    S,
    C,
    eps,
    NQ: tl.constexpr,
    NKV: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QK_NORM: tl.constexpr,
    ROTATE_QUERY: tl.constexpr,
    ROTATE_KEY: tl.constexpr,
    SCORE: tl.constexpr,
):
    """What `attend_decode` does with APPEND before it attends, for S tokens of each row.

    rows: [B·S, (Nq + 2·Nkv)·D (+ N with SCORE)]. write_index, position: [B], of a row's first
    token. Written: query [B, Nq, S, D]; in the slots from write_index[b] on, key and value
    [B, Nkv, C, D] and score [B, N, C]. A token without a slot is not appended, and its query is
    rotated by the angles of position 0, since its own may have none.
    Programs: B·S, Nq + 2·Nkv heads.
    """
    ROW: tl.constexpr = (NQ + 2 * NKV) * D + (N if SCORE else 0)
    row = tl.program_id(0)
    head = tl.program_id(1)
    b = row // S
    s = row % S
    slot = tl.load(write_index + b) + s
    has_slot = slot < C
    token = rows + row.to(tl.int64) * ROW
    d = tl.arange(0, BLOCK_D)
    written = d < D
    stored = d < tl.where(has_slot, D, 0)
    cos_row = cos
    sin_row = sin
    if ROTATE_QUERY or ROTATE_KEY:
        turn = tl.where(has_slot, tl.load(position + b) + s, 0) * (D // 2)
        cos_row += turn
        sin_row += turn

    if head < NQ:
        q = head_vector(
            token + head * D, query_norm, cos_row, sin_row, eps, QK_NORM, ROTATE_QUERY, D, BLOCK_D
        )
        target = query + ((b * NQ + head).to(tl.int64) * S + s) * D
        tl.store(target + d, q.to(query.dtype.element_ty), mask=written)
        if SCORE:
            n = head * N // NQ
            new_score = mask_score(token + (NQ + 2 * NKV) * D + n, A + n, score.dtype.element_ty)
            # Of the heads that share a score, the first writes it.
            writes = has_slot & (head % (NQ // N) == 0)
            place = score + (b * N + n).to(tl.int64) * C + slot
            tl.store(place, new_score.to(score.dtype.element_ty), mask=writes)
    elif head < NQ + NKV:
        g = head - NQ
        k = head_vector(
            token + head * D, key_norm, cos_row, sin_row, eps, QK_NORM, ROTATE_KEY, D, BLOCK_D
        )
        target = key + ((b * NKV + g).to(tl.int64) * C + slot) * D
        tl.store(target + d, k.to(key.dtype.element_ty), mask=stored)
    else:
        g = head - NQ - NKV
        v = tl.load(token + head * D + d, mask=written, other=0.0)
        target = value + ((b * NKV + g).to(tl.int64) * C + slot) * D
        tl.store(target + d, v.to(value.dtype.element_ty), mask=stored)


@triton.jit
def attend_prompt(
    query,
    key,
    value,
    score,
    write_index,
    threshold,
    limit,
    output,
    S,
    C,
    score_row_stride,
    scale,
    NQ: tl.constexpr,
    NKV: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SELECT: tl.constexpr,
):
    """Attention of many queries, one tile of BLOCK_M (token, query head) pairs per program.

    A program has HEADS query heads that share their keys and scores; pair r of them is token
    r / HEADS and head r mod HEADS, so any number of heads fills a tile.

    Tensors as in `attend_decode`. Programs: S·HEADS / BLOCK_M, Nq / HEADS, B.
    """
    # Later tiles see more keys: they start first, so that none is left over at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    first_head = tl.program_id(1) * HEADS
    b = tl.program_id(2)
    pair = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    s = pair // HEADS
    a = first_head + pair % HEADS
    g = first_head // (NQ // NKV)
    n = first_head * N // NQ
    start = tl.load(write_index + b).to(tl.int32)
    i = start + s
    last_token = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // HEADS, S - 1)
    end = tl.minimum(start + last_token + 1, C)

    d = tl.arange(0, BLOCK_D)
    head_start = (b * NKV + g).to(tl.int64) * C * D
    keys = key + head_start
    values = value + head_start
    scores = score + b * score_row_stride + n.to(tl.int64) * C
    inside_pair = (s < S)[:, None] & (d < D)[None, :]
    q_place = ((b * NQ + a).to(tl.int64) * S + s)[:, None] * D + d[None, :]
    q = tl.load(query + q_place, mask=inside_pair, other=0.0)
    if SELECT:
        selection = (b * N + n).to(tl.int64) * S + s
        lowest = tl.load(threshold + selection, mask=s < S, other=float("-inf"))
        last = tl.load(limit + selection, mask=s < S, other=0)

    top = tl.full([BLOCK_M], _LOWEST, tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, end, BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N)
        seen = slot < end
        inside = seen[:, None]
        if D != BLOCK_D:
            inside = inside & (d < D)[None, :]
        place = slot[:, None] * D + d[None, :]
        k = tl.load(keys + place, mask=inside, other=0.0)
        bias = tl.load(scores + slot, mask=seen, other=0.0).to(tl.float32)
        kept = seen[None, :] & (slot[None, :] <= i[:, None])
        if SELECT:
            equal = (bias[None, :] == lowest[:, None]) & (slot[None, :] <= last[:, None])
            kept = kept & ((bias[None, :] > lowest[:, None]) | equal)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]
        x = tl.where(kept, x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        p = tl.exp(x - new_top[:, None])
        fade = tl.exp(top - new_top)
        top = new_top
        mass = mass * fade + tl.sum(p, 1)
        v = tl.load(values + place, mask=inside, other=0.0)
        attended = attended * fade[:, None]
        attended = tl.dot(p.to(v.dtype), v, attended, input_precision="ieee")
    result = attended / mass[:, None]
    target = ((b * S + s).to(tl.int64) * NQ + a)[:, None] * D + d[None, :]
    tl.store(output + target, result, mask=inside_pair)
