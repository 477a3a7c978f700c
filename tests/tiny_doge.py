"""Writes tiny checkpoints with random weights: numpy and safetensors, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from model.config import DogeConfig
from model.generations.g4 import G4

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


def config_json(**overrides: Any) -> dict[str, Any]:
    """The content of config.json; a field overridden with None is left out."""
    merged = {**BASE_CONFIG, **overrides}
    return {name: value for name, value in merged.items() if value is not None}


def random_tensors(config: Mapping[str, Any], seed: int) -> Tensors:
    """Every tensor of a G4 checkpoint, such that each part moves the logits.

    A, norms and residual scales stand away from 0 and 1; the logits are about 10 to 30 in size.
    """
    generator = np.random.default_rng(seed)
    shapes = G4.tensor_shapes(DogeConfig.from_dict(config))
    return {name: _random_tensor(generator, name, size) for name, size in shapes.items()}


def write_checkpoint(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write config.json and model.safetensors of a random G4 checkpoint.

    Args:
        folder: made when it is missing.
        seed: of the weights.
        overrides: fields of config.json, e.g. `tie_word_embeddings=False` or `**MOE`.

    Returns:
        `folder`.
    """
    config = config_json(**overrides)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(random_tensors(config, seed), folder / "model.safetensors")
    return folder


def _random_tensor(
    generator: np.random.Generator, name: str, size: tuple[int, ...]
) -> npt.NDArray[Any]:
    if len(size) == 1:
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
