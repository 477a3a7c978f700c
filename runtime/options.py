"""Command-line flags that several commands share, and what they are turned into."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from runtime.backends import BACKENDS
from runtime.bundle import Bundle
from runtime.command import CommandParser, UsageError
from runtime.cpu_threads import CpuThreads
from runtime.tokenizer import Tokenizer


def add_bundle_flags(parser: CommandParser) -> None:
    """BUNDLE, `--backend`, `--variant`, `--threads`, `--spinning`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    parser.add_argument(
        "--backend", choices=list(BACKENDS), help="what runs the model (the first that can)"
    )
    parser.add_argument("--variant", help="which of the backend's models (its first)")
    add_thread_flags(parser)


def add_thread_flags(parser: CommandParser) -> None:
    """`--threads` and `--spinning`, which `threads_of` reads."""
    parser.add_argument(
        "--threads", type=int, metavar="N",
        help="CPU threads of a step (physical cores, at most 8, for onnxruntime; torch's choice)",
    )  # fmt: skip
    parser.add_argument(
        "--spinning", action=argparse.BooleanOptionalAction, default=True,
        help="threads of onnxruntime wait by spinning: faster on a machine that does nothing else",
    )  # fmt: skip


def threads_of(args: argparse.Namespace) -> CpuThreads:
    """What `add_thread_flags` asked for; one line says where it is more than this machine has.

    Raises:
        UsageError: fewer threads than one.
    """
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads must be at least 1, got {args.threads}")
    threads = CpuThreads(args.threads, args.spinning)
    threads.warn_if_more_than_cores()
    return threads


def split_backend(name: str, *, also: Sequence[str] = ()) -> tuple[str, str | None]:
    """`BACKEND[:VARIANT]` as backend and variant, None where the backend's first is meant.

    Args:
        name: what was given.
        also: what the caller takes besides backends, for the error's list.

    Raises:
        ValueError: there is no such backend; lists those there are.
    """
    backend, _, variant = name.partition(":")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join((*BACKENDS, *also))}")
    return backend, variant or None


def parse_ids(text: str) -> list[int]:
    """Token ids separated by commas, for argparse."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected token ids separated by commas, got {text!r}"
        ) from None


def open_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """The bundle's tokenizer, None where its checkpoint had none."""
    folder = bundle.tokenizer_folder
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    return Tokenizer.open(folder)


def need_tokenizer(tokenizer: Tokenizer | None, what: str) -> Tokenizer:
    """The tokenizer, or an error that says what works without one.

    Raises:
        ValueError: the bundle has none.
    """
    if tokenizer is None:
        raise ValueError(
            f"{what} needs a tokenizer and this bundle has none (its checkpoint had no "
            "tokenizer.json); use --prompt-ids"
        )
    return tokenizer


def end_of_text_ids(bundle: Bundle, tokenizer: Tokenizer | None) -> Sequence[int]:
    """End-of-text ids: the tokenizer's (generation_config.json first), else config.json's."""
    if tokenizer is not None and tokenizer.eos_token_ids:
        return tokenizer.eos_token_ids
    return bundle.config.eos_token_ids


def one_kind(**given: object) -> None:
    """Check that at most one of several flags was given.

    Raises:
        UsageError: names those that were.
    """
    flags = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if len(flags) > 1:
        raise UsageError(f"{' and '.join(flags)} exclude each other; give one kind")
