"""Packs a network's weights for the step of our kernels (runtime/kernel_step/)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from model.doge import DogeAttention, DogeDecoderLayer, DogeForCausalLM
from model.layers import CrossDomainMoE, GatedMLP, RMSNorm, rotary_tables
from model.seed import InnerFunctionAttention, SeedMoE
from model.seed_rewrites import rewrite_for_export
from plugins.projection.packing import WeightFormat, interleave_rows, pack_weights
from runtime.kernel_step.formats import StepFormats
from runtime.kernel_step.packed_weights import (
    global_matrices,
    layer_matrices,
    layer_vectors,
    matrix_arrays,
    stored_tensors,
)
from runtime.kernel_step.step_model import InnerValues, StepModel

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]


def step_model_of(network: DogeForCausalLM, max_seq_len: int) -> StepModel:
    """The numbers of a network's step.

    Raises:
        ValueError: more slots than the seed's stored mask covers.
    """
    return StepModel.make(
        network.config, network.generation, max_seq_len, _inner_values(network, max_seq_len)
    )


def write_step_weights(
    path: Path, network: DogeForCausalLM, model: StepModel, formats: StepFormats
) -> None:
    """Write the packed weights of a network in float32.

    Raises:
        ValueError: a matrix that the format cannot hold: its columns, or numbers beyond its range.
    """
    arrays = dict(packed_arrays(network, model, formats))
    expected = {
        name: (tensor.dtype, tensor.shape)
        for name, tensor in stored_tensors(model, formats).items()
    }
    found = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    if found != expected:
        wrong = sorted(found.items() ^ expected.items(), key=str)
        raise AssertionError(f"packed tensors are not those that a step reads: {wrong[:4]}")
    save_file(arrays, path)


def packed_arrays(
    network: DogeForCausalLM, model: StepModel, formats: StepFormats
) -> Iterator[tuple[str, Array]]:
    """Every tensor of the file, by name."""
    cos, sin = rotary_tables(network.config, model.slots)
    yield from (("cos", _numbers(cos)), ("sin", _numbers(sin)))
    yield "norm", _numbers(network.model.norm.weight)
    tables = {"embedding": network.model.embed_tokens.weight, "head": network.head_weight}
    for name, shape in global_matrices(model, formats).items():
        yield from _packed(name, _numbers(tables[name]), shape.format)
    rewritten, _ = rewrite_for_export(network, model.max_seq_len)
    layers = zip(network.model.layers, rewritten.model.layers, strict=True)
    for number, (layer, short) in enumerate(layers):
        yield from _layer(f"layers.{number}.", layer, short, model, formats)


def _layer(
    prefix: str,
    layer: nn.Module,
    rewritten: nn.Module,
    model: StepModel,
    formats: StepFormats,
) -> Iterator[tuple[str, Array]]:
    assert isinstance(layer, DogeDecoderLayer)
    assert isinstance(rewritten, DogeDecoderLayer)
    matrices = _attention_matrices(layer, model) | _mlp_matrices(layer.mlp)
    for name, shape in layer_matrices(model, formats).items():
        try:
            yield from _packed(prefix + name, matrices[name], shape.format)
        except ValueError as error:
            raise ValueError(f"{prefix}{name}: {error}") from error
    vectors = _vectors(layer, rewritten, model)
    for name, tensor in layer_vectors(model, formats).items():
        array = vectors[name]
        if name in ("expert_down", "expert_up"):
            array = pack_weights([array], formats.small).weights
        yield prefix + name, np.ascontiguousarray(array.reshape(tensor.shape))


def _attention_matrices(layer: DogeDecoderLayer, model: StepModel) -> dict[str, Float32]:
    attention = layer.self_attn
    if isinstance(attention, InnerFunctionAttention):
        projections: tuple[nn.Module, ...] = (attention.q_proj, attention.k_proj)
    else:
        assert isinstance(attention, DogeAttention)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    matrices = {
        "qkv": np.concatenate([_weight(projection) for projection in projections]),
        "o": _weight(attention.o_proj),
    }
    if isinstance(attention, DogeAttention) and attention.scored:
        matrices["score"] = mask_score_rows(attention)
    if model.inner_values is not None and model.inner_values.score_rows:
        assert isinstance(attention, InnerFunctionAttention)
        matrices["value_score"] = value_score_rows(attention)
    return matrices


def mask_score_rows(attention: DogeAttention) -> Float32:
    """What a layer's mask scores are computed from, as one product with its input, [N, H].

    dt_proj reads the values, which are products themselves. Neither factor is rounded before they
    are multiplied: of narrow values, scores would be those of another model.
    """
    return _numbers(attention.dt_proj.weight.double() @ attention.v_proj.weight.double())


def value_score_rows(attention: InnerFunctionAttention) -> Float32:
    """What the seed's values are picked by, as one product with a layer's input, [R·N, H]."""
    assert attention.v_queries is not None and attention.v_keys is not None
    keys = attention.v_keys.double()  # [R, r, N]
    queries = attention.v_queries.weight.double().view(*keys.shape[:2], -1)
    return _numbers((keys.transpose(1, 2) @ queries).flatten(0, 1))


def seed_router_rows(mlp: SeedMoE) -> Float32:
    """What the seed's experts are picked by, as one product with a block's input, [2·P·n, H]."""
    assert mlp.keys is not None and mlp.queries is not None
    heads, _, planes, half = mlp.keys.shape
    queries = mlp.queries.weight.double().view(planes, heads, half, -1)
    router = mlp.keys.double().permute(2, 0, 1, 3) @ queries  # [2, P, n, H]
    return _numbers(router.flatten(0, 2))


def _mlp_matrices(mlp: nn.Module) -> dict[str, Float32]:
    if isinstance(mlp, SeedMoE):
        return {
            "gate_up": _weight(mlp.up_proj),
            "down": _weight(mlp.down_proj),
            "router": seed_router_rows(mlp),
        }
    assert isinstance(mlp, GatedMLP | CrossDomainMoE)
    matrices = {
        "gate_up": interleave_rows(_weight(mlp.gate_proj), _weight(mlp.up_proj)),
        "down": _weight(mlp.down_proj),
    }
    if isinstance(mlp, CrossDomainMoE):
        matrices["router"] = _weight(mlp.router_gate)
    return matrices


def _vectors(
    layer: DogeDecoderLayer, rewritten: DogeDecoderLayer, model: StepModel
) -> Mapping[str, Float32]:
    attention, mlp = layer.self_attn, layer.mlp
    tensors: dict[str, Tensor | None] = {
        "input_norm": layer.input_layernorm.weight,
        "mlp_norm": layer.post_attention_layernorm.weight,
        "input_residual": layer.input_residual,
        "mlp_residual": layer.post_attention_residual,
    }
    if isinstance(mlp, CrossDomainMoE | SeedMoE):
        tensors |= {"expert_down": mlp.down_embed.weight, "expert_up": mlp.up_embed.weight}
    if isinstance(attention, DogeAttention):
        for name, norm in {"query_norm": attention.q_norm, "key_norm": attention.k_norm}.items():
            tensors[name] = norm.weight if isinstance(norm, RMSNorm) else None
        tensors["A"] = attention.A if attention.scored else None
    else:
        tensors["values"] = _value_rows(attention, rewritten.self_attn)
    if not model.score_heads:
        tensors["mask_bias"] = _mask_bias(rewritten.self_attn, model)
    return {name: _numbers(tensor) for name, tensor in tensors.items() if tensor is not None}


def _value_rows(attention: nn.Module, rewritten: nn.Module) -> Tensor:
    """The rows that tokens pick from, [N, H]; the one sum of rows where all pick the same."""
    assert isinstance(attention, InnerFunctionAttention)
    assert isinstance(rewritten, InnerFunctionAttention)
    if rewritten.value_scale is not None:
        return rewritten.value_scale[None]
    assert attention.v_embed is not None
    return attention.v_embed.weight


def _mask_bias(rewritten: nn.Module, model: StepModel) -> Tensor:
    assert isinstance(rewritten, DogeAttention | InnerFunctionAttention)
    assert rewritten.mask_bias is not None
    bias = torch.zeros(1, model.bias_heads, model.slots, 1)
    bias[:, :, : model.max_seq_len] = rewritten.mask_bias
    return bias


def _inner_values(network: DogeForCausalLM, max_seq_len: int) -> InnerValues | None:
    if not network.config.is_seed:
        return None
    rewritten, _ = rewrite_for_export(network, max_seq_len)
    attention = rewritten.model.layers[0].self_attn
    assert isinstance(attention, InnerFunctionAttention)
    assert attention.mask_bias is not None
    mask_heads = attention.mask_bias.shape[1]
    if attention.value_scale is not None:
        return InnerValues(heads=1, count=1, picks=1, mask_heads=mask_heads)
    return InnerValues(
        heads=network.config.num_inner_value_heads,
        count=network.config.num_inner_values,
        picks=network.config.num_value_per_head,
        mask_heads=mask_heads,
    )


def _packed(name: str, matrix: Float32, weight_format: WeightFormat) -> Iterator[tuple[str, Array]]:
    packed = pack_weights([matrix], weight_format)
    yield from matrix_arrays(name, packed.weights, packed.scales).items()


def _weight(projection: nn.Module) -> Float32:
    assert isinstance(projection, nn.Linear)
    return _numbers(projection.weight)


def _numbers(tensor: Tensor) -> Float32:
    array: Float32 = tensor.detach().to(torch.float32).cpu().numpy()
    return array
