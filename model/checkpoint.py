"""A checkpoint folder to a module, with every tensor accounted for. safetensors only, no code."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.config import DogeConfig, UnsupportedModelError, read_config_json
from model.doge import DogeForCausalLM
from model.generations import GENERATIONS, Generation, detect_generation
from model.generations.g3 import tensors_coincide
from model.weight_files import (
    INDEX_NAME,
    PICKLE_SUFFIXES,
    WEIGHTS_NAME,
    listed,
    pickle_reason,
    read_index,
)

logger = logging.getLogger(__name__)

# What a published checkpoint calls the tied head when it stores it all the same.
_HEAD = "lm_head.weight"
_FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, kw_only=True)
class CheckpointHeader:
    """What the headers of a checkpoint's weight files say, before any tensor is read.

    Attributes:
        files: the weight files, in order.
        shapes: shape of each tensor, by published name.
        dtypes: safetensors dtype of each tensor.
        location: file that holds each tensor.
    """

    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    location: Mapping[str, Path]


def load_checkpoint(
    path: Path, dtype: torch.dtype = torch.float32, router_mode: str | None = None
) -> DogeForCausalLM:
    """Load the checkpoint in folder `path` into the network of its generation.

    Args:
        path: folder with config.json and safetensors.
        dtype: dtype of the network's parameters.
        router_mode: overrides the config's router mode.

    Returns:
        The network in eval mode, without gradients.

    Raises:
        FileNotFoundError: no folder, no config.json, no safetensors.
        UnsupportedModelError: an unreadable file, an unknown generation, or a tensor that is
            missing, unexpected, misshapen, of an unsupported dtype, or that should change nothing
            and does.
    """
    config, generation, header = inspect_checkpoint(path, router_mode)
    with torch.device("meta"):
        network = DogeForCausalLM(config, generation)
    network.to_empty(device="cpu")
    network.to(dtype)
    network.reset_rotary()
    parameters = network.published_parameters()
    with torch.no_grad():
        for file in header.files:
            with _open(file) as tensors:
                for name in tensors.offset_keys():
                    tensor = tensors.get_tensor(name)
                    if name in parameters:
                        parameters[name].copy_(tensor)
                    else:
                        _check_inert(generation, name, tensor)
    return network.requires_grad_(False).eval()


def inspect_checkpoint(
    path: Path, router_mode: str | None = None
) -> tuple[DogeConfig, Generation, CheckpointHeader]:
    """Read config and headers and check every name and shape, without loading a tensor.

    Raises:
        FileNotFoundError: no folder, no config.json, no safetensors.
        UnsupportedModelError: as `load_checkpoint`.
    """
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"checkpoint {path} {kind}; expected a folder with config.json")
    config_json = read_config_json(path)
    header = read_header(path)
    generation = detect_generation(header.shapes, config_json, GENERATIONS)
    _mention_twin(generation, header)
    config = _read_config(generation, config_json)
    if router_mode is not None:
        config = config.with_router_mode(router_mode)
    _check_tensors(generation, header, config)
    return config, generation, header


def _mention_twin(generation: Generation, header: CheckpointHeader) -> None:
    """Say so where config.json alone decided between G2 and G3, whose arithmetic differs."""
    if generation.name in {"g2", "g3"} and tensors_coincide(header.shapes):
        found = "has" if generation.name == "g3" else "has no"
        logger.warning(
            "the tensors fit g2 and g3; read as %s because config.json %s dynamic_mask_ratio",
            generation.name,
            found,
        )


def _read_config(generation: Generation, config_json: Mapping[str, Any]) -> DogeConfig:
    try:
        return generation.read_config(config_json)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{error} (the tensors are those of {generation.name}, {generation.title})"
        ) from error


def read_header(path: Path) -> CheckpointHeader:
    """Names, shapes and dtypes of all tensors in the checkpoint folder `path`.

    Raises:
        FileNotFoundError: no safetensors file, or a shard that the index names is missing.
        UnsupportedModelError: a file or the index cannot be read, a tensor stands twice, or the
            index and the shards say different things.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    location: dict[str, Path] = {}
    files, index = _weight_files(path)
    for file in files:
        with _open(file) as tensors:
            for name in tensors.offset_keys():
                if name in location:
                    raise UnsupportedModelError(
                        f"tensor {name} stands in {location[name].name} and in {file.name}"
                    )
                tensor = tensors.get_slice(name)
                shapes[name] = tuple(tensor.get_shape())
                dtypes[name] = str(tensor.get_dtype())
                location[name] = file
    _check_index(path, index, location)
    return CheckpointHeader(files=files, shapes=shapes, dtypes=dtypes, location=location)


def _check_index(path: Path, index: Mapping[str, str], location: Mapping[str, Path]) -> None:
    """Every tensor that the index names must be where it says; what it leaves out is loaded too."""
    wrong = [
        f"{name} in {shard}" + (f" (it is in {location[name].name})" if name in location else "")
        for name, shard in sorted(index.items())
        if location.get(name) != path / shard
    ]
    if wrong:
        raise UnsupportedModelError(
            f"{path / INDEX_NAME} looks for {listed(wrong)}; index and shards do not belong "
            "together, download them again"
        )


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    """Open a safetensors file (untyped handle); its errors get the file's name and what to do."""
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except SafetensorError as error:
        raise UnsupportedModelError(
            f"{file} is not a whole safetensors file ({file.stat().st_size} bytes): {error}; "
            "copy or download it again"
        ) from error


def _weight_files(path: Path) -> tuple[tuple[Path, ...], Mapping[str, str]]:
    """The weight files and, where there are shards, which of them holds each tensor."""
    single, index = path / WEIGHTS_NAME, path / INDEX_NAME
    if single.is_file():
        return (single,), {}
    if not index.is_file():
        pickles = sorted(p.name for p in path.glob("*") if p.suffix in PICKLE_SUFFIXES)
        hint = f"; it has {pickle_reason(pickles)}" if pickles else ""
        raise FileNotFoundError(f"{path} has no {WEIGHTS_NAME} and no {INDEX_NAME}{hint}")
    weight_map = read_index(index, str(index))
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} lacks the shard {name} that {INDEX_NAME} names")
    unnamed = sorted(p.name for p in path.glob("*.safetensors") if p.name not in names)
    if unnamed:
        logger.warning("%s does not name %s, which is left out", index.name, listed(unnamed))
    return tuple(path / name for name in names), weight_map


def _check_inert(generation: Generation, name: str, tensor: torch.Tensor) -> None:
    """A stored tensor that the network leaves out must be one that changes nothing."""
    bound = generation.inert_bound(name)
    least = tensor.min().item()
    if bound is not None and not least >= bound:
        raise UnsupportedModelError(
            f"{name} goes down to {least:g}; generation {generation.name} is supported where it is "
            f"{bound:g} or more, as its published checkpoints have it, so that the mask hides no "
            "key (docs/reference.md)"
        )


def _check_tensors(generation: Generation, header: CheckpointHeader, config: DogeConfig) -> None:
    """Compare the checkpoint's tensors with those its config calls for; list every problem."""
    if config.num_hidden_layers > len(header.shapes):
        raise UnsupportedModelError(
            f"config.json has num_hidden_layers {config.num_hidden_layers}, the checkpoint "
            f"{len(header.shapes)} tensors in all"
        )
    expected = generation.tensor_shapes(config)
    problems = [
        f"missing {name} {list(shape)}"
        for name, shape in expected.items()
        if name not in header.shapes
    ]
    unexpected = sorted(set(header.shapes) - set(expected))
    problems += [f"unexpected {name} {list(header.shapes[name])}" for name in unexpected]
    problems += [
        f"{name} has shape {list(header.shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in header.shapes and header.shapes[name] != shape
    ]
    problems += [
        f"{name} has dtype {dtype}, expected one of {', '.join(_FLOAT_DTYPES)}"
        for name, dtype in header.dtypes.items()
        if dtype not in _FLOAT_DTYPES
    ]
    if not problems:
        return
    shown = "; ".join(problems[:12])
    more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
    hints = "".join(f" ({hint})" for hint in _hints(header, config, unexpected))
    raise UnsupportedModelError(
        f"the tensors of generation {generation.name} ({generation.title}) do not fit config.json: "
        f"{shown}{more}{hints}"
    )


def _hints(
    header: CheckpointHeader, config: DogeConfig, unexpected: Sequence[str]
) -> Iterator[str]:
    """What often explains tensors that do not fit."""
    if config.tie_word_embeddings and _HEAD in unexpected:
        yield "config.json has tie_word_embeddings true, yet the head is stored"
    mask = header.shapes.get("model.layers.0.attn.dynamic_mask")
    if mask is not None and len(mask) == 2 and mask[1] != config.max_position_embeddings:
        yield (
            f"the dynamic mask covers {mask[1]} keys and by config.json the context is "
            f"{config.max_position_embeddings}; the mask's width is the longest context, so "
            f"max_position_embeddings, and the original length of scaled rope if there is one, "
            f"must be {mask[1]}"
        )
    scores = header.shapes.get("model.layers.0.self_attn.A")
    if scores == (config.num_attention_heads,) != (config.num_key_value_heads,):
        norms = "model.layers.0.self_attn.q_norm.weight" in header.shapes
        if norms:
            yield (
                "one score per query head belongs to g3 and g4h, norms of queries and keys to g4; "
                "the two cannot be turned into each other"
            )
