"""Compare two models of a bundle in this process: python -m runtime.gpu_checks.engine_comparison.

The section of engines starts it and reads what it writes; an engine that takes its process down
takes down nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from plugins.launcher import LaunchError
from runtime.backends import open_backend
from runtime.backends.base import Backend, BackendUnavailableError
from runtime.bundle import Bundle
from runtime.comparison import compare_backends, random_prompts, variant_tolerance
from runtime.gpu_checks.chosen_tokens import check_chosen_tokens
from runtime.gpu_checks.section import combined
from runtime.manifest import Variant
from runtime.options import split_backend

# What a backend says of a machine that cannot run it; RuntimeError is what TensorRT's calls raise.
_REFUSALS = (BackendUnavailableError, LaunchError, OSError, RuntimeError)
_PROMPTS, _PROMPT_TOKENS, _STEPS = 2, 16, 16
_WARMUP_STEPS, _TIMED_STEPS = 5, 50
# Prompts and batches whose speed is measured, as far as the bundle's limits go.
_LENGTHS = (16, 128, 512, 2048)
_SPEED_REPEATS, _SPEED_STEPS = 3, 16


def compare(bundle: Bundle, reference: Variant, candidate: Variant, seed: int) -> dict[str, Any]:
    """Open both, feed them the same tokens, and time the candidate.

    Returns:
        JSON-ready: `verdict`; `opened`, whether the candidate could be; `error`, what was said
        where something failed; the comparison's `report`, `load_s` and `step_ms`; `chosen`, the
        tokens that the GPU chooses by itself; `speeds`; and `starts`, the first tokens after
        opening, and after closing and opening again.
    """
    begin = time.perf_counter()
    try:
        engine = open_backend(candidate.backend, bundle, variant=candidate.name)
    except _REFUSALS as error:
        return {"verdict": "skipped", "opened": False, "error": _one_line(error)}
    except ValueError as error:  # the bundle is at fault, not the machine
        return {"verdict": "fail", "opened": False, "error": _one_line(error)}
    load_s = round(time.perf_counter() - begin, 3)
    with closing(engine):
        starts = [_start(engine, load_s)]
        try:
            other = open_backend(reference.backend, bundle, variant=reference.name)
        except (*_REFUSALS, ValueError) as error:
            said = f"the reference cannot be opened: {_one_line(error)}"
            return {"verdict": "skipped", "opened": True, "load_s": load_s, "error": said}
        with closing(other):
            found = {"opened": True, "load_s": load_s, **_both(other, engine, bundle, seed)}
    if found["verdict"] == "fail":
        return {**found, "starts": starts}
    begin = time.perf_counter()
    try:
        again = open_backend(candidate.backend, bundle, variant=candidate.name)
    except (*_REFUSALS, ValueError) as error:
        said = f"it opens once and not again: {_one_line(error)}"
        return {**found, "verdict": "fail", "error": said, "starts": starts}
    with closing(again):
        starts.append(_start(again, round(time.perf_counter() - begin, 3)))
        return {**found, "starts": starts, "speeds": _speeds(again, seed)}


def _start(backend: Backend, load_s: float) -> dict[str, Any]:
    """The first prompt and the first step, in which an engine compiles its kernels."""
    facts = getattr(backend, "device_facts", None)
    times = []
    try:
        cache = backend.new_cache(1, None)
        begin = time.perf_counter()
        logits = backend.prefill(np.zeros((1, 1), np.int64), np.array([1]), cache)
        times.append(_ms_since(begin))
        begin = time.perf_counter()
        backend.decode(logits.argmax(-1), cache)
        times.append(_ms_since(begin))
    except (*_REFUSALS, ValueError):
        pass  # what fails here fails in the comparison too, where it is told
    return {
        "load_s": load_s,
        "first_prompt_ms": times[0] if times else None,
        "first_step_ms": times[1] if len(times) > 1 else None,
        "device": None if facts is None else facts(),
    }


def _speeds(backend: Backend, seed: int) -> list[dict[str, Any]]:
    """Prompts of several lengths and the steps behind them, of one row and of all rows."""
    limits = backend.limits
    longest = min(limits.max_input_len, limits.max_seq_len - _SPEED_STEPS)
    found = []
    for batch in sorted({1, limits.max_batch_size}):
        cache = backend.new_cache(batch, None)
        for length in [n for n in _LENGTHS if n <= longest]:
            prompts = np.array(random_prompts(backend.vocab_size, batch, length, seed), np.int64)
            prefill_ms, step_ms = [], []
            for _ in range(1 + _SPEED_REPEATS):  # kernels of a new shape are compiled in the first
                backend.rewind(cache, np.zeros(batch, np.int64))
                begin = time.perf_counter()
                logits = backend.prefill(prompts, np.full(batch, length), cache)
                prefill_ms.append(_ms_since(begin))
                for _ in range(_SPEED_STEPS):
                    begin = time.perf_counter()
                    logits = backend.decode(logits.argmax(-1), cache)
                    step_ms.append(_ms_since(begin))
            step = median(step_ms[_SPEED_STEPS:])
            found.append(
                {
                    "batch_size": batch,
                    "prompt_tokens": length,
                    "prefill_ms": round(median(prefill_ms[1:]), 4),
                    "step_ms": round(step, 4),
                    "tokens_per_s": round(1e3 * batch / step, 2),
                }
            )
        del cache  # its memory serves the next batch
    return found


def _ms_since(begin: float) -> float:
    return round(1e3 * (time.perf_counter() - begin), 4)


def _both(reference: Backend, candidate: Backend, bundle: Bundle, seed: int) -> dict[str, Any]:
    limits = bundle.limits
    length = min(_PROMPT_TOKENS, limits.max_input_len, max(limits.max_seq_len // 2, 1))
    steps = min(_STEPS, limits.max_seq_len - length)
    prompts = random_prompts(bundle.config.vocab_size, _PROMPTS, length, seed)
    variants = [bundle.variant(b.name, b.variant) for b in (reference, candidate)]
    atol, rtol = max(map(variant_tolerance, variants))
    try:
        report = compare_backends(reference, candidate, prompts, steps, atol=atol, rtol=rtol)
        found = {"report": report.as_dict(), "step_ms": _step_ms(candidate, prompts[0])}
        if report.verdict == "fail":
            return {"verdict": "fail", **found}
        tolerance = variant_tolerance(variants[1])
        chosen = check_chosen_tokens(candidate, prompts[0], seed, tolerance)
    except (RuntimeError, ValueError) as error:  # ValueError: logits that nothing can be picked of
        return {"verdict": "fail", "error": _one_line(error)}
    verdict = combined((report.verdict, chosen["verdict"]))
    return {"verdict": verdict, **found, "chosen": chosen}


def _step_ms(backend: Backend, prompt: Sequence[int]) -> dict[str, Any] | None:
    """Milliseconds of a decode step; None where the cache has no room for one that counts."""
    count = min(_TIMED_STEPS, backend.limits.max_seq_len - len(prompt) - _WARMUP_STEPS)
    if count < 1:
        return None
    cache = backend.new_cache(1, None)
    logits = backend.prefill(np.array([prompt], np.int64), np.array([len(prompt)]), cache)
    times = []
    for _ in range(_WARMUP_STEPS + count):
        begin = time.perf_counter()
        logits = backend.decode(logits.argmax(-1), cache)
        times.append(1e3 * (time.perf_counter() - begin))
    counted = sorted(times[_WARMUP_STEPS:])
    return {
        "median": round(median(counted), 4),
        "p95": round(counted[math.ceil(0.95 * count) - 1], 4),
        "steps": count,
        "prompt_tokens": len(prompt),
    }


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and write what it found."""
    parser = argparse.ArgumentParser(prog="engine_comparison", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("reference", metavar="BACKEND:VARIANT")
    parser.add_argument("candidate", metavar="BACKEND:VARIANT")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    bundle = Bundle.open(args.bundle)
    names = (split_backend(args.reference), split_backend(args.candidate))
    reference, candidate = (bundle.variant(*name) for name in names)
    found = compare(bundle, reference, candidate, args.seed)
    args.output.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
