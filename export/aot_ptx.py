"""Kernels as PTX that an engine can hold: the right version, no hidden parameters, assembled once.

TensorRT hands the PTX to the driver where the engine runs, with exactly the arguments of
`AotPlugin`. Triton adds two pointers to its own scratch memory, which these kernels have none of;
left in, every launch would be two arguments short.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from export.kernel_compiler import CompiledKernel, KernelCompileError, compile_kernels
from plugins.aot_plugin import SHARED_LIMIT, AotCode
from plugins.kernel_spec import KernelSpec

_PTX_TYPES = {"i32": "u32"}  # all others are pointers, u64


def ptx_version(target: str) -> int:
    """The PTX version for a GPU, 80 for 8.0: old enough for any driver that TensorRT 11 runs on.

    8.0 came with CUDA 12.0. GPUs from sm100 on need a later one; 8.8 came with CUDA 12.9.
    """
    return 80 if int(target.removeprefix("sm")) < 100 else 88


def compile_ptx(
    specs: Iterable[KernelSpec], target: str, *, processes: int | None = None
) -> dict[str, AotCode]:
    """Compile the kernels of plugins for one GPU; none need be present.

    Args:
        specs: what plugins' `make_kernels` give.
        target: architecture such as `sm90`.
        processes: how many work at once; default one for each CPU that may be used.

    Returns:
        The code by kernel name, ready for TensorRT.

    Raises:
        BackendUnavailableError: Triton is not installed.
        KernelCompileError: a kernel does not compile, needs more shared memory than `SHARED_LIMIT`,
            has other parameters than TensorRT passes, or does not assemble.
        ValueError: a target that is no architecture.
    """
    version = ptx_version(target) if re.fullmatch(r"sm\d{2,3}", target) else None
    by_name = {spec.name: spec for spec in specs}
    compiled = compile_kernels(by_name.values(), [target], processes=processes, ptx_version=version)
    large = [kernel.spec for kernel in compiled if kernel.shared_bytes > SHARED_LIMIT]
    if large:
        # Without a pipeline a tile of keys and values lies in shared memory once, not twice.
        compiled = [kernel for kernel in compiled if kernel.spec not in large] + compile_kernels(
            [replace(spec, num_stages=1) for spec in large],
            [target],
            processes=processes,
            ptx_version=version,
        )
    return {kernel.spec.name: _checked_code(kernel) for kernel in compiled}


def strip_scratch(ptx: str, entry: str) -> str:
    """Take the two scratch pointers, the last parameters, from the entry.

    Raises:
        KernelCompileError: the kernel reads them.
    """
    *_, first, second = _parameters(ptx, entry)
    for name, _ in (first, second):
        if re.search(rf"\b{name}\b", ptx.replace(_declaration(ptx, name), "", 1)):
            raise KernelCompileError(f"{entry} reads Triton's scratch pointer {name}")
    for name, _ in (first, second):
        ptx = ptx.replace(_declaration(ptx, name), "", 1)
    return ptx


def parameters(ptx: str, entry: str) -> list[str]:
    """PTX types of the entry's parameters, in order."""
    return [kind for _, kind in _parameters(ptx, entry)]


def expected_parameters(arguments: Mapping[str, str]) -> list[str]:
    """PTX types of a kernel's arguments, as `KernelSpec` gives them."""
    return [_PTX_TYPES.get(kind, "u64") for kind in arguments.values()]


def assemble(ptx: str) -> bytes:
    """The cubin that the assembler of CUDA 12.9 makes of PTX, for the GPU that it names.

    This assembler comes with Triton. What it takes, drivers from CUDA 12.9 on take, too.

    Raises:
        KernelCompileError: it does not assemble.
    """
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise KernelCompileError("triton, whose assembler checks PTX, is not installed")
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if target is None:
        raise KernelCompileError("the PTX names no target")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="ascii")
        command: Sequence[str] = [str(tool), f"-arch={target[1]}", str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise KernelCompileError(f"ptxas for {target[1]}: {result.stderr.strip()}")
        return cubin.read_bytes()


def _checked_code(kernel: CompiledKernel) -> AotCode:
    spec = kernel.spec
    where = f"{spec.name} for {kernel.target}"
    if kernel.shared_bytes > SHARED_LIMIT:
        raise KernelCompileError(
            f"{where} needs {kernel.shared_bytes} bytes of shared memory, expected at most "
            f"{SHARED_LIMIT}"
        )
    ptx = strip_scratch(kernel.ptx, kernel.entry)
    expected = expected_parameters(spec.arguments)
    if (found := parameters(ptx, kernel.entry)) != expected:
        raise KernelCompileError(f"{where} takes {found}, TensorRT passes {expected}")
    try:
        assemble(ptx)
    except KernelCompileError as error:
        raise KernelCompileError(f"{where}: {error}") from error
    return AotCode(
        entry=kernel.entry,
        ptx=ptx,
        threads=32 * spec.num_warps,
        shared_bytes=kernel.shared_bytes,
    )


def _parameters(ptx: str, entry: str) -> list[tuple[str, str]]:
    """Name and PTX type of each parameter."""
    head = ptx[ptx.index(f".entry {entry}(") :]
    head = head[: head.index("\n)")]
    return [
        (name, kind)
        for kind, name in re.findall(r"^\s*\.param \.(\w+)[^\n]*?(\w+),?$", head, re.MULTILINE)
    ]


def _declaration(ptx: str, name: str) -> str:
    """The text that declares a parameter, with the comma before it."""
    found = re.search(rf",\n\s*\.param [^\n]*?\b{name}(?=,?\n)", ptx)
    if found is None:
        raise KernelCompileError(f"the PTX declares no parameter {name}")
    return found[0]
