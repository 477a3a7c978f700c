"""What a model with narrow weights loses against the float32 one, in perplexity.

Measured on text that the float32 model itself samples with a fixed seed: there the perplexity rises
by exactly the divergence of the two (their mean log ratio), whatever the model was trained on. Or
on a text that is given. The same for an engine's precision (`export/engine_quality.py`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.sources import Checkpoint
from runtime.backends.base import Backend, Limits
from runtime.comparison.tolerances import PERPLEXITY_RISES
from runtime.sampling import SamplingParams
from runtime.scoring import Score, ScoreMode, score_logits, split_windows
from runtime.session import GenerationSession
from runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BOUNDS = PERPLEXITY_RISES
SAMPLED_SEQUENCES = 4
SAMPLED_LENGTH = 256
SEED = 0


class QualityError(Exception):
    """A narrow model loses more than its bound; the message says how much."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Perplexity of one text under two models.

    Attributes:
        text: `sampled` from the reference, or `given`.
        tokens: how many tokens were scored.
        reference_perplexity: of the float32 model.
        perplexity: of the narrow model.
        increase: of the perplexity, as a fraction of the reference's.
        bound: the largest increase that is accepted.
    """

    text: str
    tokens: int
    reference_perplexity: float
    perplexity: float
    increase: float
    bound: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4g} against {self.reference_perplexity:.4g} in float32 "
            f"({self.increase:+.2%}, at most {self.bound:+.0%}) over {self.tokens} tokens of "
            f"{self.text} text"
        )

    @property
    def accepted(self) -> bool:
        """Whether the increase is within its bound."""
        return self.increase <= self.bound


def measure_quality(
    reference: Backend,
    candidate: Backend,
    *,
    bits: int,
    first_token: int | None,
    windows: Sequence[Sequence[int]] | None = None,
    mode: ScoreMode = "decode",
) -> Quality:
    """Score one text with both.

    Args:
        reference: the float32 model.
        candidate: the same model with narrow weights.
        bits: of a weight of the candidate, a key of `BOUNDS`.
        first_token: what sampled sequences begin with; None begins with the ids 0, 1, ….
        windows: a given text; None samples one from the reference.
        mode: token by token as generation runs them, or all at once.
    """
    text = "sampled" if windows is None else "given"
    if windows is None:
        windows = sample_text(reference, first_token)
    scores = [_score(backend, windows, mode) for backend in (reference, candidate)]
    return Quality(
        text=text,
        tokens=scores[0].tokens,
        reference_perplexity=scores[0].perplexity,
        perplexity=scores[1].perplexity,
        increase=math.expm1(scores[1].nll - scores[0].nll),
        bound=BOUNDS[bits],
    )


def sample_text(reference: Backend, first_token: int | None) -> list[list[int]]:
    """Sequences that the model samples at temperature 1, the same for the same model."""
    length = min(SAMPLED_LENGTH, reference.limits.max_seq_len)
    firsts = [i if first_token is None else first_token for i in range(SAMPLED_SEQUENCES)]
    rows = [[first % reference.vocab_size] for first in firsts]
    params = SamplingParams(max_tokens=length - 1, temperature=1.0, seed=SEED, ignore_eos=True)
    for event in GenerationSession(reference).generate([list(row) for row in rows], params):
        rows[event.index].append(event.token_id)
    return rows


def text_windows(path: Path, checkpoint: Checkpoint, limits: Limits) -> Sequence[Sequence[int]]:
    """The tokens of a text file, in windows of a sampled sequence's length.

    Raises:
        FileNotFoundError: the checkpoint has no tokenizer, or there is no such text.
    """
    if not checkpoint.tokenizer_files:
        raise FileNotFoundError(f"{checkpoint.folder} has no tokenizer, which --eval-text needs")
    tokenizer = Tokenizer.open(checkpoint.folder)
    ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False)
    length = min(SAMPLED_LENGTH, limits.max_seq_len)
    return split_windows(ids, length, tokenizer.bos_token_id)


def _score(backend: Backend, windows: Sequence[Sequence[int]], mode: ScoreMode) -> Score:
    """Windows of one length side by side."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for window in windows:
        by_length.setdefault(len(window), []).append(window)
    rows: list[tuple[float, ...]] = []
    for group in by_length.values():
        _, score = score_logits(backend, np.array(group, np.int64), mode)
        rows += score.token_logprobs
    return Score(token_logprobs=tuple(rows))
