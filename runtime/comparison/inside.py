"""A look inside a recorded run: which keys its heads keep, and which experts its routers use.

Both are derived from the recorded scores by the ops' rules (`runtime.comparison.choices`). A mask
score is computed once, when its token is cached, so what a query keeps depends on its slot alone,
whether it came with the prompt or in a decode step. Experts are picked pass by pass, because a
router of the mode `mixed` reads a whole pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.config import DogeConfig
from model.generations import GENERATIONS, generation_named
from runtime.comparison.choices import chosen_experts, kept_keys
from runtime.comparison.record import PromptRun, Run

# Queries whose choice is held at a time: [N, this, T] bool.
_BLOCK = 256
_QUARTERS = 4
Scores = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class HeadWindow:
    """What one score head keeps, over the queries that saw more than W keys.

    Numbers are None where there is no such query. Heads of queries that share a score keep the
    same keys, so they are one head here.

    Attributes:
        head: of the score.
        queries: how many were looked at.
        left_out: those that saw a score that is not finite, of which nothing is told.
        kept_share: mean share of a query's visible keys that it keeps.
        age_mean: of a kept key in tokens, the query's slot minus the key's; 0 is the query's own.
        age_median: the least age that half of the kept keys do not exceed.
        age_p95: likewise of 95 in 100.
        age_max: the oldest kept key's.
        age_quarters: share of kept keys in each quarter of what their query sees, newest first.
        recent_share: mean share of the W newest keys that were kept; 1 is a sliding window.
        never_kept_share: of the keys that such a query saw, the share that none of them kept.
    """

    head: int
    queries: int
    left_out: int
    kept_share: float | None
    age_mean: float | None
    age_median: int | None
    age_p95: int | None
    age_max: int | None
    age_quarters: tuple[float, ...] | None
    recent_share: float | None
    never_kept_share: float | None


@dataclass(frozen=True, kw_only=True)
class LayerWindow:
    """The heads of a layer."""

    layer: int
    heads: tuple[HeadWindow, ...]


@dataclass(frozen=True, kw_only=True)
class WindowUse:
    """What the window keeps. A query that sees at most W keys keeps them all and is left out."""

    keep_window_size: int
    layers: tuple[LayerWindow, ...]


@dataclass(frozen=True, kw_only=True)
class LayerExperts:
    """How often the experts of a layer are picked.

    Attributes:
        layer: which.
        heads: P, router heads, which share the experts; their picks are counted together.
        picks: tokens times P times K.
        left_out: tokens whose router scores are not all finite, of which nothing is counted.
        counts: [E] picks of each expert.
        dead: experts that nothing picked.
        dead_share: their share of E.
        expected_dead: how many nothing would have picked, on average, had every token and head
            picked K different experts at random: with few tokens most are.
        effective: exp of the entropy of use: so many experts, used alike, are as varied.
        top_share: the share of picks that went to the most used hundredth, at least one expert.
    """

    layer: int
    heads: int
    picks: int
    left_out: int
    counts: tuple[int, ...]
    dead: tuple[int, ...]
    dead_share: float
    expected_dead: float
    effective: float | None
    top_share: float | None


@dataclass(frozen=True, kw_only=True)
class ExpertUse:
    """The experts of all layers.

    Attributes:
        experts: E = n², those that a router can pick.
        unreachable: rows of the tables behind these, which nothing can pick.
        per_token: K of each head.
        layers: one each.
    """

    experts: int
    unreachable: int
    per_token: int
    layers: tuple[LayerExperts, ...]


@dataclass(frozen=True, kw_only=True)
class InsideReport:
    """What was seen in a run.

    Attributes:
        rung: whose run.
        queries: tokens of all prompts and decode steps.
        window: None where the model has no mask scores, or the window never drops a key.
        experts: None for a dense model.
    """

    rung: str
    queries: int
    window: WindowUse | None
    experts: ExpertUse | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def look_inside(run: Run, config: DogeConfig, *, selects: bool) -> InsideReport:
    """What the heads of a recorded run keep and its routers pick.

    Args:
        run: of a tapped rung; layers whose scores it has are looked at.
        config: its architecture, with its router mode.
        selects: whether a window can drop keys (the cache has more slots than the window).

    Raises:
        ValueError: a run without the scores that its model has.
    """
    generation = generation_named(run.subject.generation, GENERATIONS)
    score_heads = generation.num_score_heads(config)
    window = experts = None
    if selects and score_heads:
        layers = _layers_with(run, config, "score")
        window = WindowUse(
            keep_window_size=config.keep_window_size,
            layers=tuple(_layer_window(run, layer, config, score_heads) for layer in layers),
        )
    if config.num_keys and (config.is_moe or config.is_seed):
        layers = _layers_with(run, config, "router_scores")
        experts = ExpertUse(
            experts=config.num_keys**2,
            unreachable=max(config.num_experts, config.num_cdmmoe_experts) - config.num_keys**2,
            per_token=_per_token(config),
            layers=tuple(_layer_experts(run, layer, config) for layer in layers),
        )
    return InsideReport(
        rung=run.subject.rung,
        queries=sum(len(prompt.prompt) + run.steps for prompt in run.prompts),
        window=window,
        experts=experts,
    )


def _layers_with(run: Run, config: DogeConfig, kind: str) -> list[int]:
    """Layers of which every step recorded a value."""
    layers = [
        layer
        for layer in range(config.num_hidden_layers)
        if all(
            prompt.values and all(f"layers.{layer}.{kind}" in step for step in prompt.values)
            for prompt in run.prompts
        )
    ]
    if not layers:
        raise ValueError(
            f"the run of {run.subject.rung} holds no {kind} of any layer, from which choices are "
            f"derived; record it with --taps all or --taps {kind} on a backend that gives it"
        )
    return layers


class _HeadTally:
    """Counts over the choices of one head."""

    def __init__(self, longest: int) -> None:
        self.queries = self.left_out = self.seen_keys = self.never_kept = 0
        self.share = self.recent = 0.0
        self.ages: Counts = np.zeros(longest, np.int64)
        self.quarters: Counts = np.zeros(_QUARTERS, np.int64)

    def add(self, kept: npt.NDArray[np.bool_], first_slot: int, window: int) -> None:
        """Count the queries [S, T] of consecutive slots."""
        S, T = kept.shape
        slots = first_slot + np.arange(S)
        query, key = np.nonzero(kept)
        age = slots[query] - key
        visible = slots + 1
        self.queries += S
        self.share += float((kept.sum(1) / visible).sum())
        recent = (np.arange(T) > slots[:, None] - window) & (np.arange(T) <= slots[:, None])
        self.recent += float((kept & recent).sum() / window)
        self.ages += np.bincount(age, minlength=len(self.ages))
        self.quarters += np.bincount(_QUARTERS * age // visible[query], minlength=_QUARTERS)

    def result(self, head: int) -> HeadWindow:
        """The counts as shares and means."""
        total = int(self.ages.sum())
        if not total:
            nothing = dict.fromkeys(_NUMBERS)
            return HeadWindow(head=head, queries=0, left_out=self.left_out, **nothing)
        until = self.ages.cumsum()
        median, p95 = (int(np.searchsorted(until, -(-of * total // 100))) for of in (50, 95))
        return HeadWindow(
            head=head,
            queries=self.queries,
            left_out=self.left_out,
            kept_share=self.share / self.queries,
            age_mean=float((self.ages * np.arange(len(self.ages))).sum() / total),
            age_median=median,
            age_p95=p95,
            age_max=int(np.flatnonzero(self.ages)[-1]),
            age_quarters=tuple(float(count / total) for count in self.quarters),
            recent_share=self.recent / self.queries,
            never_kept_share=self.never_kept / self.seen_keys,
        )


_NUMBERS = (
    "kept_share",
    "age_mean",
    "age_median",
    "age_p95",
    "age_max",
    "age_quarters",
    "recent_share",
    "never_kept_share",
)


def _layer_window(run: Run, layer: int, config: DogeConfig, score_heads: int) -> LayerWindow:
    tallies: list[_HeadTally] = []
    for prompt in run.prompts:
        scores = _own_scores(prompt, layer, score_heads)  # [N, T]
        tallies = tallies or [_HeadTally(_longest(run)) for _ in range(score_heads)]
        for tally, score in zip(tallies, scores, strict=True):
            _count_head(tally, score, config.keep_window_size)
    heads = tuple(tally.result(head) for head, tally in enumerate(tallies))
    return LayerWindow(layer=layer, heads=heads)


def _longest(run: Run) -> int:
    return max(len(prompt.prompt) for prompt in run.prompts) + run.steps


def _own_scores(prompt: PromptRun, layer: int, heads: int) -> Scores:
    """[N, T] of a prompt and its decode steps; copies that a lowered model stores are dropped."""
    stored = np.concatenate([step[f"layers.{layer}.score"][..., 0] for step in prompt.values], 1)
    if len(stored) % heads:
        raise ValueError(
            f"layers.{layer}.score has {len(stored)} heads, expected {heads} or a multiple of them"
        )
    own: Scores = stored[:: len(stored) // heads]
    return own


def _count_head(tally: _HeadTally, score: Scores, window: int) -> None:
    T = len(score)
    # A query sees every slot before it, so one score that is no number spoils all queries behind.
    broken = np.flatnonzero(~np.isfinite(score))
    end = int(broken[0]) if broken.size else T
    tally.left_out += max(T, window) - max(end, window)
    if end <= window:
        return
    kept_once = np.zeros(end, bool)
    for first in range(window, end, _BLOCK):
        new = min(_BLOCK, end - first)
        kept = kept_keys(score[None, : first + new], first, new, window).chosen[0]
        tally.add(kept, first, window)
        kept_once[: first + new] |= kept.any(0)
    tally.seen_keys += end
    tally.never_kept += int((~kept_once).sum())


def _per_token(config: DogeConfig) -> int:
    return config.num_cdmmoe_experts_per_head if config.is_seed else config.num_experts_per_tok


def _layer_experts(run: Run, layer: int, config: DogeConfig) -> LayerExperts:
    E, K = config.num_keys**2, _per_token(config)
    heads = config.num_cdmmoe_heads if config.is_seed else 1
    counts = np.zeros(E, np.int64)
    left_out = 0
    for scores in _passes(run, layer):
        if not np.isfinite(scores).all():
            left_out += len(scores)  # `mixed` spreads a token's scores over others
            continue
        counts += chosen_experts(scores, config).chosen.sum((0, 1))
    picks = int(counts.sum())
    return LayerExperts(
        layer=layer,
        heads=heads,
        picks=picks,
        left_out=left_out,
        counts=tuple(counts.tolist()),
        dead=tuple(np.flatnonzero(counts == 0).tolist()),
        dead_share=float((counts == 0).mean()),
        expected_dead=float(E * (1 - K / E) ** (picks // K)),
        effective=_effective(counts),
        top_share=float(np.sort(counts)[-max(1, E // 100) :].sum() / picks) if picks else None,
    )


def _passes(run: Run, layer: int) -> Iterator[Scores]:
    """Router scores [S, 2·P·n] of each pass."""
    for prompt in run.prompts:
        for step in prompt.values:
            yield step[f"layers.{layer}.router_scores"]


def _effective(counts: Counts) -> float | None:
    used = counts[counts > 0]
    if not used.size:
        return None
    share = used / used.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def print_inside(report: InsideReport) -> None:
    """Print a line for each head and layer."""
    print(f"inside {report.rung}, {report.queries} tokens")
    if report.window is None:
        print("window              no key can be dropped")
    else:
        _print_window(report.window)
    if report.experts is None:
        print("experts             none, a dense model")
    else:
        _print_experts(report.experts)


def _print_window(window: WindowUse) -> None:
    print(f"keys kept by queries that see more than {window.keep_window_size}, ages in tokens:")
    print("layer head  queries   kept  age mean  median    p95    max  recent  never  by quarter")
    for layer in window.layers:
        for head in layer.heads:
            print(f"{layer.layer:5} {head.head:4}  {head.queries:7}  {_head_numbers(head)}")


def _head_numbers(head: HeadWindow) -> str:
    left = f"; {head.left_out} left out: scores that are not finite" if head.left_out else ""
    if head.age_quarters is None:
        return f"none that sees more{left}"
    quarters = " ".join(f"{share:.0%}" for share in head.age_quarters)
    return (
        f"{head.kept_share:5.1%}  {head.age_mean:8.1f}  {head.age_median:6}  {head.age_p95:5}  "
        f"{head.age_max:5}  {head.recent_share:6.1%}  {head.never_kept_share:5.1%}  "
        f"{quarters}{left}"
    )


def _print_experts(use: ExpertUse) -> None:
    behind = f", {use.unreachable} more out of reach" if use.unreachable else ""
    print(f"use of {use.experts} experts{behind}, {use.per_token} of them for a token and head:")
    print("layer heads    picks  never picked  (at random)  effective  top 1%")
    for layer in use.layers:
        left = f"  {layer.left_out} tokens left out: not finite" if layer.left_out else ""
        print(
            f"{layer.layer:5} {layer.heads:5}  {layer.picks:7}  {len(layer.dead):12}  "
            f"{layer.expected_dead:11.1f}  {_told(layer.effective, '.1f'):>9}  "
            f"{_told(layer.top_share, '.1%'):>6}{left}"
        )


def _told(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)
