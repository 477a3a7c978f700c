"""Scores of texts, on a backend whose logits depend on the last token alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import pytest

from runtime.backends.base import Backend, Cache, Ids, Limits, Logits
from runtime.bundle import Bundle
from runtime.cpu_threads import CpuThreads
from runtime.manifest import Variant
from runtime.scoring import (
    SCORE_MODES,
    Score,
    ScoreMode,
    score_logits,
    score_windows,
    split_windows,
    window_logits,
)

# What follows each token, in probabilities.
CHAIN = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]])
V = len(CHAIN)


@dataclass
class ChainBackend(Backend):
    """The logits of a token are the logarithms of its row of the chain, and a constant."""

    limits: Limits = field(
        default_factory=lambda: Limits(max_batch_size=2, max_input_len=3, max_seq_len=8)
    )
    router_mode: str | None = None
    name: str = "chain"
    variant: str = "fp32"
    vocab_size: int = V
    batches: list[tuple[int, int]] = field(default_factory=list)
    step_sizes: list[int] = field(default_factory=list)

    @classmethod
    def open(cls, bundle: Bundle, variant: Variant, threads: CpuThreads) -> Self:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def new_cache(self, batch_size: int, capacity: int | None = None) -> Cache:
        slots = self.check_cache_size(batch_size, capacity)
        self.batches.append((batch_size, slots))
        return Cache(capacity=slots, lengths=np.zeros(batch_size, np.int64))

    def _step(
        self, input_ids: Ids, write_index: Ids, logits_index: Ids, cache: Cache, row: int | None
    ) -> Logits:
        self.step_sizes.append(input_ids.shape[1])
        last = np.take_along_axis(input_ids, logits_index, axis=1)
        logits: Logits = (np.log(CHAIN[last]) + 3).astype(np.float32)
        return logits


each_mode = pytest.mark.parametrize("mode", SCORE_MODES)


# --- windows ---


@pytest.mark.parametrize(
    ("count", "window", "bos", "expected"),
    [
        (6, 3, None, [[0, 1, 2], [3, 4, 5]]),
        (5, 3, None, [[0, 1, 2], [3, 4]]),
        (7, 3, None, [[0, 1, 2], [3, 4, 5]]),  # the last one would have nothing to score
        (2, 9, None, [[0, 1]]),
        (4, 3, 9, [[9, 0, 1], [9, 2, 3]]),
        (5, 3, 9, [[9, 0, 1], [9, 2, 3], [9, 4]]),
        (3, 2, 9, [[9, 0], [9, 1], [9, 2]]),
    ],
)
def test_text_is_cut_into_windows(
    count: int, window: int, bos: int | None, expected: list[list[int]]
) -> None:
    assert split_windows(range(count), window, bos) == expected


@pytest.mark.parametrize("bos", [None, 9])
@pytest.mark.parametrize("window", [1, 0, -3])
def test_window_too_small_to_score_a_token_is_an_error(window: int, bos: int | None) -> None:
    with pytest.raises(ValueError, match=f"a window needs at least 2 tokens, got {window}"):
        split_windows([1, 2, 3], window, bos)


@pytest.mark.parametrize(("ids", "bos"), [([], None), ([], 9), ([1], None)])
def test_text_with_nothing_to_score_is_an_error(ids: list[int], bos: int | None) -> None:
    with pytest.raises(ValueError, match=f"a text of {len(ids)} tokens leaves nothing to score"):
        split_windows(ids, 4, bos)


# --- scores ---


def test_perplexity_is_the_inverse_geometric_mean_over_all_windows() -> None:
    score = Score(token_logprobs=((math.log(0.5), math.log(0.125)), (math.log(0.25),)))
    assert score.tokens == 3
    assert score.nll == pytest.approx(2 * math.log(2))
    assert score.perplexity == pytest.approx(4)


@each_mode
def test_logprobs_are_those_of_each_token_after_the_one_before(mode: ScoreMode) -> None:
    score = score_windows(ChainBackend(), [[0, 1, 1, 2], [2, 0]], mode)
    expected = [[math.log(x) for x in row] for row in ([0.25, 0.8, 0.1], [0.25])]
    assert [list(row) for row in score.token_logprobs] == [
        pytest.approx(row, abs=1e-6) for row in expected
    ]
    assert score.tokens == 4
    assert score.perplexity == pytest.approx((0.25 * 0.8 * 0.1 * 0.25) ** -0.25, rel=1e-6)


def test_windows_run_alone_with_a_cache_of_their_own_length() -> None:
    backend = ChainBackend()
    score_windows(backend, [[0, 1, 1, 2], [2, 0]])
    assert backend.batches == [(1, 4), (1, 2)]


@each_mode
def test_rows_run_in_batches_of_what_the_bundle_takes(mode: ScoreMode) -> None:
    backend = ChainBackend()
    ids = np.array([[0, 1, 2, 0], [1, 1, 1, 1], [2, 0, 2, 0], [0, 0, 0, 0], [2, 2, 1, 1]])
    logits, score = score_logits(backend, ids, mode)
    assert [size for size, _ in backend.batches] == [2, 2, 1]
    np.testing.assert_allclose(logits, np.log(CHAIN[ids]) + 3, rtol=1e-6)
    expected = [[math.log(CHAIN[a, b]) for a, b in itertools.pairwise(r)] for r in ids]
    np.testing.assert_allclose(score.token_logprobs, expected, atol=1e-6)


def test_prefill_feeds_passes_and_decode_feeds_single_tokens() -> None:
    ids = np.array([[0, 1, 2, 0, 1]])
    at_once, one_by_one = ChainBackend(), ChainBackend()
    a = window_logits(at_once, ids, "prefill")
    b = window_logits(one_by_one, ids, "decode")
    assert a.shape == b.shape == (1, 5, V)
    np.testing.assert_array_equal(a, b)
    assert at_once.step_sizes == [3, 2]
    assert one_by_one.step_sizes == [1] * 5


@each_mode
def test_window_beyond_the_context_is_an_error(mode: ScoreMode) -> None:
    with pytest.raises(ValueError, match=r"a cache of 9 tokens is outside 1 to 8"):
        score_windows(ChainBackend(), [[0] * 9], mode)


@each_mode
def test_id_outside_the_vocabulary_is_an_error(mode: ScoreMode) -> None:
    with pytest.raises(ValueError, match=f"token id {V} is outside the vocabulary"):
        score_windows(ChainBackend(), [[0, V, 1]], mode)
