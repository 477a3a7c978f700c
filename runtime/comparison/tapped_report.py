"""The report of two tapped runs: verdict, first divergence, each tap's worst; JSON or table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from model.config import DogeConfig
from runtime.comparison.logits import ComparisonReport, logits_report
from runtime.comparison.metrics import json_number
from runtime.comparison.record import Run
from runtime.comparison.tolerances import coarser
from runtime.comparison.verdict import TapDifference, differences, growth


@dataclass(frozen=True, kw_only=True)
class TapSummary:
    """A tap over all prompts and steps.

    Attributes:
        worst: where it is furthest apart; of choices, where most unlike a near tie.
        compared: how often it was compared.
        parting: how often it was over tolerance or another choice.
        near_ties: how many of those were choices that rounding explains.
    """

    worst: TapDifference
    compared: int
    parting: int
    near_ties: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return self.worst.as_dict() | {
            "compared": self.compared,
            "parting": self.parting,
            "near_ties": self.near_ties,
        }


@dataclass(frozen=True, kw_only=True)
class TappedReport:
    """Two runs compared.

    Attributes:
        logits: of the untapped runs.
        taps: one summary each, in the order in which they are computed.
        missing: taps that were wanted and not compared, with the rungs that lack them.
        first: the first tap that parts, None where none does.
        growth: relative error of the residual stream behind each layer, at that step.
        tapping_changed: by how much taps alone moved each rung's logits.
        verdict: `fail` where a number is over tolerance or not finite, or a choice differs that is
            no near tie.
        reason: the verdict in a sentence.
    """

    logits: ComparisonReport
    taps: tuple[TapSummary, ...]
    missing: dict[str, tuple[str, ...]]
    first: TapDifference | None
    growth: tuple[float | None, ...]
    tapping_changed: tuple[float | None, float | None]
    verdict: Literal["pass", "fail"]
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """The JSON form of the command's contract, with what taps add to it."""
        found = self.logits.as_dict()
        token = found["first_divergence"]
        changed = [None if v is None else json_number(v) for v in self.tapping_changed]
        return found | {
            "taps": [tap.as_dict() for tap in self.taps],
            "missing_taps": {name: list(rungs) for name, rungs in self.missing.items()},
            "first_divergence": None if self.first is None else self.first.as_dict(),
            "growth": list(self.growth),
            "first_token": token,
            "tapping_changed": dict(zip(("reference", "candidate"), changed, strict=True)),
            "verdict": self.verdict,
            "reason": self.reason,
        }


def compare_runs(
    reference: Run, candidate: Run, config: DogeConfig, *, atol: float, rtol: float
) -> TappedReport:
    """Compare two runs over the same prompts, tokens and steps.

    Args:
        reference: the run that is right by definition.
        candidate: the run in question.
        config: the architecture of both.
        atol: absolute tolerance of the untapped logits.
        rtol: their tolerance relative to the row's largest logit of the reference.
    """
    subjects = reference.subject, candidate.subject
    precision = coarser((subjects[0].precision, subjects[1].precision))
    rows = [np.concatenate([p.logits for p in run.prompts]) for run in (reference, candidate)]
    names = [subject.rung for subject in subjects]
    logits = logits_report(rows[0], rows[1], names, reference.steps, atol, rtol)
    found = list(differences(reference, candidate, config, precision))
    first = next((d for d in found if d.parts), None)
    by_place = {(d.prompt, d.step, d.tap): d for d in found}
    errors = () if first is None else tuple(growth(by_place, first.prompt, first.step))
    over = [d for d in found if d.parts and not d.near_tie]
    passes = not over and logits.verdict == "pass"
    missing = {
        name: tuple(run.subject.rung for run in (reference, candidate) if name in run.missing)
        for name in dict.fromkeys((*reference.missing, *candidate.missing))
    }
    return TappedReport(
        logits=logits,
        taps=_summaries(found),
        missing=missing,
        first=first,
        growth=errors,
        tapping_changed=(reference.tapping_changed, candidate.tapping_changed),
        verdict="pass" if passes else "fail",
        reason=_reason(first, logits, len(over), passes=passes),
    )


def _reason(
    first: TapDifference | None, logits: ComparisonReport, over: int, *, passes: bool
) -> str:
    if first is None:
        return f"no tap is over its tolerance; logits: {logits.reason}"
    if passes:
        return f"only near ties part, first {first.sentence()}; logits: {logits.reason}"
    follows = f"; {over} comparisons are over tolerance in all" if over > 1 else ""
    return f"first {first.sentence()}{follows}; logits: {logits.reason}"


def _summaries(found: Sequence[TapDifference]) -> tuple[TapSummary, ...]:
    groups: dict[str, list[TapDifference]] = {}
    for difference in found:
        groups.setdefault(difference.tap, []).append(difference)
    return tuple(
        TapSummary(
            worst=max(group, key=lambda d: d.of_tolerance),
            compared=len(group),
            parting=sum(d.parts for d in group),
            near_ties=sum(d.parts and d.near_tie for d in group),
        )
        for group in groups.values()
    )


def print_tapped(report: TappedReport) -> None:
    """Print each tap's worst, what is missing, and the verdict."""
    width = max((len(tap.worst.tap) for tap in report.taps), default=3)
    print(f"{'tap':{width}}  {'error':>9}  {'relative':>9}  {'of limit':>9}  {'at':>8}  parting")
    for tap in report.taps:
        worst = tap.worst
        ties = f" ({tap.near_ties} near ties)" if tap.near_ties else ""
        print(
            f"{worst.tap:{width}}  {worst.error:9.3g}  {worst.relative:9.3g}  "
            f"{worst.of_tolerance:9.3g}  {worst.prompt:>3}:{worst.step:<4}  "
            f"{tap.parting}/{tap.compared}{ties}"
        )
    for name, rungs in report.missing.items():
        print(f"not compared: {name}, which {' and '.join(rungs)} does not give")
    if report.growth:
        grown = ", ".join("none" if e is None else f"{e:.2g}" for e in report.growth)
        print(f"relative error behind each layer at that step: {grown}")
    rungs = (report.logits.reference, report.logits.candidate)
    for name, changed in zip(rungs, report.tapping_changed, strict=True):
        told = "was not tapped" if changed is None else f"moved its logits by {changed:.3g}"
        print(f"tapping {name}: {told}" if changed is not None else f"{name} {told}")
    print(f"{report.verdict}: {report.reason}")
