"""Tokens chosen by the graph behind each step are those that the host chooses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from runtime.backends import open_backend
from runtime.backends.base import Backend
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from runtime.bundle import Bundle
from runtime.cpu_threads import CpuThreads
from runtime.sampling import SamplingParams, make_sampler
from runtime.session import GenerationEvent, GenerationSession
from runtime.token_chooser import TokenChooser
from tests.command_calls import Built

PROMPTS = [[3, 14, 15], [92], [65, 35, 89, 79, 32]]


@pytest.fixture(scope="module")
def bundle(moe_bundle: Built) -> Bundle:
    return Bundle.open(moe_bundle.path, verify=True)


@pytest.fixture
def graph(bundle: Bundle) -> Iterator[OnnxRuntimeBackend]:
    """Chooses in the graph."""
    backend = open_backend("onnxruntime", bundle, threads=CpuThreads(1))
    assert isinstance(backend, OnnxRuntimeBackend)
    yield backend
    backend.close()


@pytest.fixture
def host(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The same model, its tokens chosen by the host."""
    backend = open_backend("onnxruntime", bundle, threads=CpuThreads(1))
    monkeypatch.setattr(backend, "_choice", None)
    yield backend
    backend.close()


def events(backend: Backend, **params: Any) -> list[GenerationEvent]:
    session = GenerationSession(backend, eos_token_ids=(1,))
    return list(session.generate(PROMPTS, SamplingParams(max_tokens=40, **params)))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 20, "seed": 3},
        {"temperature": 20, "top_k": 5, "seed": 4},
        {"temperature": 30, "top_p": 0.7, "seed": 5},
        {"temperature": 30, "min_p": 0.2, "top_k": 40, "seed": 6},
    ],
    ids=str,
)
def test_graph_and_host_choose_the_same(
    graph: OnnxRuntimeBackend, host: Backend, params: dict[str, Any]
) -> None:
    assert events(graph, ignore_eos=True, **params) == events(host, ignore_eos=True, **params)
    assert graph.host_choices == 0  # 97 tokens are fewer than the candidates


def test_rows_that_end_leave_the_others_as_they_are(
    graph: OnnxRuntimeBackend, host: Backend
) -> None:
    found = events(graph, temperature=30, seed=1, stop_token_ids=tuple(range(20)))
    assert found == events(host, temperature=30, seed=1, stop_token_ids=tuple(range(20)))
    ends = [event for event in found if event.finish_reason == "stop"]
    assert 1 <= len(ends) <= 3
    assert len({sum(event.index == row for event in found) for row in range(3)}) > 1


def test_log_probabilities_are_those_of_the_step(graph: OnnxRuntimeBackend, host: Backend) -> None:
    found = events(graph, temperature=5, logprobs=3)
    assert found == events(host, temperature=5, logprobs=3)
    assert all(event.logprobs is not None for event in found)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"repetition_penalty": 1.3}, "the graph does not know repetition_penalty"),
        ({"logit_bias": {5: 2.0}, "min_tokens": 3}, "does not know logit_bias, min_tokens"),
    ],
)
def test_rules_that_the_graph_lacks_are_the_hosts_and_said_once(
    graph: OnnxRuntimeBackend,
    host: Backend,
    params: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    assert events(graph, temperature=9, **params) == events(host, temperature=9, **params)
    told = [record.message for record in caplog.records if reason in record.message]
    assert len(told) == 1
    assert told[0].startswith("tokens are chosen by the host")


def test_token_of_which_the_graph_is_not_certain_is_the_hosts(
    graph: OnnxRuntimeBackend, host: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind = graph._bind_choice

    class Uncertain:
        """The graph that chooses, never certain."""

        def __init__(self, session: Any) -> None:
            self._session = session
            self.fits: list[Any] = []

        def io_binding(self) -> Any:
            return self._session.io_binding()

        def run_with_iobinding(self, binding: Any) -> None:
            self._session.run_with_iobinding(binding)
            self.fits[-1][:] = False

    assert graph._choice is not None
    uncertain = Uncertain(graph._choice.session)
    monkeypatch.setattr(
        graph, "_choice", type(graph._choice)(session=uncertain, width=graph._choice.width)
    )

    def remember(*arguments: Any) -> Any:
        bound = bind(*arguments)
        uncertain.fits.append(bound.fits)
        return bound

    monkeypatch.setattr(graph, "_bind_choice", remember)
    found = events(graph, temperature=20, seed=9, ignore_eos=True)
    assert found == events(host, temperature=20, seed=9, ignore_eos=True)
    assert graph.host_choices == 3 * 39  # all but the first token of each row


def test_steps_before_and_behind_a_run_of_choices_fit_together(
    graph: OnnxRuntimeBackend, host: Backend
) -> None:
    ids, lengths = np.array([[3, 14, 15, 0], [92, 65, 35, 89]]), np.array([3, 4])
    results = []
    for backend in (graph, host):
        cache = backend.new_cache(2, 12)
        first = backend.prefill(ids, lengths, cache).argmax(-1)
        logits = backend.decode(first, cache)
        sampler = make_sampler(SamplingParams(temperature=0), backend.vocab_size)
        chooser = TokenChooser(sampler, ids, lengths, np.arange(2))
        steps = backend.decode_many(logits.argmax(-1), cache, chooser, np.ones(2, bool))
        chosen = [next(steps).copy() for _ in range(4)]
        assert cache.lengths.tolist() == [8, 9]
        backend.rewind(cache, np.array([5, 6]))
        again = backend.decode(chosen[0], cache)
        results.append((np.stack(chosen), again, logits))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_full_cache_ends_the_choices_with_an_error(graph: OnnxRuntimeBackend) -> None:
    cache = graph.new_cache(1, 8)
    ids = np.array([[3, 14, 15]])
    first = graph.prefill(ids, np.array([3]), cache).argmax(-1)
    sampler = make_sampler(SamplingParams(temperature=0), graph.vocab_size)
    chooser = TokenChooser(sampler, ids, np.array([3]), np.arange(1))
    steps = graph.decode_many(first, cache, chooser, np.ones(1, bool))
    assert len([next(steps) for _ in range(5)]) == 5
    with pytest.raises(ValueError, match="row 0 already holds 8 tokens, 1 more exceed the limit"):
        next(steps)
