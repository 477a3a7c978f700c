"""Write a checkpoint with random weights of a given shape, for sizes, speed and tests."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint import WEIGHTS_NAME
from model.released import ReleasedShape


def write_random_checkpoint(folder: Path, shape: ReleasedShape, seed: int) -> None:
    """Write config.json and model.safetensors, the same bytes for the same seed.

    Matrices keep the size of what they multiply, so that activations neither vanish nor blow up
    through the layers; A and the norms stand away from their neutral values, so that every part of
    the arithmetic has an effect. What such a model says means nothing.

    Args:
        folder: an existing folder.
        shape: what to write.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _random_tensor(name, size, generator)
        for name, size in sorted(shape.generation.tensor_shapes(shape.config).items())
    }
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = {
        **shape.config.as_dict(),
        "architectures": ["DogeForCausalLM"],
        "model_type": "doge",
        "hidden_act": "silu",
        "dtype": "float32",
    }
    config["doge_router_mode"] = config.pop("router_mode")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _random_tensor(name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(size, generator=generator)
    if name.endswith("self_attn.A"):
        return 0.5 + 0.1 * values
    if len(size) == 1:  # norms and residual scales, around 1
        return 1 + 0.1 * values
    if "embed" in name:  # rows are looked up, not multiplied with
        return values * (1.0 if "embed_tokens" in name else 1 / sqrt(size[-1]))
    return values / sqrt(size[-1])
