"""A fault planted in a random layer is named with its layer, tap and kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import model.doge
import model.layers
import model.seed
from model.checkpoint import load_checkpoint
from model.doge import DogeForCausalLM
from runtime.backends.base import Backend, Cache
from runtime.backends.torch_backend import TorchCache
from runtime.comparison.choices import chosen_experts, kept_keys
from tests.runtime.comparison.planted_faults import STEPS, compare_with_fault, run_torch

DENSE, MOE = ("g3", "g4h_window", "g4_window"), ("g1", "g3_moe", "g4_moe")
Golden = Callable[[str], Path]


def random_layer(case: str, fault: str) -> int:
    return int(np.random.default_rng([len(fault), *map(ord, case)]).integers(0, 3))


@pytest.mark.parametrize("case", [*DENSE, *MOE])
def test_the_same_network_twice_is_clean(golden: Golden, case: str) -> None:
    report = compare_with_fault(golden(case))
    assert (report.verdict, report.first) == ("pass", None)
    assert report.tapping_changed == (0, 0)
    assert not report.missing


@pytest.mark.parametrize("case", [*DENSE, *MOE])
@pytest.mark.parametrize(
    ("part", "tap"),
    [
        ("self_attn.q_proj", "query"),
        ("self_attn.o_proj", "attention_output"),
        ("mlp.down_proj", "mlp_output"),
        ("post_attention_layernorm", "mlp_norm"),
    ],
)
def test_perturbed_weight_is_numeric_at_the_tap_behind_it(
    golden: Golden, case: str, part: str, tap: str
) -> None:
    layer = random_layer(case, part)

    def plant(network: DogeForCausalLM) -> None:
        network.model.layers[layer].get_submodule(part).weight.view(-1)[1] += 0.5

    report = compare_with_fault(golden(case), plant)
    assert report.first is not None
    assert (report.first.tap, report.first.kind) == (f"layers.{layer}.{tap}", "numeric")
    assert (report.verdict, report.first.step) == ("fail", 0)
    before = report.growth[:layer]
    assert before == (0.0,) * layer
    assert (report.growth[layer] or 0) > 0


def only_call(function: Callable[..., Tensor], layer: int, change: Callable[..., Tensor]) -> Any:
    """`function`, of whose calls that of a layer in each pass is changed, once armed."""
    state = {"calls": 0, "armed": False}

    def call(*args: Any, **kwargs: Any) -> Tensor:
        number = state["calls"] % 3
        state["calls"] += 1
        return (
            change(function, *args, **kwargs)
            if state["armed"] and number == layer
            else function(*args, **kwargs)
        )

    call.state = state  # type: ignore[attr-defined]
    return call


def compare_with_changed_op(golden: Golden, case: str, wrapped: Any) -> Any:
    def arm(backend: Backend, cache: Cache, step: int) -> None:
        wrapped.state["armed"] = True

    return compare_with_fault(golden(case), before_step=arm)


@pytest.mark.parametrize("case", ["g3", "g4h_window", "g4_window", "g3_moe", "g4_moe"])
def test_dropped_mask_bias_is_named_by_the_layers_attention(
    golden: Golden, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = random_layer(case, "bias")

    def without_bias(
        op: Any, q: Tensor, k: Tensor, v: Tensor, score: Tensor, *rest: Any, **kw: Any
    ) -> Tensor:
        return op(q, k, v, torch.zeros_like(score), *rest, **kw)  # type: ignore[no-any-return]

    wrapped = only_call(model.doge.dynamic_mask_attention, layer, without_bias)
    monkeypatch.setattr(model.doge, "dynamic_mask_attention", wrapped)
    report = compare_with_changed_op(golden, case, wrapped)
    assert (report.first.tap, report.first.kind) == (f"layers.{layer}.attention_output", "numeric")


@pytest.mark.parametrize("case", MOE)
def test_shifted_expert_index_is_named_by_the_layers_experts(
    golden: Golden, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = random_layer(case, "expert")

    def shifted(
        op: Any, h: Tensor, x: Tensor, y: Tensor, down: Tensor, up: Tensor, **kw: Any
    ) -> Tensor:
        return op(h, x, y, down.roll(1, 0), up.roll(1, 0), **kw)  # type: ignore[no-any-return]

    module = model.seed if case == "g1" else model.layers
    wrapped = only_call(module.expert_gather, layer, shifted)
    monkeypatch.setattr(module, "expert_gather", wrapped)
    report = compare_with_changed_op(golden, case, wrapped)
    assert (report.first.tap, report.first.kind) == (f"layers.{layer}.expert_output", "numeric")
    assert "expert gather" in report.reason


@pytest.mark.parametrize("case", [*DENSE, *MOE])
def test_overflow_of_half_precision_is_named_where_it_begins(golden: Golden, case: str) -> None:
    layer = random_layer(case, "overflow")

    class Half(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return (self.inner(x) * 1e9).half().float() / 1e9

    def plant(network: DogeForCausalLM) -> None:
        attention = network.model.layers[layer].self_attn
        attention.o_proj = Half(attention.o_proj)

    report = compare_with_fault(golden(case), plant)
    assert report.first is not None
    assert report.first.tap == f"layers.{layer}.attention_output"
    assert (report.first.kind, report.first.where) == ("not finite", ("torch:faulty",))
    assert report.as_dict()["first_divergence"]["error"] is None


@pytest.mark.parametrize("case", [*DENSE, *MOE])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_overwritten_cache_slot_is_named_by_layer_and_step(
    golden: Golden, case: str, kind: str
) -> None:
    layer = random_layer(case, f"cache {kind}")
    at = 1 + random_layer(case, "step") % STEPS

    def spoil(backend: Backend, cache: Cache, step: int) -> None:
        assert isinstance(cache, TorchCache)
        if step == at:
            cache.layers[layer][("key", "value").index(kind)][0, :, 3] = 2.0

    report = compare_with_fault(golden(case), before_step=spoil)
    assert report.first is not None
    assert (report.first.step, report.first.tap) == (at, f"layers.{layer}.cached_{kind}")


def test_choices_follow_the_definitions_of_the_ops(golden: Golden) -> None:
    from plugins.dynamic_mask_attention.op import keep_largest_scores
    from plugins.expert_gather.op import pick_experts

    generator = np.random.default_rng(5)
    score = np.round(generator.standard_normal((2, 20)), 1).astype(np.float32)  # with ties
    found = kept_keys(score, 14, 6, 4)
    visible = torch.arange(20)[None] <= torch.arange(14, 20)[:, None]
    expected = keep_largest_scores(torch.from_numpy(score)[None], visible[None, None], 4)
    np.testing.assert_array_equal(found.chosen, expected[0].numpy())
    assert (found.margin >= 0).all()
    for case in MOE:
        config = load_checkpoint(golden(case)).config
        heads = config.num_cdmmoe_heads if config.is_seed else 1
        top_k = config.num_cdmmoe_experts_per_head if config.is_seed else config.num_experts_per_tok
        n = config.num_keys
        router = np.round(generator.standard_normal((1, 2, heads, n)), 1).astype(np.float32)
        chosen = chosen_experts(router.reshape(1, -1), config).chosen  # [P, 1, n²]
        _, experts = pick_experts(*torch.from_numpy(router).unbind(1), top_k)
        for head in range(heads):
            assert set(np.flatnonzero(chosen[head, 0])) == set(experts[0, head].tolist())


def test_a_choice_of_another_key_is_discrete_with_both_margins(golden: Golden) -> None:
    network = load_checkpoint(golden("g4_window"))
    reference = run_torch(network)
    candidate = run_torch(network, "torch:other", reference)
    score = candidate.prompts[0].values[0]["layers.1.score"]
    order = np.argsort(-score[0, :, 0], kind="stable")
    kept, dropped = order[network.config.keep_window_size - 1 :][:2]
    score[0, [kept, dropped]] = score[0, [dropped, kept]]
    from runtime.comparison.verdict import differences

    found = [d for d in differences(reference, candidate, network.config, "int4") if d.parts]
    assert found[0].tap == "layers.1.kept_keys"
    assert found[0].kind == "discrete"
    assert found[0].near_tie
    assert found[0].reference_margin is not None
    assert found[0].reference_margin >= 0
