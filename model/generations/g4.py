"""G4, the Doge of transformers (`model_type: doge`, mid-2025 on).

Mask scores per key/value head, queries and keys normalised per head, selection of the
`keep_window_size` best keys; dense, or with the cross-domain mixture of experts.
"""

from __future__ import annotations

from model.config import DogeConfig
from model.generations.generation import Generation, Shapes


def _recognises(shapes: Shapes) -> bool:
    return (
        "model.embed_tokens.weight" in shapes
        and "model.layers.0.self_attn.dt_proj.weight" in shapes
        and "model.layers.0.self_attn.q_norm.weight" in shapes
    )


def _tensor_shapes(config: DogeConfig) -> dict[str, tuple[int, ...]]:
    H, D, inner = config.hidden_size, config.head_dim, config.intermediate_size
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (H,),
        "input_residual": (H,),
        "self_attn.q_proj.weight": (queries, H),
        "self_attn.k_proj.weight": (keys, H),
        "self_attn.v_proj.weight": (keys, H),
        "self_attn.o_proj.weight": (H, queries),
        "self_attn.A": (config.num_key_value_heads,),
        "self_attn.dt_proj.weight": (config.num_key_value_heads, keys),
        "self_attn.q_norm.weight": (D,),
        "self_attn.k_norm.weight": (D,),
        "post_attention_layernorm.weight": (H,),
        "post_attention_residual": (H,),
        "mlp.gate_proj.weight": (inner, H),
        "mlp.up_proj.weight": (inner, H),
        "mlp.down_proj.weight": (H, inner),
    }
    if config.is_moe:
        layer |= {
            "mlp.router_gate.weight": (2 * config.num_keys, H),
            "mlp.down_embed.weight": (config.num_experts, H),
            "mlp.up_embed.weight": (config.num_experts, H),
        }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, H),
        "model.norm.weight": (H,),
    }
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, H)
    return shapes


G4 = Generation(
    name="g4",
    title="transformers' doge: q/k norm, scores per key/value head",
    recognises=_recognises,
    tensor_shapes=_tensor_shapes,
    score_heads="key_value",
    qk_norm=True,
)
