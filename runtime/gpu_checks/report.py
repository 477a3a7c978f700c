"""The summary of an evidence file for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from runtime.gpu_checks.evidence import Evidence

_PIPED_WIDTH = 160
_ENGINE_NUMBERS = (
    "largest\ndifference",
    "step\nms",
    "token\nahead, ms",
    "same\ntokens",
    "first prompt\nms, again",
)
_STYLES = {"pass": "green", "fail": "bold red", "skipped": "dim"}


def print_evidence(evidence: Evidence) -> None:
    """Print a table for each section that has something to show, and what is wrong or left out."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    for name, report in evidence.sections.items():
        _PRINTERS.get(name, _print_section)(console, name, report)
        for problem in _problems(report):
            console.print(f"{name}: {problem}", markup=False, highlight=False)
        for line in report.get("left_out", []):
            console.print(f"{name}, left out: {line}", markup=False, highlight=False)
    verdicts = ", ".join(f"{name} {r['verdict']}" for name, r in evidence.sections.items())
    console.print(
        f"{evidence.verdict}: {verdicts}; {evidence.gpu}, {evidence.seconds:.0f} s",
        markup=False, highlight=False,
    )  # fmt: skip


def _print_section(console: Console, name: str, report: Mapping[str, Any]) -> None:
    """What is known of any section."""
    console.print(f"{name}: {report['verdict']}", markup=False, highlight=False)


def _print_bandwidth(console: Console, name: str, report: Mapping[str, Any]) -> None:
    if "gb_per_s" in report:
        line = (
            f"{name}: copies {_number(report['gb_per_s'], '.0f')} GB/s, fills "
            f"{_number(report['fill_gb_per_s'], '.0f')} GB/s, a graph's node "
            f"{_number(report['node_us'], '.2f')} µs"
        )
        console.print(line, markup=False, highlight=False)


def _print_kernels(console: Console, name: str, report: Mapping[str, Any]) -> None:
    if not report.get("cases"):
        return
    table = Table(title=name, title_justify="left", box=box.SIMPLE)
    for column in ("bundle", "op", "type", "case"):
        table.add_column(column, overflow="fold")
    for column in ("error", "limit", "warm\nµs", "cold\nµs", "cold\nGB/s", "of band-\nwidth"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for case in report["cases"]:
        timing = case["timing"] or {}
        warm, cold = (timing.get(kind) or {} for kind in ("warm", "cold"))
        table.add_row(
            _plain(case["bundle"]),
            case["op"],
            case["dtype"],
            _plain(case["case"]),
            _number(case.get("norm_error"), ".1e"),
            _number(case.get("norm_limit"), ".1e"),
            _number(warm.get("median_us"), ".1f"),
            _number(cold.get("median_us"), ".1f"),
            _number(cold.get("gb_per_s"), ".0f"),
            _number(cold.get("of_bandwidth"), ".0%"),
            _styled(case["verdict"]),
        )
    console.print(table)


def _print_engines(console: Console, name: str, report: Mapping[str, Any]) -> None:
    if not report.get("cases"):
        _print_section(console, name, report)
        return
    table = Table(title=name, title_justify="left", box=box.SIMPLE)
    for column in ("bundle", "engine", "against"):
        table.add_column(column, overflow="fold")
    for column in _ENGINE_NUMBERS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("said", overflow="fold")
    for case in report["cases"]:
        table.add_row(
            _plain(case["bundle"]),
            _plain(case["candidate"]),
            _plain(case["reference"]),
            *_engine_numbers(case),
            _styled(case["verdict"]),
            _plain((case["said"] or "").splitlines()[-1] if case["said"] else ""),
        )
    console.print(table)


def _engine_numbers(case: Mapping[str, Any]) -> tuple[str, ...]:
    """What `_ENGINE_NUMBERS` names; empty where it is not known."""
    rules = (case["chosen"] or {}).get("rules", [])
    equal = f"{sum(r['equal'] for r in rules)}/{sum(r['steps'] for r in rules)}" if rules else ""
    greedy: Mapping[str, Any] = next((r for r in rules if r["rule"] == "greedy"), {})
    starts = [_number(start["first_prompt_ms"], ".0f") or "-" for start in case["starts"] or []]
    return (
        _number((case["report"] or {}).get("logits", {}).get("max_abs"), ".3g"),
        _number((case["step_ms"] or {}).get("median"), ".3f"),
        _number(greedy.get("token_ms"), ".3f"),
        equal,
        ", ".join(starts),
    )


def _print_decode_speed(console: Console, name: str, report: Mapping[str, Any]) -> None:
    cases = report.get("cases", [])
    if not cases and not report.get("profiles"):
        _print_section(console, name, report)
        return
    table = Table(title=name, title_justify="left", box=box.SIMPLE)
    for column in ("bundle", "system"):
        table.add_column(column, overflow="fold")
    for column in ("batch", "prompt", "prompt\nms", "token\nms", "tokens/s", "of band-\nwidth"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("times torch", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for case in cases:
        ratios = [f"{other} {times:.1f}x" for other, times in case.get("times_torch", {}).items()]
        if "times_graph" in case:
            ratios.insert(0, f"recorded steps {case['times_graph']:.2f}x")
        said = (case.get("said") or "").splitlines()
        table.add_row(
            _plain(case["bundle"]),
            _plain(case["system"]),
            str(case["batch"]),
            _number(case.get("prompt_tokens"), "d"),
            _number(case.get("prompt_ms"), ".2f"),
            _number(case.get("step_ms"), ".3f"),
            _number(case.get("tokens_per_s"), ".0f"),
            _number(case.get("of_bandwidth"), ".0%"),
            _plain(said[-1] if said else ", ".join(ratios)),
            _styled(case["verdict"]),
        )
    if cases:
        console.print(table)
    for profile in report.get("profiles", []):
        about = f"{name}: {profile['bundle']}, {profile['system']}"
        if "parts" not in profile:
            text = f"{about}: {'; '.join(profile['problems'])}"
        else:
            parts = ", ".join(
                f"{p['part']} {p['us']:.1f} ({p['launches']})" for p in profile["parts"]
            )
            text = (
                f"{about}, slot {profile['position']}, µs (launches): {parts}; sum "
                f"{profile['sum_us']:.1f}, step {profile['step_us']:.1f}, token "
                f"{_number(profile['token_us'], '.1f') or 'not timed'}"
            )
        console.print(text, markup=False, highlight=False)


_PRINTERS: dict[str, Callable[[Console, str, Mapping[str, Any]], None]] = {
    "environment": lambda console, name, report: None,
    "bandwidth": _print_bandwidth,
    "kernels": _print_kernels,
    "engines": _print_engines,
    "decode_speed": _print_decode_speed,
}


def _problems(report: Mapping[str, Any]) -> list[str]:
    """What a section and its cases say is wrong."""
    found = [report["error"]] if "error" in report else []
    for case in report.get("cases", []):
        about = ", ".join(
            str(case[key]) for key in ("bundle", "op", "dtype", "case") if key in case
        )
        found += [f"{about}: {problem}" for problem in case.get("problems", [])]
    return found


def _styled(verdict: str) -> str:
    return f"[{_STYLES[verdict]}]{verdict}[/{_STYLES[verdict]}]"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
