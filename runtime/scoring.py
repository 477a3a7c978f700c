"""Log-probabilities and perplexity of given tokens, on any backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from runtime.backends.base import Backend, Ids, Logits
from runtime.sampling import log_probabilities

ScoreMode = Literal["prefill", "decode"]
SCORE_MODES: tuple[ScoreMode, ...] = get_args(ScoreMode)


@dataclass(frozen=True, kw_only=True)
class Score:
    """How likely a model finds the tokens of several windows.

    Attributes:
        token_logprobs: per window, the natural log-probability of every token but its first.
    """

    token_logprobs: tuple[tuple[float, ...], ...]

    @property
    def tokens(self) -> int:
        """How many tokens were scored."""
        return sum(map(len, self.token_logprobs))

    @property
    def nll(self) -> float:
        """Mean negative log-probability of a token, in nats."""
        return -math.fsum(x for window in self.token_logprobs for x in window) / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of `nll`."""
        return math.exp(self.nll)


def split_windows(ids: Sequence[int], window: int, bos_token_id: int | None) -> list[list[int]]:
    """Cut a text's ids into windows of at most `window` tokens that do not overlap.

    Args:
        ids: the text's tokens, without special ones.
        window: tokens of a window, the leading `bos_token_id` included.
        bos_token_id: what each window begins with; None begins with the text itself.

    Returns:
        The windows; a last one with nothing to score is left out.

    Raises:
        ValueError: a window too small to score a token, or too little text.
    """
    start = [] if bos_token_id is None else [bos_token_id]
    if window < 2:
        raise ValueError(f"a window needs at least 2 tokens, got {window}")
    size = window - len(start)
    windows = [[*start, *ids[begin : begin + size]] for begin in range(0, len(ids), size)]
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise ValueError(f"a text of {len(ids)} tokens leaves nothing to score")
    return windows


def score_windows(
    backend: Backend, windows: Sequence[Sequence[int]], mode: ScoreMode = "prefill"
) -> Score:
    """Score windows one after the other.

    Raises:
        ValueError: a window longer than the context, or ids outside the vocabulary.
    """
    rows: list[tuple[float, ...]] = []
    for window in windows:
        _, score = score_logits(backend, np.array([window], np.int64), mode)
        rows += score.token_logprobs
    return Score(token_logprobs=tuple(rows))


def score_logits(backend: Backend, ids: Ids, mode: ScoreMode) -> tuple[Logits, Score]:
    """Logits of a batch of equally long rows, and its score; arguments as `window_logits`."""
    size = backend.limits.max_batch_size
    parts = [
        window_logits(backend, ids[begin : begin + size], mode)
        for begin in range(0, len(ids), size)
    ]
    logits = np.concatenate(parts)
    taken = [
        log_probabilities(row[:-1])[np.arange(len(row) - 1), tokens[1:]]
        for row, tokens in zip(logits, ids, strict=True)
    ]
    return logits, Score(token_logprobs=tuple(tuple(float(x) for x in row) for row in taken))


def window_logits(backend: Backend, ids: Ids, mode: ScoreMode) -> Logits:
    """Logits of every position of a batch of equally long rows.

    Args:
        backend: what runs the model.
        ids: [B, S] int64.
        mode: `prefill` feeds the rows at once, `decode` token by token, as generation does.

    Returns:
        [B, S, V] float32; position t predicts t + 1.
    """
    B, S = ids.shape
    cache = backend.new_cache(B, S)
    if mode == "prefill":
        return backend.score(ids, np.full(B, S), cache)
    # The first token enters as a prompt of one; every other is a decode step.
    first = backend.prefill(ids[:, :1], np.ones(B, np.int64), cache)
    rest = [backend.decode(ids[:, t], cache) for t in range(1, S)]
    return np.stack([first, *rest], axis=1)
