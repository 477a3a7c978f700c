"""G4h, the form between G3 and G4 (the small-doge repository, June to August 2025).

Tensor names and selection of G4, but mask scores per query head and no norm of queries and keys.
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
        and "model.layers.0.self_attn.q_norm.weight" not in shapes
    )


def _layer_shapes(config: DogeConfig) -> dict[str, tuple[int, ...]]:
    return {
        **grouped_attention_shapes(config),
        **score_shapes(config, config.num_attention_heads),
        **block_shapes(config),
    }


G4H = Generation(
    name="g4h",
    title="mid-2025 small-doge: names of g4, scores per query head, no q/k norm",
    signature="model.embed_tokens and self_attn.dt_proj without self_attn.q_norm",
    recognises=_recognises,
    layer_shapes=_layer_shapes,
    score_heads="query",
    qk_norm=False,
)
