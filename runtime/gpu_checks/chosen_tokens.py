"""Tokens that a GPU chooses by itself, against those that the host picks from the same backend.

A backend that runs ahead of the host has other code for that than for its logits: a second engine,
or other launches. So its tokens are taken, and then fed to it once more, one by one, with logits.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from runtime.backends.base import Backend, Logits
from runtime.comparison.metrics import json_number
from runtime.gpu_checks.section import combined
from runtime.sampling import Sampler, SamplingParams, eligible, make_sampler
from runtime.token_chooser import TokenChooser

_STEPS = 64
# Two engines of one model round differently, so a token may be another where two are nearly as
# likely. A choice by wrong rules, a wrong uniform number or a wrong cache is seldom the host's.
_LEAST_EQUAL = 0.9
# Of 8 tokens each has a share that roundings hardly change; random weights have no clear winner
# among thousands.
_RULES = {
    "greedy": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(temperature=1.0, top_k=8, top_p=0.95),
    "every rule": SamplingParams(
        temperature=0.9, top_k=8, top_p=0.95, min_p=0.01, repetition_penalty=1.2,
        presence_penalty=0.3, frequency_penalty=0.2, logit_bias={1: -2.0},
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Parting:
    """A step at which the GPU's token is not the host's.

    Attributes:
        step: tokens before it.
        chosen: the GPU's token.
        picked: the host's.
        distance: greedy: by how much the host's token has the larger logit; drawn: how far the
            uniform number is from where the GPU's token would have been drawn, infinite where it
            could not.
    """

    step: int
    chosen: int
    picked: int
    distance: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite distance becomes null."""
        return {
            "step": self.step, "chosen": self.chosen, "picked": self.picked,
            "distance": json_number(self.distance),
        }  # fmt: skip


def check_chosen_tokens(
    backend: Backend, prompt: Sequence[int], seed: int, tolerance: tuple[float, float]
) -> dict[str, Any]:
    """Compare the tokens of `decode_many` with the host's picks, by three sets of rules.

    Args:
        backend: what runs on the GPU.
        prompt: token ids to continue.
        seed: of the uniform numbers.
        tolerance: atol and rtol of its logits; a greedy token's logit may be less than the largest
            by twice as much, since both may be off by it.

    Returns:
        JSON-ready: `verdict`, and `rules`, for each set the number of `steps`, how many were
        `equal`, the first parting, the largest `distance` of all, `token_ms` on average, how many
        tokens the host drew because the GPU was not certain, and the verdict.
    """
    if len(prompt) >= backend.limits.max_seq_len:
        return {"verdict": "skipped", "rules": []}  # no room for a token behind the prompt
    cases = [
        _check(backend, prompt, name, replace(params, seed=seed), tolerance)
        for name, params in _RULES.items()
    ]
    return {"verdict": combined(case["verdict"] for case in cases), "rules": cases}


def _check(
    backend: Backend,
    prompt: Sequence[int],
    name: str,
    params: SamplingParams,
    tolerance: tuple[float, float],
) -> dict[str, Any]:
    steps = min(_STEPS, backend.limits.max_seq_len - len(prompt))
    params = replace(params, max_tokens=steps + 1, ignore_eos=True)
    sampler = make_sampler(params, backend.vocab_size)
    ids, lengths = np.array([prompt], np.int64), np.array([len(prompt)])
    everyone = np.ones(1, bool)
    cache = backend.new_cache(1, None)
    before = _host_choices(backend)
    logits = backend.prefill(ids, lengths, cache)
    device = TokenChooser(sampler, ids, lengths, np.zeros(1, np.int64))
    first = device.choose(logits, 0, everyone)
    begin = time.perf_counter()
    with closing(backend.decode_many(first, cache, device, everyone)) as chosen:  # type: ignore[type-var]
        tokens = [int(first[0]), *(int(row[0]) for row in itertools.islice(chosen, steps))]
    token_ms = 1e3 * (time.perf_counter() - begin) / steps
    drawn_by_host = _host_choices(backend) - before

    backend.rewind(cache, lengths)
    host = TokenChooser(sampler, ids, lengths, np.zeros(1, np.int64))
    host.history.append(first, everyone)
    partings, beyond = [], 0
    for step, (fed, token) in enumerate(itertools.pairwise(tokens), 1):
        logits = backend.decode(np.array([fed]), cache)
        uniform = host.uniform(step)
        adjusted = sampler.adjust(logits, host.history)[0]
        picked = int(sampler(logits, host.history, uniform)[0])
        host.history.append(np.array([token]), everyone)
        if token != picked:
            distance = _distance(adjusted, float(uniform[0]), token, sampler)
            partings.append(Parting(step=step, chosen=token, picked=picked, distance=distance))
            atol, rtol = tolerance
            beyond += sampler.greedy and distance > 2 * (atol + rtol * float(np.abs(logits).max()))
    equal = steps - len(partings)
    right = equal >= _LEAST_EQUAL * steps and not beyond
    return {
        "rule": name,
        "verdict": "pass" if right else "fail",
        "steps": steps,
        "equal": equal,
        "first_parting": partings[0].as_dict() if partings else None,
        "distance": json_number(max((p.distance for p in partings), default=0.0)),
        "token_ms": round(token_ms, 4),
        "chosen_by_host": drawn_by_host,
    }


def _distance(adjusted: Logits, uniform: float, token: int, sampler: Sampler) -> float:
    """How far `token` is from being the pick of logits [V] after bias and penalties."""
    if sampler.greedy:
        return float(adjusted.max() - adjusted[token])
    ids, probabilities = eligible(adjusted, sampler.params)
    places = np.flatnonzero(ids == token)
    if not places.size:
        return math.inf
    end = float(probabilities[: places[0] + 1].sum())
    begin = end - float(probabilities[places[0]])
    return max(begin - uniform, uniform - end, 0.0)


def _host_choices(backend: Backend) -> int:
    """Tokens that an engine's decode graph has left to the host so far; 0 of other backends."""
    return int(getattr(backend, "host_choices", 0))
