"""How far two backends are apart, and where they part: python runtime/compare.py BUNDLE."""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import DogeConfig, UnsupportedModelError
from runtime.backends import BACKENDS
from runtime.backends.base import BackendUnavailableError
from runtime.bundle import Bundle
from runtime.command import NEGATIVE, SUCCESS, CommandParser, UsageError, print_json, run_command
from runtime.comparison import (
    PUBLISHED,
    Run,
    RunReport,
    TapName,
    bundle_taps,
    check_comparable,
    check_subjects,
    compare_runs,
    is_recorded,
    load_run,
    print_report,
    random_prompts,
    recorded_run,
    recorded_subject,
    run_rung,
    run_tolerance,
    rung_of,
    save_run,
)
from runtime.comparison.inside import InsideReport, look_inside, print_inside
from runtime.comparison.page import write_page
from runtime.comparison.repro import Side, check_folder, side_of, write_repro
from runtime.options import need_tokenizer, one_kind, open_tokenizer, parse_ids
from runtime.scoring import split_windows

logger = logging.getLogger("runtime.compare")

ERRORS = (BackendUnavailableError, OSError, UnsupportedModelError, ValueError)
# The default prompts: seeded random ids.
PROMPTS, PROMPT_LENGTH, PROMPT_SEED = 4, 16, 0
STEPS, TEXT_TOKENS = 32, 2048
REFERENCE, CANDIDATE = "torch", "onnxruntime"


def make_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser("compare", "Compare two backends: how far apart, where, and why.")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle of the reference")
    parser.add_argument(
        "bundle2", type=Path, metavar="BUNDLE2", nargs="?", help="bundle of the candidate (same)"
    )
    choices = ", ".join((*BACKENDS, f"{PUBLISHED} (transformers' code)"))
    parser.add_argument(
        "--reference", metavar="BACKEND[:VARIANT]", help=f"one of {choices} ({REFERENCE})"
    )
    parser.add_argument("--candidate", metavar="BACKEND[:VARIANT]", help=f"likewise ({CANDIDATE})")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable")
    parser.add_argument("--prompt-ids", action="append", type=parse_ids, metavar="1,2,3")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="UTF-8, one prompt a line")
    parser.add_argument("--steps", type=int, help=f"decode steps after each prompt ({STEPS})")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8; compare perplexity and distributions"
    )
    parser.add_argument(
        "--text-tokens", type=int, metavar="N",
        help=f"of the text, from its beginning ({TEXT_TOKENS}); all their logits are held",
    )  # fmt: skip
    parser.add_argument(
        "--taps", metavar="all|NAME[,NAME...]",
        help="look inside as well: every named value, or layers.1.key, or key of every layer",
    )  # fmt: skip
    parser.add_argument(
        "--save", type=Path, metavar="RUN",
        help="write the reference's run with all its taps instead of comparing; with --load, the "
        "candidate's, and compare",
    )  # fmt: skip
    parser.add_argument(
        "--load", type=Path, metavar="RUN", action="append",
        help="a saved run, or recorded results of published code, as the reference; its prompts "
        "and tokens are fed to the candidate. Given twice, the second is the candidate",
    )  # fmt: skip
    parser.add_argument(
        "--inside", action="store_true",
        help="which keys every head keeps, how old they are, and how often each expert is used",
    )  # fmt: skip
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write the report as one self-contained page"
    )
    parser.add_argument(
        "--repro", type=Path, metavar="DIR",
        help="where the verdict is fail, write the smallest piece that still differs",
    )  # fmt: skip
    parser.add_argument("--atol", type=float, help="absolute tolerance (a table by precision)")
    parser.add_argument("--rtol", type=float, help="relative tolerance (likewise)")
    return parser


@dataclass(frozen=True)
class Task:
    """What to run and what to look at.

    Attributes:
        bundles: of the reference and of the candidate.
        taps: what to record, empty for logits alone.
        insist: whether those were asked for by name.
    """

    bundles: tuple[Bundle, Bundle]
    taps: tuple[TapName, ...]
    insist: bool

    @property
    def config(self) -> DogeConfig:
        """The architecture."""
        return self.bundles[0].config

    @classmethod
    def of(cls, args: argparse.Namespace) -> Task:
        """Open what the flags name."""
        bundle = Bundle.open(args.bundle)
        other = bundle if args.bundle2 is None else Bundle.open(args.bundle2)
        looks = args.save or args.load or args.inside or args.html or args.repro
        wanted = args.taps or ("all" if looks else None)
        taps = () if wanted is None else bundle_taps(bundle, wanted)
        return cls((bundle, other), taps, args.taps not in (None, "all"))


def run(args: argparse.Namespace) -> int:
    """Compare, print, and tell the verdict by the exit status."""
    _check_flags(args)
    if args.repro:
        check_folder(args.repro)
    task = Task.of(args)
    loaded = [_loaded(path, task) for path in args.load or ()]
    reference = side_of(loaded[0], None) if loaded else _reference(args, task)
    if args.save and not loaded:
        return _save(reference.run, args)
    if len(loaded) == 2:
        candidate = side_of(loaded[1], None)
    else:
        candidate = _candidate(args, task, reference.run)
    if args.save:
        save_run(candidate.run, args.save)
    check_comparable(reference.run, candidate.run)
    tolerance = run_tolerance(reference.run, candidate.run, args.atol, args.rtol)
    report = compare_runs(
        reference.run, candidate.run, task.config, atol=tolerance[0], rtol=tolerance[1]
    )
    runs = (reference.run, candidate.run)
    insides = [_inside(found, task) for found in runs] if args.inside else []
    document = _document(report, insides, reference.run, task, args)
    if args.html:
        write_page(args.html, document, report.differences)
    if args.json:
        print_json(document)
    else:
        print_report(report)
        for inside in insides:
            if inside is not None:
                print_inside(inside)
    if args.repro and report.verdict == "fail":
        written = write_repro(args.repro, report, reference, candidate, tolerance=tolerance)
        logger.info("%s", written.sentence)
    return SUCCESS if report.verdict == "pass" else NEGATIVE


def _check_flags(args: argparse.Namespace) -> None:
    one_kind(prompt=args.prompt, prompt_ids=args.prompt_ids, prompts=args.prompts)
    loads = args.load or []
    if len(loads) > 2:
        raise UsageError("--load is given at most twice: the reference, then the candidate")
    if args.text_tokens is not None and args.text is None:
        raise UsageError("--text-tokens belongs to --text")
    decided = ["prompt", "prompt_ids", "prompts", "steps", "text", "reference"] if loads else []
    if len(loads) == 2:
        decided += ["candidate", "save"]
    if args.save and not loads:
        decided += ["candidate", "html", "repro", "inside", "atol", "rtol"]
    # A tolerance of 0 was given, a switch that is off was not.
    there = [n for n in decided if getattr(args, n) is not None and getattr(args, n) is not False]
    given = [f"--{name.replace('_', '-')}" for name in there]
    if args.bundle2 is not None and (loads or args.save):
        given.append("BUNDLE2")
    if given:
        why = "--save without --load records the reference and compares nothing"
        if loads:
            why = f"--load {loads[0]} decides what is run and fed"
        raise UsageError(f"{why}; leave out {', '.join(given)}")
    for name in ("atol", "rtol"):
        value = getattr(args, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}")


def _reference(args: argparse.Namespace, task: Task) -> Side:
    bundle = task.bundles[0]
    rung = rung_of(bundle, args.reference or REFERENCE)
    if not args.save:  # before any long work
        check_subjects(rung.subject, rung_of(task.bundles[1], args.candidate or CANDIDATE).subject)
    steps = STEPS if args.steps is None else args.steps
    prompts = _prompts(args, bundle, steps)
    windows = _windows(args, bundle)
    found = run_rung(rung, task.taps, prompts, steps, windows=windows, insist=task.insist)
    return side_of(found, rung)


def _candidate(args: argparse.Namespace, task: Task, reference: Run) -> Side:
    rung = rung_of(task.bundles[1], args.candidate or CANDIDATE)
    check_subjects(reference.subject, rung.subject)
    there = tuple(tap for tap in task.taps if tap.name in reference.taps)
    found = run_rung(
        rung,
        task.taps if task.insist or there else (),
        [prompt.prompt for prompt in reference.prompts],
        reference.steps,
        tokens=[prompt.tokens for prompt in reference.prompts],
        windows=() if reference.text is None else reference.text.windows,
        insist=task.insist,
    )
    return side_of(found, rung)


def _loaded(path: Path, task: Task) -> Run:
    bundle = task.bundles[0]
    recorded = is_recorded(path)
    found = recorded_run(path, recorded_subject(bundle)) if recorded else load_run(path)
    check_subjects(found.subject, rung_of(bundle, _any_backend(bundle)).subject)
    lacking = [tap.name for tap in task.taps if tap.name not in found.taps]
    if task.insist and lacking:
        raise ValueError(f"the run {path} holds no {', '.join(lacking)}; save it with those")
    return found


def _any_backend(bundle: Bundle) -> str:
    variant = bundle.manifest.variants[0]
    return f"{variant.backend}:{variant.name}"


def _save(found: Run, args: argparse.Namespace) -> int:
    save_run(found, args.save)
    told: dict[str, Any] = {
        "run": str(args.save),
        "rung": found.subject.rung,
        "prompts": len(found.prompts),
        "steps": found.steps,
        "taps": list(found.taps),
        "missing_taps": list(found.missing),
    }
    if args.json:
        print_json(told)
    else:
        print(
            f"{args.save}: {found.subject.rung}, {len(found.prompts)} prompts, {found.steps} "
            f"steps, {len(found.taps)} taps; compare with --load {args.save}"
        )
    return SUCCESS


def _inside(found: Run, task: Task) -> InsideReport | None:
    """What a run shows of the inside, None where it has no taps."""
    if not found.taps:
        return None
    selects = found.subject.max_seq_len > task.config.keep_window_size
    return look_inside(found, task.config, selects=selects)


def _document(
    report: RunReport,
    insides: Sequence[InsideReport | None],
    reference: Run,
    task: Task,
    args: argparse.Namespace,
) -> dict[str, Any]:
    tokenizer = open_tokenizer(task.bundles[0])
    decode = None if tokenizer is None else tokenizer.decode
    found = report.as_dict(decode)
    loaded = len(args.load or ())
    found["rungs"]["reference"]["source"] = "loaded" if loaded else "here"
    found["rungs"]["candidate"]["source"] = "loaded" if loaded > 1 else "here"
    looked = [None if inside is None else inside.as_dict() for inside in insides]
    return found | {
        "inside": dict(zip(("reference", "candidate"), looked, strict=True)) if looked else None,
        "command": shlex.join(["compare.py", *args.command]),
        "prompts": [
            {
                "ids": list(prompt.prompt),
                "text": None if decode is None else decode(prompt.prompt),
            }
            for prompt in reference.prompts
        ],
    }


def _prompts(args: argparse.Namespace, bundle: Bundle, steps: int) -> list[list[int]]:
    if args.prompt_ids:
        return list(args.prompt_ids)
    texts = args.prompt
    if args.prompts is not None:
        texts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line]
        if not texts:
            raise ValueError(f"{args.prompts} holds no prompt; write one a line")
    if texts:
        tokenizer = need_tokenizer(open_tokenizer(bundle), "a text prompt")
        return [tokenizer.encode(text) for text in texts]
    length = max(1, min(PROMPT_LENGTH, bundle.limits.max_seq_len - steps))
    return random_prompts(bundle.config.vocab_size, PROMPTS, length, PROMPT_SEED)


def _windows(args: argparse.Namespace, bundle: Bundle) -> list[list[int]]:
    """The first tokens of the text in windows of the context; none without a text."""
    if args.text is None:
        return []
    tokenizer = need_tokenizer(open_tokenizer(bundle), "--text")
    count = TEXT_TOKENS if args.text_tokens is None else args.text_tokens
    if count < 2:
        raise ValueError(f"--text-tokens must be at least 2, got {count}")
    text = args.text.read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False)[:count]
    if not ids:
        raise ValueError(f"{args.text} holds no text; give a file with some words")
    limits = bundle.limits
    mixed = bundle.manifest.router_mode == "mixed"
    longest = limits.max_input_len if mixed else limits.max_seq_len
    return split_windows(ids, longest, tokenizer.bos_token_id)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    parser.set_defaults(command=arguments)
    return run_command(parser, run, arguments, ERRORS)


if __name__ == "__main__":
    sys.exit(main())
