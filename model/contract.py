"""The step contract: the one list of what a step takes and gives, for every backend. No PyTorch.

docs/contract.md explains the meaning of each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.config import DogeConfig
from model.generations.generation import Generation


def cache_kinds(generation: Generation) -> tuple[str, ...]:
    """What a layer keeps of every cached token, in the contract's order."""
    return ("key", "value") if generation.score_heads is None else ("key", "value", "score")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of the step.

    Attributes:
        name: its name in the ONNX model and in the engine.
        dtype: numpy dtype name, or `bfloat16`.
        shape: fixed sizes as numbers, dynamic ones by name (`B`, `S`, `M`).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def as_dict(self) -> dict[str, object]:
        """JSON-ready form, as the manifest stores it."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True, kw_only=True)
class StepContract:
    """Inputs and outputs of one step, in the order in which the ONNX model lists them.

    Attributes:
        tokens: `input_ids`, `position_ids`, `write_index`, `logits_index`.
        past: the cache tensors of every layer before the step.
        logits: the step's result.
        present: the cache tensors after the step; `present[i]` shares the buffer of `past[i]`.
    """

    tokens: tuple[TensorSpec, ...]
    past: tuple[TensorSpec, ...]
    logits: TensorSpec
    present: tuple[TensorSpec, ...]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """All inputs, in order."""
        return self.tokens + self.past

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """All outputs, in order."""
        return (self.logits, *self.present)

    @property
    def aliases(self) -> tuple[tuple[str, str], ...]:
        """Pairs (past, present) that share one buffer."""
        return tuple((a.name, b.name) for a, b in zip(self.past, self.present, strict=True))

    def as_dict(self) -> dict[str, object]:
        """JSON-ready form, as the manifest stores it."""
        return {
            "inputs": [spec.as_dict() for spec in self.inputs],
            "outputs": [spec.as_dict() for spec in self.outputs],
            "aliases": [list(pair) for pair in self.aliases],
        }

    def bytes_per_token(self) -> int:
        """Cache bytes that one token of one sequence takes."""
        total = 0
        for spec in self.past:
            _, heads, _, size = spec.shape
            if not isinstance(heads, int) or not isinstance(size, int):
                raise TypeError(f"{spec.name}: heads and size are fixed numbers, got {spec.shape}")
            total += heads * size * DTYPE_BYTES[spec.dtype]
        return total


DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int64": 8, "bool": 1}


def step_contract(
    config: DogeConfig,
    generation: Generation,
    *,
    max_seq_len: int,
    cache_dtype: str = "float32",
    score_dtype: str = "float32",
    score_heads: int | None = None,
) -> StepContract:
    """The contract of a model whose cache has `max_seq_len` slots.

    Args:
        config: the architecture.
        generation: decides how many mask scores a key has.
        max_seq_len: C, prompt plus generated tokens.
        cache_dtype: dtype of cached keys and values.
        score_dtype: dtype of cached mask scores.
        score_heads: how many mask scores a lowered model caches with a key, None for as many as the
            generation has.
    """
    sizes = cache_sizes(config, generation, max_seq_len)
    if score_heads is not None and "score" in sizes:
        sizes["score"] = (score_heads, max_seq_len, 1)

    def cache(prefix: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=f"{prefix}.{i}.{kind}",
                dtype=score_dtype if kind == "score" else cache_dtype,
                shape=("B", *size),
            )
            for i in range(config.num_hidden_layers)
            for kind, size in sizes.items()
        )

    return StepContract(
        tokens=(
            TensorSpec(name="input_ids", dtype="int64", shape=("B", "S")),
            TensorSpec(name="position_ids", dtype="int64", shape=("B", "S")),
            TensorSpec(name="write_index", dtype="int64", shape=("B",)),
            TensorSpec(name="logits_index", dtype="int64", shape=("B", "M")),
        ),
        past=cache("past_key_values"),
        logits=TensorSpec(name="logits", dtype="float32", shape=("B", "M", config.vocab_size)),
        present=cache("present"),
    )


def cache_sizes(
    config: DogeConfig, generation: Generation, slots: int
) -> dict[str, tuple[int, int, int]]:
    """Heads, slots and numbers per slot of each kind of cache tensor of one sequence's layer."""
    keys = (config.num_key_value_heads, slots, config.head_dim)
    sizes = {"key": keys, "value": keys, "score": (generation.num_score_heads(config), slots, 1)}
    return {kind: sizes[kind] for kind in cache_kinds(generation)}


def layer_taps(config: DogeConfig, generation: Generation) -> Sequence[str]:
    """Names of the main-graph values that people compare, in graph order.

    `layers.{i}.output` is the residual stream after layer i.
    """
    taps = ["embedding"]
    for index in range(config.num_hidden_layers):
        names = [
            "attention_norm",
            "value",
            *(["score"] if generation.score_heads else []),
            "query",
            "key",
            "attention_output",
            "attention_residual",
            "mlp_norm",
        ]
        if config.is_moe or generation.inner_function:
            names += ["router_scores", "expert_output"]
        names += ["mlp_output", "output"]
        taps += [f"layers.{index}.{name}" for name in names]
    return [*taps, "final_norm"]
