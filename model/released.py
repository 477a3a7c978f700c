"""The published shapes of Doge by name, for building with random weights. No PyTorch.

A name alone means the generation that transformers loads (G4), or the seed (G1) where no other has
that size; `-g2`, `-g3` and `-g4h` name the others.

Numbers are those of the published configs and training recipes; `parameters` counts unique
parameters (a tied table once) and is asserted against the shapes by a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from model.config import DogeConfig, UnsupportedModelError
from model.generations import Generation
from model.generations.g1 import G1
from model.generations.g2 import G2_FIRST
from model.generations.g3 import G3
from model.generations.g4 import G4
from model.generations.g4h import G4H


@dataclass(frozen=True, kw_only=True)
class ReleasedShape:
    """One published architecture.

    Attributes:
        generation: which Doge it is.
        config: its numbers.
        parameters: unique parameters.
    """

    generation: Generation
    config: DogeConfig
    parameters: int


def _dense_or_moe(
    generation: Generation,
    layers: int,
    hidden: int,
    inner: int,
    heads: tuple[int, int],
    parameters: int,
    *,
    experts: tuple[int, int] = (0, 0),
    vocab_size: int = 32768,
    positions: int = 2048,
    rope_theta: float = 10000.0,
) -> ReleasedShape:
    special = (0, 1, 2) if vocab_size == 32768 else (128000, 128001, 128001)
    return ReleasedShape(
        generation=generation,
        parameters=parameters,
        config=DogeConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads[0],
            num_key_value_heads=heads[1],
            head_dim=hidden // heads[0],
            max_position_embeddings=positions,
            keep_window_size=positions,
            rope_theta=rope_theta,
            is_moe=experts[0] > 0,
            num_experts=experts[0],
            num_experts_per_tok=experts[1],
            bos_token_id=special[0],
            eos_token_id=special[1],
            pad_token_id=special[2],
        ),
    )


def _early(
    generation: Generation,
    layers: int,
    heads: int,
    parameters: int,
    *,
    positions: int = 2048,
) -> ReleasedShape:
    """A shape of 2024: heads of size 128, untied, with the ids of its tokenizer."""
    return ReleasedShape(
        generation=generation,
        parameters=parameters,
        config=DogeConfig(
            vocab_size=32768,
            hidden_size=128 * heads,
            intermediate_size=512 * heads,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=128,
            max_position_embeddings=positions,
            keep_window_size=positions,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    )


def _seed(layers: int, heads: int, positions: int, parameters: int) -> ReleasedShape:
    """A seed model: its own numbers follow from the number of heads."""
    shape = _early(G1, layers, heads, parameters, positions=positions)
    config = replace(
        shape.config,
        num_inner_values=heads,
        num_inner_value_heads=heads // 2,
        num_value_per_head=heads // 2,
        inner_values_retrieval_size=128,
        num_cdmmoe_experts=512 * heads,
        num_cdmmoe_heads=heads // 2,
        num_cdmmoe_experts_per_head=heads,
        private_expert_retrieval_size=256,
    )
    return replace(shape, config=config)


class _Family(NamedTuple):
    """One size as the generations from G3 on have it."""

    numbers: tuple[int, int, int, tuple[int, int]]  # layers, hidden, inner, heads
    g4: int  # parameters
    per_head: int  # parameters of G3 and G4h
    options: dict[str, Any]
    in_g3: bool


_FAMILIES = {
    "20m": _Family((8, 256, 512, (2, 1)), 13_118_728, 13_117_712, {}, True),
    "60m": _Family((16, 512, 1024, (4, 2)), 54_571_552, 54_575_680, {}, True),
    "160m": _Family((24, 768, 1536, (6, 3)), 152_676_168, 152_697_744, {}, True),
    "320m": _Family((32, 1024, 2048, (8, 4)), 335_750_272, 335_807_744, {}, True),
    "20m-moe": _Family(
        (8, 256, 512, (2, 1)), 17_444_104, 17_443_088, {"experts": (1024, 16)}, True
    ),
    "120m-moe": _Family(
        (16, 512, 1024, (4, 2)), 122_728_992, 122_733_120, {"experts": (4096, 32)}, True
    ),
    "480m-moe": _Family(
        (24, 768, 1536, (6, 3)), 495_953_736, 495_975_312, {"experts": (9216, 48)}, False
    ),
    "1.4b-moe": _Family(
        (32, 1024, 2048, (8, 4)), 1_417_880_704, 1_417_938_176, {"experts": (16384, 64)}, False
    ),
    "40m": _Family(
        (8, 256, 1024, (2, 1)),
        40_709_384,
        40_708_368,
        {"vocab_size": 128256, "positions": 4096, "rope_theta": 40000.0},
        False,
    ),
    "40m-moe": _Family(
        (8, 256, 768, (2, 1)),
        43_461_896,
        43_460_880,
        {"experts": (1024, 8), "vocab_size": 128256},
        False,
    ),
    "180m-moe": _Family(
        (16, 512, 1536, (4, 2)),
        184_201_760,
        184_205_888,
        {"experts": (4096, 16), "vocab_size": 128256},
        False,
    ),
}


def _shapes() -> Iterator[tuple[str, ReleasedShape]]:
    yield "doge-22m", _seed(4, 2, 16384, 22_320_384)
    yield "doge-76m", _seed(8, 4, 4096, 76_894_720)
    yield "doge-197m", _seed(12, 6, 16384, 197_217_024)
    yield "doge-20m-g2", _early(G2_FIRST, 4, 2, 20_977_928)
    yield "doge-60m-g2", _early(G2_FIRST, 8, 4, 67_142_176)
    for name, family in _FAMILIES.items():
        shape = _dense_or_moe(G4, *family.numbers, family.g4, **family.options)
        yield f"doge-{name}", shape
        yield (
            f"doge-{name}-g4h",
            replace(shape, generation=G4H, parameters=family.per_head),
        )
        if family.in_g3:
            yield (
                f"doge-{name}-g3",
                replace(shape, generation=G3, parameters=family.per_head),
            )


RELEASED_SHAPES: dict[str, ReleasedShape] = dict(_shapes())


def released_shape(name: str) -> ReleasedShape:
    """The published shape called `name`.

    Raises:
        UnsupportedModelError: there is none of that name; lists those there are.
    """
    if name not in RELEASED_SHAPES:
        raise UnsupportedModelError(f"unknown shape {name!r}; known: {', '.join(RELEASED_SHAPES)}")
    return RELEASED_SHAPES[name]
