"""Numbers that say how far two arrays are apart."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from runtime.backends.base import Logits
from runtime.sampling import log_probabilities


def json_number(value: float) -> float | None:
    """JSON has no infinity: a difference that is none becomes null, `reason` says why."""
    return value if np.isfinite(value) else None


def kl_divergence(expected: Logits, actual: Logits) -> npt.NDArray[np.float64]:
    """Kullback-Leibler divergence of each row [R, V], expected to actual, float64 [R] in nats."""
    p = log_probabilities(expected).astype(np.float64)
    q = log_probabilities(actual).astype(np.float64)
    # Rounding can make a vanishing divergence negative.
    divergence: npt.NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return np.maximum(divergence, 0.0)
