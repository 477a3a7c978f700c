"""How far two backends are apart: python runtime/compare.py BUNDLE [BUNDLE2]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.config import UnsupportedModelError
from runtime.backends import BACKENDS, open_backend
from runtime.backends.base import BackendUnavailableError
from runtime.bundle import Bundle
from runtime.command import NEGATIVE, SUCCESS, CommandParser, print_json, run_command
from runtime.comparison import (
    ComparisonReport,
    TappedReport,
    bundle_taps,
    check_same_checkpoint,
    compare_backends,
    compare_runs,
    print_tapped,
    random_prompts,
    run_rung,
    variant_tolerance,
)
from runtime.manifest import Variant
from runtime.options import need_tokenizer, one_kind, open_tokenizer, parse_ids, split_backend

ERRORS = (BackendUnavailableError, OSError, UnsupportedModelError, ValueError)
# The default prompts: seeded random ids.
PROMPTS, PROMPT_LENGTH, PROMPT_SEED = 4, 16, 0


def make_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser("compare", "Compare the logits of two backends, step by step.")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle of the reference")
    parser.add_argument(
        "bundle2", type=Path, metavar="BUNDLE2", nargs="?", help="bundle of the candidate (same)"
    )
    choices = ", ".join(BACKENDS)
    parser.add_argument(
        "--reference", default="torch", metavar="BACKEND[:VARIANT]", help=f"one of {choices}"
    )
    parser.add_argument(
        "--candidate", default="onnxruntime", metavar="BACKEND[:VARIANT]", help="likewise"
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable")
    parser.add_argument("--prompt-ids", action="append", type=parse_ids, metavar="1,2,3")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="UTF-8, one prompt a line")
    parser.add_argument("--steps", type=int, default=32, help="decode steps after each prompt")
    parser.add_argument(
        "--taps", metavar="all|NAME[,NAME...]",
        help="look inside as well: every named value, or layers.1.key, or key of every layer",
    )  # fmt: skip
    parser.add_argument("--atol", type=float, help="absolute tolerance (a table by precision)")
    parser.add_argument("--rtol", type=float, help="relative tolerance (likewise)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compare, print, and tell the verdict by the exit status."""
    one_kind(prompt=args.prompt, prompt_ids=args.prompt_ids, prompts=args.prompts)
    bundle = Bundle.open(args.bundle)
    other = bundle if args.bundle2 is None else Bundle.open(args.bundle2)
    names = [split_backend(args.reference), split_backend(args.candidate)]
    variants = [b.variant(*name) for b, name in zip((bundle, other), names, strict=True)]
    atol, rtol = args.atol, args.rtol
    if atol is None or rtol is None:
        usual = max(map(variant_tolerance, variants))
        atol, rtol = (b if a is None else a for a, b in zip((atol, rtol), usual, strict=True))
    prompts = list(_prompts(args, bundle))
    if args.taps is not None:
        tapped = _compare_inside((bundle, other), variants, prompts, args, (atol, rtol))
        return _tell(tapped, args)
    reference, candidate = (
        open_backend(variant.backend, b, variant=variant.name)
        for b, variant in zip((bundle, other), variants, strict=True)
    )
    report = compare_backends(
        reference,
        candidate,
        prompts,
        args.steps,
        atol=atol,
        rtol=rtol,
    )
    reference.close()
    candidate.close()
    if args.json:
        print_json(report.as_dict())
    else:
        _print(report)
        print(f"{report.verdict}: {report.reason}")
    return SUCCESS if report.verdict == "pass" else NEGATIVE


def _compare_inside(
    bundles: tuple[Bundle, Bundle],
    variants: Sequence[Variant],
    prompts: Sequence[Sequence[int]],
    args: argparse.Namespace,
    tolerance: tuple[float, float],
) -> TappedReport:
    check_same_checkpoint(*bundles)
    insist = args.taps != "all"
    taps = bundle_taps(bundles[0], args.taps)
    reference = run_rung(bundles[0], variants[0], taps, prompts, args.steps, insist=insist)
    fed = [prompt.tokens for prompt in reference.prompts]
    candidate = run_rung(
        bundles[1], variants[1], taps, prompts, args.steps, tokens=fed, insist=insist
    )
    atol, rtol = tolerance
    return compare_runs(reference, candidate, bundles[0].config, atol=atol, rtol=rtol)


def _tell(report: TappedReport, args: argparse.Namespace) -> int:
    if args.json:
        print_json(report.as_dict())
    else:
        _print(report.logits)
        print_tapped(report)
    return SUCCESS if report.verdict == "pass" else NEGATIVE


def _prompts(args: argparse.Namespace, bundle: Bundle) -> Iterator[list[int]]:
    if args.prompt_ids:
        yield from args.prompt_ids
        return
    texts = args.prompt
    if args.prompts is not None:
        texts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line]
        if not texts:
            raise ValueError(f"{args.prompts} holds no prompt; write one a line")
    if texts:
        tokenizer = need_tokenizer(open_tokenizer(bundle), "a text prompt")
        yield from (tokenizer.encode(text) for text in texts)
        return
    length = max(1, min(PROMPT_LENGTH, bundle.limits.max_seq_len - args.steps))
    yield from random_prompts(bundle.config.vocab_size, PROMPTS, length, PROMPT_SEED)


def _print(report: ComparisonReport) -> None:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(make_parser(), run, argv, ERRORS)


if __name__ == "__main__":
    sys.exit(main())
