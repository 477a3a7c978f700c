"""Time decoding of one system in this process: python -m runtime.gpu_checks.decode_timing.

The section of decode speed starts it and reads what it writes. A system is a variant of the bundle,
`cuda:fp16`, or PyTorch on the bundle's checkpoint, `torch:float16:compiled`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from plugins.launcher import LaunchError
from runtime.backends import open_backend
from runtime.backends.base import Backend, BackendUnavailableError, Ids
from runtime.benchmarking import random_ids
from runtime.bundle import Bundle
from runtime.gpu_checks.decode_pace import Decoding, Pace, time_decoding
from runtime.sampling import SamplingParams, make_sampler
from runtime.token_chooser import TokenChooser

# Needs PyTorch; imported when it is what is timed.
_TORCH_LOOP = "model.torch_decoding"
_TORCH = "torch"
# What a system says of a machine that cannot run it.
_REFUSALS = (BackendUnavailableError, LaunchError, OSError, RuntimeError)


class BackendDecoding:
    """A backend of ours, through `decode_many`."""

    def __init__(self, backend: Backend, batch_size: int) -> None:
        """Take a cache of full size; `chosen` holds [B] for each token behind the prompts."""
        self._backend = backend
        self._cache = backend.new_cache(batch_size)
        self._prompts: Ids = np.zeros((batch_size, 0), np.int64)
        self._first: Ids = np.zeros(batch_size, np.int64)
        self._steps: Iterator[Ids] = iter(())
        self.chosen: list[Ids] = []

    def prefill(self, prompts: Ids) -> None:
        """Begin anew with prompts [B, S]."""
        self._backend.rewind(self._cache, np.zeros(len(prompts), np.int64))
        self._prompts = prompts
        logits = self._backend.prefill(prompts, self._lengths, self._cache)
        self._first = logits.argmax(axis=1)
        self.rewind()

    def rewind(self) -> None:
        """Forget all tokens but the prompts."""
        backend, rows = self._backend, len(self._prompts)
        backend.rewind(self._cache, self._lengths)
        sampler = make_sampler(SamplingParams(temperature=0), backend.vocab_size)
        choice = TokenChooser(sampler, self._prompts, self._lengths, np.arange(rows))
        self._steps = backend.decode_many(self._first, self._cache, choice, np.ones(rows, bool))
        self.chosen = [self._first]

    def decode(self, count: int) -> None:
        """Choose and read so many tokens more for each row."""
        self.chosen += [tokens.copy() for tokens in islice(self._steps, count)]

    def wait(self) -> None:
        """Tokens that were read are there."""

    @property
    def _lengths(self) -> Ids:
        return np.full(len(self._prompts), self._prompts.shape[1], np.int64)


def measure(
    bundle: Bundle,
    system: str,
    *,
    batch_size: int,
    lengths: Sequence[int],
    pace: Pace,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Open a system and time it behind prompts of each length.

    Returns:
        JSON-ready: `verdict`; `error`, what was said where something failed; `measured`, a part for
        each length that was timed; `compiler`, what torch's counted.
    """
    try:
        opened, decoding = _open(bundle, system, batch_size, device)
    except _REFUSALS as error:
        return {"verdict": "skipped", "error": _one_line(error), "measured": []}
    except ValueError as error:  # the bundle is at fault, not the machine
        return {"verdict": "fail", "error": _one_line(error), "measured": []}
    found: dict[str, Any] = {"verdict": "pass", "measured": []}
    with opened:
        try:
            for length in lengths:
                prompts = random_ids(bundle.config.vocab_size, batch_size, length, seed)
                found["measured"].append(time_decoding(decoding, prompts, pace))
        except (RuntimeError, ValueError) as error:
            found |= {"verdict": "fail", "error": _one_line(error)}
        if facts := getattr(decoding, "compiler_facts", None):
            found["compiler"] = facts() or None
    return found


def _open(
    bundle: Bundle, system: str, batch_size: int, device: str
) -> tuple[AbstractContextManager[Any], Decoding]:
    kind, _, name = system.partition(":")
    if kind != _TORCH:
        backend = open_backend(kind, bundle, variant=name)
        try:
            return closing(backend), BackendDecoding(backend, batch_size)
        except BaseException:
            backend.close()
            raise
    dtype, _, mode = name.partition(":")
    if importlib.util.find_spec(_TORCH) is None:
        raise BackendUnavailableError(
            "PyTorch is not installed; run: pip install 'doge-tensorrt[torch]'"
        )
    loop = importlib.import_module(_TORCH_LOOP)
    if problem := loop.missing_device(device):
        raise BackendUnavailableError(problem)
    decoding: Decoding = loop.TorchDecoding.open(
        bundle.path / bundle.variants(_TORCH)[0].path,
        dtype=dtype,
        device=device,
        router_mode=bundle.manifest.router_mode,
        mode=mode,
        batch_size=batch_size,
        capacity=bundle.limits.max_seq_len,
    )
    return nullcontext(), decoding


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def main(argv: Sequence[str] | None = None) -> int:
    """Time a system and write what was found."""
    parser = argparse.ArgumentParser(prog="decode_timing", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("system", metavar="BACKEND:VARIANT|torch:DTYPE:MODE")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--lengths", required=True, help="tokens of prompts, e.g. 128,1900")
    parser.add_argument("--pace", required=True, help="warm-up, tokens, repeats, e.g. 8,64,5")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--device", default="cuda", help="torch's name of the device for PyTorch")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    warmup, tokens, repeats = map(int, args.pace.split(","))
    found = measure(
        Bundle.open(args.bundle),
        args.system,
        batch_size=args.batch_size,
        lengths=[int(length) for length in args.lengths.split(",")],
        pace=Pace(warmup=warmup, tokens=tokens, repeats=repeats),
        seed=args.seed,
        device=args.device,
    )
    args.output.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
