"""What `Backend` makes of a step: tried with a step whose logits betray the cache's content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.backends.base import Backend, Cache, Ids, Limits, Logits
from runtime.bundle import Bundle
from runtime.cpu_threads import CpuThreads
from runtime.manifest import Variant

V = 13  # vocabulary
UNWRITTEN = -1


@dataclass(kw_only=True)
class RecordedCache(Cache):
    """Keeps the tokens themselves, [B, C], where a real cache keeps keys and values."""

    tokens: Ids


@dataclass(frozen=True)
class StepCall:
    """One call of the step, with copies of what it was given."""

    input_ids: Ids
    write_index: Ids
    logits_index: Ids
    row: int | None


@dataclass
class HistoryBackend(Backend):
    """Its logits depend on every token of a row up to the query, and on their order."""

    limits: Limits
    router_mode: str | None = None
    name: str = "history"
    variant: str = "fp32"
    vocab_size: int = V
    calls: list[StepCall] = field(default_factory=list)

    @classmethod
    def open(cls, bundle: Bundle, variant: Variant, threads: CpuThreads) -> Self:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def new_cache(self, batch_size: int, capacity: int | None = None) -> RecordedCache:
        slots = self.check_cache_size(batch_size, capacity)
        return RecordedCache(
            capacity=slots,
            lengths=np.zeros(batch_size, np.int64),
            tokens=np.full((batch_size, slots), UNWRITTEN),
        )

    def _step(
        self, input_ids: Ids, write_index: Ids, logits_index: Ids, cache: Cache, row: int | None
    ) -> Logits:
        assert isinstance(cache, RecordedCache)
        lengths_before = cache.lengths.copy()
        S, M = input_ids.shape[1], logits_index.shape[1]
        rows = [*range(cache.batch_size)] if row is None else [row]
        assert len(input_ids) == len(write_index) == len(logits_index) == len(rows)
        assert 1 <= S <= self.limits.max_input_len
        assert M >= 1
        assert (write_index >= 0).all()
        assert (write_index + S <= cache.capacity).all(), "a write passes the end of the cache"
        assert ((logits_index >= 0) & (logits_index < S)).all()
        self.calls.append(StepCall(input_ids.copy(), write_index.copy(), logits_index.copy(), row))
        logits = np.empty((len(rows), M, V), np.float32)
        for b, cached in enumerate(rows):
            start = write_index[b]
            cache.tokens[cached, start : start + S] = input_ids[b]
            for m in range(M):
                history = cache.tokens[cached, : start + logits_index[b, m] + 1]
                assert UNWRITTEN not in history, "a query sees a slot that was never written"
                logits[b, m] = logits_after(history)
        assert (cache.lengths == lengths_before).all()
        return logits


def logits_after(history: Sequence[int] | Ids) -> Logits:
    """[V] numbers in -1 to 1 that another history, or another order, would not give."""
    state = 1
    for token in history:
        state = (state * 31 + int(token) + 1) % 1_000_003
    return np.sin(state * (1 + np.arange(V))).astype(np.float32)


def backend_of(
    *,
    batch: int = 4,
    input_len: int = 4,
    seq_len: int = 16,
    router_mode: str | None = None,
) -> HistoryBackend:
    limits = Limits(max_batch_size=batch, max_input_len=input_len, max_seq_len=seq_len)
    return HistoryBackend(limits, router_mode)


def padded(rows: Sequence[Sequence[int]], filler: int = V + 90) -> tuple[Ids, Ids]:
    """Rows as one [B, S] array and their lengths; what stands behind a row is no valid id."""
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), lengths.max()), filler)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    return ids, lengths


def ids_of(*tokens: int) -> Ids:
    return np.array(tokens, np.int64)


ROWS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4], [3, 1, 4, 1]]


# --- prefill and score ---


@pytest.mark.parametrize("input_len", [1, 2, 4, 11, 16])
def test_prefill_gives_the_logits_of_each_rows_last_token(input_len: int) -> None:
    backend = backend_of(input_len=input_len)
    cache = backend.new_cache(4)
    logits = backend.prefill(*padded(ROWS), cache)
    assert logits.shape == (4, V)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, [logits_after(row) for row in ROWS])
    assert cache.lengths.tolist() == [1, 7, 11, 4]
    assert cache.prompt_lengths.tolist() == [1, 7, 11, 4]


def test_prefill_feeds_rows_side_by_side_in_chunks_of_max_input_len() -> None:
    backend = backend_of(input_len=4)
    backend.prefill(*padded(ROWS), backend.new_cache(4))
    assert [call.row for call in backend.calls] == [None, None, None]
    assert [call.input_ids.shape for call in backend.calls] == [(4, 4), (4, 4), (4, 3)]


def test_row_that_has_ended_writes_its_surplus_behind_its_end() -> None:
    backend = backend_of(input_len=4)
    cache = backend.new_cache(4)
    backend.prefill(*padded(ROWS), cache)
    assert [call.write_index.tolist() for call in backend.calls] == [
        [0, 0, 0, 0],
        [1, 4, 4, 4],
        [1, 7, 8, 4],
    ]
    for b, row in enumerate(ROWS):
        assert cache.tokens[b, : len(row)].tolist() == row


def test_prefill_behind_cached_tokens_continues_each_row() -> None:
    backend = backend_of(input_len=3)
    cache = backend.new_cache(3)
    first, second = [[1], [2, 3, 4, 5], [6, 7]], [[8, 9, 10, 11], [12], [0, 1, 2]]
    backend.prefill(*padded(first), cache)
    logits = backend.prefill(*padded(second), cache)
    expected = [logits_after([*a, *b]) for a, b in zip(first, second, strict=True)]
    np.testing.assert_array_equal(logits, expected)
    assert cache.lengths.tolist() == [5, 5, 5]
    assert cache.prompt_lengths.tolist() == [1, 4, 2]


def test_rows_run_alone_where_the_longest_would_pass_the_end_of_another() -> None:
    backend = backend_of(input_len=8, seq_len=10)
    cache = backend.new_cache(2)
    backend.prefill(*padded([[1] * 8, [2]]), cache)
    backend.calls.clear()
    logits = backend.prefill(*padded([[3, 4], [5, 6, 7]]), cache)
    assert [call.row for call in backend.calls] == [0, 1]
    np.testing.assert_array_equal(
        logits, [logits_after([1] * 8 + [3, 4]), logits_after([2, 5, 6, 7])]
    )
    assert cache.lengths.tolist() == [10, 4]


def test_rows_run_side_by_side_where_the_longest_just_fits_behind_every_row() -> None:
    backend = backend_of(input_len=8, seq_len=10)
    cache = backend.new_cache(2)
    backend.prefill(*padded([[1] * 7, [2]]), cache)
    backend.calls.clear()
    backend.prefill(*padded([[3], [5, 6, 7]]), cache)
    assert [call.row for call in backend.calls] == [None]


def test_score_gives_the_logits_of_every_token_and_zero_behind_a_row() -> None:
    backend = backend_of(input_len=4)
    cache = backend.new_cache(4)
    logits = backend.score(*padded(ROWS), cache)
    assert logits.shape == (4, 11, V)
    for b, row in enumerate(ROWS):
        for s in range(11):
            expected = logits_after(row[: s + 1]) if s < len(row) else np.zeros(V)
            np.testing.assert_array_equal(logits[b, s], expected)
    assert cache.lengths.tolist() == [1, 7, 11, 4]


def test_score_near_the_end_of_the_cache_gives_the_same_logits_row_by_row() -> None:
    backend = backend_of(input_len=3, seq_len=9)
    cache = backend.new_cache(2)
    backend.prefill(*padded([[1] * 7, [2]]), cache)
    logits = backend.score(*padded([[3], [5, 6, 7, 8]]), cache)
    np.testing.assert_array_equal(logits[0, 0], logits_after([1] * 7 + [3]))
    assert not logits[0, 1:].any()
    for s in range(4):
        np.testing.assert_array_equal(logits[1, s], logits_after([2, 5, 6, 7, 8][: s + 2]))


def test_prefill_may_fill_the_cache_to_the_last_slot() -> None:
    backend = backend_of(input_len=4, seq_len=11)
    cache = backend.new_cache(4)
    np.testing.assert_array_equal(
        backend.prefill(*padded(ROWS), cache), [logits_after(row) for row in ROWS]
    )


# --- decode ---


def test_decode_after_prefill_equals_one_long_prefill() -> None:
    rows = [[1, 2], [3], [4, 5, 6]]
    backend = backend_of()
    cache = backend.new_cache(3)
    backend.prefill(*padded(rows), cache)
    for step in range(5):
        new = ids_of(step, step + 1, step + 2)
        rows = [[*row, int(token)] for row, token in zip(rows, new, strict=True)]
        logits = backend.decode(new, cache)
        np.testing.assert_array_equal(logits, [logits_after(row) for row in rows])
    assert cache.lengths.tolist() == [7, 6, 8]
    assert cache.prompt_lengths.tolist() == [2, 1, 3]


def test_decode_leaves_rows_that_take_no_part_as_they_are() -> None:
    backend = backend_of()
    cache = backend.new_cache(3)
    backend.prefill(*padded([[1, 2], [3], [4, 5, 6]]), cache)
    logits = backend.decode(ids_of(7, V, 8), cache, np.array([True, False, True]))
    np.testing.assert_array_equal(logits[0], logits_after([1, 2, 7]))
    np.testing.assert_array_equal(logits[2], logits_after([4, 5, 6, 8]))
    assert cache.lengths.tolist() == [3, 1, 4]
    again = backend.decode(ids_of(9, 9, 9), cache)
    np.testing.assert_array_equal(
        again, [logits_after(r) for r in ([1, 2, 7, 9], [3, 9], [4, 5, 6, 8, 9])]
    )


def test_decode_of_others_takes_the_last_token_of_a_full_row() -> None:
    backend = backend_of(input_len=4, seq_len=4)
    cache = backend.new_cache(2)
    backend.prefill(*padded([[1, 2, 3, 4], [5]]), cache)
    logits = backend.decode(ids_of(0, 6), cache, np.array([False, True]))
    np.testing.assert_array_equal(logits[1], logits_after([5, 6]))
    assert cache.lengths.tolist() == [3, 2]
    np.testing.assert_array_equal(
        backend.decode(ids_of(4, 7), cache), [logits_after([1, 2, 3, 4]), logits_after([5, 6, 7])]
    )


def test_decode_of_a_full_row_is_an_error_that_changes_nothing() -> None:
    backend = backend_of(input_len=4, seq_len=4)
    cache = backend.new_cache(2)
    backend.prefill(*padded([[1], [1, 2, 3, 4]]), cache)
    backend.calls.clear()
    with pytest.raises(
        ValueError, match="row 1 already holds 4 tokens, 1 more exceed the limit of this cache, 4"
    ):
        backend.decode(ids_of(1, 1), cache)
    assert not backend.calls
    assert cache.lengths.tolist() == [1, 4]


# --- rewind ---


def test_rewound_row_goes_on_as_if_the_tokens_had_never_been() -> None:
    backend = backend_of()
    cache = backend.new_cache(2)
    backend.prefill(*padded([[1, 2, 3, 4, 5], [6, 7, 8]]), cache)
    backend.rewind(cache, ids_of(2, 3))
    assert cache.lengths.tolist() == [2, 3]
    assert cache.prompt_lengths.tolist() == [2, 3]
    logits = backend.prefill(*padded([[9], [10, 11]]), cache)
    np.testing.assert_array_equal(
        logits, [logits_after([1, 2, 9]), logits_after([6, 7, 8, 10, 11])]
    )


@pytest.mark.parametrize("lengths", [(4, 1), (3, -1), (0, 2)])
def test_rewind_to_more_than_there_is_or_below_zero_is_an_error(lengths: tuple[int, int]) -> None:
    backend = backend_of()
    cache = backend.new_cache(2)
    backend.prefill(*padded([[1, 2, 3], [4]]), cache)
    with pytest.raises(ValueError, match=r"cannot rewind rows of \[3, 1\] tokens to \["):
        backend.rewind(cache, ids_of(*lengths))
    assert cache.lengths.tolist() == [3, 1]


def test_rewind_copies_the_lengths_it_is_given() -> None:
    backend = backend_of()
    cache = backend.new_cache(1)
    backend.prefill(*padded([[1, 2, 3]]), cache)
    target = ids_of(2)
    backend.rewind(cache, target)
    backend.decode(ids_of(5), cache)
    assert target.tolist() == [2]


# --- any order of operations ---

ROW_COUNT, SLOTS = 3, 9
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["prefill", "score", "decode", "rewind"]),
        st.lists(st.integers(0, 7), min_size=ROW_COUNT, max_size=ROW_COUNT),
        st.integers(0, 2**16),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(operations=OPERATIONS, input_len=st.integers(1, 5))
def test_any_order_of_operations_gives_the_logits_of_each_rows_own_history(
    operations: list[tuple[str, list[int], int]], input_len: int
) -> None:
    backend = backend_of(batch=ROW_COUNT, input_len=input_len, seq_len=SLOTS)
    cache = backend.new_cache(ROW_COUNT)
    histories: list[list[int]] = [[] for _ in range(ROW_COUNT)]
    for name, sizes, seed in operations:
        tokens = np.random.default_rng(seed).integers(0, V, (ROW_COUNT, SLOTS))
        if name == "rewind":
            histories = [h[:size] for h, size in zip(histories, sizes, strict=True)]
            backend.rewind(cache, ids_of(*map(len, histories)))
        elif name == "decode":
            active = np.array([size % 2 == 0 for size in sizes])
            if any(a and len(h) == SLOTS for a, h in zip(active, histories, strict=True)):
                continue
            logits = backend.decode(tokens[:, 0], cache, active)
            for b, history in enumerate(histories):
                del history[SLOTS - 1 :]
                if active[b]:
                    history.append(int(tokens[b, 0]))
                    np.testing.assert_array_equal(logits[b], logits_after(history))
        else:
            lengths = [min(1 + s, SLOTS - len(h)) for s, h in zip(sizes, histories, strict=True)]
            if not all(lengths):
                continue
            new = [tokens[b, :length].tolist() for b, length in enumerate(lengths)]
            append = backend.prefill if name == "prefill" else backend.score
            logits = append(*padded(new), cache)
            for b, history in enumerate(histories):
                for s, token in enumerate(new[b]):
                    history.append(token)
                    if name == "score":
                        np.testing.assert_array_equal(logits[b, s], logits_after(history))
                if name == "prefill":
                    np.testing.assert_array_equal(logits[b], logits_after(history))
        assert cache.lengths.tolist() == [len(history) for history in histories]
        for b, history in enumerate(histories):
            assert cache.tokens[b, : len(history)].tolist() == history


# --- arguments that cannot be ---


@pytest.mark.parametrize("bad", [-1, V, V + 5])
@pytest.mark.parametrize("call", ["prefill", "score"])
def test_prefill_and_score_name_an_id_outside_the_vocabulary(call: str, bad: int) -> None:
    backend = backend_of()
    cache = backend.new_cache(2)
    with pytest.raises(
        ValueError, match=rf"token id {bad} is outside the vocabulary of {V} tokens"
    ):
        getattr(backend, call)(*padded([[1, 2, 3], [4, bad]]), cache)
    assert not backend.calls
    assert not cache.lengths.any()


def test_decode_names_an_id_outside_the_vocabulary() -> None:
    backend = backend_of()
    cache = backend.new_cache(2)
    with pytest.raises(ValueError, match=rf"token id {V} is outside the vocabulary"):
        backend.decode(ids_of(1, V), cache)
    assert not cache.lengths.any()


@pytest.mark.parametrize("lengths", [(0, 2), (2, 4), (-1, 1)])
def test_lengths_outside_the_given_ids_are_an_error(lengths: tuple[int, int]) -> None:
    backend = backend_of()
    with pytest.raises(ValueError, match=r"lengths must be between 1 and 3, got \["):
        backend.prefill(np.zeros((2, 3), np.int64), ids_of(*lengths), backend.new_cache(2))
    assert not backend.calls


def test_rows_of_ids_must_be_those_of_the_cache() -> None:
    backend = backend_of()
    with pytest.raises(ValueError, match="2 rows of ids for a cache of 3 rows"):
        backend.prefill(np.zeros((2, 3), np.int64), ids_of(1, 1), backend.new_cache(3))


def test_prompt_longer_than_the_cache_is_an_error_that_changes_nothing() -> None:
    backend = backend_of(seq_len=6)
    cache = backend.new_cache(2, 5)
    backend.prefill(*padded([[1], [2, 3]]), cache)
    backend.calls.clear()
    with pytest.raises(ValueError, match="row 1: 2 cached and 4 new tokens exceed the limit of 5"):
        backend.prefill(*padded([[1], [2, 3, 4, 5]]), cache)
    assert not backend.calls
    assert cache.lengths.tolist() == [1, 2]


@pytest.mark.parametrize("batch_size", [0, 5, -1])
def test_cache_of_a_batch_that_was_not_built_for_is_an_error(batch_size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"a batch of {batch_size} sequences is outside 1 to 4.*--max-batch-size"
    ):
        backend_of(batch=4).new_cache(batch_size)


@pytest.mark.parametrize("capacity", [0, 17])
def test_cache_of_more_slots_than_were_built_for_is_an_error(capacity: int) -> None:
    with pytest.raises(
        ValueError, match=rf"a cache of {capacity} tokens is outside 1 to 16.*--max-seq-len"
    ):
        backend_of(seq_len=16).new_cache(1, capacity)


def test_cache_without_a_capacity_takes_all_slots() -> None:
    assert backend_of(seq_len=16).new_cache(2).capacity == 16
    assert backend_of(seq_len=16).new_cache(2, 3).capacity == 3


# --- the router mode `mixed` ---


def mixed() -> HistoryBackend:
    return backend_of(input_len=11, router_mode="mixed")


@pytest.mark.parametrize("call", ["prefill", "score"])
def test_mixed_runs_each_prompt_alone_in_one_pass_without_surplus(call: str) -> None:
    backend = mixed()
    cache = backend.new_cache(4)
    getattr(backend, call)(*padded(ROWS), cache)
    assert [step.row for step in backend.calls] == [0, 1, 2, 3]
    assert [step.input_ids[0].tolist() for step in backend.calls] == ROWS


def test_mixed_decodes_all_rows_in_one_step() -> None:
    backend = mixed()
    cache = backend.new_cache(4)
    backend.prefill(*padded(ROWS), cache)
    backend.calls.clear()
    logits = backend.decode(ids_of(1, 2, 3, 4), cache)
    assert [step.row for step in backend.calls] == [None]
    np.testing.assert_array_equal(logits, [logits_after([*r, i + 1]) for i, r in enumerate(ROWS)])


def test_mixed_refuses_a_prompt_longer_than_one_pass() -> None:
    backend = backend_of(input_len=4, router_mode="mixed")
    cache = backend.new_cache(2)
    with pytest.raises(
        ValueError, match=r"prompt of 5 tokens exceeds the 4 of one pass.*--router per_token"
    ):
        backend.prefill(*padded([[1], [1, 2, 3, 4, 5]]), cache)
    assert not backend.calls


def test_mixed_refuses_a_prompt_behind_cached_tokens() -> None:
    backend = mixed()
    cache = backend.new_cache(2)
    backend.prefill(*padded([[1], [2, 3]]), cache)
    with pytest.raises(ValueError, match=r"prompt behind cached tokens.*--router per_token"):
        backend.prefill(*padded([[1], [2]]), cache)
    assert cache.lengths.tolist() == [1, 2]


def test_mixed_rewinds_to_the_end_of_a_prompt_and_to_nothing_but_not_into_a_prompt() -> None:
    backend = mixed()
    cache = backend.new_cache(2)
    backend.prefill(*padded([[1, 2, 3], [4]]), cache)
    backend.decode(ids_of(5, 6), cache)
    with pytest.raises(ValueError, match=r"cannot rewind into a prompt.*--router per_token"):
        backend.rewind(cache, ids_of(2, 1))
    assert cache.lengths.tolist() == [4, 2]
    backend.rewind(cache, ids_of(3, 1))
    logits = backend.decode(ids_of(7, 8), cache)
    np.testing.assert_array_equal(logits, [logits_after([1, 2, 3, 7]), logits_after([4, 8])])
    backend.rewind(cache, ids_of(0, 0))
    logits = backend.prefill(*padded([[9], [10, 11]]), cache)
    np.testing.assert_array_equal(logits, [logits_after([9]), logits_after([10, 11])])
    assert cache.prompt_lengths.tolist() == [1, 2]


def test_per_token_may_do_what_mixed_may_not() -> None:
    backend = backend_of(input_len=4, router_mode="per_token")
    cache = backend.new_cache(2)
    backend.prefill(*padded([[1], [1, 2, 3, 4, 5]]), cache)
    backend.rewind(cache, ids_of(1, 2))
    logits = backend.prefill(*padded([[2], [3]]), cache)
    np.testing.assert_array_equal(logits, [logits_after([1, 2]), logits_after([1, 2, 3])])
