"""The persistent kernel compiled for named GPUs, at released shapes; nothing runs it."""

from __future__ import annotations

import dataclasses
import re

import pytest
from cuda.bindings import nvrtc

from export.cuda_compiler import compile_cuda_kernels, is_cuda_source
from export.kernel_build import describe
from export.kernel_compiler import KernelCompileError
from model.released import released_shape
from runtime.backends.base import BackendUnavailableError
from runtime.kernel_library import kernel_source, source_sha256
from runtime.kernel_step.formats import StepFormats
from runtime.kernel_step.persistent import PersistentDecode
from runtime.kernel_step.step_model import StepModel
from tests.kernel_gate import resources, wide_loads

# A multiprocessor's registers, of which a block of this many threads may have all.
REGISTERS = 65536
SHARED_LIMIT = 48 * 1024


def decode_of(name, precision):
    shape = released_shape(name)
    model = StepModel.make(shape.config, shape.generation, 2048)
    return PersistentDecode(model, StepFormats.of(precision))


def check_code(name, precision, target):
    spec = decode_of(name, precision).kernel.spec
    (kernel,) = compile_cuda_kernels([spec], [target], "3.9.0")
    used = resources(kernel.cubin)
    assert (used.stack, used.local) == (0, 0), "registers are spilled"
    assert used.registers * 32 * spec.num_warps <= REGISTERS, "a block does not fit"
    shared = int(re.search(r"\.shared [^\n]*\[(\d+)\]", kernel.ptx)[1])
    assert shared <= SHARED_LIMIT
    body = kernel.ptx
    # Weights by loads of 16 bytes that leave the first cache alone, and no others of theirs.
    assert len(re.findall(r"ld\.global\.nc\.L1::no_allocate\.v4\.u32", body)) >= 10
    assert wide_loads(body) >= 12
    assert not re.search(r"ld\.global\.nc\.[us](8|16)", body)
    assert body.count("atom.add.release.gpu.global.u32") == 6
    assert body.count("ld.acquire.gpu.global.u32") >= 6
    assert "prefetch.global.L2" in body
    # What other blocks write does not come from a block's own cache.
    assert re.search(r"ld\.global\.cg\.f32", body)
    return kernel


def test_it_fills_a_multiprocessor_and_spills_nothing():
    kernel = check_code("doge-20m", "fp16", "sm89")
    entry = describe(kernel)
    assert (entry.entry, entry.threads, entry.shared_bytes) == ("persistent_step", 384, 0)
    assert entry.grid == ("processors", "1", "1")
    assert entry.toolkit == "13.0"
    assert entry.is_of(kernel.spec)
    assert b"plugins" not in kernel.cubin, "where the source lies"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "target"),
    [
        ("doge-60m", "fp16", "sm120"),
        ("doge-60m", "int8", "sm80"),
        ("doge-20m", "int4", "sm90"),
        ("doge-60m", "bf16", "sm86"),
    ],
)
def test_other_precisions_and_gpus_spill_nothing_either(name, precision, target):
    check_code(name, precision, target)


def test_bytes_depend_on_nothing_but_source_and_constants():
    spec = decode_of("doge-20m", "fp16").kernel.barrier_spec
    first, second, other = (
        compile_cuda_kernels([each], ["sm89"], "3.9.0")[0]
        for each in (
            spec,
            spec,
            dataclasses.replace(spec, constants={**spec.constants, "THREADS": 64}),
        )
    )
    assert first.sha256 == second.sha256 != other.sha256
    assert len(first.cubin) < 10_000, "nothing but barriers"


def test_what_does_not_compile_is_named_with_the_reason():
    spec = decode_of("doge-20m", "fp16").kernel.spec
    wrong = dataclasses.replace(spec, constants={**spec.constants, "HIDDEN": 252})
    with pytest.raises(KernelCompileError, match=r"for sm89: .*16 bytes must not reach into"):
        compile_cuda_kernels([wrong], ["sm89"], "3.9.0")
    with pytest.raises(KernelCompileError, match=r"for sm12: NVRTC_ERROR_INVALID_OPTION"):
        compile_cuda_kernels([spec], ["sm12"], "3.9.0")


def test_a_specification_of_other_parameters_is_refused():
    spec = decode_of("doge-20m", "fp16").kernel.barrier_spec
    wrong = dataclasses.replace(spec, arguments={"count": "i32", "barrier": "*i32"})
    with pytest.raises(KernelCompileError, match=r"takes \['u64', 'u32', .* says \['u32', 'u64'"):
        compile_cuda_kernels([wrong], ["sm89"], "3.9.0")


def test_without_nvrtc_the_package_is_named(monkeypatch):
    def missing():
        raise RuntimeError("DynamicLibNotFoundError")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    spec = decode_of("doge-20m", "fp16").kernel.spec
    with pytest.raises(BackendUnavailableError, match=r"NVRTC.*pip install '.*\[persistent\]'"):
        compile_cuda_kernels([spec], ["sm89"], "3.9.0")
    assert compile_cuda_kernels([], ["sm89"], "3.9.0") == []


def test_the_source_is_hashed_and_found_within_its_package():
    function = decode_of("doge-20m", "fp16").kernel.spec.function
    path = function.partition(":")[0]
    assert kernel_source(path).name == "persistent_step.cu"
    assert source_sha256(function) == source_sha256(f"{path}:another")
    assert source_sha256(function) != source_sha256("plugins.projection.kernel:project")
    with pytest.raises(ValueError, match=r"no source of the kernels in plugins/.*/other\.cu"):
        kernel_source("plugins/persistent_step/other.cu")


def test_kernels_of_triton_are_left_to_it():
    kernel = decode_of("doge-20m", "fp16").kernel
    assert is_cuda_source(kernel.spec)
    triton = dataclasses.replace(kernel.spec, function="plugins.projection.kernel:project")
    assert not is_cuda_source(triton)
