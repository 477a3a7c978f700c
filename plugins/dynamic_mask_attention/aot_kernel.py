"""Entry functions of dynamic mask attention for engines that hold their own PTX.

TensorRT passes such a kernel the plugin's inputs, then int32 sizes, then its outputs: no scratch
memory, no counters, no floats. Programs that share the keys of a query therefore leave their
shares in outputs of one plugin, and a second plugin joins them.

A share of a query head is `values`, Σ p·v, and `masses`, its largest logit and Σ p; p is
exp(logit - largest). A share without keys has the mass 0.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from plugins.dynamic_mask_attention.kernel import attend_keys, attend_prompt

# Below every logit but -inf, and finite: differences of two of them are numbers.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def attend_shares_aot(
    query,
    key,
    value,
    score,
    write_index,
    tokens,
    slots,
    splits,
    values,
    masses,
    SCALE: tl.constexpr,
    NQ: tl.constexpr,
    NKV: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARE_STEP: tl.constexpr,
    ONE_SCORE_ROW: tl.constexpr,
):
    """One share of the keys of one key/value head and query; its query heads read them together.

    query [B, Nq, S, D]; key, value [B, Nkv, C, D]; score [B or 1, N, C, 1]; write_index [B].
    tokens: S. slots: C. Written: values [splits, B, S, Nq, D] and masses [splits, B, S, Nq, 2],
    float32. Programs: B·S, Nkv, splits.
    """
    GROUP: tl.constexpr = NQ // NKV
    row = tl.program_id(0)
    g = tl.program_id(1)
    split = tl.program_id(2)
    b = row // tokens
    s = row % tokens
    visible = tl.minimum(tl.load(write_index + b).to(tl.int32) + s + 1, slots)
    share = tl.cdiv(tl.cdiv(visible, splits), SHARE_STEP) * SHARE_STEP
    begin = split * share
    end = tl.minimum(begin + share, visible)

    d = tl.arange(0, BLOCK_D)
    head_start = (b * NKV + g).to(tl.int64) * slots * D
    scores = score
    if not ONE_SCORE_ROW:
        scores += b.to(tl.int64) * N * slots
    queries = ()
    for h in tl.static_range(GROUP):
        q_row = query + ((b * NQ + g * GROUP + h).to(tl.int64) * tokens + s) * D
        queries += (tl.load(q_row + d, mask=d < D, other=0.0).to(tl.float32) * SCALE,)

    tops, sums_of_p, sums_of_v = attend_keys(
        queries, key + head_start, value + head_start, scores, begin, end, g, slots, (), (),
        NQ, NKV, N, D, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip

    share_row = split.to(tl.int64) * tl.num_programs(0) + row
    for h in tl.static_range(GROUP):
        entry = share_row * NQ + g * GROUP + h
        top = tl.max(tops[h], 0)
        weight = tl.exp(tops[h] - top)
        tl.store(masses + 2 * entry, top)
        tl.store(masses + 2 * entry + 1, tl.sum(sums_of_p[h] * weight, 0))
        tl.store(values + entry * D + d, tl.sum(sums_of_v[h] * weight[:, None], 0), mask=d < D)


@triton.jit
def attend_prompt_aot(
    query,
    key,
    value,
    score,
    write_index,
    tokens,
    slots,
    splits,
    values,
    masses,
    SCALE: tl.constexpr,
    NQ: tl.constexpr,
    NKV: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_SCORE_ROW: tl.constexpr,
):
    """`attend_prompt`, whose finished result is one share of mass 1; the others are empty.

    The values of empty shares are not written. Tensors as in `attend_shares_aot`, programs as in
    `attend_prompt`.
    """
    attend_prompt(
        query,
        key,
        value,
        score,
        write_index,
        write_index,  # in place of a threshold and a limit, which are not read
        write_index,
        values,
        tokens,
        slots,
        slots.to(tl.int64) * (0 if ONE_SCORE_ROW else N),
        SCALE,
        NQ,
        NKV,
        N,
        D,
        BLOCK_D,
        HEADS,
        BLOCK_M,
        BLOCK_N,
        False,
    )
    pair = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    s = pair // HEADS
    a = tl.program_id(1) * HEADS + pair % HEADS
    rows = tl.num_programs(2) * tokens
    entry = (tl.program_id(2) * tokens + s) * NQ + a
    for split in range(splits):
        mass = masses + 2 * (split * rows * NQ + entry)
        tl.store(mass, tl.where(split == 0, 0.0, _LOWEST), mask=s < tokens)
        tl.store(mass + 1, tl.where(split == 0, 1.0, 0.0), mask=s < tokens)


@triton.jit
def join_shares_aot(
    query,
    values,
    masses,
    splits,
    attention_output,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Attention of one query head from its shares; `query` only says the output's type.

    values and masses as `attend_shares_aot` leaves them. Written: attention_output [B, S, Nq·D].
    Programs: B·S·Nq.
    """
    entry = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    split = tl.arange(0, MAX_SPLITS)
    there = split < splits
    share = split.to(tl.int64) * tl.num_programs(0) + entry
    top = tl.load(masses + 2 * share, mask=there, other=_LOWEST)
    mass = tl.load(masses + 2 * share + 1, mask=there, other=0.0)
    inside = there[:, None] & (d < D)[None, :]
    value = tl.load(values + share[:, None] * D + d[None, :], mask=inside, other=0.0)
    value = tl.where((mass > 0.0)[:, None], value, 0.0)  # what is not written may be NaN
    weight = tl.exp(top - tl.max(top, 0))
    result = tl.sum(weight[:, None] * value, 0) / tl.sum(weight * mass, 0)
    result = result.to(attention_output.dtype.element_ty)
    tl.store(attention_output + entry.to(tl.int64) * D + d, result, mask=d < D)
