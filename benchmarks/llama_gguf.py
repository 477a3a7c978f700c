"""A Llama with random weights in the shape of a dense Doge, as a GGUF file for llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from peer_systems import import_peer

from model.config import DogeConfig

# Formats in which weights are written; norms are always F32.
FORMATS = ("F32", "Q8_0", "Q4_0")
_SEED = 0


def write_llama(path: Path, config: DogeConfig, weight_format: str) -> None:
    """Write the file: same vocabulary, widths, heads and layers, and a tied head if Doge's is.

    What Doge has beyond Llama is missing: mask scores, residual scales, norms of queries and keys.

    Args:
        path: the file to write.
        config: the shape.
        weight_format: one of `FORMATS`; of all matrices, the table of tokens included.

    Raises:
        ValueError: a mixture of experts, or an unknown format.
        BackendUnavailableError: the package gguf is missing.
    """
    if config.is_moe or config.is_seed:
        raise ValueError("a mixture of Doge's experts has no Llama of the same shape")
    if weight_format not in FORMATS:
        raise ValueError(f"unknown format {weight_format!r}; there are {', '.join(FORMATS)}")
    gguf = import_peer("gguf")
    kind = gguf.GGMLQuantizationType[weight_format]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, tensor in _tensors(config):
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(config: DogeConfig) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Every tensor under llama.cpp's name, [out, in]."""
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
    for name, shape in shapes.items():
        if len(shape) == 1:
            yield f"{name}.weight", np.ones(shape, np.float32)
        else:
            scale = np.float32(1 / np.sqrt(shape[-1]))
            yield f"{name}.weight", generator.standard_normal(shape, np.float32) * scale
