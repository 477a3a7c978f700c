"""The numbers of a Doge architecture, read from a checkpoint's config.json."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

logger = logging.getLogger(__name__)

RouterMode = Literal["mixed", "per_token"]

# Keys that say nothing about the arithmetic of inference: housekeeping of transformers, training
# options, and the stale fields that published configs carry (docs/reference.md).
_IRRELEVANT_KEYS = frozenset(
    [
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bad_words_ids",
        "begin_suppress_tokens",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "expert_retrieval_size",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_cdmoe_experts",
        "num_cdmoe_experts_per_head",
        "num_cdmoe_heads",
        "num_channels",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "patch_size",
        "prefix",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "router_aux_loss_coef",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "use_bfloat16",
        "use_cache",
    ]
)
_FIXED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("doge",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_bias": (False, None),
    "sliding_window": (None,),
    "dynamic_mask_ratio": (0, 0.0, None),
}
_REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
# What the seed generation alone has (the published spelling has the double m). Later configs carry
# some of them as leftovers, which mean nothing there.
SEED_FIELDS = (
    "num_inner_values",
    "num_inner_value_heads",
    "num_value_per_head",
    "inner_values_retrieval_size",
    "num_cdmmoe_experts",
    "num_cdmmoe_heads",
    "num_cdmmoe_experts_per_head",
    "private_expert_retrieval_size",
)


# Fields that are whole numbers, and the least that each may be.
_WHOLE_NUMBERS = {
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 1,
    "max_position_embeddings": 1,
    "keep_window_size": 1,
    "num_experts": 0,
    "num_experts_per_tok": 0,
    **dict.fromkeys(SEED_FIELDS, 0),
}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class UnsupportedModelError(Exception):
    """The checkpoint is not one that this project runs; the message says what was seen."""


@dataclass(frozen=True, kw_only=True)
class DogeConfig:
    """The architecture of one Doge checkpoint, validated when made.

    Field names are those of config.json. `max_position_embeddings` is the length up to which plain
    RoPE holds: for a checkpoint with scaled RoPE, its original length. `router_mode` is how the
    experts' router is split (docs/reference.md). `is_moe` says that there are experts behind such
    a router. The seed generation has other experts and numbers of its own (`SEED_FIELDS`), which
    are all 0 elsewhere.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    keep_window_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    is_moe: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = False
    router_mode: RouterMode = "mixed"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    num_inner_values: int = 0
    num_inner_value_heads: int = 0
    num_value_per_head: int = 0
    inner_values_retrieval_size: int = 0
    num_cdmmoe_experts: int = 0
    num_cdmmoe_heads: int = 0
    num_cdmmoe_experts_per_head: int = 0
    private_expert_retrieval_size: int = 0

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise UnsupportedModelError("invalid Doge config: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        problems = [
            f"{name} must be a whole number of at least {least}, got {value!r}"
            for name, least in _WHOLE_NUMBERS.items()
            if not _is_whole(value := getattr(self, name)) or value < least
        ]
        problems += [
            f"{name} must be true or false, got {value!r}"
            for name in ("tie_word_embeddings", "is_moe", "norm_topk_prob")
            if not isinstance(value := getattr(self, name), bool)
        ]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            several = isinstance(value, tuple) and name == "eos_token_id"
            if value is not None and not all(map(_is_whole, value if several else (value,))):
                problems.append(f"{name} must be a token id, got {value!r}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                problems.append(f"{name} must be a number above 0, got {value!r}")
            elif not math.isfinite(value):
                problems.append(f"{name} must be finite, got {value!r}")
        if self.router_mode not in get_args(RouterMode):
            problems.append(
                f"doge_router_mode must be one of {', '.join(get_args(RouterMode))}, "
                f"got {self.router_mode!r}"
            )
        if problems:
            return problems
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            problems.append(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if self.is_seed:
            problems += self._seed_problems()
        if self.is_moe:
            if self.num_keys < 1:
                problems.append(f"num_experts must be at least 1, got {self.num_experts!r}")
            elif not 1 <= self.num_experts_per_tok <= self.num_keys**2:
                problems.append(
                    f"num_experts_per_tok must be between 1 and {self.num_keys**2} (the reachable "
                    f"experts of {self.num_experts}), got {self.num_experts_per_tok!r}"
                )
        return problems

    def _seed_problems(self) -> list[str]:
        problems = [
            f"{name} must be at least 1 in the seed generation, got {getattr(self, name)}"
            for name in SEED_FIELDS
            if getattr(self, name) < 1
        ]
        if self.is_moe:
            problems.append("is_moe belongs to later generations than the one with inner values")
        if self.hidden_size != self.num_attention_heads * self.head_dim:
            problems.append(
                f"num_attention_heads ({self.num_attention_heads}) must divide hidden_size "
                f"({self.hidden_size})"
            )
        if self.num_key_value_heads != self.num_attention_heads:
            problems.append(
                f"num_key_value_heads ({self.num_key_value_heads}) must equal num_attention_heads "
                f"({self.num_attention_heads}) in the seed generation"
            )
        if problems:
            return problems
        if self.num_value_per_head > self.num_inner_values:
            problems.append(
                f"num_value_per_head must be at most num_inner_values ({self.num_inner_values}), "
                f"got {self.num_value_per_head}"
            )
        if self.private_expert_retrieval_size % 2:
            problems.append(
                "private_expert_retrieval_size must be even, half for each axis of the expert "
                f"grid, got {self.private_expert_retrieval_size}"
            )
        if self.num_cdmmoe_experts_per_head > self.num_keys**2:
            problems.append(
                f"num_cdmmoe_experts_per_head must be between 1 and {self.num_keys**2} (the "
                f"reachable experts of {self.num_cdmmoe_experts}), got "
                f"{self.num_cdmmoe_experts_per_head}"
            )
        return problems

    @property
    def is_seed(self) -> bool:
        """Whether these are the numbers of the seed generation (G1)."""
        return any(getattr(self, name) for name in SEED_FIELDS)

    @property
    def num_keys(self) -> int:
        """n, the keys per axis of the expert grid: the whole part of √experts, 0 without any."""
        return math.isqrt(max(self.num_experts, self.num_cdmmoe_experts, 0))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-text ids as a tuple, empty when the config names none."""
        if self.eos_token_id is None:
            return ()
        if isinstance(self.eos_token_id, int):
            return (self.eos_token_id,)
        return tuple(self.eos_token_id)

    def with_router_mode(self, router_mode: str) -> DogeConfig:
        """The same architecture with another split of the experts' router.

        Raises:
            UnsupportedModelError: not a router mode.
        """
        return dataclasses.replace(self, router_mode=cast(RouterMode, router_mode))

    def as_dict(self) -> dict[str, Any]:
        """Every field, as JSON-ready values; those of the seed generation only there."""
        values = dataclasses.asdict(self)
        if not self.is_seed:
            values = {name: value for name, value in values.items() if name not in SEED_FIELDS}
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        return values

    @classmethod
    def from_pretrained(cls, path: Path, *, seed: bool = False) -> DogeConfig:
        """Read `config.json` in the checkpoint folder `path`; see `from_dict`.

        Raises:
            FileNotFoundError: there is no config.json.
            UnsupportedModelError: not JSON, another model type, or a value that is not supported.
        """
        return cls.from_dict(read_config_json(path), seed=seed)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, seed: bool = False) -> DogeConfig:
        """Read the published fields of `data`, as `config.json` spells them.

        Unknown keys are listed once, as a warning, and ignored.

        Args:
            data: the content of config.json.
            seed: read `SEED_FIELDS`, which must be there; they are ignored otherwise.

        Raises:
            UnsupportedModelError: every problem at once.
        """
        problems = []
        if "model_type" not in data:
            problems.append("model_type is missing, expected 'doge'")
        for name, allowed in _FIXED_VALUES.items():
            if name in data and data[name] not in allowed:
                problems.append(f"{name} is {data[name]!r}, supported: {allowed[0]!r}")
        required = (*_REQUIRED_KEYS, *SEED_FIELDS) if seed else _REQUIRED_KEYS
        problems += [f"{name} is missing" for name in required if data.get(name) is None]
        if problems:
            raise UnsupportedModelError("unsupported config.json: " + "; ".join(problems))

        values: dict[str, Any] = {
            field.name: data[field.name]
            for field in dataclasses.fields(cls)
            if data.get(field.name) is not None and (seed or field.name not in SEED_FIELDS)
        }
        heads = values["num_attention_heads"]
        values.setdefault("num_key_value_heads", heads)
        if _is_whole(heads) and heads > 0 and _is_whole(values["hidden_size"]):
            values.setdefault("head_dim", values["hidden_size"] // heads)
        # Whatever keeps the head size from being known is reported with everything else.
        values.setdefault("head_dim", 2)
        values.setdefault("max_position_embeddings", 2048)
        # The seed generation has no window; with one as long as the context nothing is dropped.
        window = values["max_position_embeddings"] if seed else 2048
        values.setdefault("keep_window_size", window)
        values.setdefault("tie_word_embeddings", False)
        if values.get("is_moe"):
            values.setdefault("num_experts", 16384)
            values.setdefault("num_experts_per_tok", 64)
        else:
            values["num_experts"] = values["num_experts_per_tok"] = 0
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        values["router_mode"] = data.get("doge_router_mode") or "mixed"
        values |= _read_rope(data, values["max_position_embeddings"])
        known = {field.name for field in dataclasses.fields(cls)} - {"router_mode"}
        known |= {*_FIXED_VALUES, *_ROPE_KEYS, *_IRRELEVANT_KEYS, "doge_router_mode"}
        unknown = sorted(set(data) - known)
        if unknown:
            logger.warning("config.json: unknown keys ignored: %s", ", ".join(unknown))
        return cls(**values)


def read_config_json(path: Path) -> dict[str, Any]:
    """The content of `config.json` in the checkpoint folder `path`.

    Raises:
        FileNotFoundError: there is no config.json.
        UnsupportedModelError: it is not one JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} has no config.json; a checkpoint folder holds config.json and "
            "model.safetensors"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UnsupportedModelError(f"{file} must hold one JSON object")
    return data


def _read_rope(data: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """`rope_theta` and the length up to which plain RoPE holds.

    transformers 5 writes `rope_parameters`, older files `rope_theta` and `rope_scaling`. Dynamic
    scaling equals plain RoPE up to its original length; beyond that the published code depends on
    what ran before, so the length ends there.
    """
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = data.get(key) or {}
        if not isinstance(value, Mapping):
            raise UnsupportedModelError(
                f"unsupported config.json: {key} must be an object, got {value!r}"
            )
        rope |= value
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", data.get("rope_theta"))
    values: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    if kind == "default":
        return values
    if kind != "dynamic":
        raise UnsupportedModelError(
            f"unsupported config.json: rope type is {kind!r}, supported: 'default', 'dynamic' (up "
            "to its original length)"
        )
    original = rope.get("original_max_position_embeddings")
    if original is None:
        return values
    if not _is_whole(original):
        raise UnsupportedModelError(
            "unsupported config.json: original_max_position_embeddings must be a whole number, "
            f"got {original!r}"
        )
    if _is_whole(max_positions):
        values["max_position_embeddings"] = min(original, max_positions)
    return values
