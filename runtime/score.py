"""Perplexity of a text: python runtime/score.py BUNDLE --text FILE."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.config import UnsupportedModelError
from runtime.backends import open_backend
from runtime.backends.base import Backend, BackendUnavailableError, Ids
from runtime.bundle import Bundle
from runtime.command import SUCCESS, CommandParser, UsageError, print_json, run_command
from runtime.options import add_bundle_flags, need_tokenizer, open_tokenizer, threads_of
from runtime.scoring import SCORE_MODES, Score, score_logits, score_windows, split_windows

ERRORS = (BackendUnavailableError, OSError, UnsupportedModelError, ValueError)


def make_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser("score", "Log-probabilities and perplexity of a text or of token ids.")
    add_bundle_flags(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text")
    what.add_argument("--ids", type=Path, metavar="FILE.npy", help="int64 [B, S], taken as it is")
    parser.add_argument("--window", type=int, help="tokens of a window of the text (the context)")
    parser.add_argument(
        "--mode", choices=SCORE_MODES, default="prefill", help="at once, or token by token"
    )
    parser.add_argument(
        "--logits", type=Path, metavar="OUT.npy", help="with --ids: write float32 [B, S, V]"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Score and print."""
    if args.logits is not None and args.ids is None:
        raise UsageError("--logits belongs to --ids")
    if args.window is not None and args.text is None:
        raise UsageError("--window belongs to --text")
    bundle = Bundle.open(args.bundle)
    windows = _text_windows(args, bundle) if args.ids is None else None
    ids = None if args.ids is None else _read_ids(args.ids)
    backend = open_backend(args.backend, bundle, variant=args.variant, threads=threads_of(args))
    try:
        if windows is not None:
            score = score_windows(backend, windows, args.mode)
        else:
            score = _score_ids(backend, ids, args)
    finally:
        backend.close()
    _print(backend, score, args)
    return SUCCESS


def _text_windows(args: argparse.Namespace, bundle: Bundle) -> list[list[int]]:
    tokenizer = need_tokenizer(open_tokenizer(bundle), "--text")
    text = args.text.read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False)
    window = bundle.limits.max_seq_len if args.window is None else args.window
    if window > bundle.limits.max_seq_len:
        raise ValueError(
            f"--window {window} exceeds the context of {bundle.limits.max_seq_len} tokens"
        )
    return split_windows(ids, window, tokenizer.bos_token_id)


def _read_ids(path: Path) -> Ids:
    try:
        ids = np.load(path, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise ValueError(f"{path} is no .npy file of int64 [B, S]") from error
    if not isinstance(ids, np.ndarray):
        raise ValueError(f"{path} holds several arrays, expected one of int64 [B, S]")
    is_table = ids.ndim == 2 and ids.shape[0] >= 1 and ids.shape[1] >= 2
    if not is_table or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{path} holds {ids.dtype} {list(ids.shape)}, expected int64 [B, S] with S of 2 or more"
        )
    result: Ids = ids.astype(np.int64)
    return result


def _score_ids(backend: Backend, ids: Ids | None, args: argparse.Namespace) -> Score:
    if ids is None:
        raise AssertionError("either windows or ids are scored")
    logits, score = score_logits(backend, ids, args.mode)
    if args.logits is not None:
        np.save(args.logits, logits)
    return score


def _print(backend: Backend, score: Score, args: argparse.Namespace) -> None:
    if args.json:
        print_json(
            {
                "backend": backend.name,
                "variant": backend.variant,
                "mode": args.mode,
                "tokens": score.tokens,
                "nll": score.nll,
                "perplexity": score.perplexity,
                "token_logprobs": [list(window) for window in score.token_logprobs],
            }
        )
        return
    print(f"{backend.name}:{backend.variant}, {args.mode}")
    print(f"tokens      {score.tokens}")
    print(f"nll         {score.nll:.4f} nats per token")
    print(f"perplexity  {score.perplexity:.3f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(make_parser(), run, argv, ERRORS)


if __name__ == "__main__":
    sys.exit(main())
