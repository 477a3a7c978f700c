"""Two rungs on a text: perplexity of each, and how far their distributions are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.base import Backend, Logits
from runtime.comparison.metrics import json_number, kl_divergence
from runtime.sampling import log_probabilities
from runtime.scoring import window_logits

# How many of the likeliest tokens are looked among for the other rung's.
_BEST = 5


@dataclass(frozen=True, kw_only=True)
class TextRun:
    """One rung on a text.

    Attributes:
        windows: token ids of each window, which is fed at once and alone.
        logits: [S, V] float32 of each window; position t predicts t + 1.
    """

    windows: tuple[tuple[int, ...], ...]
    logits: tuple[Logits, ...]


@dataclass(frozen=True, kw_only=True)
class TextComparison:
    """A text on two rungs.

    Attributes:
        tokens: how many were scored; every one but a window's first.
        windows: how many there were.
        reference_nll: mean negative log-probability of a token, in nats.
        candidate_nll: likewise.
        kl_max: largest Kullback-Leibler divergence of a position, reference to candidate, in nats.
        kl_mean: its mean.
        top1_agreement: share of positions whose likeliest token is the same.
        top5_agreement: share of positions where the reference's likeliest token is among the five
            likeliest of the candidate.
        max_abs: largest difference of a logit.
        of_tolerance: largest difference of a logit over what is tolerated.
        perplexity_bound: by which factor perplexity may rise, where that is what decides; None
            where every logit does.
    """

    tokens: int
    windows: int
    reference_nll: float
    candidate_nll: float
    kl_max: float
    kl_mean: float
    top1_agreement: float
    top5_agreement: float
    max_abs: float
    of_tolerance: float
    perplexity_bound: float | None = None

    @property
    def passes(self) -> bool:
        """Whether the candidate is as good on this text as it must be."""
        if not math.isfinite(self.candidate_nll):
            return False
        if self.perplexity_bound is not None:
            return self.perplexity_ratio <= self.perplexity_bound
        return self.of_tolerance <= 1

    @property
    def perplexity_ratio(self) -> float:
        """The candidate's perplexity over the reference's; above 1 is worse."""
        return math.exp(self.candidate_nll - self.reference_nll)

    def sentence(self) -> str:
        """How the text went, in words."""
        told = (
            f"text of {self.tokens} tokens: perplexity {_exp(self.reference_nll):.4g} and "
            f"{_exp(self.candidate_nll):.4g}"
        )
        if self.perplexity_bound is not None:
            return f"{told}, at most {self.perplexity_bound - 1:+.0%}"
        return f"{told}, logits {self.of_tolerance:.3g} of the tolerance"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form; a number that is not finite becomes null."""
        found = asdict(self)
        for side in ("reference", "candidate"):
            nll = found.pop(f"{side}_nll")
            found[side] = {"nll": json_number(nll), "perplexity": json_number(_exp(nll))}
        ratio = self.perplexity_ratio if math.isfinite(self.candidate_nll) else math.inf
        found["perplexity_ratio"] = json_number(ratio)
        return {k: json_number(v) if isinstance(v, float) else v for k, v in found.items()}


def _exp(nll: float) -> float:
    return math.exp(nll) if math.isfinite(nll) else math.inf


def record_text(backend: Backend, windows: Sequence[Sequence[int]]) -> TextRun:
    """Feed each window at once and keep every position's logits: 4·V bytes for each token.

    Raises:
        ValueError: a window longer than the context, or ids outside the vocabulary.
    """
    logits = [window_logits(backend, np.array([w], np.int64), "prefill")[0] for w in windows]
    return TextRun(
        windows=tuple(tuple(int(i) for i in window) for window in windows), logits=tuple(logits)
    )


def compare_text(
    reference: TextRun,
    candidate: TextRun,
    *,
    atol: float,
    rtol: float,
    perplexity_bound: float | None = None,
) -> TextComparison:
    """Compare two rungs on the same windows.

    Args:
        reference: the one that is right by definition.
        candidate: the one in question.
        atol: absolute tolerance of a logit.
        rtol: its tolerance relative to the position's largest logit of the reference.
        perplexity_bound: as `TextComparison`.
    """
    expected, actual = (np.concatenate(run.logits) for run in (reference, candidate))
    finite = bool(np.isfinite(expected).all() and np.isfinite(actual).all())
    nll = [_nll(run) for run in (reference, candidate)]
    best = expected.argmax(-1)  # [positions]
    placed = np.argpartition(-actual, min(_BEST, actual.shape[-1]) - 1, -1)[:, :_BEST]
    kl = kl_divergence(expected, actual) if finite else np.full(len(expected), np.inf)
    with np.errstate(invalid="ignore"):
        difference = np.abs(actual.astype(np.float64) - expected).max(-1)
        limit = atol + rtol * np.abs(expected).max(-1)
    share = np.divide(difference, limit, out=np.where(difference > 0, np.inf, 0.0), where=limit > 0)
    return TextComparison(
        tokens=len(expected) - len(reference.windows),
        windows=len(reference.windows),
        reference_nll=nll[0],
        candidate_nll=nll[1],
        kl_max=float(kl.max()),
        kl_mean=float(kl.mean()),
        top1_agreement=float((best == actual.argmax(-1)).mean()),
        top5_agreement=float((placed == best[:, None]).any(-1).mean()),
        max_abs=float(difference.max()) if finite else math.inf,
        of_tolerance=float(share.max()) if finite else math.inf,
        perplexity_bound=perplexity_bound,
    )


def _nll(run: TextRun) -> float:
    """Mean negative log-probability of every token but a window's first; infinite without sense."""
    taken: list[npt.NDArray[Any]] = []
    for window, logits in zip(run.windows, run.logits, strict=True):
        if not np.isfinite(logits).all():
            return math.inf
        rows = log_probabilities(logits[:-1])
        taken.append(rows[np.arange(len(window) - 1), np.array(window[1:])])
    return -float(np.concatenate(taken).astype(np.float64).mean())
