"""Which generation a checkpoint belongs to, told by the names and shapes of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from model.config import DogeConfig, UnsupportedModelError, read_config_json
from model.generations import GENERATIONS, Generation, detect_generation, generation_named
from model.generations.g4 import G4
from model.generations.generation import Shapes
from tests.golden_cases import GOLDEN_CASES
from tests.tiny_doge import MOE, config_json

OTHER_SHAPES: Shapes = {
    "model.word_embed.weight": (97, 64),
    "model.layers.0.pre_layernorm.weight": (64,),
    "model.layers.0.state_space.dt_proj.weight": (4, 32),
}


def shapes_of(generation: str, **overrides: Any) -> dict[str, tuple[int, ...]]:
    known = generation_named(generation, GENERATIONS)
    return known.tensor_shapes(known.read_config(config_json(generation, **overrides)))


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", framework="numpy") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 -- a safetensors handle is no mapping


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_case_is_recognised_by_its_shapes_alone(
    golden: Callable[[str], Path], case: str
) -> None:
    assert (
        detect_generation(stored_shapes(golden(case)), {}, GENERATIONS).name == GOLDEN_CASES[case]
    )


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_case_holds_exactly_the_tensors_of_its_config(
    golden: Callable[[str], Path], case: str
) -> None:
    generation = generation_named(GOLDEN_CASES[case], GENERATIONS)
    config = generation.read_config(read_config_json(golden(case)))
    assert stored_shapes(golden(case)) == generation.tensor_shapes(config)


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda g: g.name)
def test_every_generation_is_told_from_the_others(generation: Generation) -> None:
    shapes = shapes_of(generation.name)
    assert detect_generation(shapes, config_json(generation.name), GENERATIONS) is generation


@pytest.mark.parametrize(("name", "ratio"), [("g2", None), ("g3", 0.0)])
def test_config_decides_where_the_tensors_of_g2_and_g3_coincide(
    name: str, ratio: float | None
) -> None:
    config = config_json("g2", num_key_value_heads=4, dynamic_mask_ratio=ratio)
    shapes = shapes_of("g2", num_key_value_heads=4)
    assert shapes == shapes_of("g3", num_key_value_heads=4)
    assert detect_generation(shapes, config, GENERATIONS).name == name


def test_published_names_differ_from_the_network_where_the_generation_says_so() -> None:
    g3, g1 = generation_named("g3", GENERATIONS), generation_named("g1", GENERATIONS)
    assert g3.published_name("model.layers.11.input_residual") == (
        "model.layers.11.pre_residual.weight"
    )
    assert g3.published_name("model.norm.weight") == "model.final_layernorm.weight"
    assert g1.published_name("model.layers.0.self_attn.v_keys") == "model.layers.0.attn.v_keys"
    assert g1.published_name("lm_head.weight") == "lm_head.weight"


def test_tensors_of_a_tied_and_an_untied_head() -> None:
    tied, untied = (
        G4.tensor_shapes(DogeConfig.from_dict(config_json(tie_word_embeddings=tie)))
        for tie in (True, False)
    )
    assert untied == {**tied, "lm_head.weight": (97, 64)}


def test_tensors_of_the_experts_count_the_unreachable_ones() -> None:
    dense = G4.tensor_shapes(DogeConfig.from_dict(config_json(num_hidden_layers=1)))
    moe = G4.tensor_shapes(DogeConfig.from_dict(config_json(num_hidden_layers=1, **MOE)))
    assert {name: shape for name, shape in moe.items() if name not in dense} == {
        "model.layers.0.mlp.router_gate.weight": (16, 64),
        "model.layers.0.mlp.down_embed.weight": (69, 64),
        "model.layers.0.mlp.up_embed.weight": (69, 64),
    }
    assert set(dense) <= set(moe)


def test_head_dim_need_not_be_hidden_size_over_heads() -> None:
    shapes = G4.tensor_shapes(DogeConfig.from_dict(config_json(head_dim=32)))
    attention = "model.layers.2.self_attn"
    assert shapes[f"{attention}.q_proj.weight"] == (128, 64)
    assert shapes[f"{attention}.k_proj.weight"] == (64, 64)
    assert shapes[f"{attention}.o_proj.weight"] == (64, 128)
    assert shapes[f"{attention}.dt_proj.weight"] == (2, 64)
    assert shapes[f"{attention}.q_norm.weight"] == (32,)


@pytest.mark.parametrize(
    "shapes", [OTHER_SHAPES, {"model.norm.weight": (4,)}, {}], ids=["other", "norm", ""]
)
def test_unknown_tensors_are_an_error_that_lists_what_was_seen_and_what_would_match(
    shapes: Shapes,
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        detect_generation(shapes, {}, GENERATIONS)
    message = str(caught.value)
    assert "match no known generation" in message
    for generation in GENERATIONS:
        assert f"{generation.name} ({generation.title}): {generation.signature}" in message
    for name in shapes:
        assert name in message
    if not shapes:
        assert "Seen: no tensors" in message


def test_error_lists_the_first_layer_only() -> None:
    shapes = {f"model.layers.{i}.pre_layernorm.weight": (64,) for i in range(30)}
    with pytest.raises(UnsupportedModelError) as caught:
        detect_generation(shapes, {}, GENERATIONS)
    assert "layers.0." in str(caught.value)
    assert "layers.1." not in str(caught.value)
    assert "layers.10." not in str(caught.value)


@pytest.mark.parametrize(("first", "second"), [("g3", "g4"), ("g1", "g3"), ("g1", "g4h")])
def test_tensors_of_two_generations_in_one_file_are_an_error_that_names_both(
    first: str, second: str
) -> None:
    shapes = {**shapes_of(first), **shapes_of(second)}
    with pytest.raises(
        UnsupportedModelError, match=f"match {first} and {second} at once"
    ) as caught:
        detect_generation(shapes, config_json(first), GENERATIONS)
    assert "model.layers.0.self_attn.dt_proj.weight" in str(caught.value)


def test_generation_is_found_by_its_name() -> None:
    assert generation_named("g4", GENERATIONS) is G4


def test_unknown_name_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UnsupportedModelError, match="unknown generation 'g9'; known: g1, g2"):
        generation_named("g9", GENERATIONS)


def test_generations_have_names_of_their_own() -> None:
    assert len({generation.name for generation in GENERATIONS}) == len(GENERATIONS)


@pytest.mark.parametrize(("score_heads", "expected"), [("key_value", 2), ("query", 4), (None, 0)])
def test_number_of_scores_follows_the_heads_that_score(
    score_heads: str | None, expected: int
) -> None:
    generation: Generation = dataclasses.replace(G4, score_heads=score_heads)  # type: ignore[arg-type]
    assert generation.num_score_heads(DogeConfig.from_dict(config_json())) == expected
