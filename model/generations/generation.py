"""What tells one published generation of Doge from another, without PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from model.config import DogeConfig, UnsupportedModelError

Shapes = Mapping[str, tuple[int, ...]]
_PLACE = re.compile(r"(model\.(?:layers\.\d+\.)?)([^.]+)(.*)")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation: how its checkpoint is recognised and where its arithmetic differs.

    The network's own parameter names are those of G4. A generation that spells them otherwise says
    so in `parts`; whatever people see (checkpoints, ONNX, errors) has the published names.

    Attributes:
        name: short name, e.g. `g4`; the manifest and the reports use it.
        title: a few words for people.
        signature: which tensors make a checkpoint this generation's, in words.
        recognises: whether tensor shapes and config.json are this generation's signature.
        layer_shapes: shapes of one decoder layer's tensors, by the network's names.
        parts: published name of a part of the network or of a layer, where it differs.
        read_config: config.json to the architecture.
        extra_config: fields of config.json that this generation writes and no other needs.
        score_heads: whether mask scores are per key/value head or per query head; None where no
            score is computed from the values and none is cached.
        qk_norm: whether queries and keys are normalised per head.
        rotates_keys: whether keys are rotated as queries are.
        inner_function: whether values are retrieved rows times the normed input, under a stored
            mask, and experts stand beside a feed-forward block without a gate (the seed).
        inert: tensors of a layer that are stored and change nothing, each with the least value up
            to which that holds, None where it holds for any.
    """

    name: str
    title: str
    signature: str
    recognises: Callable[[Shapes, Mapping[str, Any]], bool]
    layer_shapes: Callable[[DogeConfig], dict[str, tuple[int, ...]]]
    parts: Mapping[str, str] = field(default_factory=dict)
    read_config: Callable[[Mapping[str, Any]], DogeConfig] = DogeConfig.from_dict
    extra_config: Mapping[str, Any] = field(default_factory=dict)
    score_heads: Literal["key_value", "query"] | None
    qk_norm: bool
    rotates_keys: bool = True
    inner_function: bool = False
    inert: Mapping[str, float | None] = field(default_factory=dict)

    def num_score_heads(self, config: DogeConfig) -> int:
        """N, the number of mask scores cached with each key; 0 where none is."""
        if self.score_heads is None:
            return 0
        if self.score_heads == "query":
            return config.num_attention_heads
        return config.num_key_value_heads

    def published_name(self, name: str) -> str:
        """The published spelling of one of the network's parameter names."""
        found = _PLACE.fullmatch(name)
        if found is None:
            return name
        place, part, rest = found.groups()
        return f"{place}{self.parts.get(part, part)}{rest}"

    def tensor_shapes(self, config: DogeConfig) -> dict[str, tuple[int, ...]]:
        """Every tensor that a checkpoint of this config must hold, by published name."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
            "model.norm.weight": (config.hidden_size,),
        }
        layer = self.layer_shapes(config)
        for index in range(config.num_hidden_layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        if not config.tie_word_embeddings:
            shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
        return {self.published_name(name): shape for name, shape in shapes.items()}

    def inert_bound(self, name: str) -> float | None:
        """The least value up to which the inert tensor of this published name changes nothing.

        Raises:
            KeyError: the tensor is not inert.
        """
        for tensor, bound in self.inert.items():
            place = self.published_name(f"model.layers.0.{tensor}").removeprefix("model.layers.0.")
            if re.fullmatch(rf"model\.layers\.\d+\.{re.escape(place)}", name):
                return bound
        raise KeyError(name)


def grouped_attention_shapes(config: DogeConfig) -> dict[str, tuple[int, ...]]:
    """The projections of grouped attention, by the network's names."""
    H, D = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
    return {
        "self_attn.q_proj.weight": (queries, H),
        "self_attn.k_proj.weight": (keys, H),
        "self_attn.v_proj.weight": (keys, H),
        "self_attn.o_proj.weight": (H, queries),
    }


def score_shapes(config: DogeConfig, heads: int) -> dict[str, tuple[int, ...]]:
    """What computes the mask scores of `heads` heads from the values of all key/value heads."""
    return {
        "self_attn.A": (heads,),
        "self_attn.dt_proj.weight": (heads, config.num_key_value_heads * config.head_dim),
    }


def block_shapes(config: DogeConfig) -> dict[str, tuple[int, ...]]:
    """Norms, residual scales and the gated feed-forward block, with its experts if there are."""
    H, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (H,),
        "input_residual": (H,),
        "post_attention_layernorm.weight": (H,),
        "post_attention_residual": (H,),
        "mlp.gate_proj.weight": (inner, H),
        "mlp.up_proj.weight": (inner, H),
        "mlp.down_proj.weight": (H, inner),
    }
    if config.is_moe:
        shapes |= {
            "mlp.router_gate.weight": (2 * config.num_keys, H),
            "mlp.down_embed.weight": (config.num_experts, H),
            "mlp.up_embed.weight": (config.num_experts, H),
        }
    return shapes


def detect_generation(
    shapes: Shapes, config_json: Mapping[str, Any], generations: Sequence[Generation]
) -> Generation:
    """The one generation of `generations` that recognises the checkpoint.

    Args:
        shapes: shape of each tensor, by published name.
        config_json: the content of config.json, which decides between two generations whose
            tensors coincide.
        generations: the known ones.

    Raises:
        UnsupportedModelError: none does, or several do; lists what was seen and what would match.
    """
    matches = [
        generation for generation in generations if generation.recognises(shapes, config_json)
    ]
    if len(matches) == 1:
        return matches[0]
    seen = sorted(
        f"{name} {list(shape)}"
        for name, shape in shapes.items()
        if ".layers." not in name or ".layers.0." in name
    )
    known = "; ".join(f"{g.name} ({g.title}): {g.signature}" for g in matches or generations)
    if matches:
        found = f"match {' and '.join(g.name for g in matches)} at once; a checkpoint has one form"
    else:
        found = "match no known generation"
    raise UnsupportedModelError(
        f"the tensors {found}. Seen: {', '.join(seen) or 'no tensors'}. What matches: {known}"
    )


def generation_named(name: str, generations: Sequence[Generation]) -> Generation:
    """The generation called `name`.

    Raises:
        UnsupportedModelError: no generation has that name.
    """
    for generation in generations:
        if generation.name == name:
            return generation
    raise UnsupportedModelError(
        f"unknown generation {name!r}; known: {', '.join(g.name for g in generations)}"
    )
