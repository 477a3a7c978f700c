"""How the backend of our kernels runs: choosing, rewinding, running ahead, and what it refuses.

Every kernel runs in Triton's interpreter. Tokens of every kind of model are those of the reference
in test_cuda_tokens.py, and what does not fit is in test_cuda_bad_inputs.py.
"""

from __future__ import annotations

import ctypes
import gc
import threading

import numpy as np
import pytest

import plugins.projection.launches as projection_launches
import plugins.projection.matrix as projection_matrix
from runtime.backends.base import Limits
from runtime.gpu.token_ring import LEAD
from runtime.kernel_step import step_kernels
from runtime.sampling import SamplingParams, make_sampler
from runtime.session import GenerationSession
from runtime.token_chooser import TokenChooser
from tests.engine_runs import generate, prefill
from tests.fake_kernels import PackedBundle
from tests.fake_tensorrt.cuda import Status
from tests.tiny_doge import write_checkpoint

# A batch of two runs the kernels of three.
LIMITS = Limits(max_batch_size=3, max_input_len=12, max_seq_len=30)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one by one: fewer and larger ones compute the same."""
    monkeypatch.setattr(projection_launches, "ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(projection_launches, "ENOUGH_HEAD_PROGRAMS", 1)
    monkeypatch.setattr(projection_matrix, "_FEW_PROGRAMS", 1)


@pytest.fixture
def packed(tmp_path):
    """Gives packed weights of one layer, in float32."""

    def make(**overrides):
        folder = write_checkpoint(
            tmp_path / "checkpoint", num_hidden_layers=1, tie_word_embeddings=False, **overrides
        )
        return PackedBundle.make(tmp_path, folder, "fp32", LIMITS)

    return make


def prompts(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(3, 97, length).tolist() for length in lengths]


def steps_of(backend, rows, forced):
    """Logits of a prefill and of the steps that follow with these tokens."""
    cache = backend.new_cache(len(rows))
    found = [prefill(backend, cache, *rows)]
    found += [backend.decode(tokens, cache) for tokens in forced]
    assert cache.lengths.tolist() == [len(row) + len(forced) for row in rows]
    return np.array(found)


SAMPLED = {
    "greedy": SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True),
    "drawn": SamplingParams(
        max_tokens=9, temperature=6.0, top_k=40, top_p=0.9, min_p=0.01, seed=5, ignore_eos=True
    ),
    "ruled": SamplingParams(
        max_tokens=9, temperature=5.0, seed=6, repetition_penalty=1.4, presence_penalty=0.5,
        frequency_penalty=0.7, logit_bias={7: 9.0}, min_tokens=5,
        stop_token_ids=(7, *range(70, 85)),  # as many as the device keeps from ending a text
    ),
    # More ids that end a text than the device keeps from doing so, which nothing asks it to.
    "many ends": SamplingParams(
        max_tokens=5, temperature=5.0, seed=6, logit_bias={7: 9.0}, ignore_eos=True,
        stop_token_ids=tuple(range(70, 90)),
    ),
    "ruled greedy": SamplingParams(
        max_tokens=9, temperature=0.0, repetition_penalty=3.0, presence_penalty=2.0,
        frequency_penalty=2.0, ignore_eos=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("rules", SAMPLED)
def test_device_chooses_the_tokens_of_the_reference(packed, rules):
    bundle = packed()
    backend, cuda, launcher = bundle.open()
    expected = generate(bundle.torch(), prompts(6, 3), SAMPLED[rules])
    assert generate(backend, prompts(6, 3), SAMPLED[rules]) == expected
    assert len({token for row in expected for token in row}) > (1 if "greedy" in rules else 3)
    # One graph for all steps, and nothing waits for one of them but for what it left.
    assert cuda.calls["cudaStreamBeginCapture"] == 1
    heads = [name for name in launcher.put if name.startswith(("head", "choose"))]
    assert len(heads) == (1 if rules == "greedy" else 2)
    backend.close()
    assert (cuda.ledger.violations, cuda.ledger.live, cuda.used_bytes) == ([], {}, 0)


def test_steps_run_ahead_and_no_step_is_waited_for(packed):
    bundle = packed()
    backend, cuda, _ = bundle.open()
    chooser = []
    original = backend.decode_many

    def watched(*arguments):
        for tokens in original(*arguments):
            chooser.append((cuda.calls["cudaGraphLaunch"], cuda.calls["cudaStreamSynchronize"]))
            yield tokens

    backend.decode_many = watched
    generate(backend, prompts(5), SAMPLED["greedy"])
    # The cache has room for nine tokens behind the first.
    launched = [graphs for graphs, _ in chooser]
    waited = {synchronized for _, synchronized in chooser}
    assert launched == [min(LEAD + 1 + i, 9) for i in range(len(launched))]
    assert len(waited) == 1, "the stream was waited for between steps"


def test_ids_that_end_a_text_wait_for_min_tokens(packed):
    bundle = packed()
    backend, _, launcher = bundle.open()
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    free = generate(bundle.torch(), prompts(5), params)[0]
    params = SamplingParams(
        max_tokens=5, temperature=0.0, min_tokens=4, stop_token_ids=tuple(set(free))
    )
    expected = generate(bundle.torch(), prompts(5), params)
    assert not set(expected[0][:4]) & set(free)
    assert generate(backend, prompts(5), params) == expected
    assert any(name.startswith("choose") for name in launcher.put)


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"logprobs": 1, "ignore_eos": True}, "log-probabilities are asked for"),
        (
            {"min_tokens": 3, "stop_token_ids": tuple(range(60, 77))},
            "17 ids end the text, the device keeps 16 from doing so",
        ),
    ],
)
def test_host_chooses_what_the_device_cannot(packed, caplog, rules, reason):
    bundle = packed()
    backend, cuda, launcher = bundle.open()
    params = SamplingParams(max_tokens=4, temperature=0.0, **rules)
    expected = generate(bundle.torch(), prompts(4), params)
    with caplog.at_level("INFO", logger="runtime.backends.cuda_backend"):
        assert generate(backend, prompts(4), params) == expected
    assert reason in caplog.text
    # Its steps are recorded all the same.
    assert cuda.calls["cudaGraphLaunch"] == len(expected[0]) - 1 == 3
    assert not any(name.startswith("choose") for name in launcher.put)


def test_a_run_that_is_left_early_leaves_the_cache_right(packed):
    bundle = packed()
    backend, reference = bundle.open()[0], bundle.torch()
    found = []
    for used in (backend, reference):
        cache = used.new_cache(2)
        logits = prefill(used, cache, *prompts(6, 3))
        found.append([logits, *_leave_early(used, cache, logits)])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


def _leave_early(backend, cache, logits):
    """Two tokens of many, then a rewind, a prompt and a step."""
    params = SamplingParams(max_tokens=20, temperature=0.0)
    rows = prompts(6, 3)
    ids = np.zeros((2, 6), np.int64)
    choice = TokenChooser(
        make_sampler(params, backend.vocab_size), ids, np.array([6, 3]), np.arange(2)
    )
    active = np.ones(2, bool)
    first = choice.choose(logits, 0, active)
    many = backend.decode_many(first, cache, choice, active)
    tokens = [next(many).copy() for _ in range(2)]
    assert cache.lengths.tolist() == [8, 5]
    backend.rewind(cache, np.array([7, 5]))
    yield prefill(backend, cache, rows[1], rows[0])
    yield backend.decode(tokens[1], cache)
    yield cache.lengths.copy()
    if backend.name == "cuda":
        with pytest.raises(ValueError, match="another step has run on this cache"):
            next(many)
        assert cache.lane.usable
    else:
        many.close()


def test_score_gives_every_tokens_logits(packed, monkeypatch):
    """In passes that are shorter than a prompt may be."""
    monkeypatch.setattr(step_kernels, "CHUNK_LENGTH", 5)
    bundle = packed()
    backend = bundle.open()[0]
    rows = np.array(prompts(14, 14))
    lengths = np.array([14, 9])
    found, expected = (
        used.score(rows, lengths, used.new_cache(2)) for used in (backend, bundle.torch())
    )
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


# What goes wrong.


def test_a_launch_that_fails_names_kernel_and_step_and_the_session_can_begin_anew(packed):
    bundle = packed()
    backend, cuda, launcher = bundle.open()
    cache = backend.new_cache(1)
    prefill(backend, cache, *prompts(3))
    launcher.refuses = "attend_decode"
    with pytest.raises(RuntimeError, match=r"step 2 of this batch: attend_decode.*CUDA_ERROR_TEST"):
        backend.decode(np.array([5]), cache)
    with pytest.raises(RuntimeError, match=r"an earlier step on this cache .*new_cache"):
        backend.decode(np.array([5]), cache)
    launcher.refuses = None
    again = backend.new_cache(1)
    expected = steps_of(bundle.torch(), prompts(3), [np.array([5])])
    prefill(backend, again, *prompts(3))
    np.testing.assert_allclose(backend.decode(np.array([5]), again), expected[1], atol=1e-3)
    cache.close()
    backend.close()
    assert (cuda.ledger.violations, cuda.ledger.live) == ([], {})


def test_a_fault_in_the_middle_of_a_text_ends_it(packed):
    bundle = packed()
    backend, cuda, _ = bundle.open()
    backend.new_cache(1).close()
    original = cuda.cudaEventSynchronize
    cuda.failures["cudaEventSynchronize"] = Status.cudaErrorIllegalAddress
    with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
        generate(backend, prompts(3), SAMPLED["greedy"])
    assert original is not None
    assert generate(backend, prompts(3), SAMPLED["greedy"]) == generate(
        bundle.torch(), prompts(3), SAMPLED["greedy"]
    )


def test_logits_that_are_no_numbers_are_an_error(packed):
    bundle = packed()
    with np.errstate(invalid="ignore"):
        bundle.network.model.norm.weight.data[:] = float("nan")
    from export.step_weights import write_step_weights

    write_step_weights(
        bundle.file(bundle.variant.path), bundle.network, bundle.kernels.model,
        bundle.kernels.formats,
    )  # fmt: skip
    backend, _, _ = bundle.open()
    with pytest.raises(ValueError, match="row 0 has no token to pick"):
        generate(backend, prompts(3), SAMPLED["drawn"])


def test_step_whose_logits_are_no_numbers_ends_the_text(packed):
    """The device has no token for it, and steps behind it are on the stream already."""
    bundle = packed()
    backend, _, _ = bundle.open()
    events = GenerationSession(backend).generate(prompts(4, 3), SAMPLED["greedy"])
    assert next(events).index == 0
    norm = (ctypes.c_float * 64).from_address(backend._weights.address("norm"))
    norm[:] = [float("nan")] * 64
    with pytest.raises(ValueError, match="row 0 has no token to pick"):
        list(events)


def test_tokens_follow_until_a_row_is_full(packed):
    bundle = packed()
    params, rows = SamplingParams(temperature=0.0), prompts(6, 5)
    found = []
    for backend in (bundle.torch(), bundle.open()[0]):
        cache = backend.new_cache(2, 8)
        ids = np.zeros((2, 6), np.int64)
        choice = TokenChooser(
            make_sampler(params, backend.vocab_size), ids, np.array([6, 5]), np.arange(2)
        )
        active = np.ones(2, bool)
        first = choice.choose(prefill(backend, cache, *rows), 0, active)
        tokens = []
        with pytest.raises(ValueError, match="row 0 already holds 8 tokens, 1 more exceed"):
            tokens.extend(map(np.copy, backend.decode_many(first, cache, choice, active)))
        found.append((np.array(tokens).tolist(), cache.lengths.tolist()))
    assert found[0] == found[1]
    assert (len(found[0][0]), found[0][1]) == (2, [8, 7])


def test_caches_of_others_and_closed_ones_are_refused(packed):
    bundle = packed()
    backend, other = bundle.open()[0], bundle.open()[0]
    cache = backend.new_cache(1)
    with pytest.raises(TypeError, match="of another backend"):
        other.decode(np.array([3]), cache)
    with pytest.raises(TypeError, match="a cache of TorchCache"):
        backend.decode(np.array([3]), bundle.torch().new_cache(1))
    cache.close()
    cache.close()
    with pytest.raises(ValueError, match="this cache is closed"):
        backend.decode(np.array([3]), cache)
    cache = backend.new_cache(1)
    backend.close()
    backend.close()
    with pytest.raises(ValueError, match="this backend is closed"):
        backend.decode(np.array([3]), cache)
    with pytest.raises(ValueError, match="this backend is closed"):
        backend.new_cache(1)


def test_one_cache_is_not_stepped_by_two_threads_at_once(packed):
    backend, _, launcher = packed().open()
    cache = backend.new_cache(1)
    prefill(backend, cache, *prompts(3))
    original, refusals = launcher.launch, []

    def other_thread():
        with pytest.raises(RuntimeError, match="two threads step one cache at once"):
            backend.decode(np.array([5]), cache)
        refusals.append("refused")

    def launch(*arguments):
        if not refusals:
            thread = threading.Thread(target=other_thread)
            thread.start()
            thread.join()
        original(*arguments)

    launcher.launch = launch
    backend.decode(np.array([4]), cache)
    assert refusals == ["refused"]
    assert cache.lengths.tolist() == [4]


def test_cache_begins_as_zeros_where_another_was(packed):
    backend = packed().open()[0]
    cache = backend.new_cache(1)
    prefill(backend, cache, *prompts(5))
    cache.close()
    lane = backend.new_cache(1).lane
    lane._stream.synchronize()
    buffer = lane._cache.buffer
    assert not any((ctypes.c_uint8 * buffer.size).from_address(buffer.address))


def test_many_sessions_leave_nothing_behind(packed):
    backend, cuda, launcher = packed().open()
    found = []
    for _ in range(100):
        backend.new_cache(2).close()
        backend.new_cache(1)  # nothing refers to it
        found.append((dict(cuda.ledger.live), cuda.used_bytes))
    assert found == found[:1] * 100
    backend.close()
    assert (cuda.ledger.live, cuda.used_bytes, launcher.closed) == ({}, 0, 1)


def test_a_batch_that_has_ended_leaves_its_lane_and_its_graphs_to_the_next(packed):
    backend, cuda, _ = packed().open()
    rows = prompts(6, 3)
    expected = generate(backend, rows, SAMPLED["greedy"])
    first = generate(backend, rows[:1], SAMPLED["greedy"])
    calls = ("cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags", "cudaGraphInstantiate")
    before = {name: cuda.calls[name] for name in calls}
    assert generate(backend, rows[:1], SAMPLED["greedy"]) == first
    assert {name: cuda.calls[name] for name in calls} == before
    # A batch of another size takes the lane as well, with a cache and graphs of its own.
    assert generate(backend, rows, SAMPLED["greedy"]) == expected
    after = {name: cuda.calls[name] - count for name, count in before.items()}
    assert after == {
        "cudaMalloc": 1, "cudaHostAlloc": 0, "cudaStreamCreateWithFlags": 0,
        "cudaGraphInstantiate": 1,
    }  # fmt: skip
    backend.close()
    assert (cuda.ledger.violations, cuda.ledger.live, cuda.used_bytes) == ([], {}, 0)


def test_a_benchmark_is_told_of_the_gpu_and_its_memory(packed, monkeypatch):
    monkeypatch.setattr("runtime.gpu.copy_speed.copy_bytes_per_s.__defaults__", (1 << 20,))
    backend, cuda, _ = packed().open()
    backend.new_cache(2).close()
    facts = backend.device_facts()
    assert "sm89" in facts["gpu"]
    assert facts["memory_mb"] == round(cuda.used_bytes / 2**20, 1) > 0
    assert facts["copy_gb_per_s"] > 0
    assert facts["runtime_cache"] == "none"
    backend.close()


def test_a_backend_that_nobody_closes_is_released_all_the_same(packed):
    backend, cuda, launcher = packed().open()
    backend.new_cache(1)
    del backend
    gc.collect()
    assert (cuda.ledger.violations, cuda.ledger.live, launcher.closed) == ([], {}, 1)
