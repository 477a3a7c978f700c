"""G3, the remote-code Doge of early 2025: most widely used checkpoints of 20M to 320M.

Mask scores per query head and no norm of queries and keys, as G4h, under older tensor names. No
key is ever dropped, and the context ends at `keep_window_size`, where the published code ends too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.config import DogeConfig
from model.generations.generation import (
    Generation,
    Shapes,
    block_shapes,
    grouped_attention_shapes,
    score_shapes,
)

PARTS = {
    "embed_tokens": "word_embed",
    "norm": "final_layernorm",
    "input_layernorm": "pre_layernorm",
    "input_residual": "pre_residual.weight",
    "post_attention_layernorm": "post_layernorm",
    "post_attention_residual": "post_residual.weight",
    "mlp": "feed_forward",
}


def scores_from_keys_and_values(shapes: Shapes, config_json: Mapping[str, Any]) -> bool | None:
    """Whether dt_proj reads the values of the key/value heads (G3), not of the query heads (G2).

    The shapes say it, except where there are as many key/value heads as query heads: then G3 is the
    one whose config.json has `dynamic_mask_ratio`. None where these tensors are absent.
    """
    scores = shapes.get("model.layers.0.self_attn.dt_proj.weight")
    queries = shapes.get("model.layers.0.self_attn.q_proj.weight")
    if scores is None or queries is None:
        return None
    if tensors_coincide(shapes):
        return "dynamic_mask_ratio" in config_json
    return scores[-1] != queries[0]


def tensors_coincide(shapes: Shapes) -> bool:
    """Whether there are as many key/value heads as query heads, so that G2 and G3 look alike."""
    keys = shapes.get("model.layers.0.self_attn.k_proj.weight")
    queries = shapes.get("model.layers.0.self_attn.q_proj.weight")
    return keys is not None and queries is not None and keys[0] == queries[0]


def _recognises(shapes: Shapes, config_json: Mapping[str, Any]) -> bool:
    return (
        "model.word_embed.weight" in shapes
        and "model.layers.0.pre_layernorm.weight" in shapes
        and bool(scores_from_keys_and_values(shapes, config_json))
    )


def _layer_shapes(config: DogeConfig) -> dict[str, tuple[int, ...]]:
    return {
        **grouped_attention_shapes(config),
        **score_shapes(config, config.num_attention_heads),
        **block_shapes(config),
    }


def _read_config(data: Mapping[str, Any]) -> DogeConfig:
    config = DogeConfig.from_dict(data)
    end = min(config.max_position_embeddings, config.keep_window_size)
    return dataclasses.replace(config, max_position_embeddings=end)


G3 = Generation(
    name="g3",
    title="remote code of early 2025: scores per query head, no q/k norm, no selection",
    signature="model.word_embed, pre_layernorm and self_attn.dt_proj as wide as v_proj gives",
    recognises=_recognises,
    layer_shapes=_layer_shapes,
    parts=PARTS,
    read_config=_read_config,
    extra_config={"dynamic_mask_ratio": 0.0},
    score_heads="query",
    qk_norm=False,
)
