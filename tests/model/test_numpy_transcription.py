"""The network against an independent transcription of every published generation (numpy)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch

from model.checkpoint import load_checkpoint
from model.config import SEED_FIELDS
from model.doge import DogeForCausalLM
from tests.numpy_checkpoints import SEEDS, RandomCheckpoint, random_checkpoint
from tests.numpy_doge import Generation, Router, logits

GENERATIONS = get_args(Generation)
# Of the largest logit. The transcription computes in float64, so this is the network's rounding.
RTOL = 5e-6
Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


def ids_of(case: RandomCheckpoint) -> Ids:
    return case.distinct_ids(2, 9 + 2 * case.seed)


def one_pass(network: DogeForCausalLM, ids: Ids) -> Logits:
    B, S = ids.shape
    every = torch.arange(S).expand(B, S)
    start = torch.zeros(B, dtype=torch.long)
    result, _ = network(torch.from_numpy(ids), every, start, every, None)
    return result.numpy()


def one_by_one(network: DogeForCausalLM, ids: Ids) -> Logits:
    B, S = ids.shape
    cache, tokens = network.new_cache(B, S), torch.from_numpy(ids)
    parts = []
    for s in range(S):
        start = torch.full((B,), s)
        index = torch.zeros(B, 1, dtype=torch.long)
        parts.append(network(tokens[:, [s]], start[:, None], start, index, cache)[0])
    return torch.cat(parts, dim=1).numpy()


def assert_close(actual: Logits, expected: npt.NDArray[np.floating]) -> None:
    largest = np.abs(expected).max()
    assert largest > 1
    np.testing.assert_allclose(actual, expected, atol=RTOL * largest, rtol=0)


@pytest.fixture(params=GENERATIONS)
def generation(request: pytest.FixtureRequest) -> Generation:
    return request.param


@pytest.mark.parametrize("seed", SEEDS)
def test_network_equals_transcription_in_one_pass(
    tmp_path: Path, generation: Generation, seed: int
) -> None:
    case = random_checkpoint(generation, seed)
    case.write(tmp_path)
    ids = ids_of(case)
    routers: tuple[Router, ...] = (
        ("mixed", "per_token") if case.config.get("is_moe") else ("mixed",)
    )
    for router in routers:
        network = load_checkpoint(tmp_path, router_mode=router)
        assert network.generation.name == generation
        expected = logits(case.config, case.tensors, ids, generation, router)
        assert_close(one_pass(network, ids), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_network_equals_transcription_token_by_token(
    tmp_path: Path, generation: Generation, seed: int
) -> None:
    case = random_checkpoint(generation, seed)
    network = load_checkpoint(case.write(tmp_path))
    ids = ids_of(case)
    expected = logits(case.config, case.tensors, ids, generation, "per_token", token_by_token=True)
    assert_close(one_by_one(network, ids), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_seed_query_without_visible_keys_averages_those_up_to_itself(
    tmp_path: Path, seed: int
) -> None:
    """As published token by token; published in one pass, it averages the later keys as well."""
    case = random_checkpoint("g1", seed)
    for name, tensor in case.tensors.items():
        if name.endswith("dynamic_mask"):
            tensor[:, :4] = 0
    network = load_checkpoint(case.write(tmp_path))
    ids = ids_of(case)
    published = logits(case.config, case.tensors, ids, "g1", token_by_token=True)
    assert_close(one_by_one(network, ids), published)
    assert_close(one_pass(network, ids), published)
    in_one_pass = logits(case.config, case.tensors, ids, "g1")
    assert np.abs(in_one_pass - published).max() > 0.01


@pytest.mark.parametrize("generation", ["g4", "g4h"])
def test_equal_scores_keep_the_lower_slots_in_network_and_transcription(
    tmp_path: Path, generation: Generation
) -> None:
    for seed in SEEDS:
        case = random_checkpoint(generation, seed)
        if case.config["keep_window_size"] == 2048 or case.config.get("is_moe"):
            continue
        for name, tensor in case.tensors.items():
            if name.endswith(".A"):
                tensor[:] = 0
        network = load_checkpoint(case.write(tmp_path))
        ids = ids_of(case)
        ids[:, 1::3] = ids[:, :1]
        expected = logits(case.config, case.tensors, ids, generation)
        assert_close(one_pass(network, ids), expected)
        assert_close(one_by_one(network, ids), expected)


def grouped(case: RandomCheckpoint) -> bool:
    heads = case.config["num_attention_heads"]
    return bool(case.config.get("num_key_value_heads", heads) < heads)


@pytest.mark.parametrize(
    ("generation", "kinds"),
    [
        ("g1", "untied, dense"),
        ("g2_first", "untied, dense"),
        ("g2", "grouped, tied, untied, dense"),
        ("g3", "grouped, tied, untied, dense, experts"),
        ("g4", "grouped, tied, untied, dense, experts, window"),
        ("g4h", "grouped, tied, untied, dense, experts, window"),
    ],
)
def test_random_checkpoints_are_of_every_kind_that_a_generation_has(
    generation: Generation, kinds: str
) -> None:
    seen = set()
    for case in (random_checkpoint(generation, seed) for seed in SEEDS):
        seen.add("tied" if case.config.get("tie_word_embeddings") else "untied")
        seen.add("experts" if case.config.get("is_moe") else "dense")
        if grouped(case):
            seen.add("grouped")
        if generation != "g3" and case.config.get("keep_window_size", 2048) < ids_of(case).shape[1]:
            seen.add("window")
    assert seen == set(kinds.split(", "))


def test_random_seed_checkpoints_differ_in_every_number_of_their_own() -> None:
    configs = [random_checkpoint("g1", seed).config for seed in SEEDS]
    for name in SEED_FIELDS:
        assert len({config[name] for config in configs}) > 2, name
    experts = [config["num_cdmmoe_experts"] for config in configs]
    assert any(math.isqrt(count) ** 2 < count for count in experts)
    tensors = [random_checkpoint("g1", seed).tensors for seed in SEEDS]
    assert {bool(t["model.layers.0.attn.v_keys"].any()) for t in tensors} == {True, False}
    assert {bool(t["model.layers.0.attn.dynamic_mask"].all()) for t in tensors} == {True, False}
