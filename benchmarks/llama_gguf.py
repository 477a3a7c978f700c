"""A Llama with random weights in the shape of a dense Doge, as a GGUF file for llama.cpp."""

from __future__ import annotations

from pathlib import Path

from llama_weights import llama_tensors
from peer_systems import import_peer

from model.config import DogeConfig

# Formats in which weights are written; norms are always F32.
FORMATS = ("F32", "Q8_0", "Q4_0")


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
    if weight_format not in FORMATS:
        raise ValueError(f"unknown format {weight_format!r}; there are {', '.join(FORMATS)}")
    tensors = llama_tensors(config)
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
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
