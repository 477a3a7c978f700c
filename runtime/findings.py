"""What a check finds: how far logits are apart, what they may be, and what that means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from runtime.backends.base import Logits
from runtime.comparison import TOLERANCES

Result = Literal["pass", "fail", "expected", "skipped"]

ATOL, RTOL = TOLERANCES["fp32"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found about one subject.

    Attributes:
        subject: what was checked.
        check: which check.
        result: `expected` is beyond the limit for a reason that the documentation names.
        value: what was measured, mostly the largest difference of a logit; None for nothing.
        limit: the most that passes; None where there is none.
        meaning: the result in a sentence.
    """

    subject: str
    check: str
    result: Result
    value: float | None
    limit: float | None
    meaning: str

    def as_dict(self) -> dict[str, Any]:
        """The JSON form of the command's contract."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """The logits row that is furthest out of tolerance: its difference, and what it may be."""

    value: float
    limit: float

    @property
    def within(self) -> bool:
        """Whether all is within tolerance."""
        return self.value <= self.limit


def largest_difference(pairs: Iterable[tuple[Logits, Logits]]) -> Difference:
    """The worst of all rows of logits; a row may differ by ATOL + RTOL · its largest logit.

    Args:
        pairs: what is right and what was found, [S, V] each.

    Returns:
        An infinite difference where a logit is no finite number.
    """
    worst: Difference | None = None
    for expected, actual in pairs:
        if not (np.isfinite(expected).all() and np.isfinite(actual).all()):
            return Difference(np.inf, ATOL)
        values = np.abs(actual - expected).max(-1, initial=0.0)  # [S]
        limits = ATOL + RTOL * np.abs(expected).max(-1, initial=0.0)
        for value, limit in zip(values.tolist(), limits.tolist(), strict=True):
            if worst is None or value * worst.limit > worst.value * limit:
                worst = Difference(value, limit)
    if worst is None:
        raise ValueError("nothing was compared")
    return worst
