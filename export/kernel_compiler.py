"""Compiles kernels ahead of time with Triton: a cubin for each GPU, with no GPU present.

Triton's settings are read from the environment when it is imported, and a process in which its
interpreter is on cannot compile: `compile_kernels` therefore works in processes of its own.
"""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from plugins.kernel_spec import KernelSpec
from runtime.backends.base import BackendUnavailableError
from runtime.cpu_threads import usable_cpus

_SETTINGS = {
    "TRITON_DISABLE_LINE_INFO": "1",  # no source path in the cubin, hence the same bytes anywhere
    "TRITON_DEFAULT_FP_FUSION": "1",
}


# What a user's environment may hold that changes the code; none of it reaches the compiler.
_FOREIGN_SETTINGS = ("TRITON_", "PTXAS_", "DISABLE_PTXAS", "LLVM_", "MLIR_", "NVPTX_")


_PLACES = ("TRITON_HOME", "TRITON_CACHE_DIR")


class KernelCompileError(Exception):
    """A kernel does not compile; the message says which, and Triton's reason."""


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """A kernel for one GPU.

    Attributes:
        spec: what was compiled.
        target: GPU architecture, `sm89`.
        cubin: machine code.
        ptx: the assembly it was made from.
        entry: name of the function in both.
        shared_bytes: dynamic shared memory of a block.
        triton_version: what compiled it.
    """

    spec: KernelSpec
    target: str
    cubin: bytes = field(repr=False)
    ptx: str = field(repr=False)
    entry: str
    shared_bytes: int
    triton_version: str

    @property
    def sha256(self) -> str:
        """Hash of the cubin."""
        return hashlib.sha256(self.cubin).hexdigest()


def compile_kernels(
    specs: Iterable[KernelSpec],
    targets: Sequence[str],
    *,
    processes: int | None = None,
    ptx_version: int | None = None,
) -> list[CompiledKernel]:
    """Compile every variant for every GPU.

    Args:
        specs: the variants.
        targets: architectures such as `sm89`.
        processes: how many work at once; default one for each CPU that may be used.
        ptx_version: of the PTX, 80 for 8.0; default the newest that Triton's assembler takes,
            which is of no concern where only the cubin is used.

    Returns:
        Target by target in the order given, variants in theirs. The bytes depend on Triton's
        version alone.

    Raises:
        BackendUnavailableError: Triton is not installed.
        KernelCompileError: the first variant that does not compile.
        ValueError: a target that is no architecture.
    """
    if unreadable := [target for target in targets if not re.fullmatch(r"sm\d{2,3}", target)]:
        raise ValueError(f"a target looks like sm89, got {', '.join(unreadable)}")
    specs = list(specs)
    jobs = [(spec, target, ptx_version) for target in targets for spec in specs]
    workers = min(processes or usable_cpus(), max(len(jobs), 1))
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, initializer=_prepare_process) as pool:
            return list(pool.map(_compile, jobs))
    except BrokenProcessPool as error:
        raise KernelCompileError(
            f"a compiler's process died for {', '.join(targets)}: Triton does not know such a "
            "target, or memory ran out"
        ) from error


def _prepare_process() -> None:
    for name in list(os.environ):
        if name.startswith(_FOREIGN_SETTINGS) and name not in _PLACES:
            del os.environ[name]
    os.environ.update(_SETTINGS)


def _compile(job: tuple[KernelSpec, str, int | None]) -> CompiledKernel:
    spec, target, ptx_version = job
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"{error.name} is not installed; run: pip install 'doge-tensorrt[kernels]'"
        ) from error
    module, _, name = spec.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    _check_parameters(spec, function.arg_names)
    source = ASTSource(
        fn=function,
        signature={name: spec.arguments.get(name, "constexpr") for name in function.arg_names},
        constexprs=dict(spec.constants),
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(function.arg_names)
            if spec.arguments.get(name, "").startswith("*") or name in spec.divisible
        },
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if ptx_version is not None:
        options["ptx_version"] = ptx_version
    gpu = GPUTarget("cuda", int(target.removeprefix("sm")), 32)
    try:
        compiled = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # whatever Triton's passes and ptxas raise, which do not pickle
        raise KernelCompileError(
            f"{spec.name} for {target}: {type(error).__name__}: {error}"
        ) from None
    _check_scratch(spec, compiled.metadata)
    return CompiledKernel(
        spec=spec,
        target=target,
        cubin=compiled.asm["cubin"],
        ptx=compiled.asm["ptx"],
        entry=compiled.metadata.name,
        shared_bytes=compiled.metadata.shared,
        triton_version=triton.__version__,
    )


def _check_parameters(spec: KernelSpec, names: Sequence[str]) -> None:
    """A parameter must be an argument or a constant, and arguments stand in the kernel's order."""
    runtime = [name for name in names if name not in spec.constants]
    if runtime != list(spec.arguments):
        raise KernelCompileError(
            f"{spec.name}: the kernel takes {runtime}, its specification says "
            f"{list(spec.arguments)}"
        )


def _check_scratch(spec: KernelSpec, metadata: Any) -> None:
    """Launchers pass null for Triton's own scratch pointers."""
    needed = metadata.global_scratch_size + metadata.profile_scratch_size
    if needed:
        raise KernelCompileError(f"{spec.name} needs {needed} bytes of Triton's own scratch memory")
