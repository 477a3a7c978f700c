"""What compiled kernels show without a GPU: registers, spills, shared memory, loads, parameters."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from math import comb
from pathlib import Path

from plugins.projection.launches import Embedding, Head, Projection
from plugins.projection.packing import WeightFormat
from plugins.prompt_projection.launches import GatherRows, PromptProjection
from plugins.token_choice.launches import TokenChoice
from runtime.kernel_library import OpUse

# What a kernel may use of an SM's shared memory on the smallest target (sm86, sm89, sm120).
SHARED_LIMIT = 99 * 1024
PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the assembler gave a kernel; bytes but for `registers`."""

    registers: int
    stack: int
    local: int


def resources(cubin: bytes) -> Resources:
    """Read from a cubin by the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(registers=found["REG"], stack=found["STACK"], local=found["LOCAL"])


def parameters(ptx: str, entry: str) -> list[str]:
    """PTX types of an entry's parameters, in order."""
    head = ptx[ptx.index(f".entry {entry}(") :]
    head = head[: head.index("\n)")]
    return re.findall(r"\.param \.(\w+)", head)


def expected_parameters(arguments) -> list[str]:
    """What the launch manifest says they are, with Triton's two hidden pointers."""
    return [PTX_TYPES.get(kind, "u64") for kind in arguments.values()] + ["u64", "u64"]


def wide_loads(ptx: str) -> int:
    """Loads of 16 bytes from device memory, asynchronous copies included."""
    loads = re.findall(r"ld\.global[\w.:]*\.v4\.[bfus]32", ptx)
    copies = re.findall(r"cp\.async\S*global [^;]*, (?:0x10|16), ", ptx)
    return len(loads) + len(copies)


def narrow_loads(ptx: str) -> int:
    """Loads of one or two bytes: what a half-precision load becomes without an alignment hint."""
    return len(re.findall(r"ld\.global[\w.:]*\.[bfus](?:8|16)\b", ptx))


def attention_use(
    query_heads, kv_heads, width, *, score_heads=None, window=0, shared=False, dtype="float16"
):
    score_heads = kv_heads if score_heads is None else score_heads
    shapes = {
        "query": (-1, query_heads, -1, width),
        "key": (-1, kv_heads, 2048, width),
        "value": (-1, kv_heads, 2048, width),
        "score": (1 if shared else -1, score_heads, 2048, 1),
        "write_index": (-1,),
        "attention_output": (-1, -1, query_heads * width),
    }
    dtypes = dict.fromkeys(shapes, dtype) | {"score": "float32", "write_index": "int64"}
    attributes = {"scale": width**-0.5, "keep_window_size": window}
    return OpUse(
        op="DynamicMaskAttention", attributes=attributes, shapes=shapes, dtypes=dtypes, nodes=1
    )


def expert_use(hidden, num_keys, top_k, *, heads=1, inside=0, dtype="float16"):
    shapes = {
        "hidden": (-1, hidden),
        "scores_x": (-1, heads, num_keys),
        "scores_y": (-1, heads, num_keys),
        "down": (num_keys**2, hidden),
        "up": (num_keys**2, hidden),
        "expert_output": (-1, hidden),
    }
    attributes = {"top_k": top_k, "weight_inside": inside, "normalize": 0}
    return OpUse(
        op="ExpertGather",
        attributes=attributes,
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, dtype),
        nodes=1,
    )


def value_use(hidden, rows, top_k, *, heads=2, subset_sums=0, dtype="float16"):
    shapes = {
        "scores": (-1, heads, rows),
        "table": (comb(rows, top_k) if subset_sums else rows, hidden),
        "inner_values": (-1, hidden),
    }
    attributes = {"top_k": top_k, "subset_sums": subset_sums}
    return OpUse(
        op="ValueGather",
        attributes=attributes,
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, dtype),
        nodes=1,
    )


# Shapes of released models: model/released.py and docs/reference.md.
USES = {
    "doge-20m": attention_use(2, 1, 128),
    "doge-160m": attention_use(6, 3, 128),
    "doge-160m, bfloat16": attention_use(6, 3, 128, dtype="bfloat16"),
    "doge-160m, float32": attention_use(6, 3, 128, dtype="float32"),
    "doge-160m, window": attention_use(6, 3, 128, window=1024),
    "g4h": attention_use(8, 4, 64, score_heads=8, window=512),
    "doge-76m": attention_use(4, 4, 128, score_heads=1, shared=True),
    "doge-20m-moe, experts": expert_use(256, 32, 8),
    "doge-120m-moe, experts": expert_use(512, 64, 32),
    "doge-120m-moe, experts, bfloat16": expert_use(512, 64, 32, dtype="bfloat16"),
    "doge-120m-moe, experts, float32": expert_use(512, 64, 32, dtype="float32"),
    "doge-76m, experts": expert_use(512, 45, 4, heads=2, inside=1),
    "many experts": expert_use(1024, 128, 64),
    "no power of two": expert_use(768, 96, 48),
    "values": value_use(512, 4, 2),
    "values, sums": value_use(512, 6, 3, subset_sums=1),
}  # fmt: skip


def projection_specs():
    """Kernels of a decode step of our own at the shapes of doge-160m, in every weight format."""
    formats = [WeightFormat(kind=kind) for kind in ("float32", "float16", "bfloat16", "int8")]
    formats += [WeightFormat(kind="int4", group=group) for group in (64, 128)]
    for weights in formats:
        activation = weights.kind if weights.kind in {"float32", "bfloat16"} else "float16"
        kinds = {"weights": weights, "activation": activation}
        for batch in (1, 8):
            sized = kinds | {"batch": batch}
            yield Projection(
                rows=3072, columns=768, norm=True, epilogue="silu_product", **sized
            ).spec
            yield Projection(rows=768, columns=1536, epilogue="scaled_residual", **sized).spec
            yield Head(vocab_size=32768, columns=768, embedding=weights, **sized).spec
        yield Embedding(columns=768, **kinds).spec


def prompt_specs():
    """Kernels of many tokens, each weight format with one of doge-160m's matrices."""
    gate_up = {"rows": 3072, "columns": 768, "norm": True, "epilogue": "silu_product"}
    down = {"rows": 768, "columns": 1536, "epilogue": "scaled_residual", "addend": True}
    head = {"rows": 32768, "columns": 768, "norm": True}
    for sizes, kind, group, dot in (
        (gate_up, "float16", 0, None),
        (gate_up, "int4", 128, "bfloat16"),
        (head, "bfloat16", 0, None),
        (down, "int8", 0, "bfloat16"),
        (down, "float32", 0, None),
    ):
        weights = WeightFormat(kind=kind, group=group)
        yield from PromptProjection(weights=weights, input="float32", dot=dot, **sizes).specs
    yield GatherRows(columns=768).spec


def ending_specs():
    """Kernels that end a step of our own: the largest logit's token, or one drawn by rules."""
    kinds = {"activation": "float32", "batch": 8, "columns": 768}
    int4 = WeightFormat(kind="int4", group=64)
    yield Head(vocab_size=32768, weights=int4, embedding=int4, advance=True, **kinds).spec
    yield TokenChoice(vocab_size=32768, embedding=int4, **kinds).spec
    yield TokenChoice(
        vocab_size=128256, embedding=WeightFormat(kind="float16"), bias="rows", history=True,
        stop_ids=8, **kinds,
    ).spec  # fmt: skip
