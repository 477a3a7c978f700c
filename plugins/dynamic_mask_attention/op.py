"""Dynamic mask attention: attention whose mask is a number cached with every key.

For batch row b, query head a in score group n, and the query in slot i = write_index[b] + s:

    visible(i, j)  =  j ≤ i                                 j a cache slot, 0 ≤ j < C
    rank(i, j)     =  how many visible j' beat j:  score[j'] > score[j],  or equal and j' < j
    kept(i, j)     =  visible(i, j)  and  (W = 0  or  rank(i, j) < W)
    bias(i, j)     =  score[b, n, j] if kept(i, j), else the most negative finite number
    out[b, a, i]   =  Σ_j softmax_j( scale · q[b, a, i]·k[b, g, j] + bias(i, j) ) v[b, g, j]

Query head a reads key/value head g = a div (Nq/Nkv) and score head n = a div (Nq/N): N is Nkv
where the generation scores per key/value head (G4), Nq where it scores per query head, 1 where
no key has a score.

Source: Doge in transformers (`DogeAttention.prepare_dynamic_mask`), where the order of equal
scores is left to the device; here the lower slot wins (docs/reference.md). The op neither writes
the cache nor computes scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plugins.autograd import runs_definition


def keep_largest_scores(score: Tensor, visible: Tensor, keep_window_size: int) -> Tensor:
    """Which visible keys are among the `keep_window_size` best of each query.

    Args:
        score: [B, N, C] scores of the cached keys.
        visible: [B, 1, S, C] bool, the keys each query may see.
        keep_window_size: W ≥ 1.

    Returns:
        [B, N, S, C] bool; larger score first, equal scores lower slot first.
    """
    order = torch.argsort(score, dim=-1, descending=True, stable=True)  # [B, N, C]
    order = order[:, :, None, :].expand(-1, -1, visible.shape[2], -1)  # [B, N, S, C]
    visible_in_order = visible.expand(-1, score.shape[1], -1, -1).gather(-1, order)
    kept_in_order = visible_in_order & (visible_in_order.cumsum(-1) <= keep_window_size)
    return torch.zeros_like(kept_in_order).scatter_(-1, order, kept_in_order)


def dynamic_mask_attention_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor,
    write_index: Tensor,
    scale: float,
    keep_window_size: int,
) -> Tensor:
    """The op itself, in eager PyTorch; softmax runs in float32.

    Args:
        query: [B, Nq, S, D] new queries, already rotated.
        key: [B, Nkv, C, D] cache with the new keys written.
        value: [B, Nkv, C, D] cache with the new values written.
        score: [B or 1, N, C, 1] cache with the new scores written, N dividing Nq; with 1 the rows
            of the batch share them (a mask that is stored rather than computed).
        write_index: [B] int64, the slot of each row's first new token.
        scale: factor on q·k.
        keep_window_size: W; 0 never selects.

    Returns:
        [B, S, Nq·D] in query's dtype.
    """
    B, Nq, S, D = query.shape
    Nkv, C = key.shape[1], key.shape[2]
    score = score.expand(B, -1, -1, -1)
    N = score.shape[1]
    query_slot = write_index[:, None] + torch.arange(S, device=query.device)  # [B, S]
    key_slot = torch.arange(C, device=query.device)  # [C]
    visible = (key_slot <= query_slot[:, :, None])[:, None]  # [B, 1, S, C]
    kept = visible.expand(-1, N, -1, -1)
    if keep_window_size > 0:
        kept = keep_largest_scores(score[..., 0].detach(), visible, keep_window_size)
    hidden = torch.finfo(score.dtype).min
    bias = torch.where(kept, score.transpose(2, 3), hidden)  # [B, N, S, C]
    bias = bias.repeat_interleave(Nq // N, dim=1)  # [B, Nq, S, C]
    key = key.repeat_interleave(Nq // Nkv, dim=1)
    value = value.repeat_interleave(Nq // Nkv, dim=1)
    logits = query @ key.transpose(2, 3) * scale + bias
    weights = torch.softmax(logits.float(), dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).reshape(B, S, Nq * D)


@torch.library.custom_op("doge::dynamic_mask_attention", mutates_args=())
def _dynamic_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor,
    write_index: Tensor,
    scale: float,
    keep_window_size: int,
) -> Tensor:
    return dynamic_mask_attention_definition(
        query, key, value, score, write_index, scale, keep_window_size
    )


@_dynamic_mask_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor,
    write_index: Tensor,
    scale: float,
    keep_window_size: int,
) -> Tensor:
    B, Nq, S, D = query.shape
    return query.new_empty(B, S, Nq * D)


def dynamic_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor,
    write_index: Tensor,
    *,
    scale: float,
    keep_window_size: int,
) -> Tensor:
    """Apply the op: one node when exported, differentiable where a gradient is asked for.

    Arguments and result as in `dynamic_mask_attention_definition`, which autograd differentiates
    directly; the selection itself has no gradient.
    """
    arguments = (query, key, value, score, write_index, scale, keep_window_size)
    if runs_definition(query, key, value, score):
        return dynamic_mask_attention_definition(*arguments)
    attended: Tensor = _dynamic_mask_attention(*arguments)
    return attended
