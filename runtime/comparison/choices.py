"""The choices that scores decide, with their margins, in numpy and by the ops' own rules.

The rules are those of `plugins/dynamic_mask_attention/op.py` and `plugins/expert_gather/op.py`; a
test compares both with them. A margin is the score of the last one chosen minus that of the best
one that was not: how far the choice is from being another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # at run time numpy is all: a piece to send to someone holds this file
    from model.config import DogeConfig

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Choice:
    """What was chosen for each of some questions (heads, tokens), in two comparable forms.

    Attributes:
        chosen: [Q, S, candidates] bool, for each head and token.
        margin: [Q, S] float64, infinite where everything was chosen.
        scale: [Q, S] float64, size of the largest score that took part.
    """

    chosen: npt.NDArray[np.bool_]
    margin: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]


def kept_keys(score: Floats, first_slot: int, new: int, keep_window_size: int) -> Choice:
    """The keys that each of `new` queries keeps.

    Args:
        score: [N, T] of every cached key, the step's own included.
        first_slot: slot of the first query; query s sees slots up to first_slot + s.
        new: S.
        keep_window_size: W ≥ 1.

    Returns:
        [N, S, T]: larger score first, equal scores lower slot first.
    """
    N, T = score.shape
    chosen = np.zeros((N, new, T), bool)
    margin = np.full((N, new), np.inf)
    scale = np.zeros((N, new))
    order = np.argsort(-score, axis=-1, kind="stable")  # [N, T]
    for s in range(new):
        seen = first_slot + s + 1
        scale[:, s] = np.abs(score[:, :seen]).max(-1)
        if seen <= keep_window_size:
            chosen[:, s, :seen] = True
            continue
        visible = order[order < seen].reshape(N, seen)
        np.put_along_axis(chosen[:, s], visible[:, :keep_window_size], True, -1)
        edge = visible[:, keep_window_size - 1 : keep_window_size + 1]
        pair = np.take_along_axis(score, edge, -1).astype(np.float64)
        margin[:, s] = pair[:, 0] - pair[:, 1]
    return Choice(chosen, margin, scale)


def chosen_experts(router_scores: Floats, config: DogeConfig) -> Choice:
    """The experts that each token picks.

    Args:
        router_scores: [S, 2·P·n], one whole pass of one row.
        config: the architecture, with its router mode.

    Returns:
        [P, S, n²]: K of the n² sums of an axis each, equal sums in the order of pairs.
    """
    scores_x, scores_y, top_k = _axes(router_scores, config)  # [S, P, n]
    S, P, n = scores_x.shape
    sums, experts = _best_pairs(scores_x, scores_y, min(top_k + 1, n))
    order = np.argsort(-sums, axis=-1, kind="stable")
    # Of a grid cut to K per axis, as the op cuts it, the K best are the same.
    picked = np.take_along_axis(experts, order[..., :top_k], -1)  # [S, P, K]
    chosen = np.zeros((S, P, n * n), bool)
    np.put_along_axis(chosen, picked, True, -1)
    margin = np.full((S, P), np.inf)
    if top_k < n * n:
        edge = np.take_along_axis(sums, order[..., top_k - 1 : top_k + 1], -1).astype(np.float64)
        margin = edge[..., 0] - edge[..., 1]
    scale = np.abs(scores_x).max(-1) + np.abs(scores_y).max(-1)
    return Choice(chosen.swapaxes(0, 1), margin.T, scale.T.astype(np.float64))


def _axes(router_scores: Floats, config: DogeConfig) -> tuple[Floats, Floats, int]:
    """How a generation cuts router scores into the two axes of the grid."""
    S, n = len(router_scores), config.num_keys
    if config.is_seed:
        cut = router_scores.reshape(S, 2, config.num_cdmmoe_heads, n)
        return cut[:, 0], cut[:, 1], config.num_cdmmoe_experts_per_head
    if config.router_mode == "mixed":
        cut = router_scores.reshape(2, S, 1, n).swapaxes(0, 1)
    else:
        cut = router_scores.reshape(S, 2, 1, n)
    return cut[:, 0], cut[:, 1], config.num_experts_per_tok


def _best_pairs(scores_x: Floats, scores_y: Floats, per_axis: int) -> tuple[Floats, Any]:
    n = scores_x.shape[-1]
    index_x = np.argsort(-scores_x, axis=-1, kind="stable")[..., :per_axis]
    index_y = np.argsort(-scores_y, axis=-1, kind="stable")[..., :per_axis]
    best_x = np.take_along_axis(scores_x, index_x, -1)
    best_y = np.take_along_axis(scores_y, index_y, -1)
    sums = (best_x[..., :, None] + best_y[..., None, :]).reshape(*scores_x.shape[:-1], -1)
    experts = (index_x[..., :, None] * n + index_y[..., None, :]).reshape(sums.shape)
    return sums, experts
