"""What ONNX Runtime is given on a CPU: every lowering it needs, in order.

The result is no longer standard ONNX: it holds operators that ONNX Runtime alone has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir as ir

from export.lowerings.expert_rows import gather_expert_rows
from export.lowerings.graph_editor import GraphEditor
from export.lowerings.grouped_query_attention import CacheScales, use_grouped_query_attention
from export.lowerings.mask_scores import compose_mask_scores
from export.lowerings.narrow_weights import Bits, narrow_weights
from export.lowerings.projections import pack_projections, store_weights_transposed
from export.lowerings.residual_norms import fuse_residual_norms
from export.lowerings.silu import fuse_silu
from model.config import DogeConfig

CpuPrecision = Literal["fp32", "int8", "int4"]
CPU_PRECISIONS: tuple[CpuPrecision, ...] = get_args(CpuPrecision)
CPU_BITS: dict[CpuPrecision, Bits] = {"int8": 8, "int4": 4}
# Longer prompts are fed in pieces, so that no bias of a whole prompt by a whole context is made.
CHUNK_LENGTH = 512


# Operators that look rows up, and which of their inputs they do that in.
_TABLES = {
    ("Gather", 0),
    ("GatherBlockQuantized", 0),
    ("GatherBlockQuantized", 2),
    ("RotaryEmbedding", 1),
    ("RotaryEmbedding", 2),
    ("GroupQueryAttention", 7),
    ("GroupQueryAttention", 8),
}


@dataclass(frozen=True, kw_only=True)
class CpuModel:
    """What a runtime must know of a lowered model.

    Attributes:
        score_heads: N, mask scores cached with each key; None where none is.
        read_bytes_per_token: bytes of weights that a step of one token reads.
        cache_dtype: of cached keys and values.
    """

    score_heads: int | None
    read_bytes_per_token: int
    cache_dtype: str = "float32"

    def as_details(self) -> dict[str, Any]:
        """The details of its variant in a manifest."""
        return {
            "cache_dtype": self.cache_dtype,
            "score_dtype": "float32",
            "score_heads": self.score_heads,
            "rows_alone": True,
            "chunk_length": CHUNK_LENGTH,
            "read_bytes_per_token": self.read_bytes_per_token,
        }


def lower_for_cpu(
    canonical: Path,
    path: Path,
    config: DogeConfig,
    *,
    slots: int,
    precision: CpuPrecision = "fp32",
    cache_scales: Sequence[CacheScales] | None = None,
    weights_of: Path | None = None,
) -> CpuModel:
    """Write the lowered model `path` and, beside it, its weights as external data.

    Args:
        canonical: the canonical model.
        path: the `.onnx` file to write.
        config: the architecture.
        slots: C, the cache slots of the canonical model.
        precision: of the weights; activations are float32, or int8 within products with narrow
            weights.
        cache_scales: one per layer caches keys and values as int8; None as float32.
        weights_of: a lowered model in the same folder and precision, whose weights this one reads
            instead of writing its own.

    Raises:
        ValueError: a graph that is not canonical, or sizes that narrow weights cannot have.
    """
    model = ir.load(canonical)
    editor = GraphEditor(model)
    store_weights_transposed(editor)
    selects = slots > config.keep_window_size
    heads = compose_mask_scores(editor, config.num_attention_heads, per_query_head=not selects)
    pack_projections(editor)
    use_grouped_query_attention(editor, cache_scales)
    gather_expert_rows(editor)
    fuse_silu(editor)
    fuse_residual_norms(editor)
    if precision in CPU_BITS:
        editor.finish()
        narrow_weights(editor, CPU_BITS[precision])
    editor.finish()
    used = {node.op_identifier() for node in model.graph}
    for name in [name for name in model.functions if name not in used]:
        del model.functions[name]
    if weights_of is None:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:
        _share_weights(model.graph, ir.load(weights_of).graph)
        ir.save(model, path)
    return CpuModel(
        score_heads=heads or None,
        read_bytes_per_token=_read_bytes_per_token(model.graph, config),
        cache_dtype="float32" if cache_scales is None else "int8",
    )


def _share_weights(graph: ir.Graph, other: ir.Graph) -> None:
    """Let the tensors of `graph` be those that `other` has under their names."""
    for name, value in graph.initializers.items():
        stored = other.initializers[name].const_value if name in other.initializers else None
        if stored is None or value.const_value is None:
            continue
        if (stored.dtype, stored.shape) != (value.const_value.dtype, value.const_value.shape):
            raise ValueError(
                f"{name} is {value.const_value.dtype} {value.const_value.shape} here and "
                f"{stored.dtype} {stored.shape} there; expected models of one checkpoint and "
                "precision"
            )
        value.const_value = stored


def _read_bytes_per_token(graph: ir.Graph, config: DogeConfig) -> int:
    """Bytes of stored tensors that a step of one token reads; of tables, the rows it looks up."""
    total = 0
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        uses = [(use.node, use.idx) for use in value.uses()]
        if all((node.op_type, place) in _TABLES for node, place in uses):
            rows = max(_rows_read(node, config) for node, _ in uses)
            total += tensor.nbytes // tensor.numpy().shape[0] * rows
        else:
            total += tensor.nbytes
    return total


def _rows_read(node: ir.Node, config: DogeConfig) -> int:
    indices = node.inputs[1]
    if node.op_type.startswith("Gather") and indices is not None and not indices.is_graph_input():
        if config.is_seed:
            return config.num_cdmmoe_heads * config.num_cdmmoe_experts_per_head
        return config.num_experts_per_tok
    return 1
