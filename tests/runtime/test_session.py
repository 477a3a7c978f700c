"""The loop that makes tokens, on a backend whose logits are a table: the next token is scripted."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from runtime.backends.base import Backend, Cache, Ids, Limits, Logits
from runtime.bundle import Bundle
from runtime.cpu_threads import CpuThreads
from runtime.manifest import Variant
from runtime.philox import uniform_numbers
from runtime.sampling import SamplingParams, log_probabilities, pick
from runtime.session import GenerationEvent, GenerationSession
from runtime.tokenizer import Tokenizer

V = 12
EOS = 11


@dataclass(kw_only=True)
class LastTokenCache(Cache):
    """A row needs no more memory than its last token, which the step is given."""


@dataclass
class TableBackend(Backend):
    """Logits depend on the last token alone: a row of a table."""

    table: Logits
    limits: Limits
    router_mode: str | None = None
    name: str = "table"
    variant: str = "fp32"
    vocab_size: int = V
    batches: list[tuple[int, int]] = field(default_factory=list)
    steps: int = 0

    @classmethod
    def open(cls, bundle: Bundle, variant: Variant, threads: CpuThreads) -> Self:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def new_cache(self, batch_size: int, capacity: int | None = None) -> LastTokenCache:
        slots = self.check_cache_size(batch_size, capacity)
        self.batches.append((batch_size, slots))
        return LastTokenCache(capacity=slots, lengths=np.zeros(batch_size, np.int64))

    def _step(
        self, input_ids: Ids, write_index: Ids, logits_index: Ids, cache: Cache, row: int | None
    ) -> Logits:
        assert (write_index + input_ids.shape[1] <= cache.capacity).all()
        self.steps += 1
        return self.table[np.take_along_axis(input_ids, logits_index, axis=1)]


def successor_table(successors: dict[int, int] | None = None) -> Logits:
    """After token t comes t + 1 by far, EOS after EOS - 1 included, unless said otherwise."""
    table = np.zeros((V, V), np.float32)
    for token in range(V):
        table[token, (successors or {}).get(token, (token + 1) % V)] = 9
    return table


def table_backend(
    table: Logits | None = None, *, batch: int = 4, seq_len: int = 32, input_len: int = 8
) -> TableBackend:
    limits = Limits(max_batch_size=batch, max_input_len=input_len, max_seq_len=seq_len)
    return TableBackend(successor_table() if table is None else table, limits)


def params_of(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 5, **values})


def letters() -> Tokenizer:
    """Token i is the i-th letter; the last is the special end-of-text."""
    vocab = {letter: i for i, letter in enumerate("abcdefghijk")}
    library = tokenizers.Tokenizer(models.BPE({**vocab, "<eos>": EOS}, []))
    library.add_special_tokens(["<eos>"])
    library.decoder = decoders.Fuse()
    return Tokenizer(library, {"eos_token": "<eos>"}, None, {})


def tokens_of(events: Sequence[GenerationEvent]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = defaultdict(list)
    for event in events:
        rows[event.index].append(event.token_id)
    return dict(rows)


def reasons_of(events: Sequence[GenerationEvent]) -> dict[int, str]:
    """Each sequence's reason; one that does not come with its last event fails."""
    reasons: dict[int, str] = {}
    for event in events:
        assert event.index not in reasons, "an event follows a sequence's end"
        if event.finish_reason is not None:
            reasons[event.index] = event.finish_reason
    return reasons


def generate(
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    backend: TableBackend | None = None,
    tokenizer: Tokenizer | None = None,
    eos: Sequence[int] = (EOS,),
) -> list[GenerationEvent]:
    session = GenerationSession(backend or table_backend(), tokenizer, eos_token_ids=eos)
    return [*session.generate(prompts, params)]


# --- when a sequence ends ---


def test_max_tokens_ends_a_sequence_with_reason_length() -> None:
    backend = table_backend()
    events = generate([[7, 0], [3]], params_of(max_tokens=3), backend=backend)
    assert tokens_of(events) == {0: [1, 2, 3], 1: [4, 5, 6]}
    assert reasons_of(events) == {0: "length", 1: "length"}
    assert backend.steps == 3  # the last token needs no step of its own


def test_end_of_text_ends_a_sequence_and_others_go_on() -> None:
    events = generate([[9], [0]], params_of(max_tokens=6))
    assert tokens_of(events) == {0: [10, EOS], 1: [1, 2, 3, 4, 5, 6]}
    assert reasons_of(events) == {0: "stop", 1: "length"}


def test_end_of_text_as_the_last_allowed_token_is_a_stop() -> None:
    assert reasons_of(generate([[9]], params_of(max_tokens=2))) == {0: "stop"}


def test_ignore_eos_goes_on_but_stop_ids_still_stop() -> None:
    params = params_of(max_tokens=9, ignore_eos=True, stop_token_ids=(2,))
    events = generate([[9]], params)
    assert tokens_of(events) == {0: [10, EOS, 0, 1, 2]}
    assert reasons_of(events) == {0: "stop"}


def test_every_one_of_several_end_ids_stops() -> None:
    events = generate([[0], [4], [7]], params_of(stop_token_ids=(6,)), eos=(2, 9))
    assert tokens_of(events) == {0: [1, 2], 1: [5, 6], 2: [8, 9]}


def test_end_ids_cannot_be_picked_before_min_tokens() -> None:
    table = successor_table(dict.fromkeys(range(V), EOS))
    table[:, 5] = 4  # second best
    table[:, 6] = 3
    params = params_of(min_tokens=3, stop_token_ids=(5,))
    events = generate([[0]], params, backend=table_backend(table))
    assert tokens_of(events) == {0: [6, 6, 6, EOS]}
    assert reasons_of(events) == {0: "stop"}


def test_min_tokens_leaves_end_of_text_alone_where_it_is_ignored() -> None:
    table = successor_table(dict.fromkeys(range(V), EOS))
    params = params_of(min_tokens=2, max_tokens=3, ignore_eos=True)
    assert tokens_of(generate([[0]], params, backend=table_backend(table))) == {0: [EOS] * 3}


# --- the context ---


def test_context_ends_a_sequence_with_reason_length(caplog: pytest.LogCaptureFixture) -> None:
    backend = table_backend(seq_len=6)
    with caplog.at_level(logging.INFO):
        events = generate([[0, 1, 2, 3], [0]], params_of(), backend=backend)
    assert tokens_of(events) == {0: [4, 5], 1: [1, 2, 3, 4, 5]}
    assert reasons_of(events) == {0: "length", 1: "length"}
    assert backend.batches == [(2, 6)]
    assert "prompt 0: 4 tokens and 5 new ones exceed the context of 6" in caplog.text
    assert "prompt 1" not in caplog.text


def test_context_policy_error_refuses_before_anything_runs() -> None:
    backend = table_backend(seq_len=6)
    session = GenerationSession(backend, context_policy="error")
    with pytest.raises(ValueError, match=r"prompt 1: 2 tokens and 5 new.*--context-policy stop"):
        session.generate([[0], [0, 1]], params_of())
    assert not backend.batches
    assert len([*session.generate([[0]], params_of())]) == 5


def test_unknown_context_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be one of stop, error, got 'slide'"):
        GenerationSession(table_backend(), context_policy="slide")  # type: ignore[arg-type]


def test_room_is_what_the_context_leaves() -> None:
    assert GenerationSession(table_backend(seq_len=6)).room(4) == 2


def test_cache_is_no_larger_than_the_longest_sequence() -> None:
    backend = table_backend()
    generate([[0], [0, 1, 2]], params_of(max_tokens=4), backend=backend)
    assert backend.batches == [(2, 7)]


# --- batches ---


def test_prompts_run_in_groups_of_max_batch_size() -> None:
    backend = table_backend(batch=2)
    events = generate([[0], [2], [4], [6], [8]], params_of(max_tokens=2), backend=backend)
    assert [size for size, _ in backend.batches] == [2, 2, 1]
    assert tokens_of(events) == {0: [1, 2], 1: [3, 4], 2: [5, 6], 3: [7, 8], 4: [9, 10]}
    assert [event.index for event in events] == [0, 1, 0, 1, 2, 3, 2, 3, 4, 4]


def test_no_prompts_give_no_events() -> None:
    assert generate([], params_of()) == []


def test_events_come_as_tokens_are_made() -> None:
    backend = table_backend(batch=1)
    events = GenerationSession(backend).generate([[0], [1]], params_of())
    assert backend.steps == 0
    next(events)
    assert (backend.steps, len(backend.batches)) == (1, 1)
    next(events)
    assert backend.steps == 2


def random_table(seed: int) -> Logits:
    return np.random.default_rng(seed).normal(size=(V, V)).astype(np.float32)


def test_drawn_tokens_follow_from_seed_place_and_count() -> None:
    table = random_table(0)
    params = params_of(temperature=1.0, seed=77)
    events = generate([[3], [3], [5]], params, backend=table_backend(table, batch=2), eos=())
    for index, prompt in enumerate([3, 3, 5]):
        last, expected = prompt, []
        for count in range(5):
            number = uniform_numbers(77, np.array([index]), np.array([count]))[0]
            last = pick(table[last], number, params)
            expected.append(last)
        assert tokens_of(events)[index] == expected


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_what_runs_side_by_side_changes_nothing(batch: int) -> None:
    prompts = [[1], [2, 3, 4], [5, 6], [7], [8, 9, 10, 0, 1], [2], [2]]
    params = params_of(
        temperature=0.9, max_tokens=8, repetition_penalty=1.3, frequency_penalty=0.2, top_k=6
    )
    backend = table_backend(random_table(1), batch=batch, input_len=2)
    alone = generate(prompts, params, backend=table_backend(random_table(1), batch=1))
    together = generate(prompts, params, backend=backend)
    assert tokens_of(together) == tokens_of(alone)
    assert reasons_of(together) == reasons_of(alone)


def test_penalties_see_the_prompt_and_the_text() -> None:
    table = np.zeros((V, V), np.float32)
    table[:, :4] = [8, 7, 6, 5]
    params = params_of(repetition_penalty=100.0, max_tokens=3)
    events = generate([[0], [1]], params, backend=table_backend(table))
    assert tokens_of(events) == {0: [1, 2, 3], 1: [0, 2, 3]}


# --- text ---


def test_text_of_events_is_what_the_tokens_say() -> None:
    events = generate([[8], [0]], params_of(max_tokens=3), tokenizer=letters())
    assert [e.text for e in events if e.index == 0] == ["j", "k", ""]
    assert [e.text for e in events if e.index == 1] == ["b", "c", "d"]


def test_without_a_tokenizer_events_have_no_text() -> None:
    assert {event.text for event in generate([[0]], params_of())} == {""}


def test_stop_string_ends_its_sequence_and_is_not_shown() -> None:
    events = generate([[0], [5]], params_of(stop=("cd",)), tokenizer=letters())
    assert [e.text for e in events if e.index == 0] == ["b", "", ""]
    assert tokens_of(events) == {0: [1, 2, 3], 1: [6, 7, 8, 9, 10]}
    assert reasons_of(events) == {0: "stop", 1: "length"}


def test_beginning_of_a_stop_string_is_shown_at_the_end() -> None:
    events = generate([[0]], params_of(stop=("fz",)), tokenizer=letters())
    assert [event.text for event in events] == ["b", "c", "d", "e", "f"]
    held = generate([[0]], params_of(stop=("ez",)), tokenizer=letters())
    assert [event.text for event in held] == ["b", "c", "d", "", "ef"]


def test_stop_string_without_a_tokenizer_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"stop strings need a tokenizer.*--stop-token-ids"):
        GenerationSession(table_backend()).generate([[0]], params_of(stop=("x",)))


# --- log-probabilities ---


def test_logprobs_are_those_of_the_models_own_logits() -> None:
    table = random_table(2)
    params = params_of(
        logprobs=2, temperature=0.5, logit_bias={4: 50.0}, max_tokens=2, repetition_penalty=2.0
    )
    events = generate([[3]], params, backend=table_backend(table))
    last = 3
    for event in events:
        own = log_probabilities(table[last])
        assert event.token_id == 4
        assert event.logprobs is not None
        assert event.logprobs.logprob == pytest.approx(float(own[4]), abs=1e-6)
        best = np.argsort(-own)[:2]
        assert [token for token, _ in event.logprobs.top] == best.tolist()
        assert [value for _, value in event.logprobs.top] == pytest.approx(own[best].tolist())
        last = event.token_id


def test_logprobs_of_zero_best_still_give_the_tokens_own() -> None:
    (event,) = generate(
        [[3]], params_of(logprobs=0, max_tokens=1), backend=table_backend(np.zeros((V, V), "f4"))
    )
    assert event.logprobs is not None
    assert event.logprobs.logprob == pytest.approx(-math.log(V))
    assert event.logprobs.top == ()


def test_no_logprobs_unless_asked_for() -> None:
    assert {event.logprobs for event in generate([[0]], params_of())} == {None}


# --- prompts that cannot be ---


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([], "prompt 1 is empty; give at least one token"),
        ([0, V], f"prompt 1: token id {V} is outside the vocabulary of {V} tokens"),
        ([-1], "prompt 1: token id -1 is outside the vocabulary"),
        ([0] * 32, "prompt 1 has 32 tokens, the limit is 32 .*--max-seq-len"),
    ],
)
def test_prompt_that_cannot_be_is_named_before_anything_runs(
    prompt: list[int], problem: str
) -> None:
    backend = table_backend()
    with pytest.raises(ValueError, match=problem):
        GenerationSession(backend).generate([[0], prompt], params_of())
    assert not backend.batches


def test_parameters_outside_the_vocabulary_are_named_before_anything_runs() -> None:
    backend = table_backend()
    with pytest.raises(ValueError, match=f"outside the vocabulary of {V} tokens: stop_token_ids"):
        GenerationSession(backend).generate([[0]], params_of(stop_token_ids=(V,)))
    assert not backend.batches


def test_prompt_that_leaves_room_for_one_token_gets_one() -> None:
    events = generate([[0] * 31], params_of())
    assert tokens_of(events) == {0: [1]}
    assert reasons_of(events) == {0: "length"}
