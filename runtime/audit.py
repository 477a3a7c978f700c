"""What is right about a model before anyone trusts it: python runtime/audit.py --model DIR."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from model.config import DogeConfig, UnsupportedModelError
from model.generations import Generation
from model.hub import CheckpointDownloadError, resolve_model
from runtime.backends.base import BackendUnavailableError
from runtime.command import NEGATIVE, SUCCESS, CommandParser, print_json, run_command
from runtime.findings import Finding, Result
from runtime.invariants import (
    ROUTER_QUIRK,
    audit_subject,
    different_tokens,
    ours_against_transformers,
    router_modes,
)
from runtime.scoring import score_windows, split_windows
from runtime.subject import BackendSubject, Subject
from runtime.tokenizer import Tokenizer

ERRORS = (
    BackendUnavailableError,
    CheckpointDownloadError,
    OSError,
    UnsupportedModelError,
    ValueError,
)
# Modules that need torch. They are imported when the command runs: reading its --help, and every
# other module of `runtime/`, works without.
_CHECKPOINT = "model.checkpoint"
_TORCH_BACKEND = "runtime.backends.torch_backend"
_TRANSFORMERS = "model.transformers_reference"
# By what factor one router mode must do better on a text for that to tell anything.
_TELLING = 1.05
_SEED_QUIRK = "docs/reference.md, What training leaves untouched in the seed"
# Columns of the table where stdout is no terminal.
_PIPED_WIDTH = 150
_STYLES = {"pass": "green", "fail": "bold red", "expected": "yellow", "skipped": "dim"}

logger = logging.getLogger("runtime.audit")


def make_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        "audit",
        "Check a checkpoint for future leaks, a cache that departs, rows that mix, state that is "
        "kept; ours and, where it loads the checkpoint, transformers'.",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR|ORG/NAME", help="checkpoint folder or hub id"
    )
    parser.add_argument(
        "--router",
        choices=("mixed", "per_token"),
        help="how experts are routed (config.json's doge_router_mode, else mixed)",
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text that both router modes are scored on"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Audit, print, and tell the verdict by the exit status."""
    folder = resolve_model(args.model, quiet=args.quiet).folder
    text = None if args.text is None else args.text.read_text(encoding="utf-8")
    generation, findings = audit(folder, args.router, text)
    verdict = "fail" if any(finding.result == "fail" for finding in findings) else "pass"
    if args.json:
        rows = [finding.as_dict() for finding in findings]
        print_json({"generation": generation, "findings": rows, "verdict": verdict})
    else:
        _print(generation, findings, verdict)
    return SUCCESS if verdict == "pass" else NEGATIVE


def audit(folder: Path, router_mode: str | None, text: str | None) -> tuple[str, list[Finding]]:
    """Every finding about the checkpoint in `folder`.

    Args:
        folder: config.json and safetensors.
        router_mode: overrides the config's router mode.
        text: scored under both router modes; None where none was given.

    Returns:
        The generation's name and the findings.

    Raises:
        BackendUnavailableError: torch is not installed.
        FileNotFoundError: no such checkpoint.
        UnsupportedModelError: not one that this project runs.
        ValueError: the model is too small to audit, or `text` has nothing to score.
    """
    checkpoint = _import(_CHECKPOINT)
    config, generation, header = checkpoint.inspect_checkpoint(folder, router_mode)
    findings: list[Finding] = []
    ours = _open_ours(folder, "ours", config.router_mode, config, generation)
    subjects: dict[str, BackendSubject] = {config.router_mode: ours}
    if config.is_moe:
        for mode in ("mixed", "per_token"):
            if mode not in subjects:
                subjects[mode] = _open_ours(folder, f"ours, {mode}", mode, config, generation)
    if ours.keep_window_size is not None and ours.keep_window_size < ours.context:
        findings.append(different_tokens(ours))
    findings += _audited(ours)
    if config.is_moe and config.router_mode == "mixed":
        # The same network without the router's mixing: what is expected above hides nothing else.
        findings += _audited(subjects["per_token"])
    findings += _transformers_findings(folder, config, generation, subjects.get("mixed", ours))
    if generation.inner_function:
        findings += _seed_findings(header)
    if config.is_moe:
        apart = router_modes(subjects["mixed"], subjects["per_token"])
        findings.append(dataclasses.replace(apart, subject=ours.name))
        findings += _perplexities(subjects, config.router_mode, folder, text)
    elif text is not None:
        findings.append(
            _without_perplexity("--text tells router modes apart, and there is no router")
        )
    for subject in subjects.values():
        subject.backend.close()
    return generation.name, findings


def _audited(subject: Subject) -> list[Finding]:
    logger.info("checking %s", subject.name)
    return audit_subject(subject)


def _open_ours(
    folder: Path, name: str, router_mode: str, config: DogeConfig, generation: Generation
) -> BackendSubject:
    backend = _import(_TORCH_BACKEND).TorchBackend.from_checkpoint(folder, router_mode=router_mode)
    # A generation without scores has nothing to select by.
    window = None if generation.score_heads is None else config.keep_window_size
    return BackendSubject(name, backend, window)


def _transformers_findings(
    folder: Path, config: DogeConfig, generation: Generation, ours: Subject
) -> Iterator[Finding]:
    """The published code on the same checkpoint, or why it does not run."""
    if generation.name != "g4":
        reason = (
            f"transformers' doge is generation g4; it does not compute {generation.name}, whose "
            "published code is compared in tests/data/golden/"
        )
        yield _without_transformers("transformers", reason)
        return
    module = _import(_TRANSFORMERS)
    for attention in module.ATTENTIONS:
        try:
            theirs = module.TransformersReference.open(folder, attention, config)
        except module.TransformersUnavailableError as error:
            yield _without_transformers(f"transformers, {attention}", str(error))
            continue
        yield ours_against_transformers(ours, theirs)
        yield from _audited(theirs)


def _without_transformers(subject: str, reason: str) -> Finding:
    return _skipped(subject, "ours_against_transformers", reason)


def _skipped(subject: str, check: str, reason: str) -> Finding:
    return Finding(
        subject=subject, check=check, result="skipped", value=None, limit=None, meaning=reason
    )


def _seed_findings(header: Any) -> Iterator[Finding]:
    """Whether two parts of the seed generation do anything; `header` is the checkpoint's."""
    result: Result
    zeros, _ = _count_zeros(header, ".attn.dynamic_mask")
    if zeros:
        result, meaning = "pass", f"{zeros} entries are zero and hide their keys from a head"
    else:
        result = "expected"
        meaning = (
            f"no entry is zero, so it hides no key and is left out of the export; {_SEED_QUIRK}"
        )
    yield _seed_finding("dynamic_mask_inert", result, zeros, meaning)
    zeros, entries = _count_zeros(header, ".attn.v_keys")
    used = entries - zeros
    if used:
        result = "pass"
        meaning = f"{used} of {entries} entries are not zero: values are retrieved by score"
    else:
        result = "expected"
        meaning = (
            "all are zero, so every token retrieves the same rows, those of the lower indices; "
            f"{_SEED_QUIRK}"
        )
    yield _seed_finding("value_keys_inert", result, used, meaning)


def _seed_finding(check: str, result: Result, count: int, meaning: str) -> Finding:
    return Finding(
        subject="ours",
        check=check,
        result=result,
        value=float(count),
        limit=None,
        meaning=meaning,
    )


def _count_zeros(header: Any, suffix: str) -> tuple[int, int]:
    """Entries that are exactly zero, and all entries, of the tensors whose names end so."""
    from safetensors import safe_open

    zeros = entries = 0
    for name, file in header.location.items():
        if name.endswith(suffix):
            # As torch tensors: numpy has no bfloat16.
            with safe_open(file, framework="pt", device="cpu") as tensors:
                tensor = tensors.get_tensor(name)
            zeros += int((tensor == 0).sum())
            entries += tensor.numel()
    return zeros, entries


def _perplexities(
    subjects: dict[str, BackendSubject], router_mode: str, folder: Path, text: str | None
) -> list[Finding]:
    """The perplexity of a text under both router modes: the lower is what the model learned."""
    if text is None or not (folder / "tokenizer.json").is_file():
        meaning = "give --text FILE, a text like those the model was trained on"
        if text is not None:
            meaning = "the checkpoint has no tokenizer.json, so --text cannot be read"
        unknown = "which router mode the model was trained for is not known"
        return [_without_perplexity(f"{unknown}; {meaning}")]
    tokenizer = Tokenizer.open(folder)
    ids = tokenizer.encode(text, add_special_tokens=False)
    found: dict[str, float] = {}
    for mode, subject in subjects.items():
        logger.info("scoring the text with the router mode %s", mode)
        windows = split_windows(ids, subject.context, tokenizer.bos_token_id)
        found[mode] = score_windows(subject.backend, windows).perplexity
    return [
        Finding(
            subject=f"ours, {mode}",
            check="router_perplexity",
            result=result,
            value=found[mode] if math.isfinite(found[mode]) else None,
            limit=None,
            meaning=meaning,
        )
        for mode, result, meaning in _judged_modes(found, router_mode, subjects["mixed"].vocab_size)
    ]


def _without_perplexity(reason: str) -> Finding:
    return _skipped("ours", "router_perplexity", reason)


def _judged_modes(
    found: dict[str, float], router_mode: str, vocab_size: int
) -> Iterator[tuple[str, Result, str]]:
    """What the perplexities of the two router modes say about each."""
    best, worse = sorted(("mixed", "per_token"), key=lambda mode: found[mode])
    guessing = not found[best] < vocab_size  # also where it is no number
    if guessing or found[worse] < _TELLING * found[best]:
        why = "the two are close to each other"
        if guessing:
            why = f"neither is better than a guess among {vocab_size} tokens"
        meaning = f"tells nothing: {why}; take a text like those the model was trained on"
        for mode in ("mixed", "per_token"):
            yield mode, "skipped", meaning
        return
    yield best, "pass", "the lower perplexity by far: the model was trained this way"
    use = f"use --router {best}; " if worse == router_mode else ""
    meaning = f"{use}higher than with `{best}`, so not what it was trained for: {ROUTER_QUIRK}"
    yield worse, "expected", meaning


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in {"torch", "safetensors"}:
            raise
        raise BackendUnavailableError(
            f"the audit runs our PyTorch network and {error.name} is not installed; pip install "
            "'.[torch]', and '.[export]' to compare with transformers"
        ) from error


def _print(generation: str, findings: Sequence[Finding], verdict: str) -> None:
    table = Table(title=f"generation {generation}", title_justify="left", box=box.SIMPLE)
    for column in ("subject", "check", "result"):
        table.add_column(column, no_wrap=True)
    for column in ("value", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("meaning", overflow="fold")
    for finding in findings:
        style = _STYLES[finding.result]
        table.add_row(
            finding.subject,
            finding.check,
            f"[{style}]{finding.result}[/{style}]",
            _number(finding.value),
            _number(finding.limit),
            finding.meaning.replace("[", r"\["),
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    console.print(table)
    count = {result: sum(f.result == result for f in findings) for result in _STYLES}
    print(f"{verdict}: " + ", ".join(f"{number} {result}" for result, number in count.items()))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(make_parser(), run, argv, ERRORS)


if __name__ == "__main__":
    sys.exit(main())
