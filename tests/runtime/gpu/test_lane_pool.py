"""Batches side by side and one after another, their memory, and its release; over the stand-in."""

from __future__ import annotations

import gc
import threading
from contextlib import closing

import numpy as np
import pytest

from runtime.backends import open_backend
from runtime.backends.base import Backend, BackendUnavailableError
from runtime.backends.lane_backend import LaneCache
from runtime.bundle import Bundle
from runtime.gpu.lane_pool import LanePool
from runtime.sampling import SamplingParams
from tests.engine_runs import generate, live, prefill, prompts
from tests.fake_tensorrt import FakeGpu


def test_two_caches_run_side_by_side_on_contexts_of_their_own(
    engine: Backend, reference: Backend, gpu: FakeGpu
) -> None:
    rows = prompts(20, 30)
    caches = [engine.new_cache(1) for _ in rows]
    assert live(gpu, "execution context") == 2
    found: list[list[int]] = [[], []]
    last = [prefill(engine, cache, row) for cache, row in zip(caches, rows, strict=True)]
    for _ in range(10):
        for number, cache in enumerate(caches):
            token = int(last[number].argmax())
            found[number].append(token)
            last[number] = engine.decode(np.array([token]), cache)
    params = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
    assert found == [generate(reference, [row], params)[0] for row in rows]


def test_threads_with_sessions_of_their_own_do_not_disturb_each_other(
    engine: Backend, reference: Backend
) -> None:
    rows = prompts(20, 70, 3)
    params = SamplingParams(max_tokens=15, temperature=0.0, ignore_eos=True)
    found: dict[int, list[int]] = {}

    def session(number: int) -> None:
        found[number] = generate(engine, [rows[number]], params)[0]

    threads = [threading.Thread(target=session, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(3)] == [generate(reference, [r], params)[0] for r in rows]


def test_500_sessions_leave_nothing_behind_and_allocate_nothing_after_the_first(
    engine: Backend, gpu: FakeGpu
) -> None:
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    generate(engine, prompts(3), params)
    before, calls = gpu.cuda.ledger.live, gpu.cuda.calls["cudaMalloc"]
    for _ in range(500):
        generate(engine, prompts(3), params)
    assert gpu.cuda.ledger.live == before
    assert gpu.cuda.calls["cudaMalloc"] == calls


def test_a_cache_begins_empty_whatever_its_memory_held(engine: Backend, gpu: FakeGpu) -> None:
    (prompt,) = prompts(40)
    first = engine.new_cache(1)
    expected = prefill(engine, first, prompt)
    used = gpu.cuda.calls["cudaMalloc"]
    del first
    again = engine.new_cache(1)
    assert gpu.cuda.calls["cudaMalloc"] == used, "the memory of the first is used again"
    buffers = again.lane._cache._buffers  # type: ignore[attr-defined]
    again.lane._stream.synchronize()  # type: ignore[attr-defined]
    for buffer in buffers:
        memory = gpu.cuda.find("device memory", buffer.address, buffer.size, "a test")
        assert not memory.part(buffer.address, buffer.size).any()
    np.testing.assert_array_equal(prefill(engine, again, prompt), expected)


def test_a_batch_without_memory_is_refused_and_a_smaller_one_still_runs(
    engine: Backend, gpu: FakeGpu
) -> None:
    cache_of_one = 900_000
    gpu.cuda.total_bytes = gpu.cuda.used_bytes + 2 * cache_of_one
    with pytest.raises(BackendUnavailableError, match=r"a cache of 3 sequences 2\.\d MB"):
        engine.new_cache(3)
    assert prefill(engine, engine.new_cache(1), [3, 4]).shape == (1, 2048)


def test_memory_of_batches_that_have_ended_is_given_to_the_next(
    engine: Backend, gpu: FakeGpu
) -> None:
    caches = [engine.new_cache(1) for _ in range(3)]
    assert live(gpu, "execution context") == 3
    del caches
    gpu.cuda.total_bytes = gpu.cuda.used_bytes + 500_000
    engine.new_cache(3)
    assert live(gpu, "execution context") == 1


def test_a_batch_takes_the_memory_of_one_of_its_size_before_any_other(
    engine: Backend, gpu: FakeGpu
) -> None:
    first, second = engine.new_cache(1), engine.new_cache(2)
    del first
    del second
    used = gpu.cuda.calls["cudaMalloc"]
    kept = [engine.new_cache(2), engine.new_cache(1)]
    assert gpu.cuda.calls["cudaMalloc"] == used
    assert len(kept) == 2


def test_closing_works_in_any_order_and_more_than_once(engine_bundle: Bundle, gpu: FakeGpu) -> None:
    backend = open_backend("tensorrt_rtx", engine_bundle)
    first, second = backend.new_cache(1), backend.new_cache(2)
    assert isinstance(first, LaneCache)
    prefill(backend, second, [3], [4])
    first.close()
    first.close()
    with pytest.raises(ValueError, match="this cache is closed"):
        prefill(backend, first, [3])
    backend.close()
    backend.close()
    gc.collect()
    assert gpu.cuda.ledger.live == {}
    with pytest.raises(ValueError, match="this backend is closed"):
        prefill(backend, second, [3], [4])
    with pytest.raises(ValueError, match="this backend is closed"):
        backend.new_cache(1)
    with pytest.raises(ValueError, match="this backend is closed"):  # a step that began before
        second.lane.step(*[np.zeros((2, 1), np.int64)] * 3, None)  # type: ignore[attr-defined]
    second.close()  # type: ignore[attr-defined]


def test_a_backend_that_nobody_closes_is_released_all_the_same(
    engine_bundle: Bundle, gpu: FakeGpu
) -> None:
    cache = open_backend("tensorrt_rtx", engine_bundle).new_cache(1)
    gc.collect()
    assert gpu.cuda.ledger.live == {}
    del cache


def test_a_backend_is_a_context_manager(engine_bundle: Bundle, gpu: FakeGpu) -> None:
    with open_backend("tensorrt_rtx", engine_bundle) as backend:  # type: ignore[attr-defined]
        prefill(backend, backend.new_cache(1), [3])
    assert live(gpu, "engine") == 0


def test_a_cache_of_another_backend_is_refused(
    engine_bundle: Bundle, engine: Backend, reference: Backend, gpu: FakeGpu
) -> None:
    other = open_backend("tensorrt_rtx", engine_bundle)
    with closing(other), pytest.raises(TypeError, match="this cache is of another backend"):
        prefill(engine, other.new_cache(1), [3])
    with pytest.raises(TypeError, match="a cache of OnnxRuntimeCache does not belong"):
        prefill(engine, reference.new_cache(1), [3])


class PlainLane:
    """A lane that does nothing but note it."""

    usable = True

    def __init__(self, done: list[str], error: Exception | None = None) -> None:
        self.rows = 0
        self._done, self._error = done, error

    def begin(self, rows: int) -> None:
        if self._error is not None:
            raise self._error
        self.rows = rows
        self._done.append(f"begin {rows}")

    def close(self) -> None:
        self._done.append("close")


def test_a_lane_that_cannot_begin_is_closed_once_and_never_given_out() -> None:
    done: list[str] = []
    lanes = [PlainLane(done, RuntimeError("cudaMemsetAsync failed")), PlainLane(done)]
    given = iter(lanes)
    pool = LanePool(lambda rows: next(given))
    with pytest.raises(RuntimeError, match="cudaMemsetAsync failed"):
        pool.take(1)
    assert done == ["close"]
    assert not pool.owns(lanes[0])
    pool.give_back(lanes[0])  # nothing: it is none of the pool's
    assert pool.take(2) is lanes[1]
    pool.close()
    assert done == ["close", "begin 2", "close"]


def test_all_is_closed_in_order_whatever_becomes_of_the_rest() -> None:
    done: list[str] = []

    def fail() -> None:
        done.append("fail")
        raise OSError("no space left")

    pool = LanePool(
        lambda rows: PlainLane(done),
        first=(fail, lambda: done.append("first")),
        last=(lambda: done.append("last"), lambda: done.append("very last")),
    )
    pool.take(1)
    with pytest.raises(OSError, match="no space left"):
        pool.close()
    assert done == ["begin 1", "fail", "first", "close", "last", "very last"]
