"""Compiles CUDA C++ kernels ahead of time with NVRTC: a cubin for each GPU, with no GPU present."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Sequence
from typing import Any

from export.kernel_compiler import CompiledKernel, KernelCompileError
from plugins.kernel_spec import KernelSpec
from runtime.backends.base import BackendUnavailableError
from runtime.kernel_library import kernel_source

_INSTALL = "run: pip install 'doge-tensorrt[persistent]'"
# A block's shared memory is all in the code; launches ask for none beside it.
_DYNAMIC_SHARED_BYTES = 0


def is_cuda_source(spec: KernelSpec) -> bool:
    """Whether a kernel is written in CUDA C++."""
    return spec.function.partition(":")[0].endswith(".cu")


def compile_cuda_kernels(
    specs: Iterable[KernelSpec], targets: Sequence[str], triton_version: str
) -> list[CompiledKernel]:
    """Compile every variant for every GPU.

    Args:
        specs: variants whose source is CUDA C++; their constants are its macros.
        targets: architectures such as `sm89`.
        triton_version: of the kernels that they lie beside.

    Returns:
        Target by target in the order given, variants in theirs. The bytes depend on NVRTC's version
        alone.

    Raises:
        BackendUnavailableError: NVRTC is not installed.
        KernelCompileError: the first variant that does not compile, with NVRTC's log.
    """
    jobs = [(spec, target) for target in targets for spec in specs]
    if not jobs:
        return []
    nvrtc = _load_nvrtc()
    return [_compile(nvrtc, spec, target, triton_version) for spec, target in jobs]


def _load_nvrtc() -> Any:
    """The module `cuda.bindings.nvrtc`, whose library is there."""
    if importlib.util.find_spec("cuda") is None:
        raise BackendUnavailableError(f"cuda-python is not installed; {_INSTALL}")
    from cuda.bindings import nvrtc

    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # the bindings' own error when there is no library to open
        raise BackendUnavailableError(
            f"NVRTC, CUDA's compiler as a library, is not installed; {_INSTALL}"
        ) from error
    return nvrtc


def _compile(nvrtc: Any, spec: KernelSpec, target: str, triton_version: str) -> CompiledKernel:
    path, _, entry = spec.function.partition(":")
    source = kernel_source(path).read_bytes()
    # Without a folder: where the project lies is not in the code.
    name = path.rpartition("/")[2].encode()
    program = _call(nvrtc, "nvrtcCreateProgram", source, name, 0, [], [])
    try:
        options = [
            f"--gpu-architecture={target.replace('sm', 'sm_', 1)}".encode(),
            b"--std=c++17",
            b"--no-source-include",
            *(f"-D{name}={value}".encode() for name, value in spec.constants.items()),
        ]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _text(nvrtc, program, "ProgramLog").decode(errors="replace").strip("\0\n ")
            raise KernelCompileError(f"{spec.name} for {target}: {status.name}: {log}")
        cubin = _text(nvrtc, program, "CUBIN")
        ptx = _text(nvrtc, program, "PTX").decode().strip("\0")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    _check_parameters(spec, ptx, entry)
    return CompiledKernel(
        spec=spec,
        target=target,
        cubin=cubin,
        ptx=ptx,
        entry=entry,
        shared_bytes=_DYNAMIC_SHARED_BYTES,
        triton_version=triton_version,
    )


def _check_parameters(spec: KernelSpec, ptx: str, entry: str) -> None:
    """The parameters must be the specification's, and a launcher's two hidden pointers."""
    head = ptx[ptx.index(f".entry {entry}(") :]
    found = re.findall(r"\.param \.(\w+)", head[: head.index(")")])
    kinds = {"i32": "u32", "fp32": "f32"}
    wanted = [kinds.get(kind, "u64") for kind in spec.arguments.values()] + ["u64", "u64"]
    if found != wanted:
        raise KernelCompileError(
            f"{spec.name}: the kernel takes {found}, its specification says {wanted}"
        )


def _text(nvrtc: Any, program: Any, what: str) -> bytes:
    size: int = _call(nvrtc, f"nvrtcGet{what}Size", program)
    content = b" " * size  # which the bindings write into
    _call(nvrtc, f"nvrtcGet{what}", program, content)
    return content


def _call(nvrtc: Any, function: str, *arguments: Any) -> Any:
    status, *values = getattr(nvrtc, function)(*arguments)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelCompileError(f"{function} failed with {status.name}")
    return values[0] if values else None
