"""The network against published results, against itself with and without a cache, and its taps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from model.checkpoint import load_checkpoint
from model.contract import layer_taps, step_contract
from model.doge import DogeAttention, DogeForCausalLM
from model.generations.g4 import G4
from model.step_ops import LayerCache
from tests.golden_cases import GOLDEN_CASES
from tests.tiny_doge import MOE, write_checkpoint

# The contract is 1e-3 on logits of size 10 to 30; orders of summation differ by about 2e-5.
ATOL = 1e-4
Golden = Callable[[str], Path]


def load(folder: Path, router_mode: str | None = None) -> DogeForCausalLM:
    return load_checkpoint(folder, router_mode=router_mode)


def step(
    network: DogeForCausalLM,
    ids: Tensor,
    cache: list[LayerCache] | None = None,
    start: int | list[int] = 0,
    logits_index: Tensor | None = None,
) -> Tensor:
    """Logits of one step; without `logits_index`, of every token."""
    B, S = ids.shape
    write_index = torch.tensor([start] * B if isinstance(start, int) else start)
    position_ids = write_index[:, None] + torch.arange(S)
    if logits_index is None:
        logits_index = torch.arange(S).expand(B, S)
    logits, _ = network(ids, position_ids, write_index, logits_index, cache)
    assert isinstance(logits, Tensor)
    return logits


def attentions(network: DogeForCausalLM) -> list[DogeAttention]:
    return [module for module in network.modules() if isinstance(module, DogeAttention)]


def one_by_one(network: DogeForCausalLM, ids: Tensor) -> Tensor:
    """Logits of every token, each fed in a step of its own."""
    cache = network.new_cache(len(ids), ids.shape[1])
    parts = [step(network, ids[:, [s]], cache, s) for s in range(ids.shape[1])]
    return torch.cat(parts, dim=1)


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """[rows, length] with few repetitions: 97 tokens in the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(97, generator=generator)[:length] for _ in range(rows)])


def golden_tensors(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, S], logits of one pass [B, S, V], logits of row 0 token by token [1, S, V]."""
    with np.load(folder / "golden.npz") as data:
        assert data["attention_mask"].all()
        names = ("input_ids", "prefill_logits", "decode_logits")
        ids, prefill, decode = (torch.from_numpy(data[name]) for name in names)
    return ids.long(), prefill, decode


# --- against published code ---


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_prefill_equals_published_code(golden: Golden, case: str) -> None:
    ids, expected, _ = golden_tensors(golden(case))
    network = load(golden(case))
    actual = step(network, ids, network.new_cache(*ids.shape))
    assert expected.abs().max() > 5
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_decode_equals_published_code(golden: Golden, case: str) -> None:
    ids, _, expected = golden_tensors(golden(case))
    actual = one_by_one(load(golden(case)), ids[:1])
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", ["g4_window", "g4h_window"])
def test_window_of_the_golden_case_drops_keys(golden: Golden, case: str) -> None:
    ids, expected, _ = golden_tensors(golden(case))
    network = load(golden(case))
    for attention in attentions(network):
        attention.keep_window_size = 2048
    logits = step(network, ids)
    torch.testing.assert_close(logits[:, :7], expected[:, :7], atol=ATOL, rtol=0)
    assert (logits[:, 7:] - expected[:, 7:]).abs().amax(dim=(1, 2)).min() > 1


PUBLISHED_VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 32},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 40000.0}},
    "dynamic rope within its length": {
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "eps": {"rms_norm_eps": 1e-2},
    "window": {"keep_window_size": 6},
    "moe": {**MOE},
    "moe, normalized": {**MOE, "norm_topk_prob": True},
    "moe, more picks than keys": {**MOE, "num_experts_per_tok": 13},
}


@pytest.fixture(params=PUBLISHED_VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, seed=7, **PUBLISHED_VARIANTS[request.param])


def test_network_equals_transformers_in_one_pass_and_token_by_token(variant: Path) -> None:
    published = transformers.DogeForCausalLM.from_pretrained(
        variant, attn_implementation="eager", dtype=torch.float32
    ).eval()
    network = load(variant)
    ids = random_ids(1, 19)
    with torch.inference_mode():
        expected = published(ids, use_cache=False).logits
        past, tokens = None, []
        for s in range(ids.shape[1]):
            output = published(ids[:, [s]], past_key_values=past, use_cache=True)
            past = output.past_key_values
            tokens.append(output.logits)
    torch.testing.assert_close(step(network, ids), expected, atol=ATOL, rtol=0)
    torch.testing.assert_close(one_by_one(network, ids), torch.cat(tokens, 1), atol=ATOL, rtol=0)


def test_checkpoint_saved_by_transformers_loads_as_it_is(tmp_path: Path) -> None:
    config = transformers.DogeConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    torch.manual_seed(3)
    published = transformers.DogeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in published.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    published.save_pretrained(tmp_path)
    ids = random_ids(2, 11)
    with torch.inference_mode():
        expected = published(ids, use_cache=False).logits
    torch.testing.assert_close(step(load(tmp_path), ids), expected, atol=ATOL, rtol=0)


# --- against itself: cache, chunks, rows ---


def decodable(folder: Path) -> DogeForCausalLM:
    """Routed per token where there is a router; then chunks and batches change nothing."""
    return load(folder, "per_token")


NETWORKS = (
    "g1",
    "g2_first",
    "g2",
    "g3",
    "g3 moe",
    "g4h moe",
    "g4h window",
    "g4",
    "g4 moe",
    "g4 window",
    "g4 moe window",
    "g4 window, equal scores",
)


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest, tmp_path: Path) -> DogeForCausalLM:
    kind = request.param
    overrides = {"keep_window_size": 6} if "window" in kind else {}
    overrides |= MOE if "moe" in kind else {}
    folder = write_checkpoint(tmp_path, generation=kind.split()[0], **overrides)
    loaded = decodable(folder)
    if "equal" in kind:
        for attention in attentions(loaded):
            attention.A.zero_()
    return loaded


def test_step_with_a_cache_equals_one_without(network: DogeForCausalLM) -> None:
    ids = random_ids(3, 17)
    expected = step(network, ids)
    for slots in (17, 40):
        torch.testing.assert_close(
            step(network, ids, network.new_cache(3, slots)), expected, atol=ATOL, rtol=0
        )


@pytest.mark.parametrize("length", [5, 6, 7, 8])
def test_selection_starts_with_the_first_slot_beyond_the_window(
    tmp_path: Path, length: int
) -> None:
    network = load(write_checkpoint(tmp_path, keep_window_size=6))
    ids = random_ids(2, length)
    expected = step(network, ids, network.new_cache(2, 40))
    torch.testing.assert_close(
        step(network, ids, network.new_cache(2, length)), expected, atol=ATOL, rtol=0
    )
    for attention in attentions(network):
        attention.keep_window_size = 2048
    assert torch.allclose(step(network, ids), expected, atol=ATOL, rtol=0) == (length <= 6)


def test_cache_is_changed_in_place(network: DogeForCausalLM) -> None:
    cache = network.new_cache(2, 12)
    addresses = [tensor.data_ptr() for layer in cache for tensor in layer]
    ids = random_ids(2, 5)
    _, presents = network(
        ids, torch.arange(5).expand(2, 5), torch.zeros(2, dtype=torch.long), ids[:, :1] * 0, cache
    )
    assert [tensor.data_ptr() for layer in presents for tensor in layer] == addresses
    for layer in cache:
        for tensor in layer:
            assert (tensor[:, :, :5] != 0).any(-1).all()
            assert not tensor[:, :, 5:].any()


def test_cache_has_the_shapes_of_the_contract(tmp_path: Path) -> None:
    network = load(write_checkpoint(tmp_path, num_key_value_heads=1, head_dim=24))
    contract = step_contract(network.config, G4, max_seq_len=12)
    tensors = [tensor for layer in network.new_cache(5, 12) for tensor in layer]
    for tensor, spec in zip(tensors, contract.past, strict=True):
        assert tensor.shape == (5, *spec.shape[1:])
        assert str(tensor.dtype) == f"torch.{spec.dtype}"


def test_prefill_in_chunks_equals_one_pass(network: DogeForCausalLM) -> None:
    ids = random_ids(2, 23)
    cache = network.new_cache(2, 23)
    parts = [
        step(network, ids[:, begin:end], cache, begin) for begin, end in ((0, 7), (7, 8), (8, 23))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), step(network, ids), atol=ATOL, rtol=0)


def test_decode_equals_one_pass(network: DogeForCausalLM) -> None:
    ids = random_ids(2, 15)
    torch.testing.assert_close(one_by_one(network, ids), step(network, ids), atol=ATOL, rtol=0)


def test_rows_of_unequal_length_equal_each_row_alone(network: DogeForCausalLM) -> None:
    lengths = [1, 11, 6]
    ids = random_ids(3, 20)
    cache = network.new_cache(3, 24)
    # Every row is fed 11 tokens; what stands behind its length is surplus.
    fed = torch.where(torch.arange(11) < torch.tensor(lengths)[:, None], ids[:, :11], 96)
    last = torch.tensor(lengths)[:, None] - 1
    prefilled = step(network, fed, cache, 0, last)
    steps = [prefilled]
    for more in range(9):
        new = torch.stack([ids[row, [length + more]] for row, length in enumerate(lengths)])
        steps.append(step(network, new, cache, [length + more for length in lengths]))
    actual = torch.cat(steps, 1)
    for row, length in enumerate(lengths):
        alone = step(network, ids[row : row + 1, : length + 9])
        torch.testing.assert_close(actual[row], alone[0, length - 1 :], atol=ATOL, rtol=0)


def test_later_token_moves_no_earlier_logit(network: DogeForCausalLM) -> None:
    ids = random_ids(1, 14)
    changed = ids.clone()
    changed[0, 9:] = (changed[0, 9:] + 40) % 97
    before, after = step(network, ids), step(network, changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-5, rtol=0)
    assert (before[:, 9:] - after[:, 9:]).abs().amax(-1).min() > 0.1


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_row_does_not_see_its_neighbours(network: DogeForCausalLM, rows: int) -> None:
    ids = random_ids(rows, 9)
    together = step(network, ids)
    for row in range(rows):
        alone = step(network, ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=ATOL, rtol=0)


def test_order_of_equal_scores_is_that_of_the_slots(tmp_path: Path) -> None:
    """With A = 0 every score is 1, so the first W keys stay for ever."""
    network = load(write_checkpoint(tmp_path, keep_window_size=4, num_hidden_layers=1))
    for attention in attentions(network):
        attention.A.zero_()
    ids = random_ids(1, 12)
    changed = ids.clone()
    changed[0, 4:11] = (changed[0, 4:11] + 40) % 97
    torch.testing.assert_close(step(network, ids)[:, 11], step(network, changed)[:, 11])


# --- the router mode `mixed` ---


def test_mixed_prefills_each_sequence_of_a_batch_as_if_alone(tiny_moe: Path) -> None:
    network = load(tiny_moe)
    assert network.config.router_mode == "mixed"
    for length in (1, 2, 13, 16):
        ids = random_ids(3, length)
        together = step(network, ids)
        for row in range(3):
            alone = step(network, ids[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, atol=ATOL, rtol=0)


def test_mixed_decodes_each_token_by_its_own_router_scores(tiny_moe: Path) -> None:
    ids = random_ids(3, 8)
    torch.testing.assert_close(
        one_by_one(load(tiny_moe, "mixed"), ids),
        one_by_one(load(tiny_moe, "per_token"), ids),
        atol=0,
        rtol=0,
    )


def test_mixed_prefill_departs_from_decode_as_published(tiny_moe: Path) -> None:
    network = load(tiny_moe)
    ids = random_ids(1, 12)
    assert (step(network, ids) - one_by_one(network, ids)).abs().max() > 0.5


def test_mixed_lets_a_later_token_move_an_earlier_logit(tiny_moe: Path) -> None:
    ids = random_ids(1, 12)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 40) % 97
    for mode, moves in (("mixed", True), ("per_token", False)):
        network = load(tiny_moe, mode)
        difference = (step(network, ids) - step(network, changed))[:, :-1].abs().max()
        assert (difference > 0.1) == moves


# --- logits_index and taps ---


def test_logits_index_picks_its_tokens_row_by_row(tiny_dense: Path) -> None:
    network = load(tiny_dense)
    ids = random_ids(3, 8)
    every = step(network, ids)
    wanted = torch.tensor([[7, 0], [3, 3], [2, 6]])
    picked = step(network, ids, logits_index=wanted)
    assert picked.shape == (3, 2, 97)
    for row in range(3):
        torch.testing.assert_close(picked[row], every[row, wanted[row]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("moe", [False, True])
def test_taps_come_once_each_in_the_order_of_the_contract(tmp_path: Path, moe: bool) -> None:
    network = load(write_checkpoint(tmp_path, **(MOE if moe else {})))
    seen: dict[str, tuple[int, ...]] = {}

    def record(value: Tensor, name: str) -> Tensor:
        assert name not in seen
        seen[name] = tuple(value.shape)
        return value

    ids = random_ids(2, 5)
    start = torch.zeros(2, dtype=torch.long)
    cache = network.new_cache(2, 9)
    network(ids, torch.arange(5).expand(2, 5), start, start[:, None], cache, record)
    assert list(seen) == list(layer_taps(network.config, network.generation))
    assert seen["embedding"] == seen["layers.0.output"] == seen["layers.2.mlp_output"] == (2, 5, 64)
    assert seen["layers.1.query"] == (2, 4, 5, 16)
    assert seen["layers.1.key"] == seen["layers.1.value"] == (2, 2, 5, 16)
    assert seen["layers.1.score"] == (2, 2, 5, 1)
    assert seen["final_norm"] == (2, 1, 64)
    if moe:
        assert seen["layers.0.router_scores"] == (2, 5, 16)
        assert seen["layers.0.expert_output"] == (2, 5, 64)


@pytest.mark.parametrize("kind", ["g1", "g2", "g3", "g4", "g4 moe"])
def test_step_goes_on_with_what_a_tap_returns(tmp_path: Path, kind: str) -> None:
    overrides = MOE if "moe" in kind else {}
    network = load(write_checkpoint(tmp_path, generation=kind.split()[0], **overrides))
    ids = random_ids(1, 6)
    start = torch.zeros(1, dtype=torch.long)
    arguments = (ids, torch.arange(6)[None], start, torch.tensor([[5]]), None)
    plain, _ = network(*arguments)
    for replaced in layer_taps(network.config, network.generation):

        def change(value: Tensor, name: str, replaced: str = replaced) -> Tensor:
            return value.flip(-1) * 1.5 + 0.3 if name == replaced else value

        changed, _ = network(*arguments, change)
        assert not torch.allclose(plain, changed, atol=1e-3), replaced


def test_taps_of_the_seed_come_in_the_order_of_the_contract(tmp_path: Path) -> None:
    network = load(write_checkpoint(tmp_path, generation="g1"))
    seen: dict[str, tuple[int, ...]] = {}

    def record(value: Tensor, name: str) -> Tensor:
        assert name not in seen
        seen[name] = tuple(value.shape)
        return value

    ids = random_ids(2, 5)
    start = torch.zeros(2, dtype=torch.long)
    network(ids, torch.arange(5).expand(2, 5), start, start[:, None], None, record)
    assert list(seen) == list(layer_taps(network.config, network.generation))
    assert seen["layers.1.key"] == seen["layers.1.value"] == (2, 4, 5, 16)
    assert seen["layers.0.router_scores"] == (2, 5, 2 * 2 * 7)


def test_tied_head_is_the_embedding_table(tiny_dense: Path, golden: Golden) -> None:
    tied, untied = load(tiny_dense), load(golden("g4_untied_mha"))
    assert tied.head_weight is tied.model.embed_tokens.weight
    assert untied.head_weight is untied.lm_head.weight
    assert not torch.equal(untied.head_weight, untied.model.embed_tokens.weight)


def test_rotary_tables_are_no_part_of_a_checkpoint(tiny_dense: Path) -> None:
    network = load(tiny_dense)
    assert not {"cos", "sin"} & set(network.state_dict())
    assert network.cos.shape == network.sin.shape == (256, 8)


def test_half_precision_runs_in_its_own_dtype_and_gives_float32_logits(tiny_dense: Path) -> None:
    network = load(tiny_dense)
    expected = step(network, random_ids(2, 9))
    network.to(torch.bfloat16)
    network.reset_rotary()
    cache = network.new_cache(2, 9)
    logits = step(network, random_ids(2, 9), cache)
    assert {tensor.dtype for layer in cache for tensor in layer} == {torch.bfloat16}
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().mean() < 0.05 * expected.abs().max()
