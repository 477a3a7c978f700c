"""Which generation a checkpoint belongs to, told by the names and shapes of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from model.config import DogeConfig, UnsupportedModelError
from model.generations import GENERATIONS, Generation, detect_generation, generation_named
from model.generations.g4 import G4
from model.generations.generation import Shapes
from tests.tiny_doge import MOE, config_json

G1_SHAPES: Shapes = {
    "model.word_embed.weight": (97, 64),
    "model.layers.0.in_attn_layernorm.weight": (64,),
    "model.layers.0.attn.q_proj.weight": (64, 64),
    "model.layers.0.attn.dynamic_mask": (4, 64),
    "model.layers.0.attn.v_embed.weight": (4, 64),
    "model.final_layernorm.weight": (64,),
    "lm_head.weight": (97, 64),
}
G3_SHAPES: Shapes = {
    "model.word_embed.weight": (97, 64),
    "model.layers.0.pre_layernorm.weight": (64,),
    "model.layers.0.self_attn.A": (4,),
    "model.layers.0.self_attn.dt_proj.weight": (4, 32),
    "model.layers.0.feed_forward.gate_proj.weight": (96, 64),
    "model.final_layernorm.weight": (64,),
}


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", framework="numpy") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 -- a safetensors handle is no mapping


@pytest.mark.parametrize("case", ["g4", "g4_untied_mha", "g4_moe", "g4_window"])
def test_golden_case_is_recognised_by_its_shapes_alone(
    golden: Callable[[str], Path], case: str
) -> None:
    assert detect_generation(stored_shapes(golden(case)), GENERATIONS) is G4


@pytest.mark.parametrize("case", ["g4", "g4_untied_mha", "g4_moe", "g4_window"])
def test_golden_case_holds_exactly_the_tensors_of_its_config(
    golden: Callable[[str], Path], case: str
) -> None:
    config = DogeConfig.from_pretrained(golden(case))
    assert stored_shapes(golden(case)) == G4.tensor_shapes(config)


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


# Parameters of released configs, counted from the published classes (tied weights once).
RELEASED = {
    "Doge-20M": ((8, 256, 512, 2, 1, 32768), {}, 13_118_728),
    "Doge-60M": ((16, 512, 1024, 4, 2, 32768), {}, 54_571_552),
    "Doge-160M": ((24, 768, 1536, 6, 3, 32768), {}, 152_676_168),
    "Doge-20M-MoE": (
        (8, 256, 512, 2, 1, 32768),
        {"is_moe": True, "num_experts": 1024, "num_experts_per_tok": 16},
        17_444_104,
    ),
    "Doge-40M": ((8, 256, 1024, 2, 1, 128256), {}, 40_709_384),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_config_has_the_published_number_of_parameters(name: str) -> None:
    (layers, hidden, inner, heads, key_heads, vocabulary), more, expected = RELEASED[name]
    config = DogeConfig.from_dict(
        config_json(
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            vocab_size=vocabulary,
            **more,
        )
    )
    count = 0
    for shape in G4.tensor_shapes(config).values():
        size = 1
        for extent in shape:
            size *= extent
        count += size
    assert count == expected


@pytest.mark.parametrize(
    "shapes", [G1_SHAPES, G3_SHAPES, {"model.norm.weight": (4,)}, {}], ids=["g1", "g3", "other", ""]
)
def test_unknown_tensors_are_an_error_that_lists_what_was_seen(shapes: Shapes) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        detect_generation(shapes, GENERATIONS)
    message = str(caught.value)
    assert "match no known generation" in message
    assert f"g4 ({G4.title})" in message
    for name in shapes:
        assert name in message
    if not shapes:
        assert "Seen: no tensors" in message


def test_error_lists_the_first_layer_only() -> None:
    shapes = {f"model.layers.{i}.pre_layernorm.weight": (64,) for i in range(30)}
    with pytest.raises(UnsupportedModelError) as caught:
        detect_generation(shapes, GENERATIONS)
    assert "layers.0." in str(caught.value)
    assert "layers.1." not in str(caught.value)
    assert "layers.10." not in str(caught.value)


def test_g4_without_the_norm_of_queries_is_not_taken_for_g4() -> None:
    shapes = {
        name: shape
        for name, shape in G4.tensor_shapes(DogeConfig.from_dict(config_json())).items()
        if "_norm" not in name
    }
    with pytest.raises(UnsupportedModelError, match="no known generation"):
        detect_generation(shapes, GENERATIONS)


def test_tensors_that_two_generations_claim_are_an_error_that_names_both() -> None:
    twin = dataclasses.replace(G4, name="g4b", title="another")
    shapes = G4.tensor_shapes(DogeConfig.from_dict(config_json()))
    with pytest.raises(UnsupportedModelError, match=r"match g4 and g4b; exactly one") as caught:
        detect_generation(shapes, (G4, twin))
    assert "model.embed_tokens.weight" in str(caught.value)


def test_generation_is_found_by_its_name() -> None:
    assert generation_named("g4", GENERATIONS) is G4


def test_unknown_name_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UnsupportedModelError, match="unknown generation 'g9'; known: g4"):
        generation_named("g9", GENERATIONS)


def test_generations_have_names_of_their_own() -> None:
    assert len({generation.name for generation in GENERATIONS}) == len(GENERATIONS)


@pytest.mark.parametrize(("score_heads", "expected"), [("key_value", 2), ("query", 4)])
def test_number_of_scores_follows_the_heads_that_score(score_heads: str, expected: int) -> None:
    generation: Generation = dataclasses.replace(G4, score_heads=score_heads)  # type: ignore[arg-type]
    assert generation.num_score_heads(DogeConfig.from_dict(config_json())) == expected
