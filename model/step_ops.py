"""Operators that ONNX has as one node and PyTorch spells in several.

Each function computes its operator in eager mode and becomes exactly that node when exported, so
the graph that a backend sees is the one that its fused kernels expect.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tap = Callable[[Tensor, str], Tensor]
# What one layer keeps of every cached token, C slots a sequence, in the contract's order: keys and
# values [B, Nkv, C, D] and, where the generation caches them, mask scores [B, N, C, 1].
LayerCache = tuple[Tensor, ...]


def no_tap(value: Tensor, name: str) -> Tensor:
    """Leave a named value as it is; the default `tap` of a forward pass."""
    return value


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, statistics in float32 (RMSNormalization).

    The normalised value is rounded to x's dtype before it meets the weight, as published.
    """
    if torch.compiler.is_exporting():
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    x32 = x.float()
    normalised = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """Rotate the two halves of each head by its position's angles (RotaryEmbedding).

    Args:
        x: [B, heads, S, D].
        cos: [positions, D/2] in x's dtype.
        sin: [positions, D/2] in x's dtype.
        position_ids: [B, S] int64, below `positions`.
    """
    if torch.compiler.is_exporting():
        rotated: Tensor = torch.onnx.ops.rotary_embedding(x, cos, sin, position_ids)
        return rotated
    cos, sin = cos[position_ids][:, None], sin[position_ids][:, None]  # [B, 1, S, D/2]
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def append_to_cache(past: Tensor, update: Tensor, write_index: Tensor) -> Tensor:
    """Write `update` into the slots from `write_index` on (TensorScatter), in place when eager.

    Args:
        past: [B, heads, C, size]; changed in place in eager mode.
        update: [B, heads, S, size].
        write_index: [B] int64, write_index + S ≤ C.

    Returns:
        [B, heads, C, size]: `past` itself in eager mode.
    """
    if torch.compiler.is_exporting():
        scattered: Tensor = torch.ops.doge.tensor_scatter(past, update, write_index)
        return scattered
    rows = torch.arange(past.shape[0], device=past.device)[:, None]
    slots = write_index[:, None] + torch.arange(update.shape[2], device=past.device)  # [B, S]
    past.transpose(1, 2)[rows, slots] = update.transpose(1, 2)
    return past


def append_layer(past: LayerCache | None, new: LayerCache, write_index: Tensor) -> LayerCache:
    """Append a layer's new tensors to its cache; without a cache they are all there is."""
    if past is None:
        return new
    return tuple(append_to_cache(*pair, write_index) for pair in zip(past, new, strict=True))


@torch.library.custom_op("doge::tensor_scatter", mutates_args=())
def _tensor_scatter(past: Tensor, update: Tensor, write_index: Tensor) -> Tensor:
    return append_to_cache(past.clone(), update, write_index)


@_tensor_scatter.register_fake
def _(past: Tensor, update: Tensor, write_index: Tensor) -> Tensor:
    return torch.empty_like(past)


@torch.library.custom_op("doge::tap", mutates_args=())
def export_tap(value: Tensor, name: str) -> Tensor:
    """Mark a value of the exported graph with the name that it shall carry there."""
    return value.clone()


@export_tap.register_fake
def _(value: Tensor, name: str) -> Tensor:
    return torch.empty_like(value)
