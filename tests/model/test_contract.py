"""The names, types and shapes of a step."""

from __future__ import annotations

import dataclasses
import json

import pytest

from model.config import DogeConfig
from model.contract import StepContract, TensorSpec, layer_taps, step_contract
from model.generations.g1 import G1
from model.generations.g2 import G2
from model.generations.g4 import G4
from tests.tiny_doge import MOE, config_json


def config(**overrides: object) -> DogeConfig:
    return DogeConfig.from_dict(config_json(num_hidden_layers=2, **overrides))


def contract(**arguments: str) -> StepContract:
    return step_contract(config(), G4, max_seq_len=40, **arguments)


def test_inputs_in_their_order() -> None:
    assert [(spec.name, spec.dtype, spec.shape) for spec in contract().inputs] == [
        ("input_ids", "int64", ("B", "S")),
        ("position_ids", "int64", ("B", "S")),
        ("write_index", "int64", ("B",)),
        ("logits_index", "int64", ("B", "M")),
        ("past_key_values.0.key", "float32", ("B", 2, 40, 16)),
        ("past_key_values.0.value", "float32", ("B", 2, 40, 16)),
        ("past_key_values.0.score", "float32", ("B", 2, 40, 1)),
        ("past_key_values.1.key", "float32", ("B", 2, 40, 16)),
        ("past_key_values.1.value", "float32", ("B", 2, 40, 16)),
        ("past_key_values.1.score", "float32", ("B", 2, 40, 1)),
    ]


def test_outputs_in_their_order() -> None:
    assert [(spec.name, spec.dtype, spec.shape) for spec in contract().outputs] == [
        ("logits", "float32", ("B", "M", 97)),
        ("present.0.key", "float32", ("B", 2, 40, 16)),
        ("present.0.value", "float32", ("B", 2, 40, 16)),
        ("present.0.score", "float32", ("B", 2, 40, 1)),
        ("present.1.key", "float32", ("B", 2, 40, 16)),
        ("present.1.value", "float32", ("B", 2, 40, 16)),
        ("present.1.score", "float32", ("B", 2, 40, 1)),
    ]


def test_every_past_shares_the_buffer_of_its_present() -> None:
    assert contract().aliases == (
        ("past_key_values.0.key", "present.0.key"),
        ("past_key_values.0.value", "present.0.value"),
        ("past_key_values.0.score", "present.0.score"),
        ("past_key_values.1.key", "present.1.key"),
        ("past_key_values.1.value", "present.1.value"),
        ("past_key_values.1.score", "present.1.score"),
    )
    for before, after in zip(contract().past, contract().present, strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)


def test_scores_keep_their_own_dtype() -> None:
    narrow = contract(cache_dtype="float16")
    assert {spec.name.rpartition(".")[2]: spec.dtype for spec in narrow.past} == {
        "key": "float16",
        "value": "float16",
        "score": "float32",
    }
    assert narrow.logits.dtype == "float32"


def test_generation_that_scores_per_query_head_caches_more_scores() -> None:
    generation = dataclasses.replace(G4, score_heads="query")
    past = step_contract(config(), generation, max_seq_len=40).past
    assert [spec.shape for spec in past[:3]] == [
        ("B", 2, 40, 16),
        ("B", 2, 40, 16),
        ("B", 4, 40, 1),
    ]


@pytest.mark.parametrize(
    ("cache_dtype", "score_dtype", "expected"),
    [
        ("float32", "float32", 2 * 2 * (16 + 16 + 1) * 4),
        ("float16", "float32", 2 * 2 * ((16 + 16) * 2 + 4)),
        ("bfloat16", "bfloat16", 2 * 2 * (16 + 16 + 1) * 2),
    ],
)
def test_bytes_of_a_token_are_those_of_all_layers(
    cache_dtype: str, score_dtype: str, expected: int
) -> None:
    made = contract(cache_dtype=cache_dtype, score_dtype=score_dtype)
    assert made.bytes_per_token() == expected


def test_bytes_of_a_token_do_not_depend_on_the_slots() -> None:
    assert len({step_contract(config(), G4, max_seq_len=c).bytes_per_token() for c in (1, 99)}) == 1


def test_bytes_of_a_token_need_fixed_sizes() -> None:
    spec = TensorSpec(name="past_key_values.0.key", dtype="float32", shape=("B", "heads", 40, 16))
    broken = dataclasses.replace(contract(), past=(spec,))
    with pytest.raises(TypeError, match=r"past_key_values\.0\.key: heads and size are fixed"):
        broken.bytes_per_token()


def test_contract_as_json() -> None:
    made = contract()
    stored = json.loads(json.dumps(made.as_dict()))
    assert stored["inputs"][3] == {"name": "logits_index", "dtype": "int64", "shape": ["B", "M"]}
    assert [entry["name"] for entry in stored["inputs"]] == [spec.name for spec in made.inputs]
    assert [entry["name"] for entry in stored["outputs"]] == [spec.name for spec in made.outputs]
    assert stored["aliases"][0] == ["past_key_values.0.key", "present.0.key"]


def test_taps_of_a_dense_model() -> None:
    taps = layer_taps(config(), G4)
    assert (taps[0], taps[-1]) == ("embedding", "final_norm")
    first = [name.removeprefix("layers.0.") for name in taps if name.startswith("layers.0.")]
    assert sorted(first) == [
        "attention_norm",
        "attention_output",
        "attention_residual",
        "key",
        "mlp_norm",
        "mlp_output",
        "output",
        "query",
        "score",
        "value",
    ]
    second = [name.removeprefix("layers.1.") for name in taps if name.startswith("layers.1.")]
    assert first == second
    assert len(taps) == len(set(taps)) == 2 + 2 * 10


def test_generation_without_scores_caches_and_taps_none() -> None:
    made = step_contract(config(), G2, max_seq_len=40)
    assert [spec.name for spec in made.past[:4]] == [
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]
    assert not [tap for tap in layer_taps(config(), G2) if tap.endswith("score")]
    assert made.bytes_per_token() == 2 * 2 * (16 + 16) * 4


def test_taps_of_the_seed_have_its_experts() -> None:
    taps = layer_taps(DogeConfig.from_dict(config_json("g1"), seed=True), G1)
    assert "layers.0.router_scores" in taps
    assert "layers.2.expert_output" in taps


def test_taps_of_a_mixture_of_experts_have_the_router_and_the_experts() -> None:
    dense, moe = layer_taps(config(), G4), layer_taps(config(**MOE), G4)
    assert [name for name in moe if name not in dense] == [
        "layers.0.router_scores",
        "layers.0.expert_output",
        "layers.1.router_scores",
        "layers.1.expert_output",
    ]
    assert [name for name in moe if name in dense] == list(dense)
