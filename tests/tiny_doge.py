"""Writes tiny checkpoints of every generation with random weights; no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from model.generations import GENERATIONS, generation_named

Tensors = dict[str, npt.NDArray[Any]]

BASE_CONFIG: Mapping[str, Any] = {
    "architectures": ["DogeForCausalLM"],
    "model_type": "doge",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "keep_window_size": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "is_moe": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# 69 experts make an 8 x 8 grid that five of them lie outside of.
MOE: Mapping[str, Any] = {"is_moe": True, "num_experts": 69, "num_experts_per_tok": 5}


# What a generation's config.json has beside the base, None where it lacks the field.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "g1": {
        "num_key_value_heads": None,
        "keep_window_size": None,
        "is_moe": None,
        "tie_word_embeddings": None,
        "max_position_embeddings": 64,
        "num_inner_values": 4,
        "num_inner_value_heads": 2,
        "num_value_per_head": 2,
        "inner_values_retrieval_size": 16,
        "num_cdmmoe_experts": 50,
        "num_cdmmoe_heads": 2,
        "num_cdmmoe_experts_per_head": 4,
        "private_expert_retrieval_size": 16,
    },
    "g2_first": {"num_key_value_heads": None, "tie_word_embeddings": False},
    "g2": {},
    "g3": {"dynamic_mask_ratio": 0.0},
    "g4h": {},
    "g4": {},
}


def config_json(generation: str = "g4", **overrides: Any) -> dict[str, Any]:
    """The content of config.json; a field overridden with None is left out."""
    merged = {**BASE_CONFIG, **CONFIGS[generation], **overrides}
    return {name: value for name, value in merged.items() if value is not None}


def random_tensors(config: Mapping[str, Any], seed: int, generation: str = "g4") -> Tensors:
    """Every tensor of a checkpoint, such that each part moves the logits.

    A, norms and residual scales stand away from 0 and 1; the logits are about 10 to 30 in size. A
    tenth of the seed's stored mask is zero, never that of the first key.
    """
    generator = np.random.default_rng(seed)
    known = generation_named(generation, GENERATIONS)
    shapes = known.tensor_shapes(known.read_config(config))
    embedding = known.published_name("model.embed_tokens.weight")
    tensors = {
        name: _random_tensor(generator, "embed_tokens.weight" if name == embedding else name, size)
        for name, size in shapes.items()
    }
    if known.name == "g2":  # its mask hides nothing where no A is below 0
        tensors |= {name: abs(array) for name, array in tensors.items() if name.endswith(".A")}
    return tensors


def write_checkpoint(
    folder: Path,
    *,
    generation: str = "g4",
    seed: int = 0,
    untrained: bool = False,
    **overrides: Any,
) -> Path:
    """Write config.json and model.safetensors of a random checkpoint.

    Args:
        folder: made when it is missing.
        generation: name of its generation.
        seed: of the weights.
        untrained: leave the seed generation's stored mask at one and its value keys at zero, as
            its training does.
        overrides: fields of config.json, e.g. `tie_word_embeddings=False` or `**MOE`.

    Returns:
        `folder`.
    """
    config = config_json(generation, **overrides)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = random_tensors(config, seed, generation)
    if untrained:
        for name, array in tensors.items():
            if name.endswith((".dynamic_mask", ".v_keys")):
                tensors[name] = np.full_like(array, name.endswith("mask"))
    save_file(tensors, folder / "model.safetensors")
    return folder


def _random_tensor(
    generator: np.random.Generator, name: str, size: tuple[int, ...]
) -> npt.NDArray[Any]:
    if name.endswith("dynamic_mask"):
        values = np.where(generator.random(size) < 0.1, 0.0, generator.standard_normal(size))
        values[:, 0] = 1.0
    elif len(size) == 1:
        values = generator.uniform(0.5, 1.5, size)
        if name.endswith("self_attn.A"):
            values *= generator.choice([-1.0, 1.0], size)
    elif name.endswith(("embed.weight", "embed_tokens.weight", "lm_head.weight")):
        values = generator.standard_normal(size)
    else:
        values = generator.standard_normal(size) / np.sqrt(size[-1])
    if name.endswith("down_embed.weight"):
        values /= np.sqrt(size[-1])
    return values.astype(np.float32)
