"""The backend of our kernels, every kernel in Triton's interpreter, against the network in torch.

What a GPU makes of it is not shown here.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import plugins.projection.launches as projection_launches
import plugins.projection.matrix as projection_matrix
from export.cuda_models import with_stored_weights
from runtime.backends.base import BackendUnavailableError, Limits
from runtime.backends.torch_backend import TorchBackend
from runtime.gpu.token_ring import LEAD
from runtime.kernel_step.formats import StepFormats
from runtime.sampling import SamplingParams
from tests.engine_runs import generate, prefill
from tests.fake_kernels import PackedBundle
from tests.fake_tensorrt.cuda import FakeCuda, Status
from tests.tiny_doge import MOE, write_checkpoint

LIMITS = Limits(max_batch_size=2, max_input_len=12, max_seq_len=30)
WINDOW = {"keep_window_size": 8}
UNTIED = {"tie_word_embeddings": False}
# Generation, overrides of its config, router mode.
MODELS = {
    "g1": ("g1", {}, None),
    "g2": ("g2", {}, None),
    "g3": ("g3", {}, None),
    "g3-moe": ("g3", MOE, "per_token"),
    "g4": ("g4", UNTIED, None),
    "g4-window": ("g4", WINDOW, None),
    "g4-moe": ("g4", MOE, "mixed"),
    "g4h-window": ("g4h", WINDOW, None),
    "g4h-moe": ("g4h", MOE, "per_token"),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one by one: fewer and larger ones compute the same."""
    monkeypatch.setattr(projection_launches, "ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(projection_launches, "ENOUGH_HEAD_PROGRAMS", 1)
    monkeypatch.setattr(projection_matrix, "_FEW_PROGRAMS", 1)


@pytest.fixture
def packed(tmp_path):
    """Gives a bundle of packed weights of a model by name."""

    def make(name, precision="fp32", limits=LIMITS, **overrides):
        generation, more, router = MODELS[name]
        folder = write_checkpoint(
            tmp_path / "checkpoint",
            generation=generation,
            # One layer where a step of it takes the interpreter long.
            **{"num_hidden_layers": 2 if name == "g4" else 1, **more, **overrides},
        )
        return PackedBundle.make(tmp_path, folder, precision, limits, router)

    return make


def prompts(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(3, 97, length).tolist() for length in lengths]


def reference_of(bundle, precision):
    """The network whose weights are the stored numbers, in float32."""
    network = bundle.network
    if precision != "fp32":
        network = with_stored_weights(network, StepFormats.of(precision))
    return TorchBackend(network, limits=bundle.limits, variant="fp32")


def steps_of(backend, rows, forced):
    """Logits of a prefill and of the steps that follow with these tokens."""
    cache = backend.new_cache(len(rows))
    found = [prefill(backend, cache, *rows)]
    found += [backend.decode(tokens, cache) for tokens in forced]
    assert cache.lengths.tolist() == [len(row) + len(forced) for row in rows]
    return np.array(found)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_references(packed, name):
    bundle = packed(name)
    backend, cuda, _ = bundle.open()
    # Chunks of unequal rows and beyond the window, unless a router wants a prompt whole. The seed
    # has axes of 7 keys, which an odd number of tokens puts at an odd place.
    lengths = {"g4-moe": (11, 4), "g1": (9,)}.get(name, (15, 4))
    forced = np.random.default_rng(4).integers(3, 97, (2, len(lengths)))
    expected = steps_of(bundle.torch(), prompts(*lengths), forced)
    found = steps_of(backend, prompts(*lengths), forced)
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    backend.close()
    assert (cuda.ledger.violations, cuda.ledger.live, cuda.used_bytes) == ([], {}, 0)


# A cache of 16 bits rounds keys and values, and mask scores come from values before the rounding of
# their weights, which the reference does not have; so may another expert.
@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        ("g4", "fp16", 2e-3),
        ("g1", "fp16", 2e-3),
        ("g4-moe", "int8", 2e-2),
        ("g3", "int8", 5e-3),
        ("g4", "int4", 2e-2),
    ],
)
def test_logits_of_narrow_weights_are_the_references(packed, name, precision, tolerance):
    bundle = packed(name, precision)
    backend, _, _ = bundle.open()
    forced = np.random.default_rng(4).integers(3, 97, (1, 2))
    expected = steps_of(reference_of(bundle, precision), prompts(9, 3), forced)
    found = steps_of(backend, prompts(9, 3), forced)
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < tolerance * scale
    # The weights' own rounding is larger: the right numbers were read.
    if precision == "int4":
        exact = steps_of(bundle.torch(), prompts(9, 3), forced)
        assert np.abs(exact - expected).max() > 2 * tolerance * scale


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_precisions_generate_the_tokens_of_their_weights(packed, precision):
    bundle = packed("g3", precision)
    backend, _, _ = bundle.open()
    params = dataclasses.replace(SAMPLED["drawn"], max_tokens=5)
    expected = generate(reference_of(bundle, precision), prompts(6, 3), params)
    assert generate(backend, prompts(6, 3), params) == expected
    assert len({token for row in expected for token in row}) > 2


SAMPLED = {
    "greedy": SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True),
    "drawn": SamplingParams(
        max_tokens=9, temperature=6.0, top_k=40, top_p=0.9, min_p=0.01, seed=5, ignore_eos=True
    ),
    "ruled": SamplingParams(
        max_tokens=9, temperature=5.0, seed=6, repetition_penalty=1.4, presence_penalty=0.5,
        frequency_penalty=0.7, logit_bias={7: 9.0}, min_tokens=5, stop_token_ids=(7,),
    ),
    "ruled greedy": SamplingParams(
        max_tokens=9, temperature=0.0, repetition_penalty=3.0, presence_penalty=2.0,
        frequency_penalty=2.0, ignore_eos=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("rules", SAMPLED)
def test_device_chooses_the_tokens_of_the_reference(packed, rules):
    bundle = packed("g4", num_hidden_layers=1)
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


@pytest.mark.parametrize("name", ["g1", "g4-window", "g4-moe", "g3-moe"])
def test_every_kind_of_model_generates_the_references_tokens(packed, name):
    bundle = packed(name)
    backend, _, _ = bundle.open()
    params = dataclasses.replace(SAMPLED["drawn"], max_tokens=4)
    assert generate(backend, prompts(7, 3), params) == generate(
        bundle.torch(), prompts(7, 3), params
    )


def test_steps_run_ahead_and_no_step_is_waited_for(packed):
    bundle = packed("g4", num_hidden_layers=1)
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


def test_host_chooses_where_log_probabilities_are_asked_for(packed, caplog):
    bundle = packed("g4", num_hidden_layers=1)
    backend, _, _ = bundle.open()
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=1, ignore_eos=True)
    with caplog.at_level("INFO", logger="runtime.backends.cuda_backend"):
        expected = generate(bundle.torch(), prompts(4), params)
        assert generate(backend, prompts(4), params) == expected
    assert "log-probabilities are asked for" in caplog.text


def test_a_run_that_is_left_early_leaves_the_cache_right(packed):
    bundle = packed("g4", num_hidden_layers=1)
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
    from runtime.sampling import make_sampler
    from runtime.token_chooser import TokenChooser

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


def test_score_gives_every_tokens_logits(packed):
    bundle = packed("g4", num_hidden_layers=1)
    backend = bundle.open()[0]
    rows = np.array(prompts(14, 14))
    lengths = np.array([14, 9])
    found, expected = (
        used.score(rows, lengths, used.new_cache(2)) for used in (backend, bundle.torch())
    )
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


# What goes wrong.


def test_a_launch_that_fails_names_kernel_and_step_and_the_session_can_begin_anew(packed):
    bundle = packed("g4", num_hidden_layers=1)
    backend, cuda, launcher = bundle.open()
    cache = backend.new_cache(1)
    prefill(backend, cache, *prompts(3))
    launcher.refuses = "attend_decode"
    with pytest.raises(RuntimeError, match=r"step 0 of this batch: attend_decode.*CUDA_ERROR_TEST"):
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
    bundle = packed("g4", num_hidden_layers=1)
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


def test_too_little_memory_is_said_before_anything_is_allocated(packed):
    bundle = packed("g4", num_hidden_layers=1)
    cuda = FakeCuda()
    cuda.total_bytes = 100_000
    with pytest.raises(
        BackendUnavailableError, match=r"too little GPU memory: .* \(weights .*, a cache of 1 seq"
    ):
        bundle.open(cuda)
    assert "cudaMalloc" not in cuda.calls
    backend, cuda, _ = bundle.open()
    cuda.total_bytes = cuda.used_bytes + 1000
    calls = cuda.calls["cudaMalloc"]
    with pytest.raises(BackendUnavailableError, match="a cache of 2 sequences"):
        backend.new_cache(2)
    assert cuda.calls["cudaMalloc"] == calls


def test_more_than_was_built_is_refused(packed):
    bundle = packed("g4", num_hidden_layers=1)
    backend, _, _ = bundle.open()
    with pytest.raises(ValueError, match="a batch of 3 sequences is outside 1 to 2"):
        backend.new_cache(3)
    with pytest.raises(ValueError, match="a cache of 31 tokens is outside 1 to 30"):
        backend.new_cache(1, 31)
    cache = backend.new_cache(1)
    with pytest.raises(ValueError, match="exceed the limit of 30"):
        prefill(backend, cache, *prompts(31))


def test_logits_that_are_no_numbers_are_an_error(packed):
    bundle = packed("g4", num_hidden_layers=1)
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


def test_caches_of_others_and_closed_ones_are_refused(packed):
    bundle = packed("g4", num_hidden_layers=1)
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


def test_many_sessions_leave_nothing_behind(packed):
    bundle = packed("g4", num_hidden_layers=1)
    backend, cuda, launcher = bundle.open()
    before = dict(cuda.ledger.live), cuda.used_bytes
    for _ in range(100):
        backend.new_cache(2).close()
        backend.new_cache(1)
    import gc

    gc.collect()
    assert (dict(cuda.ledger.live), cuda.used_bytes) == before
    backend.close()
    assert (cuda.ledger.live, cuda.used_bytes, launcher.closed) == ({}, 0, 1)
