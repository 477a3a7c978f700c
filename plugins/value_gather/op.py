"""Value gather: rows of a small table picked by scores, for the values of the seed generation.

For one token with scores s[r, a] of N rows in each of R independent heads:

    rank(r, a)     how many a' beat a:  s[r, a'] > s[r, a],  or equal and a' < a
    picks(r)       the K rows a with rank(r, a) < K
    out            Σ_r Σ_{a ∈ picks(r)} table_a

A row picked by two heads counts twice; the scores themselves have no other effect. With
`subset_sums` the table holds Σ_{a ∈ set} of every set of K rows instead, in lexicographic order of
the sets, so that a head looks up one row.

Source: the inner function of Doge's first generation, where the order of equal scores is left to
the device; here the lower row wins (docs/reference.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from plugins.autograd import runs_definition
from plugins.value_gather.subsets import value_subsets


def pick_values(scores: Tensor, top_k: int) -> Tensor:
    """The K best rows of each token and head.

    Args:
        scores: [T, R, N].
        top_k: K, at most N.

    Returns:
        [T, R, K] int64 row numbers in ascending order; of equal scores the lower row is picked.
    """
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    return order[..., :top_k].sort(dim=-1).values


def value_gather_definition(scores: Tensor, table: Tensor, top_k: int, subset_sums: bool) -> Tensor:
    """The op itself, in eager PyTorch.

    Args:
        scores: [T, R, N] of each row in each head.
        table: [N, H] rows; with `subset_sums` [C(N, K), H], see `value_subsets`.
        top_k: K rows per token and head.
        subset_sums: whether the table holds the sums of every set of K rows.

    Returns:
        [T, H] in the table's dtype.
    """
    picks = pick_values(scores, top_k)
    if subset_sums:
        subsets = value_subsets(scores.shape[-1], top_k)
        subset_of = torch.zeros(2 ** scores.shape[-1], dtype=torch.int64, device=scores.device)
        for number, subset in enumerate(subsets):
            subset_of[sum(2**row for row in subset)] = number
        picks = subset_of[(2**picks).sum(-1, keepdim=True)]  # [T, R, 1]
    return table[picks].sum(dim=(1, 2))


@torch.library.custom_op("doge::value_gather", mutates_args=())
def _value_gather(scores: Tensor, table: Tensor, top_k: int, subset_sums: bool) -> Tensor:
    return value_gather_definition(scores, table, top_k, subset_sums)


@_value_gather.register_fake
def _(scores: Tensor, table: Tensor, top_k: int, subset_sums: bool) -> Tensor:
    return table.new_empty(scores.shape[0], table.shape[1])


def value_gather(scores: Tensor, table: Tensor, *, top_k: int, subset_sums: bool = False) -> Tensor:
    """Apply the op: one node when exported, differentiable where a gradient is asked for.

    Arguments and result as in `value_gather_definition`; the scores have no gradient.
    """
    if runs_definition(table):
        return value_gather_definition(scores, table, top_k, subset_sums)
    result: Tensor = _value_gather(scores, table, top_k, subset_sums)
    return result
