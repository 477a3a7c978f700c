"""Exact rewrites of a network without computed scores into an equal one with less work.

They are for the export and mostly for the seed generation (G1); in G2 the mask that hides nothing
becomes one zero bias.

Each applies where the actual weights allow it, and what was done is said. The reference backend
computes the checkpoint as published, so the check after an export compares the two forms.

    stored mask     with no zero among the keys in use it hides nothing: one zero bias for all
                    heads; otherwise its zeros become a bias per head
    inner values    with value keys that are all zero every score is a tie and the lowest rows are
                    picked always: their sum is a constant factor per channel
    value subsets   otherwise: sums of every set of rows a head can pick, one row to look up
    merged routers  queries and keys of a retrieval are two projections in a row: their product

`docs/reference.md` gives the reasons and the names of the tests.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import TypeVar

import torch
from torch import Tensor, nn

from model.doge import DogeAttention, DogeForCausalLM
from model.layers import linear
from model.seed import InnerFunctionAttention, SeedMoE
from plugins.value_gather.subsets import value_subsets

Part = TypeVar("Part")

# Beyond this a table of sums is larger than what it saves.
MAX_SUBSETS = 64
# The op looks a set up by a number with one bit per row.
MAX_TABLED_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Rewrite:
    """One rewrite and where it stands.

    Attributes:
        name: short name, e.g. `stored mask`.
        applied: whether it was applied.
        reason: the condition that was found, in words.
    """

    name: str
    applied: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {'applied' if self.applied else 'not applied'}, {self.reason}"


def rewrite_for_export(
    network: DogeForCausalLM, slots: int
) -> tuple[DogeForCausalLM, list[Rewrite]]:
    """An equal network with less work, and what was done.

    Args:
        network: a network as its checkpoint stores it; left as it is. A generation with computed
            scores comes back unchanged.
        slots: C, the cache slots that the result will be used with.

    Returns:
        A network that shares the tensors which are the same, and one entry per rewrite.

    Raises:
        ValueError: more slots than the stored mask covers.
    """
    if network.generation.score_heads is not None:
        return network, []
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    rewritten = copy.deepcopy(network, memo=dict(shared))
    for module in rewritten.modules():
        if isinstance(module, DogeAttention):
            module.mask_bias = module.no_bias(slots)
    attentions = [m for m in rewritten.modules() if isinstance(m, InnerFunctionAttention)]
    moes = [m for m in rewritten.modules() if isinstance(m, SeedMoE)]
    if not attentions:
        return rewritten, []
    with torch.no_grad():
        done = [
            _bake_masks(attentions, slots),
            *_fix_inner_values(attentions),
            _merge_routers(moes),
        ]
    return rewritten.requires_grad_(False).eval(), done


def _bake_masks(attentions: list[InnerFunctionAttention], slots: int) -> Rewrite:
    """All layers alike: a model has one body per op, and the number of biases is part of it."""
    biases = [attention.bias_of_mask(slots) for attention in attentions]
    zeros = sum(int((bias != 0).sum()) for bias in biases)
    for attention, bias in zip(attentions, biases, strict=True):
        attention.dynamic_mask = None
        attention.mask_bias = bias if zeros else torch.zeros(1, 1, slots, 1)
    total = sum(bias.numel() for bias in biases)
    if zeros:
        reason = f"{zeros} of its {total} entries in use hide a key; kept as a bias per head"
    else:
        reason = f"none of its {total} entries in use is zero, so it hides nothing"
    return Rewrite(name="stored mask dropped (R14)", applied=not zeros, reason=reason)


def _fix_inner_values(attentions: list[InnerFunctionAttention]) -> Iterator[Rewrite]:
    keys = [_required(attention.v_keys) for attention in attentions]
    untouched = sum(not key.any() for key in keys)
    folded = untouched == len(keys)
    if folded:
        for attention in attentions:
            _fix_constant(attention)
    yield Rewrite(
        name="inner values made a constant (R11)",
        applied=folded,
        reason=f"value keys are all zero in {untouched} of {len(keys)} layers",
    )
    if folded:
        return
    values, picked = keys[0].shape[-1], attentions[0].values_per_head
    tabled = values <= MAX_TABLED_ROWS and comb(values, picked) <= MAX_SUBSETS
    for attention in attentions:
        if tabled:
            _table_subsets(attention)
        _merge_value_gate(attention)
    yield Rewrite(
        name="value subsets tabled (R10)",
        applied=tabled,
        reason=f"{comb(values, picked)} sets of {picked} of {values} rows, at most {MAX_SUBSETS} "
        f"of {MAX_TABLED_ROWS}",
    )


def _fix_constant(attention: InnerFunctionAttention) -> None:
    """Retrieval gives the same sum for every token; it stays a factor of its own.

    It could go into the columns of o_proj, but TensorRT-RTX 1.7.1 then fails ("uses before defs"):
    the cache would be written with a bare view of the norm's output.
    """
    rows = _required(attention.v_embed).weight[: attention.values_per_head]
    attention.value_scale = nn.Parameter(attention.value_heads * rows.sum(0))  # [H]
    attention.v_embed = attention.v_queries = attention.v_keys = None


def _table_subsets(attention: InnerFunctionAttention) -> None:
    embed = _required(attention.v_embed)
    subsets = value_subsets(embed.num_embeddings, attention.values_per_head)
    table = torch.stack([embed.weight[list(rows)].sum(0) for rows in subsets])
    attention.value_sums = nn.Embedding(len(table), table.shape[1], _weight=table)
    attention.v_embed = None


def _merge_value_gate(attention: InnerFunctionAttention) -> None:
    keys = _required(attention.v_keys)  # [R, r, N]
    queries = _required(attention.v_queries).weight.view(*keys.shape[:2], -1)  # [R, r, H]
    attention.value_gate = _projection((keys.transpose(1, 2) @ queries).flatten(0, 1))
    attention.v_queries = attention.v_keys = None


def _merge_routers(moes: list[SeedMoE]) -> Rewrite:
    keys = _required(moes[0].keys)  # [P, n, 2, r/2]
    heads, n, _, half = keys.shape
    hidden = moes[0].up_proj.in_features
    merged, apart = 2 * heads * n * hidden, 2 * heads * half * (hidden + n)
    applied = merged <= apart
    if applied:
        for moe in moes:
            _merge_router(moe)
    return Rewrite(
        name="expert queries and keys merged (R13)",
        applied=applied,
        reason=f"{merged} multiplications a token and layer merged, {apart} apart",
    )


def _merge_router(moe: SeedMoE) -> None:
    keys = _required(moe.keys)
    heads, n, planes, half = keys.shape
    queries = _required(moe.queries).weight.view(planes, heads, half, -1)
    merged = keys.permute(2, 0, 1, 3) @ queries  # [2, P, n, H]
    moe.router_gate = _projection(merged.reshape(planes * heads * n, -1))
    moe.queries = moe.keys = None


def _projection(weight: Tensor) -> nn.Linear:
    layer = linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight)
    return layer


def _required(part: Part | None) -> Part:
    if part is None:
        raise AssertionError("rewrites start from the form that the checkpoint stores")
    return part
