"""The published shapes of Doge by name, for building with random weights. No PyTorch.

Numbers are those of the published configs and training recipes; `parameters` counts unique
parameters (a tied table once) and is asserted against the shapes by a test.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import DogeConfig, UnsupportedModelError
from model.generations import GENERATIONS, Generation
from model.generations.g4 import G4


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


def _g4(
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
        generation=G4,
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


RELEASED_SHAPES: dict[str, ReleasedShape] = {
    "doge-20m": _g4(8, 256, 512, (2, 1), 13_118_728),
    "doge-60m": _g4(16, 512, 1024, (4, 2), 54_571_552),
    "doge-160m": _g4(24, 768, 1536, (6, 3), 152_676_168),
    "doge-320m": _g4(32, 1024, 2048, (8, 4), 335_750_272),
    "doge-20m-moe": _g4(8, 256, 512, (2, 1), 17_444_104, experts=(1024, 16)),
    "doge-120m-moe": _g4(16, 512, 1024, (4, 2), 122_728_992, experts=(4096, 32)),
    "doge-480m-moe": _g4(24, 768, 1536, (6, 3), 495_953_736, experts=(9216, 48)),
    "doge-1.4b-moe": _g4(32, 1024, 2048, (8, 4), 1_417_880_704, experts=(16384, 64)),
    "doge-40m": _g4(
        8, 256, 1024, (2, 1), 40_709_384, vocab_size=128256, positions=4096, rope_theta=40000.0
    ),
    "doge-40m-moe": _g4(8, 256, 768, (2, 1), 43_461_896, experts=(1024, 8), vocab_size=128256),
    "doge-180m-moe": _g4(16, 512, 1536, (4, 2), 184_201_760, experts=(4096, 16), vocab_size=128256),
}


def released_shape(name: str) -> ReleasedShape:
    """The published shape called `name`.

    Raises:
        UnsupportedModelError: there is none of that name; lists those there are.
    """
    if name not in RELEASED_SHAPES:
        raise UnsupportedModelError(
            f"unknown shape {name!r}; known for generations "
            f"{', '.join(generation.name for generation in GENERATIONS)}: "
            f"{', '.join(RELEASED_SHAPES)}"
        )
    return RELEASED_SHAPES[name]
