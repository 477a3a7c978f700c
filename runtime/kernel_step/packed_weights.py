"""The file of packed weights: which tensors a step reads, of which types and shapes.

docs/kernel_step.md lists them. One safetensors file per precision; numbers of bfloat16 lie there as
their bits, uint16, because numpy has no such type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from plugins.projection.packing import WeightFormat
from runtime.backends.base import BackendUnavailableError
from runtime.kernel_step.formats import StepFormats
from runtime.kernel_step.step_model import StepModel

Array = npt.NDArray[Any]
# Kernels load 16 bytes at once; a boundary of 256 suits the copies to the device too.
ALIGNMENT = 256
_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
    "int4": np.dtype(np.uint8),
}
_SCALES: dict[str, np.dtype[Any]] = {"int8": np.dtype(np.float32), "int4": np.dtype(np.float16)}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class MatrixShape:
    """One packed matrix.

    Attributes:
        rows: its outputs.
        columns: its inputs.
        format: how it is stored.
    """

    rows: int
    columns: int
    format: WeightFormat


def global_matrices(model: StepModel, formats: StepFormats) -> dict[str, MatrixShape]:
    """The matrices of no layer."""
    table = MatrixShape(rows=model.vocab_size, columns=model.hidden, format=formats.table)
    return {"embedding": table} if model.tied else {"embedding": table, "head": table}


def layer_matrices(model: StepModel, formats: StepFormats) -> dict[str, MatrixShape]:
    """The matrices of one layer, by the part of the name behind `layers.{i}.`."""
    H, attended = model.hidden, model.query_heads * model.head_size

    def wide(rows: int, columns: int) -> MatrixShape:
        return MatrixShape(rows=rows, columns=columns, format=formats.projection(columns))

    def small(rows: int) -> MatrixShape:
        return MatrixShape(rows=rows, columns=H, format=formats.small)

    matrices = {
        "qkv": wide(model.projected, H),
        "o": wide(H, attended),
        "gate_up": wide(model.gated_rows, H),
        "down": wide(H, model.inner),
    }
    if model.score_heads:
        matrices["score"] = small(model.score_heads)
    if model.inner_values is not None and model.inner_values.score_rows:
        matrices["value_score"] = small(model.inner_values.score_rows)
    if model.experts is not None:
        matrices["router"] = small(model.experts.router_rows)
    return matrices


def layer_vectors(model: StepModel, formats: StepFormats) -> dict[str, StoredTensor]:
    """What else a layer has: norms, residual scales, expert tables, the seed's values and mask."""
    float32 = _STORED["float32"]
    H, D = model.hidden, model.head_size
    vectors = {name: StoredTensor(dtype=float32, shape=(H,)) for name in ("input_norm", "mlp_norm")}
    if not model.is_seed:
        for name in ("input_residual", "mlp_residual"):
            vectors[name] = StoredTensor(dtype=float32, shape=(H,))
    if model.qk_norm:
        for name in ("query_norm", "key_norm"):
            vectors[name] = StoredTensor(dtype=float32, shape=(D,))
    if model.score_heads:
        vectors["A"] = StoredTensor(dtype=float32, shape=(model.score_heads,))
    if model.experts is not None:
        table = StoredTensor(dtype=_STORED[formats.float_kind], shape=(model.experts.count, H))
        vectors |= {"expert_down": table, "expert_up": table}
    if model.inner_values is not None:
        inner = model.inner_values
        vectors["values"] = StoredTensor(dtype=float32, shape=(inner.count, H))
    if not model.score_heads:
        shape = (1, model.bias_heads, model.slots, 1)
        vectors["mask_bias"] = StoredTensor(dtype=float32, shape=shape)
    return vectors


def stored_tensors(model: StepModel, formats: StepFormats) -> dict[str, StoredTensor]:
    """Every tensor of the file, by name."""
    float32 = _STORED["float32"]
    rotary = StoredTensor(dtype=float32, shape=(model.slots, model.head_size // 2))
    tensors = {
        "cos": rotary,
        "sin": rotary,
        "norm": StoredTensor(dtype=float32, shape=(model.hidden,)),
    }
    for name, matrix in global_matrices(model, formats).items():
        tensors |= _matrix_tensors(name, matrix)
    for layer in range(model.layers):
        prefix = f"layers.{layer}."
        for name, matrix in layer_matrices(model, formats).items():
            tensors |= _matrix_tensors(prefix + name, matrix)
        for name, tensor in layer_vectors(model, formats).items():
            tensors[prefix + name] = tensor
    return tensors


def read_bytes_per_token(model: StepModel, formats: StepFormats) -> int:
    """Bytes of weights that one decode step of one sequence reads; of tables, the rows it needs."""
    total = 0
    for name, tensor in stored_tensors(model, formats).items():
        part = name.rpartition(".")[2]
        one_row = name.startswith("embedding") and not model.tied
        if one_row or part in ("cos", "sin"):
            total += tensor.bytes // tensor.shape[0]
        elif part in ("expert_down", "expert_up") and model.experts is not None:
            picks = model.experts.heads * model.experts.top_k
            total += tensor.bytes // tensor.shape[0] * picks
        elif part == "mask_bias":
            continue  # as much of it as of the cache, which is counted with that
        else:
            total += tensor.bytes
    return total


class PackedWeights:
    """An open file of packed weights.

    Attributes:
        path: the file.
        tensors: what it holds.
        offsets: where each tensor begins in the device's copy.
        size: bytes of the device's copy.
    """

    def __init__(self, path: Path, model: StepModel, formats: StepFormats) -> None:
        """Check that the file holds what the step reads; its numbers are read by `arrays`.

        Raises:
            BackendUnavailableError: safetensors is not installed.
            ValueError: no safetensors file, or tensors that are missing, unknown, or of another
                type or shape.
        """
        self.path = path
        self.tensors = stored_tensors(model, formats)
        self.offsets: dict[str, int] = {}
        end = 0
        for name, tensor in self.tensors.items():
            self.offsets[name] = end
            end += -(-tensor.bytes // ALIGNMENT) * ALIGNMENT
        self.size = end
        self._check()

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """Each tensor, one in memory at a time."""
        from safetensors import safe_open

        with safe_open(self.path, framework="numpy") as file:
            for name in self.tensors:
                yield name, file.get_tensor(name)

    def _check(self) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ModuleNotFoundError as error:
            raise BackendUnavailableError(
                "safetensors is not installed; run: pip install 'doge-tensorrt[cuda]'"
            ) from error
        try:
            with safe_open(self.path, framework="numpy") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                found = {
                    name: (part.get_dtype(), tuple(part.get_shape()))
                    for name, part in slices.items()
                }
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path} cannot be read as packed weights: {error}") from error
        expected = {
            name: (_SAFETENSORS[tensor.dtype.name], tensor.shape)
            for name, tensor in self.tensors.items()
        }
        if found != expected:
            names = sorted(
                name
                for name in found.keys() | expected.keys()
                if found.get(name) != expected.get(name)
            )
            first = names[0]
            raise ValueError(
                f"{self.path} does not hold what this version reads: {len(names)} tensors differ, "
                f"the first is {first}: found {found.get(first, 'none')}, expected "
                f"{expected.get(first, 'none')}; build it again"
            )


_SAFETENSORS = {
    "float32": "F32", "float16": "F16", "uint16": "U16", "int8": "I8", "uint8": "U8",
}  # fmt: skip


def matrix_arrays(name: str, weights: Array, scales: Array | None) -> Mapping[str, Array]:
    """A packed matrix's arrays by the names of the file."""
    arrays = {f"{name}.weights": weights}
    if scales is not None:
        arrays[f"{name}.scales"] = scales
    return arrays


def _matrix_tensors(name: str, matrix: MatrixShape) -> dict[str, StoredTensor]:
    kind = matrix.format.kind
    weights, scales = matrix.format.shapes(matrix.rows, matrix.columns)
    tensors = {f"{name}.weights": StoredTensor(dtype=_STORED[kind], shape=weights)}
    if scales is not None:
        tensors[f"{name}.scales"] = StoredTensor(dtype=_SCALES[kind], shape=scales)
    return tensors
