"""A checkpoint's config.json: what is read, what is ignored, and what is refused."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from model.config import DogeConfig, UnsupportedModelError
from tests.tiny_doge import MOE, config_json


def read(**overrides: Any) -> DogeConfig:
    return DogeConfig.from_dict(config_json(**overrides))


def refusal(**overrides: Any) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        read(**overrides)
    return str(caught.value)


# --- what is read ---


def test_every_published_field_is_read() -> None:
    data = config_json(
        head_dim=32,
        keep_window_size=7,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 40000.0},
        **MOE,
        norm_topk_prob=True,
        doge_router_mode="per_token",
        tie_word_embeddings=False,
        eos_token_id=[1, 6],
    )
    assert DogeConfig.from_dict(data) == DogeConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        keep_window_size=7,
        rms_norm_eps=1e-5,
        rope_theta=40000.0,
        tie_word_embeddings=False,
        is_moe=True,
        num_experts=69,
        num_experts_per_tok=5,
        norm_topk_prob=True,
        router_mode="per_token",
        bos_token_id=0,
        eos_token_id=(1, 6),
        pad_token_id=2,
    )


def test_fields_that_are_left_out_take_the_published_defaults() -> None:
    config = DogeConfig.from_dict(
        {
            "model_type": "doge",
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        }
    )
    published = transformers.DogeConfig(
        hidden_size=64, num_attention_heads=4, intermediate_size=96, num_hidden_layers=3
    )
    for name in (
        "num_key_value_heads",
        "max_position_embeddings",
        "keep_window_size",
        "rms_norm_eps",
        "tie_word_embeddings",
        "is_moe",
        "norm_topk_prob",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ):
        assert getattr(config, name) == getattr(published, name), name
    assert config.rope_theta == published.rope_parameters["rope_theta"]
    assert config.head_dim == 16
    assert config.router_mode == "mixed"


def test_experts_that_are_left_out_take_the_published_defaults() -> None:
    config, published = read(is_moe=True), transformers.DogeConfig()
    assert config.num_experts == published.num_experts
    assert config.num_experts_per_tok == published.num_experts_per_tok


def test_experts_of_a_dense_model_count_for_nothing() -> None:
    config = read(num_experts=16384, num_experts_per_tok=64)
    assert (config.num_experts, config.num_experts_per_tok, config.num_keys) == (0, 0, 0)


@pytest.mark.parametrize(("experts", "keys"), [(1, 1), (63, 7), (64, 8), (69, 8), (16384, 128)])
def test_number_of_keys_is_the_whole_root_of_the_experts(experts: int, keys: int) -> None:
    assert read(is_moe=True, num_experts=experts, num_experts_per_tok=1).num_keys == keys


def test_null_fields_are_as_if_left_out() -> None:
    names = ("num_key_value_heads", "head_dim", "rope_scaling", "sliding_window", "dtype")
    nulls = dict.fromkeys(names)
    data = {**config_json(num_key_value_heads=None), **nulls}
    assert DogeConfig.from_dict(data) == read(num_key_value_heads=None)
    assert DogeConfig.from_dict(data).num_key_value_heads == 4


@pytest.mark.parametrize(
    ("eos", "ids"), [(None, ()), (1, (1,)), (0, (0,)), ([1, 6], (1, 6)), ([], ())]
)
def test_end_of_text_ids_are_a_tuple(eos: int | list[int] | None, ids: tuple[int, ...]) -> None:
    assert read(eos_token_id=eos).eos_token_ids == ids


def test_router_mode_can_be_replaced() -> None:
    config = read(**MOE)
    assert config.router_mode == "mixed"
    other = config.with_router_mode("per_token")
    assert other.router_mode == "per_token"
    assert other.with_router_mode("mixed") == config
    with pytest.raises(
        UnsupportedModelError,
        match="doge_router_mode must be one of mixed, per_token, got 'causal'",
    ):
        config.with_router_mode("causal")


def test_fields_as_a_dictionary_are_json_and_make_the_same_config() -> None:
    config = read(eos_token_id=[1, 6], **MOE)
    stored = json.loads(json.dumps(config.as_dict()))
    assert stored["eos_token_id"] == [1, 6]
    stored["eos_token_id"] = tuple(stored["eos_token_id"])
    assert DogeConfig(**stored) == config


# --- rotary embedding ---


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 40000.0}},
        {"rope_parameters": None, "rope_theta": 40000.0},
        {"rope_parameters": {"rope_theta": 40000.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 40000.0},
        {
            "rope_parameters": None,
            "rope_theta": 40000.0,
            "rope_scaling": {"rope_type": "default"},
        },
    ],
)
def test_base_of_rotary_embedding_in_new_and_old_spelling(spelling: dict[str, Any]) -> None:
    config = read(**spelling)
    assert config.rope_theta == 40000.0
    assert config.max_position_embeddings == 256


def test_rotary_embedding_that_is_left_out_has_the_published_base() -> None:
    assert read(rope_parameters=None).rope_theta == 10000.0


@pytest.mark.parametrize(
    "spelling",
    [
        {
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 40000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 100,
            }
        },
        {
            "rope_parameters": None,
            "rope_theta": 40000.0,
            "rope_scaling": {
                "rope_type": "dynamic",
                "factor": 4.0,
                "original_max_position_embeddings": 100,
            },
        },
        {
            "rope_parameters": None,
            "rope_theta": 40000.0,
            "rope_scaling": {
                "type": "dynamic",
                "factor": 4.0,
                "original_max_position_embeddings": 100,
            },
        },
    ],
)
def test_dynamic_rope_ends_at_its_original_length(spelling: dict[str, Any]) -> None:
    config = read(**spelling)
    assert config.max_position_embeddings == 100
    assert config.rope_theta == 40000.0


def test_dynamic_rope_never_lengthens_the_positions() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    for original in ({}, {"original_max_position_embeddings": 1024}):
        assert read(rope_parameters={**dynamic, **original}).max_position_embeddings == 256


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "longrope"])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_other_rope_is_refused_by_name(key: str, kind: str) -> None:
    message = refusal(**{"rope_parameters": None, key: {"rope_type": kind, "factor": 2.0}})
    assert f"rope type is '{kind}', supported: 'default', 'dynamic'" in message


# --- what is ignored ---


def test_unknown_keys_are_warned_of_once_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = read(window_size=5, a_new_key=[1])
    assert config == read()
    (record,) = caplog.records
    assert record.getMessage() == "config.json: unknown keys ignored: a_new_key, window_size"


def test_key_of_ours_that_is_no_key_of_a_checkpoint_is_unknown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert read(router_mode="per_token").router_mode == "mixed"
    assert "router_mode" in caplog.text


def test_stale_keys_of_earlier_generations_are_ignored_silently(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stale = {
        "dynamic_mask_ratio": 0.0,
        "hidden_bias": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "num_cdmmoe_experts": 4096,
        "num_cdmmoe_experts_per_head": 8,
        "num_cdmmoe_heads": 4,
        "num_cdmoe_experts": 4096,
        "num_cdmoe_experts_per_head": 8,
        "num_cdmoe_heads": 4,
        "expert_retrieval_size": 64,
        "num_channels": 3,
        "patch_size": 16,
        "router_aux_loss_coef": 0.001,
        "torch_dtype": "float32",
        "use_cache": False,
        "transformers_version": "4.48.0",
        "auto_map": {"AutoModelForCausalLM": "modeling_doge.DogeForCausalLM"},
    }
    assert read(**stale) == read()
    assert not caplog.records


@pytest.mark.parametrize("moe", [False, True])
def test_config_that_transformers_writes_is_read_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, moe: bool
) -> None:
    published = transformers.DogeConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, is_moe=moe, vocab_size=97
    )
    published.save_pretrained(tmp_path)
    config = DogeConfig.from_pretrained(tmp_path)
    assert config.is_moe == moe
    assert (config.vocab_size, config.head_dim, config.rope_theta) == (97, 16, 10000.0)
    assert not caplog.records


# --- what is refused ---


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ],
)
def test_missing_key_is_named(name: str) -> None:
    assert f"{name} is missing" in refusal(**{name: None})


def test_missing_model_type_is_named_with_the_one_expected() -> None:
    assert "model_type is missing, expected 'doge'" in refusal(model_type=None)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("model_type", "llama", "model_type is 'llama', supported: 'doge'"),
        ("hidden_act", "gelu", "hidden_act is 'gelu', supported: 'silu'"),
        ("sliding_window", 512, "sliding_window is 512, supported: None"),
        ("attention_bias", True, "attention_bias is True, supported: False"),
        ("mlp_bias", True, "mlp_bias is True, supported: False"),
        ("hidden_bias", True, "hidden_bias is True, supported: False"),
        ("dynamic_mask_ratio", 0.5, "dynamic_mask_ratio is 0.5, supported: 0"),
    ],
)
def test_value_that_would_change_the_arithmetic_is_refused(
    name: str, value: Any, expected: str
) -> None:
    assert refusal(**{name: value}) == f"unsupported config.json: {expected}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"num_key_value_heads": 3},
            "num_attention_heads (4) must be a multiple of num_key_value_heads (3)",
        ),
        ({"hidden_size": 60}, "head_dim must be even for rotary embedding, got 15"),
        ({"head_dim": 7}, "head_dim must be even for rotary embedding, got 7"),
        ({"hidden_size": 3}, "head_dim must be a whole number of at least 1, got 0"),
        ({"vocab_size": 0}, "vocab_size must be a whole number of at least 1, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a whole number of at least 1, got"),
        ({"keep_window_size": 0}, "keep_window_size must be a whole number of at least 1, got 0"),
        ({"keep_window_size": "9"}, "keep_window_size must be a whole number of at least 1, got "),
        ({"intermediate_size": 9.5}, "intermediate_size must be a whole number of at least 1, got"),
        ({"num_key_value_heads": True}, "num_key_value_heads must be a whole number of at least 1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0, got 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number above 0, got '1e-6'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0, got nan"),
        (
            {"rope_parameters": {"rope_theta": -1.0}},
            "rope_theta must be a number above 0, got -1.0",
        ),
        (
            {"doge_router_mode": "causal"},
            "doge_router_mode must be one of mixed, per_token, got 'causal'",
        ),
        ({**MOE, "num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({**MOE, "num_experts": -4}, "num_experts must be a whole number of at least 0, got -4"),
        (
            {**MOE, "num_experts_per_tok": 65},
            "num_experts_per_tok must be between 1 and 64 (the reachable experts of 69), got 65",
        ),
        ({**MOE, "num_experts_per_tok": 0}, "num_experts_per_tok must be between 1 and 64"),
    ],
)
def test_number_that_cannot_be_is_refused(overrides: dict[str, Any], expected: str) -> None:
    message = refusal(**overrides)
    assert message.startswith("invalid Doge config: ")
    assert expected in message


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_attention_heads": "4"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 4.0},
        {"hidden_size": "64"},
        {"hidden_size": 64.0},
        {"is_moe": True, "num_experts_per_tok": 5, "num_experts": "69"},
        {"is_moe": True, "num_experts_per_tok": 5, "num_experts": 69.0},
        {**MOE, "num_experts_per_tok": "5"},
        {**MOE, "num_experts_per_tok": 5.0},
    ],
)
def test_value_of_the_wrong_type_is_refused_by_name(overrides: dict[str, Any]) -> None:
    assert [*overrides][-1] in refusal(**overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_parameters": ["default"]},
        {"rope_parameters": "default"},
        {"rope_parameters": None, "rope_scaling": [4.0]},
        {
            "rope_parameters": {
                "rope_type": "dynamic",
                "factor": 4.0,
                "original_max_position_embeddings": "100",
            }
        },
    ],
)
def test_rotary_embedding_of_the_wrong_type_is_refused(overrides: dict[str, Any]) -> None:
    assert re.search("rope|original_max_position_embeddings", refusal(**overrides))


@pytest.mark.parametrize("name", ["tie_word_embeddings", "is_moe", "norm_topk_prob"])
def test_switch_that_is_no_boolean_is_refused(name: str) -> None:
    assert name in refusal(**{**MOE, name: "false"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token_id", "1"),
        ("eos_token_id", [1, "6"]),
        ("bos_token_id", "0"),
        ("pad_token_id", 1.5),
    ],
)
def test_token_id_that_is_no_whole_number_is_refused(name: str, value: Any) -> None:
    assert name in refusal(**{name: value})


def test_all_unsupported_values_are_listed_at_once() -> None:
    message = refusal(model_type="llama", hidden_act="gelu", sliding_window=5, vocab_size=None)
    for part in ("model_type", "hidden_act", "sliding_window", "vocab_size is missing"):
        assert part in message
    assert message.count(";") == 3


def test_all_impossible_numbers_are_listed_at_once() -> None:
    message = refusal(vocab_size=0, rms_norm_eps=-1.0, doge_router_mode="x", keep_window_size=-3)
    for part in ("vocab_size", "rms_norm_eps", "doge_router_mode", "keep_window_size"):
        assert part in message
    message = refusal(num_key_value_heads=3, head_dim=7, is_moe=True, num_experts_per_tok=0)
    for part in ("num_key_value_heads", "head_dim", "num_experts_per_tok"):
        assert part in message


# --- the file ---


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; a checkpoint folder holds"):
        DogeConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "{'model_type': 'doge'}", "vocab_size: 97"])
def test_file_that_is_not_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=r"config\.json is not JSON: "):
        DogeConfig.from_pretrained(tmp_path)


def test_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(UnsupportedModelError, match=r"config\.json is not JSON: "):
        DogeConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", '"doge"', "3"])
def test_file_that_holds_no_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=r"config\.json must hold one JSON object"):
        DogeConfig.from_pretrained(tmp_path)


def test_file_is_read_as_its_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(**MOE)), encoding="utf-8")
    assert DogeConfig.from_pretrained(tmp_path) == read(**MOE)
