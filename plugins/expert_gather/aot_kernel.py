"""Entry functions of the expert gather for engines that hold their own PTX.

TensorRT passes such a kernel the plugin's inputs, then int32 sizes, then its outputs: what the
router needs as scratch memory is one more output, and what it picks goes through the graph.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from plugins.expert_gather.kernel import gather_experts, route_experts


@triton.jit
def route_experts_aot(
    scores_x,
    scores_y,
    heads,
    experts,
    weights,
    scratch,
    NUM_KEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    PER_AXIS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KEYS_BLOCK: tl.constexpr,
    PAIRS_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """`route_experts`; programs: `heads`, which is T·P.

    scores_x, scores_y [T, P, n]. Written: experts int32 and weights float32 [T, P, K]; scratch
    float32 [T, P, 4·min(K, n) + number of candidate pairs], arbitrary afterwards.
    """
    best_keys = scratch + heads.to(tl.int64) * (2 * PER_AXIS)
    pair_sums = best_keys + heads.to(tl.int64) * (2 * PER_AXIS)
    route_experts(
        scores_x,
        scores_y,
        scratch,
        best_keys.to(tl.pointer_type(tl.int32), bitcast=True),
        pair_sums,
        experts,
        weights,
        NUM_KEYS,
        TOP_K,
        PER_AXIS,
        NORMALIZE,
        KEYS_BLOCK,
        PAIRS_BLOCK,
        STEP,
    )


@triton.jit
def gather_experts_aot(
    hidden,
    down,
    up,
    experts,
    weights,
    tokens,
    expert_output,
    HIDDEN: tl.constexpr,
    PICKS: tl.constexpr,
    WEIGHT_INSIDE: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
    PICKS_BLOCK: tl.constexpr,
):
    """`gather_experts` with one program for each of the T tokens.

    hidden [T, H]; down, up [E, H]; experts and weights of `route_experts_aot`. Written:
    expert_output [T, H].
    """
    if tl.program_id(0) < tokens:
        gather_experts(
            hidden,
            down,
            up,
            experts,
            weights,
            weights,  # in place of partial sums and arrivals, which a single split has not
            experts,
            expert_output,
            HIDDEN,
            PICKS,
            1,
            PICKS,
            WEIGHT_INSIDE,
            HIDDEN_BLOCK,
            PICKS_BLOCK,
        )
