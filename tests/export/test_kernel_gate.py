"""Every kernel at the released shapes compiles for every target as it should.

Numbers alone would not show a spill, a narrow load or a parameter in the wrong place.
"""

from __future__ import annotations

import pytest

from export.build_kernels import TARGETS
from export.kernel_build import kernels_of
from export.kernel_compiler import compile_kernels
from tests.kernel_gate import (
    SHARED_LIMIT,
    USES,
    ending_specs,
    expected_parameters,
    narrow_loads,
    parameters,
    projection_specs,
    prompt_specs,
    resources,
    wide_loads,
)

# Kernels that read keys, values, expert rows or weights.
STREAMING = (
    "attend_decode",
    "attend_prompt",
    "gather_experts",
    "project",
    "project_prompt",
    "head",
)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled():
    """Every kernel of every use for every target, by use."""
    specs = {spec.name: spec for use in USES.values() for spec in kernels_of([use])}
    kernels = compile_kernels(specs.values(), TARGETS)
    return {
        label: [k for k in kernels if k.spec.name in {s.name for s in kernels_of([use])}]
        for label, use in USES.items()
    }


@pytest.mark.parametrize("label", USES)
def test_kernels_of_ops_fit_a_gpu_and_read_wide(compiled, label):
    assert {kernel.target for kernel in compiled[label]} == set(TARGETS)
    for kernel in compiled[label]:
        check_code(kernel)


def test_kernels_of_projections_fit_a_gpu_and_read_wide():
    for kernel in compile_kernels(projection_specs(), ("sm89", "sm90")):
        check_code(kernel)


@pytest.mark.parametrize("specs", [prompt_specs, ending_specs])
def test_kernels_of_a_step_of_ours_fit_a_gpu_and_read_wide(specs):
    for kernel in compile_kernels(specs(), TARGETS):
        check_code(kernel)


def check_code(kernel):
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
