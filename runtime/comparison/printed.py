"""The report of two runs as lines on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.comparison.free_running import FreeRunning
from runtime.comparison.logits import ComparisonReport
from runtime.comparison.run_report import RunReport
from runtime.comparison.text import TextComparison


def print_report(report: RunReport) -> None:
    """Print logits, text, free generation, each tap's worst, what is missing, and the verdict."""
    _print_logits(report.logits)
    if report.text is not None:
        _print_text(report.text)
    if report.free_running:
        _print_free_running(report.free_running)
    if report.taps:
        _print_taps(report)
    print(f"{report.verdict}: {report.reason}")


def _print_logits(report: ComparisonReport) -> None:
    print(f"{report.candidate} against {report.reference}, {report.positions} positions")
    print(f"largest difference  {report.max_abs:.3g}")
    print(f"mean difference     {report.mean_abs:.3g}")
    print(f"KL divergence       {report.kl_max:.3g} at most, {report.kl_mean:.3g} on average, nats")
    print(f"same greedy token   {report.top1_agreement:.2%}")
    if report.first_divergence is not None:
        where = report.first_divergence
        print(
            f"first other token   prompt {where.prompt}, step {where.step}: "
            f"{where.reference_token} (margin {where.reference_margin:.3g}) became "
            f"{where.candidate_token} (margin {where.candidate_margin:.3g})"
        )


def _print_text(text: TextComparison) -> None:
    found = text.as_dict()
    perplexities = [found[side]["perplexity"] for side in ("reference", "candidate")]
    told = " became ".join("none" if p is None else f"{p:.6g}" for p in perplexities)
    print(f"perplexity          {told}, over {text.tokens} tokens of text")
    print(
        f"of the text         KL {text.kl_mean:.3g} on average, likeliest token the same "
        f"{text.top1_agreement:.2%}, among the five likeliest {text.top5_agreement:.2%}"
    )


def _print_free_running(found: Sequence[FreeRunning]) -> None:
    equal = sum(prompt.equal for prompt in found)
    total = sum(len(prompt.reference_tokens) for prompt in found)
    print(f"generated alone     {equal} of {total} tokens before the first that differs")


def _print_taps(report: RunReport) -> None:
    width = max(len(tap.worst.tap) for tap in report.taps)
    print(f"{'tap':{width}}  {'error':>9}  {'relative':>9}  {'of limit':>9}  {'at':>8}  parting")
    for tap in report.taps:
        worst = tap.worst
        ties = f" ({tap.near_ties} near ties)" if tap.near_ties else ""
        if tap.following:
            ties += f" ({tap.following} follow from near ties)"
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
    names = (report.logits.reference, report.logits.candidate)
    for name, changed in zip(names, report.tapping_changed, strict=True):
        told = "was not tapped" if changed is None else f"moved its logits by {changed:.3g}"
        print(f"tapping {name}: {told}" if changed is not None else f"{name} {told}")
