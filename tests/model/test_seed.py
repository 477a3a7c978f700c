"""The seed generation: its odd rules, and each exact rewrite against the published form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from model.checkpoint import load_checkpoint
from model.config import UnsupportedModelError
from model.doge import DogeForCausalLM
from model.seed import InnerFunctionAttention, SeedMoE
from model.seed_rewrites import rewrite_for_export
from tests.tiny_doge import write_checkpoint

ATOL = 1e-4


def write(folder: Path, *, mask: str = "some", keys: str = "random", **overrides: Any) -> Path:
    """A seed checkpoint whose stored mask and value keys are as asked for."""
    write_checkpoint(folder, generation="g1", **overrides)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, array in tensors.items():
        if name.endswith("dynamic_mask") and mask == "ones":
            tensors[name] = np.ones_like(array)
        if name.endswith("v_keys") and keys == "zero":
            tensors[name] = np.zeros_like(array)
    save_file(tensors, file)
    return folder


def logits(network: DogeForCausalLM, ids: Tensor, slots: int | None = None) -> Tensor:
    """Logits of every token in one pass, with a cache of `slots` or without one."""
    B, S = ids.shape
    positions = torch.arange(S).expand(B, S)
    cache = None if slots is None else network.new_cache(B, slots)
    result: Tensor = network(ids, positions, torch.zeros(B, dtype=torch.long), positions, cache)[0]
    return result


def random_ids(rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(97, generator=generator)[:length] for _ in range(rows)])


def seed_parts(network: DogeForCausalLM) -> tuple[InnerFunctionAttention, SeedMoE]:
    attention, mlp = network.model.layers[0].self_attn, network.model.layers[0].mlp
    assert isinstance(attention, InnerFunctionAttention)
    assert isinstance(mlp, SeedMoE)
    return attention, mlp


def applied(folder: Path, slots: int = 40) -> tuple[DogeForCausalLM, dict[str, bool]]:
    """The rewritten network, having been compared with the published form."""
    network = load_checkpoint(folder)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    rewritten, done = rewrite_for_export(network, slots)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} of the published form changed"
    for ids in (random_ids(2, 23), random_ids(1, 1)):
        expected = logits(network, ids, slots)
        assert expected.abs().max() > 5
        torch.testing.assert_close(logits(rewritten, ids, slots), expected, atol=ATOL, rtol=0)
    return rewritten, {str(rewrite).partition(":")[0]: rewrite.applied for rewrite in done}


MASK, FOLD, TABLE, ROUTER = (
    "stored mask dropped (R14)",
    "inner values made a constant (R11)",
    "value subsets tabled (R10)",
    "expert queries and keys merged (R13)",
)


def test_untrained_checkpoint_loses_mask_retrieval_and_router_keys(tmp_path: Path) -> None:
    rewritten, done = applied(write(tmp_path, mask="ones", keys="zero"))
    assert done == {MASK: True, FOLD: True, ROUTER: True}
    attention, mlp = seed_parts(rewritten)
    assert attention.custom_ops == ("DynamicMaskAttention",)
    assert attention.mask_bias is not None
    assert attention.mask_bias.shape == (1, 1, 40, 1)
    assert not attention.mask_bias.any()
    assert {name.rpartition("self_attn.")[2] for name, _ in attention.named_parameters()} == {
        "q_proj.weight",
        "k_proj.weight",
        "o_proj.weight",
        "value_scale",
    }
    assert mlp.queries is None
    assert mlp.keys is None


def test_mask_with_a_zero_stays_as_a_bias_per_head(tmp_path: Path) -> None:
    rewritten, done = applied(write(tmp_path, keys="zero"))
    assert done == {MASK: False, FOLD: True, ROUTER: True}
    attention, _ = seed_parts(rewritten)
    assert attention.mask_bias is not None
    assert attention.mask_bias.shape == (1, 4, 40, 1)
    assert attention.mask_bias.any()


def test_zeros_beyond_the_slots_in_use_do_not_count(tmp_path: Path) -> None:
    folder = write(tmp_path, mask="ones")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.attn.dynamic_mask"][2, 40:] = 0
    save_file(tensors, folder / "model.safetensors")
    assert applied(folder, slots=40)[1][MASK]
    assert not applied(folder, slots=41)[1][MASK]


def test_value_keys_in_one_layer_keep_the_retrieval_in_all(tmp_path: Path) -> None:
    folder = write(tmp_path, keys="zero")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.attn.v_keys"][1] = 0.5 * np.eye(16, 4)
    save_file(tensors, folder / "model.safetensors")
    _, done = applied(folder)
    assert not done[FOLD]
    assert done[TABLE]


def test_subsets_are_tabled_up_to_a_size(tmp_path: Path) -> None:
    def tabled(values: int, picked: int) -> bool:
        folder = tmp_path / f"{values} {picked}"
        return applied(write(folder, num_inner_values=values, num_value_per_head=picked))[1][TABLE]

    assert tabled(6, 3)
    assert tabled(16, 1)
    assert not tabled(9, 4)
    # A single set, but a number of 40 bits.
    assert not tabled(40, 40)
    assert not tabled(40, 1)


def test_router_is_merged_only_where_that_is_less_work(tmp_path: Path) -> None:
    few = applied(write(tmp_path / "a", private_expert_retrieval_size=16))[1]
    many = applied(write(tmp_path / "b", private_expert_retrieval_size=4))[1]
    assert few[ROUTER]
    assert not many[ROUTER]


@pytest.mark.parametrize("generation", ["g3", "g4h", "g4"])
def test_other_generations_with_scores_are_left_as_they_are(
    tmp_path: Path, generation: str
) -> None:
    network = load_checkpoint(write_checkpoint(tmp_path, generation=generation))
    assert rewrite_for_export(network, 40) == (network, [])


def test_second_generation_gets_one_zero_bias(tmp_path: Path) -> None:
    network = load_checkpoint(write_checkpoint(tmp_path, generation="g2"))
    rewritten, done = rewrite_for_export(network, 40)
    assert done == []
    ids = random_ids(2, 23)
    assert torch.equal(logits(rewritten, ids, 40), logits(network, ids, 40))
    assert rewritten.model.layers[0].self_attn.mask_bias.shape == (1, 1, 40, 1)


# --- the seed's own rules ---


def test_untouched_value_keys_pick_the_lowest_rows(tmp_path: Path) -> None:
    network = load_checkpoint(write(tmp_path, keys="zero"))
    attention, _ = seed_parts(network)
    assert attention.v_embed is not None
    expected = 2 * attention.v_embed.weight[:2].sum(0)
    picked = attention.inner_values(torch.randn(2, 3, 64))
    torch.testing.assert_close(picked, expected.expand(2, 3, 64))


def test_keys_are_not_rotated_and_queries_once(tmp_path: Path) -> None:
    network = load_checkpoint(write(tmp_path, mask="ones"))
    seen: dict[str, Tensor] = {}

    def tap(value: Tensor, name: str) -> Tensor:
        seen[name] = value
        return value

    ids = random_ids(1, 9)
    start = torch.zeros(1, dtype=torch.long)
    for shift in (0, 7):
        positions = torch.arange(9)[None] + shift
        network(ids, positions, start, start[:, None], None, tap)
        if shift == 0:
            first = dict(seen)
    assert torch.equal(seen["layers.0.key"], first["layers.0.key"])
    assert not torch.allclose(seen["layers.0.query"], first["layers.0.query"], atol=0.1)
    # Scores depend on the query's absolute position, so shifting all positions moves the logits.
    assert not torch.allclose(seen["layers.0.output"], first["layers.0.output"], atol=0.01)


@pytest.mark.parametrize("value", [1e-30, -3.0, 0.49])
def test_only_an_exact_zero_of_the_mask_hides_a_key(tmp_path: Path, value: float) -> None:
    folder = write(tmp_path, mask="ones")
    ids = random_ids(1, 12)
    plain = logits(load_checkpoint(folder), ids)
    tensors = load_file(folder / "model.safetensors")
    for entry, same in ((value, True), (0.0, False)):
        for layer in range(3):
            tensors[f"model.layers.{layer}.attn.dynamic_mask"][:, 5] = entry
        save_file(tensors, folder / "model.safetensors")
        assert torch.equal(logits(load_checkpoint(folder), ids), plain) == same


def test_query_whose_keys_are_all_hidden_averages_those_up_to_itself(tmp_path: Path) -> None:
    folder = write(tmp_path, mask="ones")
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        tensors[f"model.layers.{layer}.attn.dynamic_mask"][:, :4] = 0
    save_file(tensors, folder / "model.safetensors")
    network = load_checkpoint(folder)
    ids = random_ids(1, 12)
    whole = logits(network, ids)
    for length in (1, 3, 7):  # no later key, and no empty slot, takes part
        torch.testing.assert_close(logits(network, ids[:, :length]), whole[:, :length])
        torch.testing.assert_close(logits(network, ids[:, :length], 60), whole[:, :length])


def test_more_tokens_than_the_mask_is_wide_are_an_error(tmp_path: Path) -> None:
    network = load_checkpoint(write(tmp_path, max_position_embeddings=32))
    with pytest.raises(ValueError, match=r"33 tokens exceed the 32 keys that the .* mask covers"):
        logits(network, random_ids(1, 20), slots=33)
    with pytest.raises(ValueError, match="33 tokens exceed the 32 keys"):
        rewrite_for_export(network, 33)


def test_mask_of_another_width_than_the_config_says_is_an_error_that_says_the_width(
    tmp_path: Path,
) -> None:
    folder = write(tmp_path)
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace(
            '"max_position_embeddings": 64', '"max_position_embeddings": 128'
        )
    )
    with pytest.raises(
        UnsupportedModelError, match=r"mask covers 64 keys.*max_position_embeddings, .* must be 64"
    ):
        load_checkpoint(folder)
