"""Measuring systems side by side: rounds in seeded random order, and the statistics of them.

A round runs every contender once, so that whatever else the machine does meets all of them. Ratios
are taken within a round. Each contender has a process of its own, which stays open; between two of
them is a pause, because ONNX Runtime's threads go on spinning for 30 to 40 ms after a run.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from runtime.backends import open_backend
from runtime.backends.base import Backend, Cache, Ids
from runtime.bundle import Bundle
from runtime.cpu_threads import CpuThreads
from runtime.sampling import SamplingParams, make_sampler
from runtime.system_process import Opened, Opener, SystemProcess, Timing
from runtime.token_chooser import TokenChooser

logger = logging.getLogger(__name__)

PAUSE_S = 0.15
PERCENTILES = (50, 95, 99)
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One system with one size of task.

    Attributes:
        label: names it in messages.
        open_system: opens it; picklable.
        vocab_size: V; prompts are random ids below it.
        batch_size: B.
        input_len: tokens of each prompt.
        output_len: tokens generated from each.
    """

    label: str
    open_system: Opener
    vocab_size: int
    batch_size: int
    input_len: int
    output_len: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of one contender.

    Attributes:
        opened: what ran.
        timings: one of each round, in the order of the rounds, without the warm-up.
        peak_rss_mb: largest resident memory of its process, in MiB.
    """

    opened: Opened
    timings: tuple[Timing, ...]
    peak_rss_mb: float


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Figures of one contender over all rounds.

    Attributes:
        ttft_ms: median time to the first token.
        tpot_ms: median over rounds of a round's mean time of a later token; None without one.
        itl_ms: percentiles of the time between tokens, over all tokens of all rounds.
        prefill_tokens_per_s: prompt tokens of the batch by the median time to the first token.
        decode_tokens_per_s: tokens of the batch by `tpot_ms`.
    """

    ttft_ms: float
    tpot_ms: float | None
    itl_ms: dict[str, float] | None
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None


class BackendSystem:
    """A backend of ours as a system: greedy generation through `prefill` and `decode_many`.

    Attributes:
        backend: key in `BACKENDS`.
        variant: which of the bundle's models.
        device: of an engine, the GPU, its memory with the cache in it, and how fast it copies.
    """

    def __init__(self, backend: Backend, batch_size: int, capacity: int) -> None:
        """Measure `backend` with one cache of `capacity` slots, emptied before each run."""
        self.backend = backend.name
        self.variant = backend.variant
        self._backend = backend
        self._cache = backend.new_cache(batch_size, capacity)
        facts = getattr(backend, "device_facts", None)
        self.device: dict[str, Any] | None = None if facts is None else facts()

    def run(self, prompts: Ids, output_len: int) -> Timing:
        """Generate `output_len` tokens from prompts [B, S]."""
        self._backend.rewind(self._cache, np.zeros(len(prompts), np.int64))
        return time_generation(self._backend, self._cache, prompts, output_len)

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()


def open_backend_system(
    folder: Path,
    backend: str | None,
    variant: str | None,
    *,
    threads: CpuThreads,
    batch_size: int,
    capacity: int,
) -> BackendSystem:
    """Open a bundle's backend for measuring.

    Raises:
        ValueError, BackendUnavailableError: as `Bundle.open` and `open_backend`.
    """
    bundle = Bundle.open(folder)
    opened = open_backend(backend, bundle, variant=variant, threads=threads)
    return BackendSystem(opened, batch_size, capacity)


def time_generation(backend: Backend, cache: Cache, prompts: Ids, output_len: int) -> Timing:
    """Generate greedily and time every token, from an empty cache.

    A backend hands logits and ids over as numpy, so whatever device it uses has finished by then.

    Args:
        backend: what runs.
        cache: B empty rows with room for `S + output_len - 1` tokens.
        prompts: [B, S] int64.
        output_len: tokens of each row; the first comes from the prompt's pass.
    """
    lengths = np.full(len(prompts), prompts.shape[1], np.int64)
    marks = [time.perf_counter()]
    tokens = backend.prefill(prompts, lengths, cache).argmax(axis=1)
    marks.append(time.perf_counter())
    sampler = make_sampler(SamplingParams(temperature=0), backend.vocab_size)
    choice = TokenChooser(sampler, prompts, lengths, np.arange(len(prompts)))
    steps = backend.decode_many(tokens, cache, choice, np.ones(len(prompts), bool))
    marks += [time.perf_counter() for _ in itertools.islice(steps, output_len - 1)]
    first, *later = np.diff(marks).tolist()
    return Timing(ttft_s=first, step_s=tuple(later))


def random_ids(vocab_size: int, batch_size: int, length: int, seed: int) -> Ids:
    """Seeded random prompts [B, S], without a repetition in a row where the vocabulary allows."""
    generator = np.random.default_rng(seed)
    if length > vocab_size:
        return generator.integers(0, vocab_size, (batch_size, length))
    rows = [generator.choice(vocab_size, length, replace=False) for _ in range(batch_size)]
    return np.stack(rows).astype(np.int64)


def round_orders(contenders: int, rounds: int, seed: int) -> list[list[int]]:
    """The order of the contenders in each round: each once, at random, the same for a seed."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(contenders).tolist() for _ in range(rounds)]


def measure_interleaved(
    contenders: Sequence[Contender],
    *,
    repeats: int,
    warmup: int,
    before_round: Callable[[], None] | None = None,
    pause_s: float = PAUSE_S,
) -> list[Measurement]:
    """Open every contender in a process of its own and run all of them in rounds.

    All stay open until the end, so their memory adds up. In a round, contenders with the same
    vocabulary, batch and length get the same prompts.

    Args:
        contenders: what is measured.
        repeats: rounds that count.
        warmup: rounds before them that do not.
        before_round: called before each round that counts, for what is measured beside.
        pause_s: seconds between two runs.

    Returns:
        One measurement for each contender, in their order.

    Raises:
        SystemProcessError: a process died.
        Exception: what a contender raised.
    """
    timings: list[list[Timing]] = [[] for _ in contenders]
    with ExitStack() as stack:
        processes = []
        for contender in contenders:
            logger.info("opening %s", contender.label)
            process = SystemProcess(contender.label, contender.open_system)
            processes.append(stack.enter_context(process))
        for number, order in enumerate(round_orders(len(contenders), warmup + repeats, _SEED)):
            counts = number >= warmup
            logger.info(
                "round %d of %d" if counts else "warm-up %d of %d",
                number + 1 - (warmup if counts else 0),
                repeats if counts else warmup,
            )
            if counts and before_round is not None:
                time.sleep(pause_s)
                before_round()
            for index in order:
                contender = contenders[index]
                prompts = random_ids(
                    contender.vocab_size, contender.batch_size, contender.input_len, number
                )
                time.sleep(pause_s)
                timing = processes[index].run(prompts, contender.output_len)
                if counts:
                    timings[index].append(timing)
        return [
            Measurement(
                opened=process.opened,
                timings=tuple(found),
                peak_rss_mb=process.peak_rss_mb(),
            )
            for process, found in zip(processes, timings, strict=True)
        ]


def summarize(timings: Sequence[Timing], batch_size: int, input_len: int) -> Statistics:
    """The figures of one contender's rounds, of which there is at least one."""
    ttft_s = median(timing.ttft_s for timing in timings)
    means = [timing.tpot_s for timing in timings if timing.tpot_s is not None]
    steps = [step for timing in timings for step in timing.step_s]
    tpot_s = median(means) if means else None
    return Statistics(
        ttft_ms=ttft_s * 1e3,
        tpot_ms=None if tpot_s is None else tpot_s * 1e3,
        itl_ms={f"p{q}": float(np.percentile(steps, q)) * 1e3 for q in PERCENTILES}
        if steps
        else None,
        prefill_tokens_per_s=batch_size * input_len / ttft_s,
        decode_tokens_per_s=None if tpot_s is None else batch_size / tpot_s,
    )


def prefill_ratio(baseline: Sequence[Timing], timings: Sequence[Timing]) -> float:
    """How many times as fast as `baseline` prompts are: the median of the rounds' ratios."""
    return median(a.ttft_s / b.ttft_s for a, b in zip(baseline, timings, strict=True))


def decode_ratio(baseline: Sequence[Timing], timings: Sequence[Timing]) -> float | None:
    """How many times as fast as `baseline` later tokens are; None where there are none."""
    pairs = ((a.tpot_s, b.tpot_s) for a, b in zip(baseline, timings, strict=True))
    ratios = [a / b for a, b in pairs if a is not None and b is not None]
    return median(ratios) if ratios else None
