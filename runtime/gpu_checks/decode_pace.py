"""Which tokens of a continuation are timed, and how."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from runtime.backends.base import Ids


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What is timed.

    Attributes:
        warmup: tokens of each continuation that do not count.
        tokens: tokens behind them that do.
        repeats: prompts, and then continuations of the last, that count; one of each before them
            does not.
    """

    warmup: int = 8
    tokens: int = 64
    repeats: int = 5

    @property
    def needed(self) -> int:
        """Slots behind a prompt."""
        return self.warmup + self.tokens

    def context(self, prompt_tokens: int) -> float:
        """Mean tokens in a row's cache while it counts, each step's own included."""
        return prompt_tokens + self.warmup + (self.tokens + 1) / 2


class Decoding(Protocol):
    """A system that continues prompts greedily."""

    def prefill(self, prompts: Ids) -> None:
        """Begin anew with prompts [B, S]."""

    def rewind(self) -> None:
        """Forget all tokens but the prompts."""

    def decode(self, count: int) -> None:
        """Choose so many tokens more for each row; they may not be there yet."""

    def wait(self) -> None:
        """Wait until all that was asked for is done."""


def time_decoding(decoding: Decoding, prompts: Ids, pace: Pace) -> dict[str, Any]:
    """JSON-ready: how long prompts [B, S] take, and a step behind them."""
    prompt_times = []
    for repeat in range(1 + pace.repeats):
        begin = time.perf_counter()
        decoding.prefill(prompts)
        decoding.wait()
        if repeat:
            prompt_times.append(1e3 * (time.perf_counter() - begin))
    times = []
    for repeat in range(1 + pace.repeats):
        decoding.rewind()
        decoding.decode(pace.warmup)
        decoding.wait()
        begin = time.perf_counter()
        decoding.decode(pace.tokens)
        decoding.wait()
        if repeat:
            times.append(1e3 * (time.perf_counter() - begin) / pace.tokens)
    middle = median(times)
    return {
        "prompt_tokens": prompts.shape[1],
        "prompt_ms": round(median(prompt_times), 4),
        "step_ms": round(middle, 5),
        "fastest_ms": round(min(times), 5),
        "slowest_ms": round(max(times), 5),
        "tokens_per_s": round(1e3 * len(prompts) / middle, 1),
    }
