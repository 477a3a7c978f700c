"""The report of two runs: verdict, first divergence, each tap's worst, text; as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from model.config import DogeConfig
from runtime.comparison.free_running import Decode, FreeRunning, compare_free_running
from runtime.comparison.logits import ComparisonReport, logits_report
from runtime.comparison.metrics import json_number
from runtime.comparison.record import Run, Subject
from runtime.comparison.text import TextComparison, compare_text
from runtime.comparison.tolerances import PERPLEXITY_BOUNDS, TOLERANCES, coarser
from runtime.comparison.verdict import TapDifference, differences, growth


@dataclass(frozen=True, kw_only=True)
class TapSummary:
    """A tap over all prompts and steps.

    Attributes:
        worst: where it is furthest apart; of choices, where most unlike a near tie.
        compared: how often it was compared.
        parting: how often it was over tolerance or another choice.
        near_ties: how many of those were choices that rounding explains.
        following: how many of those only followed from such a choice.
    """

    worst: TapDifference
    compared: int
    parting: int
    near_ties: int
    following: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return self.worst.as_dict() | {
            "compared": self.compared,
            "parting": self.parting,
            "near_ties": self.near_ties,
            "following": self.following,
        }


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Two runs compared.

    Attributes:
        reference: what was right by definition.
        candidate: what was in question.
        logits: of the untapped runs.
        differences: every tap at every step, in the order (step, tap, prompt).
        taps: one summary each, in the order in which they are computed.
        missing: taps that were wanted and not compared, with the rungs that lack them.
        first: the first tap that parts, None where none does.
        unexplained: the first that parts without a near tie being the cause, None where none does.
        growth: relative error of the residual stream behind each layer, at that step.
        tapping_changed: by how much taps alone moved each rung's logits.
        free_running: what each rung generates by itself, empty where that is not known.
        text: both rungs on a text, None where there was none.
        verdict: `fail` where a number is over tolerance or not finite, or a choice differs, and no
            near tie is the cause; where untapped logits are over tolerance, whatever the cause;
            where a text is.
        reason: the verdict in a sentence.
    """

    reference: Subject
    candidate: Subject
    logits: ComparisonReport
    differences: tuple[TapDifference, ...]
    taps: tuple[TapSummary, ...]
    missing: dict[str, tuple[str, ...]]
    first: TapDifference | None
    unexplained: TapDifference | None
    growth: tuple[float | None, ...]
    tapping_changed: tuple[float | None, float | None]
    free_running: tuple[FreeRunning, ...]
    text: TextComparison | None
    verdict: Literal["pass", "fail"]
    reason: str

    def as_dict(self, decode: Decode | None = None) -> dict[str, Any]:
        """The JSON form of the command's contract, with what runs add to it (docs/compare.md).

        Args:
            decode: turns tokens into text, where there is a tokenizer.
        """
        found = self.logits.as_dict()
        token = found["first_divergence"]
        first = None if self.first is None else self.first.as_dict()
        sides = ("reference", "candidate")
        changed = [None if v is None else json_number(v) for v in self.tapping_changed]
        rungs = [
            {
                "rung": subject.rung,
                "precision": subject.precision,
                "tapped": moved is not None,
                "versions": dict(subject.versions),
                "machine": dict(subject.machine),
                "weights_sha256": subject.weights_sha256,
                "generation": subject.generation,
                "max_input_len": subject.max_input_len,
                "max_seq_len": subject.max_seq_len,
                "router_mode": subject.router_mode,
            }
            for subject, moved in zip(
                (self.reference, self.candidate), self.tapping_changed, strict=True
            )
        ]
        return found | {
            "taps": [tap.as_dict() for tap in self.taps],
            "missing_taps": {name: list(rungs) for name, rungs in self.missing.items()},
            "first_divergence": first if self.taps else token,
            "first_unexplained": (None if self.unexplained is None else self.unexplained.as_dict()),
            "growth": list(self.growth),
            "first_token": token,
            "tapping_changed": dict(zip(sides, changed, strict=True)),
            "rungs": dict(zip(sides, rungs, strict=True)),
            "free_running": [found.as_dict(decode) for found in self.free_running],
            "text": None if self.text is None else self.text.as_dict(),
            "verdict": self.verdict,
            "reason": self.reason,
        }


def run_tolerance(
    reference: Run, candidate: Run, atol: float | None, rtol: float | None
) -> tuple[float, float]:
    """Tolerance of logits, (atol, rtol): what is given, else by the coarser precision of the two.

    Raises:
        ValueError: a precision that no tolerance is known for.
    """
    if atol is not None and rtol is not None:
        return atol, rtol
    names = {run.subject.precision for run in (reference, candidate)}
    if unknown := sorted(names - TOLERANCES.keys()):
        raise ValueError(
            f"no tolerance is known for {', '.join(unknown)}; name one by --atol and --rtol"
        )
    usual = max(TOLERANCES[name] for name in names)
    return usual[0] if atol is None else atol, usual[1] if rtol is None else rtol


def compare_runs(
    reference: Run, candidate: Run, config: DogeConfig, *, atol: float, rtol: float
) -> RunReport:
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
    over = [d for d in found if d.parts and not d.explained]
    text = None
    if reference.text is not None and candidate.text is not None:
        text = compare_text(
            reference.text,
            candidate.text,
            atol=atol,
            rtol=rtol,
            perplexity_bound=PERPLEXITY_BOUNDS.get(precision),
        )
    passes = not over and logits.verdict == "pass" and (text is None or text.passes)
    missing = {
        name: tuple(run.subject.rung for run in (reference, candidate) if name in run.missing)
        for name in dict.fromkeys((*reference.missing, *candidate.missing))
    }
    return RunReport(
        reference=reference.subject,
        candidate=candidate.subject,
        logits=logits,
        differences=tuple(found),
        taps=_summaries(found),
        missing=missing,
        first=first,
        unexplained=over[0] if over else None,
        growth=errors,
        tapping_changed=(reference.tapping_changed, candidate.tapping_changed),
        free_running=compare_free_running(reference, candidate),
        text=text,
        verdict="pass" if passes else "fail",
        reason=_reason(first, over, logits, text, tapped=bool(found)),
    )


def _reason(
    first: TapDifference | None,
    over: Sequence[TapDifference],
    logits: ComparisonReport,
    text: TextComparison | None,
    *,
    tapped: bool,
) -> str:
    told = logits.reason if text is None else f"{logits.reason}; {text.sentence()}"
    if not tapped:
        return told
    if first is None:
        return f"no tap is over its tolerance; logits: {told}"
    if not over:
        return (
            f"only near ties part and what follows from them, first {first.sentence()}; logits: "
            f"{told}"
        )
    parted = f"first {first.sentence()}"
    if first.explained:
        parted += f"; first that no near tie explains: {over[0].sentence()}"
    more = f"; {len(over)} comparisons are over tolerance in all" if len(over) > 1 else ""
    return f"{parted}{more}; logits: {told}"


def _summaries(found: Sequence[TapDifference]) -> tuple[TapSummary, ...]:
    groups: dict[str, list[TapDifference]] = {}
    for difference in found:
        groups.setdefault(difference.tap, []).append(difference)
    return tuple(
        TapSummary(
            worst=max(group, key=lambda d: (d.parts and not d.explained, d.of_tolerance)),
            compared=len(group),
            parting=sum(d.parts for d in group),
            near_ties=sum(d.parts and d.near_tie for d in group),
            following=sum(d.follows for d in group),
        )
        for group in groups.values()
    )
