"""What tells one published generation of Doge from another, without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from model.config import DogeConfig, UnsupportedModelError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation: how its checkpoint is recognised and where its arithmetic differs.

    Attributes:
        name: short name, e.g. `g4`; the manifest and the reports use it.
        title: a few words for people.
        recognises: whether tensor names and shapes are this generation's signature.
        tensor_shapes: every tensor a checkpoint of this config must hold, by published name.
        score_heads: whether mask scores are per key/value head or per query head.
        qk_norm: whether queries and keys are normalised per head.
    """

    name: str
    title: str
    recognises: Callable[[Shapes], bool]
    tensor_shapes: Callable[[DogeConfig], dict[str, tuple[int, ...]]]
    score_heads: Literal["key_value", "query"]
    qk_norm: bool

    def num_score_heads(self, config: DogeConfig) -> int:
        """N, the number of mask scores cached with each key."""
        if self.score_heads == "query":
            return config.num_attention_heads
        return config.num_key_value_heads


def detect_generation(shapes: Shapes, generations: Sequence[Generation]) -> Generation:
    """The one generation of `generations` that recognises the tensors.

    Raises:
        UnsupportedModelError: none does, or several do; lists what was seen.
    """
    matches = [generation for generation in generations if generation.recognises(shapes)]
    if len(matches) == 1:
        return matches[0]
    seen = sorted(name for name in shapes if ".layers." not in name or ".layers.0." in name)
    known = ", ".join(f"{generation.name} ({generation.title})" for generation in generations)
    found = " and ".join(generation.name for generation in matches) or "no known generation"
    raise UnsupportedModelError(
        f"the tensors match {found}; exactly one of these must match: {known}. "
        f"Seen: {', '.join(seen) or 'no tensors'}"
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
