"""Random weights of a Llama in the shape of a dense Doge, under llama.cpp's names."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from model.config import DogeConfig

_SEED = 0


def llama_tensors(config: DogeConfig) -> dict[str, npt.NDArray[np.float32]]:
    """Every tensor by llama.cpp's name; matrices are [out, in].

    Raises:
        ValueError: a mixture of experts or a seed model, which no Llama resembles.
    """
    if config.is_moe or config.is_seed:
        raise ValueError("a mixture of Doge's experts has no Llama of the same shape")
    generator = np.random.default_rng(_SEED)
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        shapes |= {
            f"blk.{index}.attn_norm": (hidden,),
            f"blk.{index}.attn_q": (queries, hidden),
            f"blk.{index}.attn_k": (keys, hidden),
            f"blk.{index}.attn_v": (keys, hidden),
            f"blk.{index}.attn_output": (hidden, queries),
            f"blk.{index}.ffn_norm": (hidden,),
            f"blk.{index}.ffn_gate": (inner, hidden),
            f"blk.{index}.ffn_up": (inner, hidden),
            f"blk.{index}.ffn_down": (hidden, inner),
        }
    shapes["output_norm"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["output"] = (config.vocab_size, hidden)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            tensors[f"{name}.weight"] = np.ones(shape, np.float32)
        else:
            scale = np.float32(1 / np.sqrt(shape[-1]))
            tensors[f"{name}.weight"] = generator.standard_normal(shape, np.float32) * scale
    return tensors
