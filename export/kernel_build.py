"""Which kernels a model needs, and compiling them into a bundle's `kernels/`."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from export.bundle_writer import BundleWriter
from export.cuda_compiler import compile_cuda_kernels, is_cuda_source
from export.kernel_compiler import CompiledKernel, compile_kernels
from plugins.custom_op import DOMAIN, CustomOp
from plugins.kernel_spec import KernelSpec
from plugins.registry import OPS
from runtime.bundle import Bundle
from runtime.kernel_library import (
    KERNEL_FOLDER,
    KERNEL_MANIFEST,
    KernelEntry,
    KernelLibrary,
    OpUse,
    source_sha256,
)
from runtime.kernel_step.variant import BACKEND as CUDA_BACKEND
from runtime.kernel_step.variant import LAYER_PLUGIN, kernels_of_variant, layers_of_variant
from runtime.tensorrt_module import PRODUCTS

logger = logging.getLogger(__name__)

_OPS = {op.name: op for op in OPS}


def op_uses(canonical: Path, dtype: str) -> tuple[OpUse, ...]:
    """How a model uses the custom ops, in one number format.

    Args:
        canonical: the canonical model; weights are not read.
        dtype: numpy's name of what its floats become.

    Raises:
        ValueError: a node without the shapes that kernels are made for.
    """
    counted: dict[str, tuple[OpUse, int]] = {}
    for node, op in op_nodes(ir.load(canonical)):
        try:
            use = OpUse(
                op=op.name,
                attributes=node_attributes(node, op),
                shapes=_shapes(node, op),
                dtypes=_dtypes(op, dtype),
                nodes=1,
            )
        except ValueError as error:
            raise ValueError(f"{op.name} ({node.name}): {error}") from error
        counted[use.key] = (use, counted.get(use.key, (use, 0))[1] + 1)
    return tuple(replace(use, nodes=count) for use, count in counted.values())


def kernels_of(uses: Iterable[OpUse]) -> tuple[KernelSpec, ...]:
    """Every kernel variant that these uses can launch, by name.

    Raises:
        ValueError: a use that no kernel covers.
    """
    specs: dict[str, KernelSpec] = {}
    for use in uses:
        try:
            specs |= {spec.name: spec for spec in use.make_kernels().specs}
        except ValueError as error:
            raise ValueError(f"{use.op}: {error}") from error
    return tuple(specs[name] for name in sorted(specs))


def op_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, CustomOp]]:
    """The nodes of the main graph that are custom ops."""
    for node in model.graph:
        if node.domain == DOMAIN:
            yield node, _OPS[node.op_type]


def node_attributes(node: ir.Node, op: CustomOp) -> dict[str, int | float]:
    """The op's attributes on a node."""
    return {
        name: node.attributes[name].as_int() if kind == "INT" else node.attributes[name].as_float()
        for name, kind in op.attributes.items()
    }


def _values(node: ir.Node, op: CustomOp) -> Iterator[tuple[str, ir.Value]]:
    names = (*op.inputs, *op.outputs)
    for name, value in zip(names, (*node.inputs, *node.outputs), strict=True):
        if value is None:
            raise ValueError(f"input {name} is missing")
        yield name, value


def _shapes(node: ir.Node, op: CustomOp) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, value in _values(node, op):
        if value.shape is None:
            raise ValueError(f"{name} has no shape in the model")
        shapes[name] = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return shapes


def _dtypes(op: CustomOp, dtype: str) -> dict[str, str]:
    return {
        name: "int64"
        if name in op.integer_inputs
        else "float32"
        if name in op.exact_inputs
        else dtype
        for name in (*op.inputs, *op.outputs)
    }


def write_kernels(
    uses: Sequence[OpUse],
    targets: Sequence[str],
    writer: BundleWriter,
    previous: Bundle | None,
    *,
    step_specs: Sequence[KernelSpec] = (),
) -> KernelLibrary:
    """Compile what a model launches and add it to a bundle, with the launch manifest.

    Args:
        uses: what the model does with the custom ops, in the number formats that are wanted.
        targets: architectures such as `sm89`.
        writer: the bundle.
        previous: an earlier bundle of the same model, whose kernels are kept where they are of
            another name or target; where another Triton compiled them, they are compiled anew.
        step_specs: kernels of steps of our own (backend `cuda`) that are wanted.

    Returns:
        The library of what the bundle holds now.

    Raises:
        BackendUnavailableError: Triton, or NVRTC where it is needed, is not installed.
        KernelCompileError: a kernel does not compile.
        ValueError: a use that no kernel covers, or kernels in `previous` that were altered.
    """
    kept = _kernels_in(previous)
    every_use = {use.key: use for use in uses}
    wanted = {spec.name: spec for spec in step_specs}
    kept_steps = {spec.name: spec for spec in specs_of_steps(previous)}
    if kept is not None:
        every_use |= {use.key: use for use in kept.uses}
        if kept.triton_version != _triton_version():
            logger.warning(
                "the bundle's kernels were compiled by Triton %s: all are compiled anew",
                kept.triton_version,
            )
            uses = tuple(every_use.values())
            targets = tuple(dict.fromkeys([*targets, *kept.targets]))
            wanted = kept_steps | wanted
            kept = None
    wanted |= {spec.name: spec for spec in kernels_of(uses)}
    every = [wanted[name] for name in sorted(wanted)]
    compiled = compile_kernels([spec for spec in every if not is_cuda_source(spec)], targets)
    compiled += compile_cuda_kernels(
        [spec for spec in every if is_cuda_source(spec)], targets, compiled[0].triton_version
    )
    entries = {(kernel.target, kernel.spec.name): describe(kernel) for kernel in compiled}
    cubins = {describe(kernel).file: kernel.cubin for kernel in compiled}
    if kept is not None:
        current = kept_steps | {spec.name: spec for spec in kernels_of(every_use.values())}
        for entry in kept.entries:
            spec = current.get(entry.name)
            if spec is not None and entry.is_of(spec):
                cubins.setdefault(entry.file, (kept.folder / entry.file).read_bytes())
                entries.setdefault((entry.target, entry.name), entry)
    for file in () if previous is None else previous.manifest.files:
        if file.role == "kernels":
            writer.path_for(file.path)  # lets go of it, if it was adopted
    library = KernelLibrary(
        folder=writer.folder / KERNEL_FOLDER,
        triton_version=compiled[0].triton_version,
        uses=tuple(every_use[key] for key in sorted(every_use)),
        entries=tuple(entries[key] for key in sorted(entries)),
    )
    for name, cubin in cubins.items():
        _write(writer, f"{KERNEL_FOLDER}/{name}", cubin)
    _write(writer, KERNEL_MANIFEST, library.to_json().encode())
    return library


def specs_of_steps(bundle: Bundle | None) -> tuple[KernelSpec, ...]:
    """The kernels of every model of a bundle whose layers are nothing but our kernels."""
    if bundle is None:
        return ()
    specs = {
        spec.name: spec
        for variant in bundle.variants(CUDA_BACKEND)
        for spec in kernels_of_variant(bundle, variant).specs
    }
    for backend in PRODUCTS:
        for variant in bundle.variants(backend):
            if variant.details.get("plugin") == LAYER_PLUGIN:
                work = layers_of_variant(bundle, variant)
                specs |= {spec.name: spec for spec in work.specs}
    return tuple(specs[name] for name in sorted(specs))


def _write(writer: BundleWriter, relative: str, content: bytes) -> None:
    writer.path_for(relative).write_bytes(content)
    writer.add_file("kernels", relative)


def describe(kernel: CompiledKernel) -> KernelEntry:
    """The launch manifest's entry of a compiled kernel."""
    spec = kernel.spec
    return KernelEntry(
        name=spec.name,
        target=kernel.target,
        file=f"{spec.name}.{kernel.target}.cubin",
        sha256=kernel.sha256,
        entry=kernel.entry,
        threads=32 * spec.num_warps,
        shared_bytes=kernel.shared_bytes,
        arguments=tuple(spec.arguments.items()),
        constants=dict(spec.constants),
        grid=spec.grid,
        toolkit=toolkit_of(kernel.ptx),
        source_sha256=source_sha256(spec.function),
    )


def toolkit_of(ptx: str) -> str:
    """The CUDA toolkit that an assembler of this PTX belongs to.

    PTX 8.8 came with CUDA 12.9 and 9.0 with 13.0, counting on one by one.

    Raises:
        ValueError: no version, or one of a CUDA that is not known here.
    """
    found = re.search(r"^\.version (\d+)\.(\d+)", ptx, re.MULTILINE)
    major, minor = (int(found[1]), int(found[2])) if found else (0, 0)
    if major == 9:
        return f"13.{minor}"
    if major == 8 and minor <= 8:
        return f"12.{minor + 1 if minor == 8 else minor}"
    raise ValueError(f"PTX version {major}.{minor} belongs to no CUDA toolkit known here")


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels_in(bundle: Bundle | None) -> KernelLibrary | None:
    if bundle is None or not any(file.role == "kernels" for file in bundle.manifest.files):
        return None
    return bundle.kernel_library()
