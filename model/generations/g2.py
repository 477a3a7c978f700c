"""G2, December 2024: a mask that compares and therefore never hides anything.

A key would be hidden where exp(A · softplus(dt)) < 1, that is where A < 0; through a comparison A
gets no gradient, so it is still its initial 1. Checkpoints with every A ≥ 0 are attention without a
mask; others are refused. Two forms exist, the second under the names of G3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import DogeConfig, UnsupportedModelError
from model.generations.g3 import PARTS, scores_from_keys_and_values
from model.generations.generation import (
    Generation,
    Shapes,
    block_shapes,
    grouped_attention_shapes,
)

_FIRST_PARTS = {
    "embed_tokens": "word_embed",
    "norm": "final_layernorm",
    "self_attn": "attn",
    "input_layernorm": "pre_sequence_layernorm",
    "input_residual": "post_sequence_residual.weight",
    "post_attention_layernorm": "pre_state_layernorm",
    "post_attention_residual": "post_state_residual.weight",
    "mlp": "feed_forward",
}
_INERT = {"self_attn.A": 0.0, "self_attn.dt_proj.weight": None}


def _recognises_first(shapes: Shapes, config_json: Mapping[str, Any]) -> bool:
    layer = "model.layers.0"
    return f"{layer}.attn.A" in shapes and f"{layer}.pre_sequence_layernorm.weight" in shapes


def _recognises_second(shapes: Shapes, config_json: Mapping[str, Any]) -> bool:
    return (
        "model.word_embed.weight" in shapes
        and "model.layers.0.pre_layernorm.weight" in shapes
        and scores_from_keys_and_values(shapes, config_json) is False
    )


def _layer_shapes(config: DogeConfig) -> dict[str, tuple[int, ...]]:
    return {
        **grouped_attention_shapes(config),
        "self_attn.A": (config.num_attention_heads,),
        "self_attn.dt_proj.weight": (config.num_attention_heads, config.hidden_size),
        **block_shapes(config),
    }


def _read_config(data: Mapping[str, Any]) -> DogeConfig:
    config = DogeConfig.from_dict(data)
    if config.is_moe:
        raise UnsupportedModelError(
            "unsupported config.json: is_moe is true in a checkpoint of generation g2; no "
            "published one has experts, and how they would be routed is not known"
        )
    return config


G2_FIRST = Generation(
    name="g2_first",
    title="December 2024, first form: a mask without effect, no scores",
    signature="attn.A and pre_sequence_layernorm",
    recognises=_recognises_first,
    layer_shapes=_layer_shapes,
    parts=_FIRST_PARTS,
    read_config=_read_config,
    score_heads=None,
    qk_norm=False,
    inert=_INERT,
)
G2 = Generation(
    name="g2",
    title="late December 2024: names of g3, a mask without effect, no scores",
    signature="model.word_embed, pre_layernorm and self_attn.dt_proj of width hidden_size",
    recognises=_recognises_second,
    layer_shapes=_layer_shapes,
    parts=PARTS,
    read_config=_read_config,
    score_heads=None,
    qk_norm=False,
    inert=_INERT,
)
