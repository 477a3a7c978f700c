"""G4, the Doge of transformers (`model_type: doge`, mid-2025 on).

Mask scores per key/value head, queries and keys normalised per head, selection of the
`keep_window_size` best keys; dense, or with the cross-domain mixture of experts.
"""

from __future__ import annotations

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


def _recognises(shapes: Shapes, config_json: Mapping[str, Any]) -> bool:
    return (
        "model.embed_tokens.weight" in shapes
        and "model.layers.0.self_attn.dt_proj.weight" in shapes
        and "model.layers.0.self_attn.q_norm.weight" in shapes
    )


def _layer_shapes(config: DogeConfig) -> dict[str, tuple[int, ...]]:
    return {
        **grouped_attention_shapes(config),
        **score_shapes(config, config.num_key_value_heads),
        "self_attn.q_norm.weight": (config.head_dim,),
        "self_attn.k_norm.weight": (config.head_dim,),
        **block_shapes(config),
    }


G4 = Generation(
    name="g4",
    title="transformers' doge: q/k norm, scores per key/value head",
    signature="model.embed_tokens, self_attn.dt_proj and self_attn.q_norm",
    recognises=_recognises,
    layer_shapes=_layer_shapes,
    score_heads="key_value",
    qk_norm=True,
)
