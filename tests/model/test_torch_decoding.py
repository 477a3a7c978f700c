"""Decoding in PyTorch gives the tokens of the reference, in whatever way it is run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from model.torch_decoding import TorchDecoding, missing_device
from runtime.backends.torch_backend import TorchBackend
from tests.tiny_doge import MOE, write_checkpoint

CAPACITY, STEPS = 24, 8
PROMPTS = np.random.default_rng(0).integers(3, 97, (2, 9))
# With a head of their own, random weights do not just repeat the token.
UNTIED = {"tie_word_embeddings": False}
# Generation, overrides of its config, router mode.
MODELS = {
    "g4": ("g4", UNTIED, None),
    "window": ("g4", {"keep_window_size": 8, **UNTIED}, None),
    "g1": ("g1", {}, None),
    "mixed": ("g4", {**MOE, **UNTIED}, "mixed"),
    "per token": ("g4", {**MOE, **UNTIED}, "per_token"),
}


@pytest.fixture
def quick_compiler(monkeypatch):
    """Graphs are taken and made functional as for the real compiler, and then run as they are."""
    compile_as_asked = torch.compile
    asked = []

    def compile_quickly(module, **options):
        asked.append(options)
        return compile_as_asked(module, backend="aot_eager", fullgraph=options["fullgraph"])

    monkeypatch.setattr(torch, "compile", compile_quickly)
    torch.compiler.reset()
    counters.clear()
    return asked


@pytest.fixture
def checkpoint(tmp_path):
    def write(name):
        generation, overrides, router = MODELS[name]
        folder = write_checkpoint(
            tmp_path / "checkpoint", generation=generation, **{"num_hidden_layers": 2, **overrides}
        )
        return folder, router

    return write


def opened(folder, router, mode, **changes):
    options = {"dtype": "float32", "device": "cpu", "batch_size": 2, "capacity": CAPACITY}
    return TorchDecoding.open(folder, router_mode=router, mode=mode, **{**options, **changes})


def tokens_of_the_reference(folder, router, prompts, steps):
    backend = TorchBackend.from_checkpoint(folder, router_mode=router)
    cache = backend.new_cache(len(prompts), CAPACITY)
    logits = backend.prefill(prompts, np.full(len(prompts), prompts.shape[1]), cache)
    found = [logits.argmax(-1)]
    for _ in range(steps):
        found.append(backend.decode(found[-1], cache).argmax(-1))
    return np.stack(found, axis=1)


RUNS = [(name, mode) for name in MODELS for mode in ("growing", "eager")]
RUNS.append(("g4", "compiled"))
# The first trace of an expert's choice takes seconds more.
RUNS.append(pytest.param("mixed", "compiled", marks=pytest.mark.slow))


@pytest.mark.parametrize(("name", "mode"), RUNS)
def test_tokens_are_those_of_the_reference(checkpoint, quick_compiler, name, mode):
    folder, router = checkpoint(name)
    expected = tokens_of_the_reference(folder, router, PROMPTS, STEPS)
    assert len(set(expected.ravel().tolist())) > 4
    decoding = opened(folder, router, mode)
    decoding.prefill(PROMPTS)
    decoding.decode(3)
    decoding.decode(STEPS - 3)
    decoding.wait()
    np.testing.assert_array_equal(decoding.tokens(), expected)
    # The same continuation again, and another prompt in the same cache.
    decoding.rewind()
    decoding.decode(STEPS)
    np.testing.assert_array_equal(decoding.tokens(), expected)
    other = PROMPTS[::-1, 4:].copy()
    decoding.prefill(other)
    decoding.decode(5)
    expected = tokens_of_the_reference(folder, router, other, 5)
    np.testing.assert_array_equal(decoding.tokens(), expected)
    if mode == "compiled":
        assert quick_compiler == [{"mode": "reduce-overhead", "fullgraph": True}]
        assert decoding.compiler_facts()["graphs"] == 1, "a step is compiled once"
    else:
        assert decoding.compiler_facts() == {}


def test_a_compiler_sees_definitions_and_no_ops(checkpoint, monkeypatch):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: whole(module, backend=keep))
    torch.compiler.reset()
    decoding = opened(*checkpoint("per token"), "compiled")
    decoding.prefill(PROMPTS)
    decoding.decode(1)
    (graph,) = graphs
    called = {str(node.target) for node in graph.graph.nodes}
    assert "doge" not in " ".join(called)
    assert any("softmax" in name for name in called)


@pytest.mark.parametrize(
    ("name", "passes"),
    [("per token", [(2, 4), (2, 4), (2, 1)]), ("mixed", [(1, 9), (1, 9)])],
)
def test_a_router_that_wants_a_prompt_whole_gets_it(checkpoint, monkeypatch, name, passes):
    monkeypatch.setattr("model.torch_decoding._CHUNK", 4)
    decoding = opened(*checkpoint(name), "eager")
    seen = []
    forward = decoding._network.forward

    def watched(ids, *rest):
        seen.append(tuple(ids.shape))
        return forward(ids, *rest)

    decoding._network.forward = watched
    decoding.prefill(PROMPTS)
    assert seen == passes


def test_a_prompt_in_chunks_is_the_prompt(checkpoint, monkeypatch):
    monkeypatch.setattr("model.torch_decoding._CHUNK", 4)
    folder, router = checkpoint("g4")
    decoding = opened(folder, router, "eager")
    decoding.prefill(PROMPTS)
    decoding.decode(STEPS)
    expected = tokens_of_the_reference(folder, router, PROMPTS, STEPS)
    np.testing.assert_array_equal(decoding.tokens(), expected)


@pytest.mark.parametrize("mode", ["growing", "eager"])
def test_weights_and_cache_have_the_type_that_is_asked_for(checkpoint, mode):
    decoding = opened(*checkpoint("g4"), mode, dtype="bfloat16")
    decoding.prefill(PROMPTS)
    decoding.decode(2)
    held = {part.dtype for layer in decoding._layers for part in layer}
    held |= {parameter.dtype for parameter in decoding._network.parameters()}
    assert held == {torch.bfloat16}
    assert decoding.tokens().shape == (2, 3)


def test_what_makes_no_sense_is_refused(checkpoint):
    folder, router = checkpoint("g4")
    with pytest.raises(ValueError, match="mode is 'jit', expected one of growing"):
        opened(folder, router, "jit")
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of float32"):
        opened(folder, router, "eager", dtype="int8")
    decoding = opened(folder, router, "eager")
    with pytest.raises(ValueError, match=r"shape \(1, 9\) for 2 rows"):
        decoding.prefill(PROMPTS[:1])
    with pytest.raises(ValueError, match="1 to 23 tokens"):
        decoding.prefill(np.zeros((2, CAPACITY), np.int64))
    decoding.prefill(PROMPTS)
    with pytest.raises(ValueError, match="9 tokens are cached, 16 more exceed the 24 slots"):
        decoding.decode(CAPACITY - 8)


def test_a_device_that_is_missing_is_named(monkeypatch):
    assert missing_device("cpu") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing_device("cuda") == f"PyTorch {torch.__version__} sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert missing_device("cuda:0") is None
