"""The memory that steps write for themselves, by name, and that of the cache."""

from __future__ import annotations

from plugins.token_choice.launches import PARAMETERS
from runtime.gpu.device_memory import ADDRESS_ALIGNMENT
from runtime.kernel_step.decode_step import RING, STOP_IDS, DecodeStep
from runtime.kernel_step.formats import StepFormats
from runtime.kernel_step.prompt_step import PromptStep
from runtime.kernel_step.step_model import StepModel

_FLOAT32, _INT64, _INT32 = 4, 8, 4
_FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def step_areas(
    model: StepModel, formats: StepFormats, steps: tuple[DecodeStep, ...], prompt: PromptStep
) -> dict[str, int]:
    """Bytes of every area, for the largest step.

    Areas hold float32 [tokens, numbers] unless said otherwise: `tokens` int64, `positions` int64
    [B] (the slot, and position, of a sequence's first new token), `ring` int64 [RING, B] (tokens of
    the last steps), `step` int32 [1], `query` in the cache's type, `counters` int32, all zero. What
    tokens are chosen by (`parameters` to `stop_ids`) is as `TokenChoice.launch` says.
    """
    batch, tokens = prompt.batch, max(prompt.max_tokens, prompt.batch)
    parts: tuple[DecodeStep | PromptStep, ...] = (*steps, prompt)
    areas = {
        "tokens": tokens * _INT64,
        "positions": batch * _INT64,
        "logits_index": tokens * _INT64,
        "ring": RING * batch * _INT64,
        "step": _INT32,
        "parameters": batch * len(PARAMETERS) * _FLOAT32,
        "uniforms": model.slots * batch * _FLOAT32,
        "bias": model.vocab_size * _FLOAT32,
        "counts": batch * model.vocab_size * _INT32,
        "stop_ids": STOP_IDS * _INT32,
        "x": tokens * model.hidden * _FLOAT32,
        "logits": batch * model.vocab_size * _FLOAT32,
        "last": tokens * model.hidden * _FLOAT32,
        "counters": max(part.counters for part in parts) * _INT32,
    }
    workspace = max(part.workspace_bytes for part in parts)
    return areas | layer_areas(model, formats, tokens, workspace)


def layer_areas(
    model: StepModel, formats: StepFormats, tokens: int, workspace: int
) -> dict[str, int]:
    """Bytes of the areas that a layer writes beside the residual stream; see `step_areas`.

    Args:
        model: its numbers.
        formats: of the cache.
        tokens: of all sequences together.
        workspace: bytes that single launches need for themselves.
    """
    experts, inner = model.experts, model.inner_values
    attended = model.query_heads * model.head_size
    areas = {
        "rows": tokens * model.row_numbers * _FLOAT32,
        "query": tokens * attended * _FLOAT_BYTES[formats.float_kind],
        "attended": tokens * attended * _FLOAT32,
        "inner": tokens * model.inner * _FLOAT32,
        "workspace": workspace,
    }
    if experts is not None:
        # Room to begin the second axis of a prompt's scores at an aligned address.
        areas["router"] = tokens * experts.router_rows * _FLOAT32 + ADDRESS_ALIGNMENT
        areas["normed"] = tokens * model.hidden * _FLOAT32
        areas["experts"] = tokens * model.hidden * _FLOAT32
    if inner is not None:
        areas["value_scores"] = tokens * max(inner.score_rows, 1) * _FLOAT32
    return areas


def cache_areas(model: StepModel, formats: StepFormats, rows: int) -> dict[str, int]:
    """Bytes of the cache tensors of so many sequences: `layers.{i}.key`, `.value`, `.score`."""
    return {
        f"layers.{layer}.{kind}": rows * size
        for layer in range(model.layers)
        for kind, size in cache_row_bytes(model, formats).items()
    }


def cache_row_bytes(model: StepModel, formats: StepFormats) -> dict[str, int]:
    """Bytes of one sequence in one layer, by kind of tensor."""
    numbers = model.key_heads * model.slots * model.head_size
    sizes = dict.fromkeys(("key", "value"), numbers * _FLOAT_BYTES[formats.float_kind])
    if model.score_heads:
        sizes["score"] = model.score_heads * model.slots * _FLOAT32
    return sizes
