"""Expert gather: a mixture of rank-1 experts picked by product keys.

Expert e = i·n + j has the score x_i + y_j of a point in an n × n grid. For one token u and each of
P independent expert heads:

    per axis       the min(K, n) largest x_i and y_j, larger first, equal ones lower index first
    picks          the K largest sums x_i + y_j among those pairs, equal sums in the order of pairs
    w              softmax over the K picked sums
    a_e            SiLU(u · down_e) · w_e          (G1: SiLU(u · down_e · w_e), `weight_inside`)
    out            Σ over heads and picks of a_e · up_e

No pair outside the per-axis best can win: K pairs at least as large would stand before it.

Source: Doge's cross-domain mixture of experts in transformers (`DogeCDMoE`), product keys after
Lample et al. 2019 and He 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plugins.autograd import runs_definition


def pick_experts(scores_x: Tensor, scores_y: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K best grid points of each token and head.

    Args:
        scores_x: [T, P, n] scores of the grid's rows.
        scores_y: [T, P, n] scores of the grid's columns.
        top_k: K, at most n².

    Returns:
        [T, P, K] sums in descending order, and [T, P, K] int64 expert numbers i·n + j.
    """
    n = scores_x.shape[-1]
    per_axis = min(top_k, n)
    best_x, index_x = _largest(scores_x, per_axis)  # [T, P, min(K, n)]
    best_y, index_y = _largest(scores_y, per_axis)
    sums = (best_x[..., :, None] + best_y[..., None, :]).flatten(-2)
    experts = (index_x[..., :, None] * n + index_y[..., None, :]).flatten(-2)
    picked, position = _largest(sums, top_k)
    return picked, experts.gather(-1, position)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` with a fixed order: larger first, equal values lower index first."""
    ordered, index = torch.sort(values, dim=-1, descending=True, stable=True)
    return ordered[..., :count], index[..., :count]


def expert_gather_definition(
    hidden: Tensor,
    scores_x: Tensor,
    scores_y: Tensor,
    down: Tensor,
    up: Tensor,
    top_k: int,
    weight_inside: bool,
    normalize: bool,
) -> Tensor:
    """The op itself, in eager PyTorch.

    Args:
        hidden: [T, H] tokens.
        scores_x: [T, P, n] router scores of the grid's rows.
        scores_y: [T, P, n] router scores of the grid's columns.
        down: [E, H] one row per expert, E ≥ n².
        up: [E, H] one row per expert.
        top_k: K experts per token and head.
        weight_inside: multiply by the weight before the activation instead of after.
        normalize: divide the weights by their sum, which is 1 up to rounding.

    Returns:
        [T, H] in hidden's dtype.
    """
    sums, experts = pick_experts(scores_x, scores_y, top_k)
    weights = torch.softmax(sums, dim=-1)  # [T, P, K]
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    product = torch.einsum("th,tpkh->tpk", hidden, down[experts])
    if weight_inside:
        activation = torch.nn.functional.silu(product * weights)
    else:
        activation = torch.nn.functional.silu(product) * weights
    return torch.einsum("tpk,tpkh->th", activation, up[experts])


@torch.library.custom_op("doge::expert_gather", mutates_args=())
def _expert_gather(
    hidden: Tensor,
    scores_x: Tensor,
    scores_y: Tensor,
    down: Tensor,
    up: Tensor,
    top_k: int,
    weight_inside: bool,
    normalize: bool,
) -> Tensor:
    return expert_gather_definition(
        hidden, scores_x, scores_y, down, up, top_k, weight_inside, normalize
    )


@_expert_gather.register_fake
def _(
    hidden: Tensor,
    scores_x: Tensor,
    scores_y: Tensor,
    down: Tensor,
    up: Tensor,
    top_k: int,
    weight_inside: bool,
    normalize: bool,
) -> Tensor:
    return torch.empty_like(hidden)


def expert_gather(
    hidden: Tensor,
    scores_x: Tensor,
    scores_y: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    top_k: int,
    weight_inside: bool = False,
    normalize: bool = False,
) -> Tensor:
    """Apply the op: one node when exported, differentiable where a gradient is asked for.

    Arguments and result as in `expert_gather_definition`.
    """
    arguments = (hidden, scores_x, scores_y, down, up, top_k, weight_inside, normalize)
    if runs_definition(hidden, scores_x, scores_y, down, up):
        return expert_gather_definition(*arguments)
    result: Tensor = _expert_gather(*arguments)
    return result
