"""The backend of our kernels generates the reference's tokens, in every precision.

The reference is the network in torch on the numbers that are stored. Every kernel runs in Triton's
interpreter, bfloat16 as a GPU rounds it (`mend_bfloat16`); what a GPU makes of it is not shown.
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import pytest

import plugins.projection.launches as projection_launches
import plugins.projection.matrix as projection_matrix
from runtime.backends.base import Limits
from runtime.backends.torch_backend import TorchBackend
from runtime.kernel_step.formats import STEP_PRECISIONS
from runtime.philox import uniform_numbers
from runtime.sampling import SamplingParams, pick
from tests.fake_kernels import PackedBundle
from tests.interpreter import mend_bfloat16
from tests.kernel_tokens import (
    GREEDY,
    ClearText,
    Text,
    largest_error,
    margin,
    tokens_of,
)
from tests.tiny_doge import MOE, write_checkpoint

# Prompts of 5 and 4 tokens take two passes, a row ends before the other, and half of the keys are
# dropped where there is a window.
LIMITS = Limits(max_batch_size=2, max_input_len=3, max_seq_len=8)
LENGTHS, NEW_TOKENS = (5, 4), 2
UNTIED = {"tie_word_embeddings": False}
WINDOW = {"keep_window_size": 4}
# Generation, overrides of its config, router mode.
MODELS = {
    "g1": ("g1", {}, None),
    "g2": ("g2", UNTIED, None),
    "g3": ("g3", UNTIED, None),
    "g3-moe": ("g3", {**UNTIED, **MOE}, "per_token"),
    "g4": ("g4", {**UNTIED, "num_hidden_layers": 2}, None),
    "g4-window": ("g4", {**UNTIED, **WINDOW}, None),
    "g4-moe": ("g4", {**UNTIED, **MOE}, "mixed"),
    "g4h": ("g4h", UNTIED, None),
    "g4h-window": ("g4h", {**UNTIED, **WINDOW}, None),
    "g4h-moe": ("g4h", {**UNTIED, **MOE, **WINDOW}, "per_token"),
}
# Models that differ from others by little that a precision changes, or that take long.
FEWER = {
    "g3-moe": ("fp32", "int8"),
    "g4-window": ("fp32",),
    "g4h": ("bf16", "int8"),
    "g4h-window": ("fp32", "fp16", "int4"),
    "g4h-moe": ("fp32", "int4"),
}
CASES = [(name, precision) for name in MODELS for precision in FEWER.get(name, STEP_PRECISIONS)]
# How far a logit may be off, as a share of the largest one: in float32 the order of sums; else what
# a prompt rounds before tensor cores multiply it, and a key or value that rounds the other way.
TOLERANCES = {"fp32": 5e-6, "fp16": 1e-3, "bf16": 6e-3, "int8": 1e-3, "int4": 1e-3}
DRAWN = SamplingParams(temperature=2.0, seed=1)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one by one: fewer and larger ones compute the same."""
    monkeypatch.setattr(projection_launches, "ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(projection_launches, "ENOUGH_HEAD_PROGRAMS", 1)
    monkeypatch.setattr(projection_matrix, "_FEW_PROGRAMS", 1)


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_tokens_and_logits_are_the_references(tmp_path, monkeypatch, name, precision):
    generation, more, router = MODELS[name]
    overrides = {"num_hidden_layers": 1, **more}
    folder = write_checkpoint(
        tmp_path / "checkpoint", generation=generation, seed=zlib.crc32(name.encode()), **overrides
    )
    # A router that mixes tokens takes a prompt in one pass.
    limits = dataclasses.replace(LIMITS, max_input_len=5) if router == "mixed" else LIMITS
    bundle = PackedBundle.make(tmp_path, folder, precision, limits, router)
    if precision == "bf16":
        mend_bfloat16(monkeypatch)
    tolerance = TOLERANCES[precision]
    expected = ClearText.find(
        bundle.network, precision, limits, LENGTHS, NEW_TOKENS, DRAWN, tolerance
    )
    backend, cuda, _ = bundle.open()
    text = Text(backend, expected.text.rows, NEW_TOKENS)
    drawn, greedy = list(text.choices(expected.params)), list(text.choices(GREEDY))
    error = largest_error(drawn, expected.drawn)
    assert error < tolerance
    assert tokens_of(drawn) == tokens_of(expected.drawn)
    assert tokens_of(greedy) == tokens_of(expected.greedy)
    assert tokens_of(greedy) != tokens_of(drawn)
    if precision in ("int8", "int4"):
        # The weights' own rounding is larger: the right numbers were read.
        exact = TorchBackend(bundle.network, limits=limits, variant="fp32")
        forced = Text(exact, expected.text.rows, NEW_TOKENS).forced(expected.drawn)
        assert largest_error(drawn, forced) > 3 * tolerance
    backend.close()
    assert (cuda.ledger.violations, cuda.ledger.live, cuda.used_bytes) == ([], {}, 0)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 5.0])
def test_no_logits_within_the_margin_give_another_token(temperature):
    """What the tokens of two runs are compared by."""
    rng = np.random.default_rng(2)
    params = SamplingParams(temperature=temperature)
    moved = 0
    for number in range(30):
        logits = rng.normal(0, 3, 20).astype(np.float32)
        uniform = float(uniform_numbers(7, np.array([0]), np.array([number]))[0])

        def token_of(numbers, uniform=uniform):
            return pick(numbers, uniform, params) if temperature else int(numbers.argmax())

        token = token_of(logits)
        limit = margin(logits, token, uniform, temperature)
        assert limit > 0
        signs = rng.choice([-1.0, 1.0], (100, 20))
        signs[0] = np.where(logits >= logits[token], 1, -1)
        signs[1] = -signs[0]
        signs[:2, token] = -1.0
        for error in signs:
            assert token_of((logits + 0.99 * limit * error).astype(np.float32)) == token
        moved += any(
            token_of((logits + 1.3 * limit * error).astype(np.float32)) != token for error in signs
        )
    # Nor is it far too small.
    assert moved > (25 if temperature == 0 else 8)
