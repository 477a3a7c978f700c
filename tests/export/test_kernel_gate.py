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


# Kernels of ops by their use, and those of a step of ours.
SPECS = {label: kernels_of([use]) for label, use in USES.items()} | {
    "prompt": tuple(prompt_specs()),
    "ending": tuple(ending_specs()),
}


@pytest.fixture(scope="module")
def compiled():
    """Each kernel for every target, by name; the compiler's processes start once for all."""
    specs = {spec.name: spec for group in SPECS.values() for spec in group}
    kernels = {name: [] for name in specs}
    for kernel in compile_kernels(specs.values(), TARGETS):
        kernels[kernel.spec.name].append(kernel)
    return kernels


@pytest.mark.parametrize("label", SPECS)
def test_kernels_fit_a_gpu_and_read_wide(compiled, label):
    for spec in SPECS[label]:
        assert {kernel.target for kernel in compiled[spec.name]} == set(TARGETS)
        for kernel in compiled[spec.name]:
            check_code(kernel)


def test_kernels_of_projections_fit_a_gpu_and_read_wide():
    for kernel in compile_kernels(projection_specs(), ("sm89", "sm90")):
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
