"""Random checkpoints of every published generation, each of another architecture.

Shapes and names are written out here from the specification of each generation, not taken from
`model/`: what the two disagree about, loading reports.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from tests.numpy_doge import NAMES, Generation

Tensors = dict[str, npt.NDArray[np.float32]]
Shape = tuple[int, ...]

# Query heads and key/value heads, one pair a seed.
HEADS = ((4, 2), (4, 4), (4, 1), (6, 3), (6, 2), (1, 1), (2, 1), (3, 3), (8, 2), (5, 1))
SEEDS = range(len(HEADS))
# Few are squares: experts beyond the n x n grid are never used.
NUM_EXPERTS = (16, 23, 50, 69, 81)
MAX_POSITIONS = 48


@dataclass(frozen=True, kw_only=True)
class RandomCheckpoint:
    """A checkpoint in memory.

    Attributes:
        config: the content of config.json.
        tensors: float32, by published name.
        inert: tensors that are stored and change nothing.
        seed: what it was made from.
    """

    config: Mapping[str, Any]
    tensors: Tensors
    inert: frozenset[str]
    seed: int

    def write(self, folder: Path) -> Path:
        (folder / "config.json").write_text(json.dumps(self.config, indent=2), encoding="utf-8")
        save_file(self.tensors, folder / "model.safetensors")
        return folder

    def distinct_ids(self, rows: int, length: int) -> npt.NDArray[np.int64]:
        """[rows, length]; no row has a token twice, so no two keys have equal mask scores."""
        generator = np.random.default_rng(self.seed)
        vocabulary = self.config["vocab_size"]
        return np.stack([generator.permutation(vocabulary)[:length] for _ in range(rows)])


def random_checkpoint(generation: Generation, seed: int) -> RandomCheckpoint:
    """A checkpoint whose architecture and weights follow from `seed`.

    Over `SEEDS` every kind is met that the generation has: dense and experts, tied and not, window
    shorter than 9 tokens and longer than all, stored masks with zeros and without, tables of keys
    that are zero and that are not.
    """
    generator = np.random.default_rng([seed, *generation.encode()])
    if generation == "g1":
        config = seed_config(generator)
        layer = seed_layer(config)
    else:
        config = grouped_config(generation, seed, generator)
        layer = grouped_layer(generation, config)
    names, hidden = NAMES[generation], config["hidden_size"]
    shapes: dict[str, Shape] = {f"model.{names.embedding}": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes[f"model.{names.final_norm}"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    tensors = {name: random_tensor(generator, name, shape) for name, shape in shapes.items()}
    inert: set[str] = set()
    if generation == "g1":
        inert = shape_seed_tensors(tensors, seed, generator)
    if generation.startswith("g2"):
        inert = shape_threshold_tensors(tensors, seed)
    return RandomCheckpoint(config=config, tensors=tensors, inert=frozenset(inert), seed=seed)


def common_config(generator: np.random.Generator) -> dict[str, Any]:
    return {
        "architectures": ["DogeForCausalLM"],
        "model_type": "doge",
        "vocab_size": int(generator.integers(40, 90)),
        "intermediate_size": int(generator.integers(9, 70)),
        "num_hidden_layers": int(generator.integers(1, 4)),
        "hidden_act": "silu",
        "rms_norm_eps": float(generator.choice([1e-6, 1e-5, 1e-2])),
        "max_position_embeddings": MAX_POSITIONS,
    }


# --- the seed generation ---


def seed_config(generator: np.random.Generator) -> dict[str, Any]:
    def between(low: int, high: int) -> int:
        return int(generator.integers(low, high + 1))

    heads, experts, values = between(1, 5), int(generator.choice(NUM_EXPERTS)), between(2, 6)
    return {
        **common_config(generator),
        "hidden_size": heads * int(generator.choice([4, 10, 16])),
        "num_attention_heads": heads,
        "rope_theta": float(generator.choice([10000.0, 500.0])),
        "rope_scaling": None,
        "hidden_bias": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_inner_values": values,
        "num_inner_value_heads": between(1, 3),
        "num_value_per_head": between(1, values),
        "inner_values_retrieval_size": between(3, 16),
        "private_expert_retrieval_size": 2 * between(2, 9),
        "num_cdmmoe_experts": experts,
        "num_cdmmoe_heads": between(1, 3),
        "num_cdmmoe_experts_per_head": between(1, math.isqrt(experts)),
    }


def seed_layer(config: Mapping[str, Any]) -> dict[str, Shape]:
    H, inner = config["hidden_size"], config["intermediate_size"]
    N, R = config["num_inner_values"], config["num_inner_value_heads"]
    retrieval, P = config["inner_values_retrieval_size"], config["num_cdmmoe_heads"]
    experts, private = config["num_cdmmoe_experts"], config["private_expert_retrieval_size"]
    return {
        "in_attn_layernorm.weight": (H,),
        "attn.q_proj.weight": (H, H),
        "attn.k_proj.weight": (H, H),
        "attn.o_proj.weight": (H, H),
        "attn.dynamic_mask": (config["num_attention_heads"], config["max_position_embeddings"]),
        "attn.v_queries.weight": (R * retrieval, H),
        "attn.v_keys": (R, retrieval, N),
        "attn.v_embed.weight": (N, H),
        "in_ff_layernorm.weight": (H,),
        "feed_forward.up_proj.weight": (inner, H),
        "feed_forward.down_proj.weight": (H, inner),
        "feed_forward.queries.weight": (P * private, H),
        "feed_forward.keys": (P, math.isqrt(experts), 2, private // 2),
        "feed_forward.down_embed.weight": (experts, H),
        "feed_forward.up_embed.weight": (experts, H),
    }


def shape_seed_tensors(tensors: Tensors, seed: int, generator: np.random.Generator) -> set[str]:
    """Stored masks with zeros (never at the first key) or all one; keys of values zero or not."""
    inert = set()
    for name, tensor in tensors.items():
        if name.endswith("dynamic_mask"):
            inert.add(name)
            tensor[:] = 1
            if seed % 2:
                # Only zero hides: nearly zero and negative numbers keep their keys.
                tensor[:] = generator.choice([0, 0, 1, -3, 0.49, 1e-30], tensor.shape)
                tensor[:, 0] = 1
        if name.endswith("v_keys") and seed % 3 == 0:
            tensor[:] = 0  # as published: all are equal, and the lower rows win
        if name.endswith(("v_keys", "v_queries.weight")):
            inert.add(name)  # they choose, and need not choose otherwise
    return inert


# --- the later generations ---


def grouped_config(
    generation: Generation, seed: int, generator: np.random.Generator
) -> dict[str, Any]:
    Nq, Nkv = HEADS[seed % len(HEADS)]
    D = int(generator.choice([4, 10, 16]))
    config = {
        **common_config(generator),
        "hidden_size": Nq * D,
        "num_attention_heads": Nq,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    theta = float(generator.choice([10000.0, 40000.0, 500.0]))
    if generation in ("g4", "g4h"):
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        config["keep_window_size"] = int(generator.integers(1, 9)) if seed % 4 in (1, 2) else 2048
    else:
        config |= {"rope_theta": theta, "rope_scaling": None, "hidden_bias": False}
    if generation != "g2_first":  # which has as many key/value heads as query heads, and no tie
        config |= {"num_key_value_heads": Nkv, "tie_word_embeddings": seed % 2 == 0}
    if generation == "g3":
        config |= {"keep_window_size": 2048, "dynamic_mask_ratio": 0.0}
        # Left over in published files from the generation before.
        config |= {"num_cdmoe_experts": 1024, "num_cdmmoe_experts": 1024}
    if generation in ("g4", "g4h") and seed % 5 == 4:
        config["head_dim"] = D + 6
    if generation in ("g3", "g4", "g4h") and seed % 3 == 0:
        experts = int(generator.choice(NUM_EXPERTS))
        config |= {
            "is_moe": True,
            "num_experts": experts,
            "num_experts_per_tok": int(generator.integers(1, 3 * math.isqrt(experts))),
            "norm_topk_prob": seed % 2 == 1,
        }
    return config


def grouped_layer(generation: Generation, config: Mapping[str, Any]) -> dict[str, Shape]:
    names = NAMES[generation]
    H, inner, Nq = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    Nkv = config.get("num_key_value_heads", Nq)
    D = config.get("head_dim", H // Nq)
    scores = Nkv if generation == "g4" else Nq
    read = Nq if generation in ("g2_first", "g2") else Nkv
    shapes: dict[str, Shape] = {
        names.attention_norm: (H,),
        f"{names.attention}.q_proj.weight": (Nq * D, H),
        f"{names.attention}.k_proj.weight": (Nkv * D, H),
        f"{names.attention}.v_proj.weight": (Nkv * D, H),
        f"{names.attention}.o_proj.weight": (H, Nq * D),
        f"{names.attention}.A": (scores,),
        f"{names.attention}.dt_proj.weight": (scores, read * D),
        str(names.attention_residual): (H,),
        names.mlp_norm: (H,),
        f"{names.mlp}.gate_proj.weight": (inner, H),
        f"{names.mlp}.up_proj.weight": (inner, H),
        f"{names.mlp}.down_proj.weight": (H, inner),
        str(names.mlp_residual): (H,),
    }
    if generation == "g4":
        shapes |= {f"{names.attention}.{part}_norm.weight": (D,) for part in "qk"}
    if config.get("is_moe"):
        experts = config["num_experts"]
        shapes |= {
            f"{names.mlp}.router_gate.weight": (2 * math.isqrt(experts), H),
            f"{names.mlp}.down_embed.weight": (experts, H),
            f"{names.mlp}.up_embed.weight": (experts, H),
        }
    return shapes


def shape_threshold_tensors(tensors: Tensors, seed: int) -> set[str]:
    """No A below zero: then the threshold of G2 hides nothing, whatever the values say."""
    inert = set()
    for name, tensor in tensors.items():
        if name.endswith(".A"):
            tensor[:] = np.abs(tensor)
            tensor[seed % len(tensor)] = 0
        if name.endswith((".A", "dt_proj.weight")):
            inert.add(name)
    return inert


def random_tensor(
    generator: np.random.Generator, name: str, shape: Shape
) -> npt.NDArray[np.float32]:
    """Norms, scales and A away from 0 and 1; projections that keep the size of what they map."""
    if len(shape) == 1:
        values = generator.uniform(0.5, 1.5, shape)
        if name.endswith(".A"):
            values *= generator.choice([-1.0, 1.0], shape)
    elif name.endswith(("word_embed.weight", "embed_tokens.weight", "up_embed.weight")):
        values = generator.standard_normal(shape)
    else:
        values = generator.standard_normal(shape) / np.sqrt(shape[-1])
    if name.endswith("lm_head.weight"):
        values *= 3
    return values.astype(np.float32)
