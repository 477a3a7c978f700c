"""Backend `cuda` with the persistent kernel, whose source runs on the CPU a fiber for each thread.

All other kernels run in Triton's interpreter. What a GPU makes of it is not shown here.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import plugins.projection.launches as projection_launches
import plugins.projection.matrix as projection_matrix
from export.step_weights import write_step_weights
from plugins.persistent_step.launches import SOURCE
from runtime.backends.base import Limits
from runtime.kernel_step.persistent import TOKENS_PER_LAUNCH
from runtime.kernel_step.step_kernels import StepKernels
from runtime.kernel_step.variant import kernels_of_variant
from runtime.sampling import SamplingParams, make_sampler
from runtime.token_chooser import TokenChooser
from tests.engine_runs import generate, prefill
from tests.fake_kernels import PackedBundle
from tests.fake_tensorrt.cuda import Status
from tests.persistent_shim import compile_shim
from tests.persistent_shim.launcher import ShimInterpreter
from tests.persistent_shim.sequence import SMALL
from tests.tiny_doge import MOE, write_checkpoint

LIMITS = Limits(max_batch_size=2, max_input_len=12, max_seq_len=30)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one by one: fewer and larger ones compute the same."""
    monkeypatch.setattr(projection_launches, "ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(projection_launches, "ENOUGH_HEAD_PROGRAMS", 1)
    monkeypatch.setattr(projection_matrix, "_FEW_PROGRAMS", 1)


def packed(folder, generation="g3", limits=LIMITS, **overrides):
    numbers = {"num_hidden_layers": 2, "tie_word_embeddings": False, **overrides}
    source = write_checkpoint(folder / "checkpoint", generation=generation, **numbers)
    return PackedBundle.make(folder, source, "fp16", limits)


def with_persistent(bundle):
    """The same bundle, of whose variant the manifest says that it has the kernel."""
    details = {**bundle.variant.details, "persistent": True}
    variant = dataclasses.replace(bundle.variant, name="fp16-persistent", details=details)
    return dataclasses.replace(bundle, variant=variant, kernels=kernels_of_variant(bundle, variant))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A bundle with the kernel, and the kernel for the CPU."""
    folder = tmp_path_factory.mktemp("persistent")
    bundle = with_persistent(packed(folder))
    spec = bundle.kernels.persistent.kernel.spec
    return bundle, compile_shim(folder, {**spec.constants, **SMALL}, spec.arguments)


@pytest.fixture
def opened(model):
    """The backend on a stand-in for CUDA, with what it calls and launches."""
    bundle, shim = model
    backend, cuda, launcher = bundle.open()
    launcher._interpreter = ShimInterpreter(launcher._interpreter, shim)
    yield backend, cuda, launcher
    backend.close()
    assert (cuda.ledger.violations, cuda.ledger.live, cuda.used_bytes) == ([], {}, 0)


def prompts(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(3, 97, length).tolist() for length in lengths]


def of_steps(launcher):
    """How many steps each launch of the persistent kernel had."""
    return [
        launch.arguments["steps"]
        for launch in launcher.launched
        if launch.kernel.startswith("persistent_step")
    ]


def begin(backend, prompt, max_tokens):
    """A prefilled cache, and tokens that follow it one by one."""
    cache = backend.new_cache(1)
    logits = prefill(backend, cache, prompt)
    params = dataclasses.replace(GREEDY, max_tokens=max_tokens)
    lengths = np.array([len(prompt)])
    sampler = make_sampler(params, backend.vocab_size)
    choice = TokenChooser(sampler, np.array([prompt]), lengths, np.arange(1))
    first = choice.choose(logits, 0, np.ones(1, bool))
    return cache, first, backend.decode_many(first, cache, choice, np.ones(1, bool))


def test_tokens_are_those_of_the_recorded_steps(model, opened):
    bundle, _ = model
    backend, cuda, launcher = opened
    found = generate(backend, prompts(5), GREEDY)
    recorded = dataclasses.replace(
        bundle, variant=dataclasses.replace(bundle.variant, details={}),
        kernels=StepKernels(bundle.kernels.model, bundle.kernels.formats, LIMITS),
    )  # fmt: skip
    graphs, their_cuda, theirs = recorded.open()
    assert found == generate(graphs, prompts(5), GREEDY)
    graphs.close()
    assert len(set(found[0])) > 4
    # A session's cache has room for 17 tokens.
    assert of_steps(launcher) == [TOKENS_PER_LAUNCH, 4]
    assert not of_steps(theirs)
    assert "cudaGraphLaunch" not in cuda.calls
    assert their_cuda.calls["cudaGraphLaunch"] >= 11


def test_launches_end_with_the_cache_and_run_one_ahead(model, opened):
    bundle, _ = model
    backend, cuda, launcher = opened
    cache, _, tokens = begin(backend, prompts(11)[0], 30)
    put, read = [], []
    for chosen in tokens:
        put.append(len([name for name in launcher.put if name.startswith("persistent_step")]))
        read.append(int(chosen[0]))
        waited = cuda.calls["cudaStreamSynchronize"]
        if len(read) == 1:
            before = waited
        assert waited == before, "the stream was waited for between steps"
        if len(read) == 19:
            break
    # 19 slots are left behind eleven tokens: launches of eight, eight and three.
    assert put == [2] * 8 + [3] * 11
    assert of_steps(launcher) == [8, 8, 3]
    reference = bundle.torch()
    params = dataclasses.replace(GREEDY, max_tokens=20)
    # A session stops where the token after the next would find no slot.
    assert read[:18] == generate(reference, prompts(11), params)[0][1:]
    assert cache.lengths.tolist() == [30]


def test_graphs_go_on_where_the_kernel_has_left_the_cache_and_back(model, opened):
    bundle, _ = model
    backend, reference = opened[0], bundle.torch()
    found = []
    for used in (backend, reference):
        cache, _, tokens = begin(used, prompts(6)[0], 20)
        seen = [int(next(tokens)[0]) for _ in range(3)]  # in the middle of a launch
        used.rewind(cache, np.array([8]))
        logits = used.decode(np.array([7]), cache)
        again = used.decode(np.array([9]), cache)
        if used is backend:
            with pytest.raises(ValueError, match="another step has run on this cache"):
                next(tokens)
            assert cache.lane.usable
        found.append((seen, logits, again))
    assert found[0][0] == found[1][0]
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.05)


def test_a_lane_that_has_served_more_sequences_finds_its_new_cache(opened):
    backend = opened[0]
    params = dataclasses.replace(GREEDY, max_tokens=4)
    first = generate(backend, prompts(4), params)
    backend.new_cache(2).close()
    # What the first cache has left free is taken, so that the next one lies elsewhere.
    size = sum(backend._kernels.cache_areas(1).values())
    taken = [np.zeros(size + more, np.uint8) for more in range(0, 4096, 256)]
    assert generate(backend, prompts(4), params) == first
    del taken


@pytest.mark.parametrize(
    ("rows", "changes"),
    [(2, {}), (1, {"temperature": 5.0, "seed": 3}), (1, {"repetition_penalty": 3.0})],
    ids=["two sequences", "drawn", "ruled"],
)
def test_everything_else_is_left_to_the_graphs(model, opened, rows, changes):
    bundle, _ = model
    backend, cuda, launcher = opened
    params = dataclasses.replace(GREEDY, max_tokens=3, **changes)
    lengths = (5, 3)[:rows]
    assert generate(backend, prompts(*lengths), params) == generate(
        bundle.torch(), prompts(*lengths), params
    )
    assert not of_steps(launcher)
    assert cuda.calls["cudaGraphLaunch"] >= 2


def test_no_token_to_pick_is_an_error(model, tmp_path):
    shim = model[1]
    broken = with_persistent(packed(tmp_path))
    broken.network.model.norm.weight.data[:] = float("nan")
    kernels = broken.kernels
    write_step_weights(
        broken.file(broken.variant.path), broken.network, kernels.model, kernels.formats
    )
    backend, _, launcher = broken.open()
    launcher._interpreter = ShimInterpreter(launcher._interpreter, shim)
    cache = backend.new_cache(1)
    prefill(backend, cache, prompts(3)[0])
    sampler = make_sampler(GREEDY, backend.vocab_size)
    choice = TokenChooser(sampler, np.array(prompts(3)), np.array([3]), np.arange(1))
    with pytest.raises(ValueError, match="row 0 has no token to pick"):
        next(backend.decode_many(np.array([5]), cache, choice, np.ones(1, bool)))
    backend.close()


def test_a_launch_that_fails_names_the_kernel(opened):
    backend, _, launcher = opened
    _, _, tokens = begin(backend, prompts(3)[0], 5)
    launcher.refuses = "persistent_step"
    with pytest.raises(RuntimeError, match=r"of this batch: persistent_step-.*CUDA_ERROR_TEST"):
        next(tokens)


def test_a_fault_names_the_steps_that_were_under_way(opened):
    backend, cuda, _ = opened
    cache, _, tokens = begin(backend, prompts(3)[0], 27)
    for _ in range(TOKENS_PER_LAUNCH):
        next(tokens)
    cuda.failures["cudaEventSynchronize"] = Status.cudaErrorIllegalAddress
    # The first is the prompt; of three launches, one was read.
    with pytest.raises(RuntimeError, match=r"one of the steps 10 to 25 of this batch: .*Illegal"):
        next(tokens)
    assert not cache.lane.usable


# Which models have it.


@pytest.mark.parametrize(
    ("generation", "overrides", "reason"),
    [
        ("g4", MOE, "it has experts"),
        ("g4", {"keep_window_size": 16}, "30 tokens exceed the keep window of 16"),
        ("g2", {}, "its generation has no mask scores"),
        ("g1", {}, "it is of the seed generation"),
        ("g4", {"intermediate_size": 1536}, "a matrix of 1536 columns, .* build without"),
    ],
    ids=["experts", "window", "g2", "seed", "wide"],
)
def test_other_models_are_refused_with_the_reason(tmp_path, generation, overrides, reason):
    tied = {} if generation == "g1" else {"tie_word_embeddings": True}
    bundle = packed(tmp_path, generation, **{**overrides, **tied})
    with pytest.raises(ValueError, match=rf"no persistent kernel .*{reason}"):
        with_persistent(bundle)


def test_a_variant_that_remembers_something_else_is_refused(model):
    bundle, _ = model
    variant = dataclasses.replace(bundle.variant, details={"persistent": 1})
    with pytest.raises(ValueError, match=r"cuda:fp16-persistent has persistent 1, expected true"):
        kernels_of_variant(bundle, variant)


def test_its_kernels_are_those_of_the_variant_and_no_others(model):
    bundle, _ = model
    plain = StepKernels(bundle.kernels.model, bundle.kernels.formats, LIMITS)
    more = {spec.name: spec for spec in bundle.kernels.specs}
    added = more.keys() - {spec.name for spec in plain.specs}
    assert {name.partition("-")[0] for name in added} == {"persistent_step", "grid_barriers"}
    assert all(more[name].function.startswith(SOURCE) for name in added)
    assert bundle.kernels.areas.keys() - plain.areas.keys() == {
        "partial_values", "partial_masses", "best_keys", "chosen", "barrier",
    }  # fmt: skip
    with pytest.raises(ValueError, match="a launch has 1 to 8 steps, got 9"):
        bundle.kernels.persistent.launch(None, 9)
