"""G1, the seed (Doge-22M, 76M, 197M; November to December 2024).

Inner Function Attention: values are the normed input times the sum of retrieved rows, queries are
rotated and keys are not, and a stored mask hides the keys at which it is zero. The feed-forward
block has no gate; experts picked by product keys per head stand beside it, each weight inside the
activation. Residuals have no scale.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from model.config import DogeConfig
from model.generations.generation import Generation, Shapes


def _recognises(shapes: Shapes, config_json: Mapping[str, Any]) -> bool:
    return "model.layers.0.attn.v_embed.weight" in shapes


def _layer_shapes(config: DogeConfig) -> dict[str, tuple[int, ...]]:
    H, inner, experts = config.hidden_size, config.intermediate_size, config.num_cdmmoe_experts
    retrieval, heads = config.private_expert_retrieval_size, config.num_cdmmoe_heads
    values, value_heads = config.num_inner_values, config.num_inner_value_heads
    value_retrieval = config.inner_values_retrieval_size
    return {
        "input_layernorm.weight": (H,),
        "self_attn.q_proj.weight": (H, H),
        "self_attn.k_proj.weight": (H, H),
        "self_attn.o_proj.weight": (H, H),
        "self_attn.dynamic_mask": (config.num_attention_heads, config.max_position_embeddings),
        "self_attn.v_queries.weight": (value_heads * value_retrieval, H),
        "self_attn.v_keys": (value_heads, value_retrieval, values),
        "self_attn.v_embed.weight": (values, H),
        "post_attention_layernorm.weight": (H,),
        "mlp.up_proj.weight": (inner, H),
        "mlp.down_proj.weight": (H, inner),
        "mlp.queries.weight": (heads * retrieval, H),
        "mlp.keys": (heads, config.num_keys, 2, retrieval // 2),
        "mlp.down_embed.weight": (experts, H),
        "mlp.up_embed.weight": (experts, H),
    }


G1 = Generation(
    name="g1",
    title="the seed of late 2024: inner function attention, a stored mask, experts per head",
    signature="attn.v_embed",
    recognises=_recognises,
    layer_shapes=_layer_shapes,
    parts={
        "embed_tokens": "word_embed",
        "norm": "final_layernorm",
        "input_layernorm": "in_attn_layernorm",
        "self_attn": "attn",
        "post_attention_layernorm": "in_ff_layernorm",
        "mlp": "feed_forward",
    },
    read_config=functools.partial(DogeConfig.from_dict, seed=True),
    score_heads=None,
    qk_norm=False,
    rotates_keys=False,
    inner_function=True,
)
