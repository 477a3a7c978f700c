"""Steps that run ahead of the host on a decode graph; over the stand-in of a GPU."""

from __future__ import annotations

import bisect
import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.backends import open_backend
from runtime.backends.base import Backend, BackendUnavailableError
from runtime.bundle import Bundle
from runtime.gpu.token_ring import LEAD
from runtime.sampling import SamplingParams, make_sampler
from runtime.token_chooser import TokenChooser
from tests.engine_runs import generate, live, prefill, prompts
from tests.fake_tensorrt import FakeGpu
from tests.fake_tensorrt.cuda import Status
from tests.fake_tensorrt.engine_file import ACTIVATION_BYTES, WEIGHT_BYTES, add_fake_engine

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=40, temperature=0.9, top_k=40, seed=3, ignore_eos=True)


class Decoding:
    """One batch that is being decoded on a backend."""

    def __init__(
        self,
        backend: Backend,
        *rows: list[int],
        params: SamplingParams = DRAWN,
        capacity: int | None = None,
    ) -> None:
        self.backend = backend
        self.cache: Any = backend.new_cache(len(rows), capacity)
        logits = prefill(backend, self.cache, *rows)
        lengths = np.array([len(row) for row in rows])
        ids = np.zeros((len(rows), lengths.max()), np.int64)
        sampler = make_sampler(params, backend.vocab_size)
        self.choice = TokenChooser(sampler, ids, lengths, np.arange(len(rows)))
        self.active = np.ones(len(rows), bool)
        self.first = self.choice.choose(logits, 0, self.active)
        self.steps = self.begin(self.first)

    def begin(self, tokens: Any) -> Iterator[Any]:
        return self.backend.decode_many(tokens, self.cache, self.choice, self.active)

    def take(self, count: int) -> list[list[int]]:
        """The tokens of rows that take part; 0 for others."""
        taken = [np.where(self.active, next(self.steps), 0).tolist() for _ in range(count)]
        return taken


def both(ahead: Backend, reference: Backend, act: Callable[[Decoding], Any], *rows: Any) -> None:
    """Do the same on both, and find the same tokens, lengths and logits of what follows."""
    found = []
    for backend in (ahead, reference):
        decoding = Decoding(backend, *rows)
        seen = act(decoding)
        lengths = decoding.cache.lengths.tolist()
        logits = backend.decode(np.full(len(rows), 7), decoding.cache, decoding.active)
        found.append((seen, lengths, logits[decoding.active]))
    (ours, our_lengths, our_logits), (expected, lengths, logits) = found
    assert ours == expected
    assert our_lengths == lengths
    np.testing.assert_allclose(our_logits, logits, atol=1e-4)


def test_a_token_costs_three_copies_and_one_wait_for_an_event(ahead: Backend, gpu: FakeGpu) -> None:
    decoding = Decoding(ahead, *prompts(5, 9), params=GREEDY)
    decoding.take(2)
    before = dict(gpu.cuda.calls)
    decoding.take(50)
    done = {name: n - before.get(name, 0) for name, n in gpu.cuda.calls.items()}
    assert {name: n for name, n in done.items() if n} == {
        "cudaMemcpyAsync": 150,
        "cudaEventRecord": 50,
        "cudaEventSynchronize": 50,
    }


def test_a_row_that_rests_costs_the_others_no_wait(ahead: Backend, gpu: FakeGpu) -> None:
    decoding = Decoding(ahead, *prompts(5, 9), params=GREEDY)
    decoding.take(2)
    decoding.active[1] = False
    decoding.take(LEAD + 1)
    before = gpu.cuda.calls["cudaStreamSynchronize"]
    decoding.take(10)
    assert gpu.cuda.calls["cudaStreamSynchronize"] == before


def test_a_step_with_logits_costs_what_it_does_without_a_decode_graph(
    ahead: Backend, gpu: FakeGpu
) -> None:
    cache = ahead.new_cache(1)
    prefill(ahead, cache, [3, 4])
    ahead.decode(np.array([5]), cache)
    before = dict(gpu.cuda.calls)
    ahead.decode(np.array([6]), cache)
    done = {name: n - before[name] for name, n in gpu.cuda.calls.items() if n > before[name]}
    assert done == {"cudaMemcpyAsync": 2, "cudaStreamSynchronize": 1}


def test_a_run_may_begin_on_a_cache_that_holds_nothing(ahead: Backend, reference: Backend) -> None:
    found = []
    for backend in (ahead, reference):
        ids, active = np.array([[5]]), np.ones(1, bool)
        sampler = make_sampler(GREEDY, backend.vocab_size)
        choice = TokenChooser(sampler, ids, np.array([1]), np.arange(1))
        steps = backend.decode_many(ids[0], backend.new_cache(1), choice, active)
        found.append([int(next(steps)[0]) for _ in range(3)])
    assert found[0] == found[1]


def test_steps_are_on_the_stream_before_the_first_token_is_read(
    ahead: Backend, gpu: FakeGpu
) -> None:
    decoding = Decoding(ahead, *prompts(5))
    decoding.take(1)
    (lane,) = ahead._lanes._all  # type: ignore[attr-defined]
    pending = gpu.cuda.streams[lane._stream.handle].pending
    assert sum(work.what == "an engine" for work in pending) == LEAD
    assert decoding.cache.lengths.tolist() == [6], "only what was taken counts"


@pytest.mark.parametrize("product", ["tensorrt_rtx", "tensorrt"])
def test_standard_tensorrt_repeats_a_graph_of_the_engine_and_the_tokens_way_back(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu, product: str
) -> None:
    bundle = add_fake_engine(engine_source, tmp_path / "bundle", backend=product, decode_width=64)
    with closing(open_backend(product, bundle)) as backend:
        decoding = Decoding(backend, *prompts(5), params=GREEDY)
        decoding.take(20)
        launched = gpu.cuda.calls.get("cudaGraphLaunch", 0)
        assert launched == (0 if product == "tensorrt_rtx" else 20 + LEAD - 1)
        backend.rewind(decoding.cache, decoding.cache.lengths - 4)
        decoding.take(1)  # begins anew, and repeats the graph that there is
        assert gpu.cuda.calls.get("cudaGraphInstantiate", 0) == (product == "tensorrt")


def test_steps_that_the_graph_is_not_certain_of_are_run_again_with_logits(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu
) -> None:
    bundle = add_fake_engine(engine_source, tmp_path / "bundle", decode_width=6)
    rows = prompts(5, 70, 12)
    params = dataclasses.replace(DRAWN, top_k=0)
    with closing(open_backend("onnxruntime", bundle)) as reference:
        expected = generate(reference, rows, params)
    with closing(open_backend("tensorrt_rtx", bundle)) as backend:
        assert generate(backend, rows, params) == expected
        assert 20 < backend.host_choices < 115  # type: ignore[attr-defined]


def test_a_run_may_end_anywhere_and_the_cache_holds_what_was_taken(
    ahead: Backend, reference: Backend
) -> None:
    def close_early(decoding: Decoding) -> Any:
        seen = decoding.take(7)
        decoding.steps.close()  # type: ignore[attr-defined]
        return seen

    def abandon(decoding: Decoding) -> Any:
        seen = decoding.take(3)
        del decoding.steps
        gc.collect()
        return seen

    def never_begin(decoding: Decoding) -> Any:
        return []

    for act in (close_early, abandon, never_begin):
        both(ahead, reference, act, *prompts(5, 20))


def test_whatever_changes_the_cache_between_two_tokens_begins_the_run_anew(
    ahead: Backend, reference: Backend
) -> None:
    def rewind(decoding: Decoding) -> Any:
        seen = decoding.take(6)
        decoding.backend.rewind(decoding.cache, decoding.cache.lengths - 4)
        return seen + decoding.take(6)

    def rewind_one_row(decoding: Decoding) -> Any:
        seen = decoding.take(6)
        decoding.backend.rewind(decoding.cache, decoding.cache.lengths - np.array([3, 0]))
        return seen + decoding.take(3)

    def decode_between(decoding: Decoding) -> Any:
        seen = decoding.take(3)
        decoding.backend.decode(np.array([11, 12]), decoding.cache)
        return seen + decoding.take(3)

    def replace_the_last_token(decoding: Decoding) -> Any:  # lengths stay as they are
        seen = decoding.take(3)
        decoding.backend.rewind(decoding.cache, decoding.cache.lengths - 1)
        decoding.backend.decode(np.array([11, 12]), decoding.cache)
        return seen + decoding.take(3)

    def prompt_between(decoding: Decoding) -> Any:
        seen = decoding.take(3)
        prefill(decoding.backend, decoding.cache, [9, 10, 11], [12])
        return seen + decoding.take(3)

    def two_runs(decoding: Decoding) -> Any:
        first = decoding.steps
        seen = decoding.take(3)
        decoding.steps = decoding.begin(np.array([30, 31]))
        seen += decoding.take(3)
        return [*seen, next(first).tolist(), *decoding.take(1)]

    def two_runs_at_equal_lengths(decoding: Decoding) -> Any:
        first = decoding.steps
        seen = decoding.take(3)
        decoding.steps = decoding.begin(np.array([30, 31]))
        seen += decoding.take(2)
        decoding.backend.rewind(decoding.cache, decoding.cache.lengths - 2)
        return [*seen, next(first).tolist()]

    def rewind_a_row_that_rests(decoding: Decoding) -> Any:
        decoding.active[0] = False
        seen = decoding.take(3)
        cut = decoding.cache.lengths - np.array([2, 0])
        decoding.backend.rewind(decoding.cache, cut)
        return seen + decoding.take(3)

    for act in (
        rewind,
        rewind_one_row,
        decode_between,
        replace_the_last_token,
        prompt_between,
        two_runs,
        two_runs_at_equal_lengths,
        rewind_a_row_that_rests,
    ):
        both(ahead, reference, act, *prompts(5, 20))


def test_rows_that_end_stay_where_they_are(ahead: Backend, reference: Backend) -> None:
    def act(decoding: Decoding) -> Any:
        seen = decoding.take(4)
        decoding.active[1] = False
        seen += decoding.take(6)
        decoding.active[0] = False
        return seen + decoding.take(9)

    both(ahead, reference, act, *prompts(5, 20, 11))


def test_a_full_cache_ends_the_run_for_active_rows_alone(
    ahead: Backend, reference: Backend
) -> None:
    found = []
    for backend in (ahead, reference):
        decoding = Decoding(backend, *prompts(5, 20), capacity=26)
        seen = decoding.take(6)
        assert decoding.cache.lengths.tolist() == [11, 26]
        decoding.active[1] = False  # full; its last slot is what steps of others write to
        seen += decoding.take(15)
        assert decoding.cache.lengths.tolist() == [26, 25]
        with pytest.raises(ValueError, match="row 0 already holds 26 tokens, 1 more exceed"):
            decoding.take(1)
        found.append(seen)
    assert found[0] == found[1]


def test_no_step_is_put_on_the_stream_that_the_cache_has_no_room_for(
    ahead: Backend, gpu: FakeGpu
) -> None:
    decoding = Decoding(ahead, *prompts(3, 5), params=GREEDY, capacity=7)
    decoding.take(1)
    assert gpu.cuda.calls["cudaEventRecord"] == 2
    decoding.take(1)
    assert gpu.cuda.calls["cudaEventRecord"] == 2


def test_a_row_that_ends_at_the_last_slot_writes_no_further(
    ahead: Backend, reference: Backend
) -> None:
    found = []
    for backend in (ahead, reference):
        decoding = Decoding(backend, *prompts(5, 416), params=GREEDY)
        seen = decoding.take(1)  # the other steps are on the stream, up to the last slot
        decoding.active[1] = False
        found.append(seen + decoding.take(8))
        assert decoding.cache.lengths.tolist() == [14, 417]
    assert found[0] == found[1]


def test_a_row_that_rests_may_go_on_again(ahead: Backend) -> None:
    decoding = Decoding(ahead, *prompts(5, 415), params=GREEDY)
    decoding.take(2)
    decoding.active[1] = False
    decoding.take(2)
    decoding.active[1] = True
    decoding.take(3)
    assert decoding.cache.lengths.tolist() == [12, 420]


def test_batches_of_other_sizes_follow_each_other_on_one_lane(
    ahead: Backend, reference: Backend, gpu: FakeGpu
) -> None:
    for lengths in ((5,), (7, 30, 4), (6, 66), (5,)):
        rows = prompts(*lengths)
        assert generate(ahead, rows, DRAWN) == generate(reference, rows, DRAWN)
    assert live(gpu, "execution context") == 2


def test_a_cache_at_the_place_of_an_earlier_one_is_bound_anew(
    ahead: Backend, reference: Backend, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, freed = gpu.cuda, []
    free, allocate = cuda._free, cuda._allocate

    def keep(kind: str, address: int) -> int:
        freed.append(cuda._memory[address])
        return free(kind, address)

    def reuse(kind: str, size: int) -> int:
        """Memory that was freed last, as drivers like to give it."""
        found = next((m for m in reversed(freed) if (m.kind, m.size) == (kind, size)), None)
        if found is None:
            return allocate(kind, size)
        freed.remove(found)
        cuda._memory[found.address] = dataclasses.replace(found, handle=cuda.ledger.born(kind))
        bisect.insort(cuda._sorted, found.address)
        return found.address

    monkeypatch.setattr(cuda, "_free", keep)
    monkeypatch.setattr(cuda, "_allocate", reuse)
    params = dataclasses.replace(GREEDY, max_tokens=5)
    (lane,) = ahead._lanes._all  # type: ignore[attr-defined]
    places = []
    for _ in range(2):
        assert generate(ahead, prompts(5), params) == generate(reference, prompts(5), params)
        places.append(lane._cache.place(None).addresses)
        ahead.new_cache(2)
    assert places[0] == places[1]


def test_two_batches_run_ahead_side_by_side(ahead: Backend, reference: Backend) -> None:
    found = []
    for backend in (ahead, reference):
        one, other = Decoding(backend, *prompts(5)), Decoding(backend, *prompts(9, 6))
        found.append([part.take(1) for _ in range(10) for part in (one, other)])
    assert found[0] == found[1]


def test_500_sessions_leave_nothing_behind(ahead: Backend, gpu: FakeGpu) -> None:
    params = dataclasses.replace(GREEDY, max_tokens=3)
    generate(ahead, prompts(3), params)
    before, calls = gpu.cuda.ledger.live, gpu.cuda.calls["cudaMalloc"]
    for _ in range(500):
        generate(ahead, prompts(3), params)
    assert gpu.cuda.ledger.live == before
    assert gpu.cuda.calls["cudaMalloc"] == calls


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"logprobs": 2}, "log-probabilities are of logits"),
        ({"repetition_penalty": 1.2}, "the graph does not know repetition_penalty"),
        ({"top_k": 100}, "top_k 100 exceeds the 64 candidates"),
        ({"temperature": 1e-5}, "temperature 1e-05 is outside 0.001 to 1000"),
    ],
)
def test_what_the_graph_cannot_do_the_host_does_and_says_so_once(
    ahead: Backend,
    reference: Backend,
    gpu: FakeGpu,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    reason: str,
) -> None:
    params = dataclasses.replace(DRAWN, max_tokens=5, **changes)
    with caplog.at_level(logging.INFO, "runtime"):
        for _ in range(2):
            assert generate(ahead, prompts(5), params) == generate(reference, prompts(5), params)
    told = [r.message for r in caplog.records if "the host chooses each token" in r.message]
    assert len(told) == 1
    assert reason in told[0]
    assert "cudaEventSynchronize" not in gpu.cuda.calls


def test_an_engine_without_a_decode_graph_still_runs_and_says_so(
    engine: Backend, reference: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "runtime"):
        assert generate(engine, prompts(5), GREEDY) == generate(reference, prompts(5), GREEDY)
    assert "this variant has no decode graph" in caplog.text


def test_logits_without_a_largest_one_are_an_error_at_their_token(
    ahead: Backend, gpu: FakeGpu
) -> None:
    decoding = Decoding(ahead, *prompts(5, 6))
    decoding.take(3)
    (lane,) = ahead._lanes._all  # type: ignore[attr-defined]
    lane._stream.synchronize()
    for buffer in lane._cache._buffers:
        memory = gpu.cuda.find("device memory", buffer.address, buffer.size, "a test")
        half = buffer.size // 2  # the second row's
        memory.part(buffer.address + half, half).view(np.float32)[:] = np.nan
    with pytest.raises(ValueError, match="has no token to pick: its logits hold NaN"):
        decoding.take(LEAD + 1)  # those that are on the stream are taken first


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaEventSynchronize", "execute_async_v3"])
def test_a_step_that_fails_in_the_middle_spoils_its_cache_alone(
    ahead: Backend, gpu: FakeGpu, call: str
) -> None:
    decoding, other = Decoding(ahead, *prompts(5)), Decoding(ahead, *prompts(6))
    decoding.take(4)
    if call == "execute_async_v3":
        gpu.trt.refuse.add(call)
    else:
        gpu.cuda.failures[call] = Status.cudaErrorIllegalAddress
    with pytest.raises(RuntimeError, match=f"{call} failed|a step could not be put on the stream"):
        decoding.take(1)
    gpu.trt.refuse.clear()
    with pytest.raises(RuntimeError, match="an earlier step on this cache has failed"):
        ahead.decode(np.array([5]), decoding.cache)
    other.take(3)
    contexts = live(gpu, "execution context")
    decoding.cache.close()
    assert live(gpu, "execution context") == contexts - 2, "its lane serves no other batch"


def test_a_run_on_a_closed_cache_or_backend_says_so(ahead_bundle: Bundle, gpu: FakeGpu) -> None:
    backend = open_backend("tensorrt_rtx", ahead_bundle)
    decoding, other = Decoding(backend, *prompts(5)), Decoding(backend, *prompts(5))
    decoding.take(2)
    other.take(2)
    decoding.cache.close()
    Decoding(backend, *prompts(9)).take(2)  # on the lane of the closed one
    with pytest.raises(ValueError, match="this cache is closed"):
        decoding.take(1)
    backend.close()
    with pytest.raises(ValueError, match="this backend is closed"):
        other.take(1)
    backend.close()


def test_opening_checks_the_decode_graph_like_the_engine(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu
) -> None:
    def open_changed(number: int, **changes: Any) -> None:
        bundle = add_fake_engine(
            engine_source, tmp_path / str(number), decode_width=64, decode_changes=changes
        )
        open_backend("tensorrt_rtx", bundle)

    with pytest.raises(ValueError, match=r"\.decode\.engine says version 1\.2\.3\.4, the manif"):
        open_changed(1, version="1.2.3.4")
    with pytest.raises(BackendUnavailableError, match=r"\.decode\.engine is no engine of Tensor"):
        open_changed(2, standard=True)
    with pytest.raises(ValueError, match=r"\.decode\.engine is not what its manifest .*next_id"):
        open_changed(3, outputs=[])
    with pytest.raises(ValueError, match=r"present\.0\.key shares the memory of None"):
        open_changed(4, aliases={})
    gc.collect()
    assert live(gpu, "engine") == 0


def test_an_altered_decode_graph_is_never_loaded(ahead_bundle: Bundle, gpu: FakeGpu) -> None:
    path = ahead_bundle.path / "engines/tensorrt_rtx-sm89-fp32.decode.engine"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"refusing to load .*\.decode\.engine has sha256"):
        open_backend("tensorrt_rtx", ahead_bundle)
    assert "cudaMalloc" not in gpu.cuda.calls


def test_memory_for_both_is_made_sure_of_before_anything_is_loaded(
    ahead_bundle: Bundle, gpu: FakeGpu
) -> None:
    gpu.cuda.total_bytes = 2 * WEIGHT_BYTES
    with pytest.raises(BackendUnavailableError) as error:
        open_backend("tensorrt_rtx", ahead_bundle)
    assert "weights of the decode graph, which --no-sampling-tail leaves out 2.0 MB" in str(
        error.value
    )
    assert gpu.cuda.used_bytes == 0


def test_memory_for_both_contexts_is_made_sure_of_before_either_is_made(
    ahead_bundle: Bundle, gpu: FakeGpu
) -> None:
    """Also that of a cache: what is missing shows before any prompt."""
    gpu.cuda.total_bytes = 2 * WEIGHT_BYTES + 2 * ACTIVATION_BYTES + 500_000
    with pytest.raises(BackendUnavailableError) as error:
        open_backend("tensorrt_rtx", ahead_bundle)
    parts = ("activations", "tokens and logits", "a cache of 1 sequence")
    parts += ("activations of the decode graph", "the choice of tokens")
    sizes = (1.0, 0.1, 0.9, 1.0, 0.1)
    said = ", ".join(f"{part} {size} MB" for part, size in zip(parts, sizes, strict=True))
    assert f"({said})" in str(error.value)
    gpu.cuda.total_bytes += 500_000
    with closing(open_backend("tensorrt_rtx", ahead_bundle)) as backend:
        generate(backend, prompts(5), dataclasses.replace(GREEDY, max_tokens=2))


@pytest.mark.parametrize("graph", ["?", {"width": 8}, {"path": "engines/x.engine"}])
def test_a_decode_graph_that_no_build_describes_so_is_refused(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu, graph: Any
) -> None:
    bundle = add_fake_engine(engine_source, tmp_path / "b", details={"decode_graph": graph})
    with pytest.raises(ValueError, match="no build writes that"):
        open_backend("tensorrt_rtx", bundle)


def test_each_engine_has_a_runtime_cache_of_its_own(ahead_bundle: Bundle, gpu: FakeGpu) -> None:
    for _ in range(2):
        gpu.trt.compiled.clear()
        with closing(open_backend("tensorrt_rtx", ahead_bundle)) as backend:
            generate(backend, prompts(5), GREEDY)
    assert gpu.trt.compiled == []
    assert len([*(ahead_bundle.path / "runtime_cache").iterdir()]) == 2
