"""Steps on a lane: what a step costs, graphs, limits, and threads; over the stand-in of a GPU."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import plugins.tensorrt_plugin
from plugins.plugin_host import PluginHost
from runtime.backends import open_backend
from runtime.backends.base import Backend, BackendUnavailableError
from runtime.bundle import Bundle
from runtime.sampling import SamplingParams
from tests.engine_runs import generate, live, prefill, prompts
from tests.fake_tensorrt import FakeGpu
from tests.fake_tensorrt.cuda import Status
from tests.fake_tensorrt.engine_file import add_fake_engine


def test_a_second_thread_in_a_step_of_the_same_cache_is_told_to_take_its_own(
    engine: Backend, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = engine.new_cache(1)
    prefill(engine, cache, [3, 4])
    told: list[str] = []
    wait = gpu.cuda.cudaStreamSynchronize

    def intrude(stream: Any) -> Any:
        monkeypatch.undo()

        def step() -> None:
            with pytest.raises(RuntimeError) as error:
                engine.decode(np.array([5]), cache)
            told.append(str(error.value))

        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
        return wait(stream)

    monkeypatch.setattr(gpu.cuda, "cudaStreamSynchronize", intrude)
    engine.decode(np.array([5]), cache)
    (text,) = told
    assert "two threads step one cache at once; give each session its own (new_cache)" in text


def test_a_decode_step_copies_once_each_way_and_waits_once(engine: Backend, gpu: FakeGpu) -> None:
    cache = engine.new_cache(2)
    prefill(engine, cache, [3, 4, 5], [6])
    engine.decode(np.array([7, 8]), cache)
    before = dict(gpu.cuda.calls)
    for _ in range(50):
        engine.decode(np.array([7, 8]), cache)
    done = {name: n - before.get(name, 0) for name, n in gpu.cuda.calls.items()}
    made = {name: n for name, n in done.items() if n}
    assert made == {"cudaMemcpyAsync": 100, "cudaStreamSynchronize": 50}


def test_a_batch_of_all_rows_allocates_nothing_for_its_logits(
    engine: Backend, gpu: FakeGpu
) -> None:
    cache = engine.new_cache(3)
    before = gpu.cuda.calls["cudaMalloc"]
    prefill(engine, cache, [3, 4, 5], [6], [7])
    engine.decode(np.array([7, 8, 9]), cache)
    assert gpu.cuda.calls["cudaMalloc"] == before


def test_too_little_memory_for_the_logits_of_scoring_says_how_to_score(
    engine: Backend, gpu: FakeGpu
) -> None:
    cache = engine.new_cache(1)
    gpu.cuda.total_bytes = gpu.cuda.used_bytes + 100_000
    text = r"logits of every token 0\.6 MB\), 0\.1 MB are free; score with a smaller --window"
    with pytest.raises(BackendUnavailableError, match=text):
        engine.score(np.ones((1, 64), np.int64), np.array([64]), cache)


def test_a_switch_of_profiles_that_fails_is_made_again(
    engine: Backend, reference: Backend, gpu: FakeGpu
) -> None:
    cache, expected = engine.new_cache(1), reference.new_cache(1)
    prefill(engine, cache, [3, 4, 5])
    gpu.cuda.failures["cudaStreamSynchronize"] = Status.cudaErrorIllegalAddress
    with pytest.raises(RuntimeError, match="cudaStreamSynchronize failed"):
        engine.decode(np.array([6]), cache)
    prefill(reference, expected, [3, 4, 5])
    found = [prefill(b, c, [6, 7]) for b, c in ((engine, cache), (reference, expected))]
    np.testing.assert_allclose(*found, atol=1e-4)


def test_a_batch_runs_in_its_own_memory_whatever_the_lane_has_bound_before(
    engine: Backend, gpu: FakeGpu
) -> None:
    first = engine.new_cache(1)
    expected = prefill(engine, first, [3])  # a step of one token, as the next batch's first one
    del first
    other = engine.new_cache(2)  # on the same lane; runs nothing
    taken = engine.new_cache(1)  # on another one, perhaps where the first cache was
    del other
    again = engine.new_cache(1)
    np.testing.assert_array_equal(prefill(engine, again, [3]), expected)
    assert live(gpu, "execution context") == 2
    del taken


def test_standard_tensorrt_decodes_by_a_graph_of_ours_once_a_step_has_run(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu
) -> None:
    bundle = add_fake_engine(engine_source, tmp_path / "bundle", backend="tensorrt")
    with closing(open_backend("tensorrt", bundle)) as backend:
        cache = backend.new_cache(1)
        for _ in range(2):  # the second prompt makes the graph's shapes and profile invalid
            prefill(backend, cache, [3, 4, 5])
            launched = gpu.cuda.calls.get("cudaGraphLaunch", 0)
            for _ in range(5):
                backend.decode(np.array([7]), cache)
            assert gpu.cuda.calls["cudaGraphLaunch"] == launched + 4
        assert gpu.cuda.calls["cudaGraphInstantiate"] == 2


def test_a_step_that_cannot_be_captured_is_told_once_and_decoding_goes_on(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = add_fake_engine(engine_source, tmp_path / "bundle", backend="tensorrt")
    rows = prompts(10)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    with closing(open_backend("onnxruntime", bundle)) as reference:
        expected = generate(reference, rows, params)
    with closing(open_backend("tensorrt", bundle)) as backend:
        gpu.cuda.captures = False
        with caplog.at_level(logging.INFO, "runtime"):
            assert generate(backend, rows, params) == expected
    told = [r.message for r in caplog.records if "without a CUDA graph" in r.message]
    assert len(told) == 1


def test_tensorrt_rtx_captures_by_itself(engine: Backend, gpu: FakeGpu) -> None:
    cache = engine.new_cache(1)
    prefill(engine, cache, [3])
    for _ in range(4):
        engine.decode(np.array([7]), cache)
    assert "cudaStreamBeginCapture" not in gpu.cuda.calls


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda e: e.new_cache(4), "a batch of 4 sequences is outside 1 to 3"),
        (lambda e: e.new_cache(1, 421), "a cache of 421 tokens is outside 1 to 420"),
        (
            lambda e: prefill(e, e.new_cache(1), [3] * 421),
            "0 cached and 421 new tokens exceed the limit of 420",
        ),
        (
            lambda e: e._step(
                np.zeros((1, 65), np.int64),
                np.zeros(1, np.int64),
                np.zeros((1, 1), np.int64),
                e.new_cache(1),
                None,
            ),
            "a step of 1 x 65 tokens is outside the engine's profiles, 3 x 64 at the most",
        ),
    ],
    ids=["rows", "slots", "prompt", "step"],
)
def test_what_the_engine_was_not_built_for_is_refused(
    engine: Backend, ask: Callable[[Any], object], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        ask(engine)


def test_closing_waits_for_the_step_of_another_thread(
    engine_bundle: Bundle, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_backend("tensorrt_rtx", engine_bundle)
    cache = backend.new_cache(1)
    closing_thread = threading.Thread(target=backend.close)
    wait, found = gpu.cuda.cudaStreamSynchronize, []

    def close_meanwhile(stream: Any) -> Any:
        monkeypatch.undo()
        closing_thread.start()
        closing_thread.join(0.2)
        found.append(closing_thread.is_alive())
        return wait(stream)

    prefill(backend, cache, [3])
    monkeypatch.setattr(gpu.cuda, "cudaStreamSynchronize", close_meanwhile)
    assert np.isfinite(backend.decode(np.array([4]), cache)).all()
    closing_thread.join()
    assert found == [True]


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaStreamSynchronize", "execute_async_v3"])
def test_a_step_that_fails_spoils_its_cache_alone(engine: Backend, gpu: FakeGpu, call: str) -> None:
    cache, other = engine.new_cache(2), engine.new_cache(1)
    prefill(engine, cache, [3], [4])
    engine.decode(np.array([5, 6]), cache)
    if call == "execute_async_v3":
        gpu.trt.refuse.add(call)
    else:
        gpu.cuda.failures[call] = Status.cudaErrorIllegalAddress
    with pytest.raises(RuntimeError, match=f"{call} failed|a step could not be put on the stream"):
        engine.decode(np.array([5, 6]), cache)
    gpu.trt.refuse.clear()
    with pytest.raises(RuntimeError, match="an earlier step on this cache has failed"):
        engine.decode(np.array([5, 6]), cache)
    prefill(engine, other, [3])
    contexts = live(gpu, "execution context")
    cache.close()  # type: ignore[attr-defined]
    assert live(gpu, "execution context") == contexts - 1, "its lane serves no other batch"
    prefill(engine, engine.new_cache(2), [3], [4])


def test_what_a_plugin_raises_reaches_the_error(
    engine: Backend, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = PluginHost()
    monkeypatch.setitem(plugins.tensorrt_plugin._HOSTS, "tensorrt_rtx", (host, []))
    cache = engine.new_cache(1)
    prefill(engine, cache, [3])
    host.problems.append("ExpertGather: no kernel covers these shapes")
    gpu.trt.refuse.add("execute_async_v3")
    with pytest.raises(RuntimeError, match="ExpertGather: no kernel covers these shapes; a kernel"):
        engine.decode(np.array([3]), cache)
    assert not host.problems
    gpu.trt.refuse.clear()
