"""PTX that an engine can hold: assembled, of the wanted version, with the wanted parameters."""

from __future__ import annotations

import re

import pytest

from export.aot_ptx import (
    assemble,
    compile_ptx,
    expected_parameters,
    parameters,
    ptx_version,
    strip_scratch,
)
from export.kernel_compiler import KernelCompileError
from plugins.aot_plugin import SHARED_LIMIT
from plugins.dynamic_mask_attention.aot import ATTEND_SHARES, JOIN_SHARES
from plugins.expert_gather.aot import GATHER_EXPERTS, ROUTE_EXPERTS, router_scratch
from plugins.value_gather.aot import GATHER_VALUES
from tests.kernel_gate import USES, narrow_loads, resources, wide_loads

TARGETS = ("sm80", "sm89", "sm90")
STREAMING = ("attend_shares_aot", "attend_prompt_aot", "gather_experts_aot")


def specs_of(use):
    """The kernels of a custom op's use, by the plugins that it becomes."""
    if use.op == "ValueGather":
        return GATHER_VALUES.make_kernels(use.attributes, use.shapes, use.dtypes)
    if use.op == "ExpertGather":
        top_k, (_, heads, keys) = int(use.attributes["top_k"]), use.shapes["scores_x"]
        picks = dict.fromkeys(("experts", "weights"), (-1, heads, top_k))
        types = {**use.dtypes, "experts": "int32", "weights": "float32"}
        routing = {**use.attributes, "scratch_size": router_scratch(top_k, keys)}
        return (
            *ROUTE_EXPERTS.make_kernels(routing, use.shapes, use.dtypes),
            *GATHER_EXPERTS.make_kernels(use.attributes, {**use.shapes, **picks}, types),
        )
    shares = {**use.attributes, "max_splits": 32, "one_score_row": int(use.shapes["score"][0] == 1)}
    return (
        *ATTEND_SHARES.make_kernels(shares, use.shapes, use.dtypes),
        *JOIN_SHARES.make_kernels({"max_splits": 32}, use.shapes, use.dtypes),
    )


SPECS = {spec.name: spec for use in USES.values() for spec in specs_of(use)}
FEW = [
    name
    for name in SPECS
    if re.search(r"fp16.*-d128-q6-kv3|join.*fp16|n64_k32_fp16|h512_.*_fp16$", name)
]


def check(codes):
    for name, code in codes.items():
        spec = SPECS[name]
        assert parameters(code.ptx, code.entry) == expected_parameters(spec.arguments), name
        assert len(re.findall(r"\.param ", code.ptx)) == len(spec.arguments), name
        assert f".reqntid {code.threads}\n" in code.ptx, name
        assert code.shared_bytes <= SHARED_LIMIT, name
        assert code.ptx.isascii(), name
        used = resources(assemble(code.ptx))
        # The assembler of CUDA 12.9 is not the one that tiles were tuned with.
        assert (used.stack, used.local) == (0, 0), f"{name} spills: {used}"
        if code.entry in STREAMING:
            assert wide_loads(code.ptx) >= 2, name
            assert narrow_loads(code.ptx) == 0, name


@pytest.mark.parametrize("target", TARGETS)
def test_ptx_of_the_wanted_version_assembles_with_no_hidden_parameters(target):
    codes = compile_ptx([SPECS[name] for name in FEW], target, processes=1)
    assert set(codes) == set(FEW)
    check(codes)
    for code in codes.values():
        assert re.search(r"^\.version 8\.0$", code.ptx, re.MULTILINE)
        assert re.search(rf"^\.target sm_{target[2:]}a?$", code.ptx, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm90", "sm120"])
def test_every_kernel_at_released_shapes_is_taken(target):
    check(compile_ptx(SPECS.values(), target, processes=1))


def test_version_is_as_old_as_the_gpu_allows():
    assert [ptx_version(target) for target in ("sm80", "sm89", "sm90", "sm120")] == [80, 80, 80, 88]


def test_target_that_is_none_is_refused():
    with pytest.raises(ValueError, match="a target looks like sm89, got 4090"):
        compile_ptx([], "4090")


PTX = """\
.version 8.0
.target sm_80
.address_size 64
.visible .entry copy(
\t.param .u64 .ptr .global .align 1 copy_param_0,
\t.param .u32 copy_param_1,
\t.param .u64 .ptr .global .align 1 copy_param_10,
\t.param .u64 .ptr .global .align 1 copy_param_2,
\t.param .u64 .ptr .global .align 1 copy_param_3
)
.reqntid 32
{
\t.reg .b64 %rd<2>;
\tld.param.b64 %rd1, [READ];
\tret;
}
"""


def test_only_the_last_two_parameters_are_stripped():
    stripped = strip_scratch(PTX.replace("READ", "copy_param_10"), "copy")
    assert parameters(stripped, "copy") == ["u64", "u32", "u64"]
    assert "copy_param_10\n)" in stripped
    assert assemble(stripped)


@pytest.mark.parametrize("read", ["copy_param_2", "copy_param_3", "copy_param_3+4"])
def test_kernel_that_reads_scratch_is_refused(read):
    with pytest.raises(KernelCompileError, match="reads Triton's scratch pointer copy_param_"):
        strip_scratch(PTX.replace("READ", read), "copy")


def test_ptx_that_is_too_new_does_not_assemble():
    with pytest.raises(KernelCompileError, match=r"Unsupported \.version 9\.4"):
        assemble(PTX.replace("READ", "copy_param_0").replace("8.0", "9.4"))
