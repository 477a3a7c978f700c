"""Greedy generation of two rungs, each fed its own tokens: how long they say the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.backends.base import Ids
from runtime.comparison.logits import Divergence
from runtime.comparison.record import PromptRun, Run

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True)
class FreeRunning:
    """One prompt.

    Attributes:
        prompt: which.
        reference_tokens: what the reference generates.
        candidate_tokens: as many of the candidate.
        first_divergence: where they part, with both margins there; None where they never do. Up to
            that step both were fed the same, so the margins are those of the teacher-forced runs.
    """

    prompt: int
    reference_tokens: tuple[int, ...]
    candidate_tokens: tuple[int, ...]
    first_divergence: Divergence | None

    @property
    def equal(self) -> int:
        """Tokens before they part."""
        found = self.first_divergence
        return len(self.reference_tokens) if found is None else found.step

    def as_dict(self, decode: Decode | None) -> dict[str, Any]:
        """JSON-ready form; `decode` turns tokens into text, null without one."""
        texts = [
            None if decode is None else decode(tokens)
            for tokens in (self.reference_tokens, self.candidate_tokens)
        ]
        found = self.first_divergence
        return {
            "prompt": self.prompt,
            "tokens": len(self.reference_tokens),
            "equal": self.equal,
            "first_divergence": None if found is None else found.as_dict(),
            "reference_text": texts[0],
            "candidate_text": texts[1],
        }


def compare_free_running(reference: Run, candidate: Run) -> tuple[FreeRunning, ...]:
    """What two runs over the same prompts generate by themselves.

    Empty where the reference was fed by another than itself: what it would have generated alone has
    no steps that the candidate was run on as well.
    """
    found = []
    for number, (a, b) in enumerate(zip(reference.prompts, candidate.prompts, strict=True)):
        if a.own_tokens is None or b.own_tokens is None:
            return ()
        if (a.own_tokens[:-1] != a.tokens).any():
            return ()
        found.append(
            FreeRunning(
                prompt=number,
                reference_tokens=tuple(int(i) for i in a.own_tokens),
                candidate_tokens=tuple(int(i) for i in b.own_tokens),
                first_divergence=_first_divergence(number, a, b, a.own_tokens, b.own_tokens),
            )
        )
    return tuple(found)


def _first_divergence(
    number: int, a: PromptRun, b: PromptRun, expected: Ids, actual: Ids
) -> Divergence | None:
    parting = np.flatnonzero(expected != actual)
    if not parting.size:
        return None
    step = int(parting[0])
    tokens = int(expected[step]), int(actual[step])
    return Divergence(
        prompt=number,
        step=step,
        reference_token=tokens[0],
        candidate_token=tokens[1],
        reference_margin=float(a.logits[step, tokens[0]] - a.logits[step, tokens[1]]),
        candidate_margin=float(b.logits[step, tokens[1]] - b.logits[step, tokens[0]]),
    )
