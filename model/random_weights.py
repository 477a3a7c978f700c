"""Write a checkpoint with random weights of a given shape, for sizes, speed and tests."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.released import ReleasedShape
from model.weight_files import WEIGHTS_NAME


def write_random_checkpoint(folder: Path, shape: ReleasedShape, seed: int) -> None:
    """Write config.json and model.safetensors, the same bytes for the same seed.

    Matrices keep the size of what they multiply, so that activations neither vanish nor blow up
    through the layers; A and the norms stand away from their neutral values, so that every part of
    the arithmetic has an effect. What training is known to leave as it was made has that value: the
    seed's stored mask is all one and its value keys are all zero (docs/reference.md). What such a
    model says means nothing.

    Args:
        folder: an existing folder.
        shape: what to write.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding = shape.generation.published_name("model.embed_tokens.weight")
    tensors = {
        name: _random_tensor(name, size, generator, is_embedding=name == embedding)
        for name, size in sorted(shape.generation.tensor_shapes(shape.config).items())
    }
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = {
        **shape.config.as_dict(),
        **shape.generation.extra_config,
        "architectures": ["DogeForCausalLM"],
        "model_type": "doge",
        "hidden_act": "silu",
        "dtype": "float32",
    }
    config["doge_router_mode"] = config.pop("router_mode")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _random_tensor(
    name: str, size: tuple[int, ...], generator: torch.Generator, *, is_embedding: bool
) -> Tensor:
    if name.endswith("attn.dynamic_mask"):
        return torch.ones(size)
    if name.endswith("attn.v_keys"):
        return torch.zeros(size)
    values = torch.randn(size, generator=generator)
    if name.endswith("attn.A"):
        return 0.5 + 0.1 * values
    if len(size) == 1:  # norms and residual scales, around 1
        return 1 + 0.1 * values
    if is_embedding or name.endswith("attn.v_embed.weight"):
        return values  # rows that are looked up, not multiplied with
    return values / sqrt(size[-1])
