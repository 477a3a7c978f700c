"""Entry function of the value gather for engines that hold their own PTX.

TensorRT passes such a kernel the plugin's inputs, then int32 sizes, then its outputs.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from plugins.value_gather.kernel import gather_values


@triton.jit
def gather_values_aot(
    scores,
    table,
    tokens,
    inner_values,
    NUM_HEADS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    TOP_K: tl.constexpr,
    SUBSET_SUMS: tl.constexpr,
    HIDDEN: tl.constexpr,
    NUM_HEADS_BLOCK: tl.constexpr,
    NUM_ROWS_BLOCK: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
):
    """`gather_values`; programs along x are the T tokens, y are parts of H.

    scores [T, R, N]; table [N, H], with SUBSET_SUMS [C(N, K), H]. Written: inner_values [T, H].
    """
    if tl.program_id(0) < tokens:
        gather_values(
            scores,
            table,
            inner_values,
            NUM_HEADS,
            NUM_ROWS,
            TOP_K,
            SUBSET_SUMS,
            HIDDEN,
            NUM_HEADS_BLOCK,
            NUM_ROWS_BLOCK,
            HIDDEN_BLOCK,
        )
