"""Kernels of a decode step of our own, at released shapes, compile for every target."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from export.build_kernels import TARGETS
from export.kernel_compiler import CompiledKernel, compile_kernels
from plugins.dynamic_mask_attention.step_launches import (
    StepAppend,
    make_step_attention,
    make_step_attention_spec,
)
from plugins.expert_down.launches import ExpertDown
from plugins.kernel_spec import KernelSpec
from plugins.projection.launches import Projection
from plugins.projection.packing import WeightFormat
from plugins.value_gather.step_launches import SeedValues
from tests.kernel_gate import (
    SHARED_LIMIT,
    expected_parameters,
    narrow_loads,
    parameters,
    resources,
    wide_loads,
)

pytestmark = pytest.mark.slow

FLOAT16, FLOAT32, INT8 = (WeightFormat(kind=kind) for kind in ("float16", "float32", "int8"))
INT4 = WeightFormat(kind="int4", group=64)
STREAMING = ("attend_decode", "attend_prompt", "project", "expert_down")


def attention_specs() -> Iterator[KernelSpec]:
    for query, key, score, dtype, window in (
        (2, 1, 1, "float16", 1024),
        (8, 4, 4, "float16", 0),
        (6, 3, 6, "bfloat16", 0),
        (4, 4, 1, "float32", 0),
    ):
        heads = {"query_heads": query, "key_heads": key, "score_heads": score, "head_size": 128}
        types = {"dtype": dtype, "score_dtype": "float32"}
        seed = query == key
        options = {
            "row_dtype": "float32", "qk_norm": score == key, "rotate_query": True,
            "rotate_key": not seed, "computes_score": not seed,
        }  # fmt: skip
        yield make_step_attention_spec(**heads, **types, **options, output_dtype="float32")
        yield StepAppend(**heads, **types, **options).spec
        attention = make_step_attention(
            **heads, **types, output_dtype="float32", scale=0.1, keep_window_size=window
        )
        yield from attention.specs


def projection_specs() -> Iterator[KernelSpec]:
    for weights, batch in ((FLOAT16, 1), (FLOAT16, 8), (INT8, 8), (INT4, 1)):
        kinds = {"weights": weights, "activation": "float32", "norm": True, "batch": batch}
        yield Projection(
            rows=1536, columns=768, output_stride=1539, extra_rows=3, extra_offset=1536,
            extra_stride=1539, **kinds,
        ).spec  # fmt: skip
        yield Projection(
            rows=2048, columns=512, epilogue="silu_product", extra_rows=128, **kinds
        ).spec


def expert_specs() -> Iterator[KernelSpec]:
    for hidden, inner, num_keys, top_k, heads, weights, tables, batch in (
        (256, 512, 32, 16, 1, FLOAT16, FLOAT16, 1),
        (512, 1024, 64, 32, 1, FLOAT32, FLOAT32, 1),
        (512, 1024, 64, 32, 1, INT4, FLOAT16, 8),
        (768, 1536, 96, 48, 1, FLOAT16, FLOAT16, 1),
        (1024, 2048, 128, 64, 1, FLOAT16, INT8, 8),
        (512, 2048, 45, 4, 2, INT8, FLOAT16, 1),
        (768, 3072, 55, 6, 3, FLOAT16, FLOAT16, 8),
    ):
        yield ExpertDown(
            hidden=hidden, inner=inner, weights=weights, activation="float32", tables=tables,
            num_keys=num_keys, top_k=top_k, heads=heads, weight_inside=heads > 1, batch=batch,
        ).spec  # fmt: skip


def value_specs() -> Iterator[KernelSpec]:
    for columns, heads, values, picks, table in (
        (256, 1, 2, 1, "float32"),
        (512, 2, 4, 2, "float16"),
        (768, 3, 6, 3, "float32"),
    ):
        yield SeedValues(
            columns=columns, heads=heads, values=values, picks=picks, table=table,
            output_offset=2 * columns, output_stride=3 * columns,
        ).spec  # fmt: skip


PARTS = {
    make.__name__: {spec.name: spec for spec in make()}
    for make in (attention_specs, projection_specs, expert_specs, value_specs)
}


@pytest.fixture(scope="module")
def compiled() -> list[CompiledKernel]:
    """The kernels of all parts; the compiler's processes start once for all."""
    specs = {name: spec for part in PARTS.values() for name, spec in part.items()}
    return compile_kernels(specs.values(), TARGETS)


@pytest.mark.parametrize("part", PARTS)
def test_kernels_of_a_step_fit_a_gpu_and_read_wide(
    compiled: list[CompiledKernel], part: str
) -> None:
    kernels = [kernel for kernel in compiled if kernel.spec.name in PARTS[part]]
    assert len(kernels) == len(PARTS[part]) * len(TARGETS)
    for kernel in kernels:
        where = f"{kernel.spec.name} for {kernel.target}"
        used = resources(kernel.cubin)
        assert (used.stack, used.local) == (0, 0), f"{where} spills: {used}"
        assert used.registers * 32 * kernel.spec.num_warps <= 65536, f"{where}: {used}"
        assert kernel.shared_bytes <= SHARED_LIMIT, where
        found = parameters(kernel.ptx, kernel.entry)
        assert found == expected_parameters(kernel.spec.arguments), where
        assert b"/kernel.py" not in kernel.cubin, f"{where} holds a source path"
        if kernel.spec.function.rpartition(":")[2] in STREAMING:
            assert wide_loads(kernel.ptx) >= 2, where
            # Each group of 4-bit weights has a scale of two bytes, read by itself.
            assert "int4" in kernel.spec.name or narrow_loads(kernel.ptx) == 0, where
