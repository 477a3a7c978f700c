"""How far the logits of two backends are apart: both get the same tokens, at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from runtime.backends.base import Backend, Logits
from runtime.comparison.metrics import json_number, kl_divergence


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first step at which the two backends would take another greedy token.

    Attributes:
        prompt: which prompt.
        step: 0 is the prefill's token.
        reference_token: greedy token of the reference.
        candidate_token: greedy token of the candidate.
        reference_margin: by how much the reference prefers its token over the candidate's.
        candidate_margin: by how much the candidate prefers its token over the reference's.
    """

    prompt: int
    step: int
    reference_token: int
    candidate_token: int
    reference_margin: float
    candidate_margin: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form; a margin that is no finite number becomes null."""
        margins = {name: getattr(self, name) for name in ("reference_margin", "candidate_margin")}
        return asdict(self) | {name: json_number(margin) for name, margin in margins.items()}


@dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """The difference of two backends over some prompts and steps.

    Attributes:
        reference: `backend:variant` of the reference.
        candidate: `backend:variant` of the candidate.
        steps: decode steps after each prompt's prefill.
        positions: logits rows compared.
        max_abs: largest absolute difference of a logit.
        mean_abs: mean absolute difference.
        kl_max: largest Kullback-Leibler divergence of a position, reference to candidate, in nats.
        kl_mean: its mean.
        top1_agreement: share of positions with the same greedy token.
        first_divergence: where greedy tokens first part, None where they never do.
        verdict: `pass` where every logit is within tolerance.
        reason: the verdict in a sentence.
    """

    reference: str
    candidate: str
    steps: int
    positions: int
    max_abs: float
    mean_abs: float
    kl_max: float
    kl_mean: float
    top1_agreement: float
    first_divergence: Divergence | None
    verdict: Literal["pass", "fail"]
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """The JSON form of the command's contract."""
        return {
            "reference": self.reference,
            "candidate": self.candidate,
            "steps": self.steps,
            "taps": [],
            "logits": {
                "max_abs": json_number(self.max_abs),
                "mean_abs": json_number(self.mean_abs),
                "kl_max": json_number(self.kl_max),
                "kl_mean": json_number(self.kl_mean),
                "top1_agreement": self.top1_agreement,
            },
            "first_divergence": (
                None if self.first_divergence is None else self.first_divergence.as_dict()
            ),
            "verdict": self.verdict,
            "reason": self.reason,
        }


def compare_backends(
    reference: Backend,
    candidate: Backend,
    prompts: Sequence[Sequence[int]],
    steps: int,
    *,
    atol: float,
    rtol: float,
) -> ComparisonReport:
    """Feed both backends the prompts and then the reference's greedy tokens.

    A logit is within tolerance when |candidate - reference| ≤ atol + rtol · max|reference|, the
    maximum over its row.

    Args:
        reference: the one that is right by definition.
        candidate: the one in question.
        prompts: token ids; each prompt runs alone.
        steps: decode steps after each prefill.
        atol: absolute tolerance.
        rtol: tolerance relative to the row's largest reference logit.

    Raises:
        ValueError: prompt and steps exceed a context, or the vocabularies differ.
    """
    if reference.vocab_size != candidate.vocab_size:
        raise ValueError(
            f"vocabularies differ: {reference.vocab_size} and {candidate.vocab_size} tokens"
        )
    for name, tolerance in (("atol", atol), ("rtol", rtol)):
        if not 0 <= tolerance < np.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {tolerance}")
    for prompt in prompts:
        outside = [i for i in prompt if not 0 <= i < reference.vocab_size]
        if outside:
            raise ValueError(
                f"token id {outside[0]} is outside the vocabulary of {reference.vocab_size} tokens"
            )
    if steps < 0 or not prompts:
        raise ValueError(f"give at least one prompt and 0 or more steps, got {steps} steps")
    pairs = [_run_prompt(reference, candidate, prompt, steps) for prompt in prompts]
    expected = np.concatenate([pair[0] for pair in pairs])  # [prompts · (steps + 1), V]
    actual = np.concatenate([pair[1] for pair in pairs])
    names = [f"{backend.name}:{backend.variant}" for backend in (reference, candidate)]
    return logits_report(expected, actual, names, steps, atol, rtol)


def _run_prompt(
    reference: Backend, candidate: Backend, prompt: Sequence[int], steps: int
) -> tuple[Logits, Logits]:
    ids = np.array([prompt], np.int64)
    lengths = np.array([len(prompt)])
    backends = (reference, candidate)
    caches = [backend.new_cache(1, len(prompt) + steps) for backend in backends]
    rows = [
        [backend.prefill(ids, lengths, cache)]
        for backend, cache in zip(backends, caches, strict=True)
    ]
    for _ in range(steps):
        token = rows[0][-1].argmax(-1)
        for backend, cache, row in zip(backends, caches, rows, strict=True):
            row.append(backend.decode(token, cache))
    return np.concatenate(rows[0]), np.concatenate(rows[1])


def logits_report(
    expected: Logits, actual: Logits, names: list[str], steps: int, atol: float, rtol: float
) -> ComparisonReport:
    """Judge rows of logits, [prompts · (steps + 1), V], as `compare_backends` does."""
    with np.errstate(invalid="ignore"):  # infinite logits are reported below
        difference = np.abs(actual.astype(np.float64) - expected)
        limit = atol + rtol * np.abs(expected).max(-1, keepdims=True)
    finite = bool(np.isfinite(actual).all() and np.isfinite(expected).all())
    within = finite and bool((difference <= limit).all())
    same = expected.argmax(-1) == actual.argmax(-1)
    kl = kl_divergence(expected, actual) if finite else np.full(len(expected), np.inf)
    if not finite:
        where = [n for n, x in zip(names, (expected, actual), strict=True) if not _finite(x)]
        reason = f"logits that are not finite numbers from {' and '.join(where)}"
        difference = np.where(np.isnan(difference), np.inf, difference)
    else:
        beyond = np.where(difference > 0, np.inf, 0.0)  # of a tolerance of zero
        worst = float(np.divide(difference, limit, out=beyond, where=limit > 0).max())
        reason = (
            f"largest difference is {worst:.3g} of the tolerance "
            f"(atol {atol:g}, rtol {rtol:g} of the row's largest logit)"
        )
    return ComparisonReport(
        reference=names[0],
        candidate=names[1],
        steps=steps,
        positions=len(expected),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        kl_max=float(kl.max()),
        kl_mean=float(kl.mean()),
        top1_agreement=float(same.mean()),
        first_divergence=first_token_divergence(expected, actual, steps),
        verdict="pass" if within else "fail",
        reason=reason,
    )


def _finite(logits: Logits) -> bool:
    return bool(np.isfinite(logits).all())


def first_token_divergence(expected: Logits, actual: Logits, steps: int) -> Divergence | None:
    """Where greedy tokens first part, rows [prompts · (steps + 1), V]; None where never."""
    differing = np.flatnonzero(expected.argmax(-1) != actual.argmax(-1))
    if not differing.size:
        return None
    row = int(differing[0])
    a, b = int(expected[row].argmax()), int(actual[row].argmax())
    return Divergence(
        prompt=row // (steps + 1),
        step=row % (steps + 1),
        reference_token=a,
        candidate_token=b,
        reference_margin=float(expected[row, a] - expected[row, b]),
        candidate_margin=float(actual[row, b] - actual[row, a]),
    )


def random_prompts(vocab_size: int, count: int, length: int, seed: int) -> list[list[int]]:
    """Seeded prompts of random ids, the comparison's default."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, (count, length))
    return [[int(i) for i in row] for row in ids]
