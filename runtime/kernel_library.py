"""The compiled kernels of a bundle: their launch manifest, and which of them a GPU can run."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

from plugins.kernel_spec import KernelSpec, OpKernels
from plugins.launcher import CudaLauncher, Device, KernelBinary, current_device, open_driver
from plugins.registry import OPS
from runtime.backends.base import BackendUnavailableError
from runtime.strict_json import Kinds, parse_json, read_list, read_object

KERNEL_FOLDER = "kernels"
KERNEL_MANIFEST = f"{KERNEL_FOLDER}/kernels.json"
LAUNCH_FORMAT = 1
# From this architecture on, code runs on the GPU it was assembled for and on no later one.
_EXACT_FROM = (9, 0)
_PRECISIONS = {"fp16": "float16", "bf16": "bfloat16"}
_BUILD_HINT = "build them with: python export/build_kernels.py BUNDLE --target"


@dataclass(frozen=True, kw_only=True)
class KernelEntry:
    """One kernel for one GPU architecture, as the launch manifest describes it.

    Attributes:
        name: of the variant, unique for a target.
        target: architecture, `sm89`.
        file: the cubin's name, beside the manifest.
        sha256: its hash.
        entry: of the function in it.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        arguments: pairs of name and type, in order; two null pointers follow them.
        constants: what the code was specialized for.
        grid: `KernelSpec.grid`.
        toolkit: CUDA version of the assembler, `12.9`; a driver must be of that major version.
        source_sha256: hash of the kernel's source (`source_sha256`).
    """

    name: str
    target: str
    file: str
    sha256: str
    entry: str
    threads: int
    shared_bytes: int
    arguments: tuple[tuple[str, str], ...]
    constants: dict[str, Any]
    grid: tuple[str, str, str]
    toolkit: str
    source_sha256: str

    @property
    def compute_capability(self) -> tuple[int, int]:
        """(8, 9) for `sm89`."""
        number = int(self.target.removeprefix("sm"))
        return number // 10, number % 10

    def is_of(self, spec: KernelSpec) -> bool:
        """Whether it was made from this specification and the source that is here."""
        return (
            list(self.arguments) == list(spec.arguments.items())
            and self.constants == dict(spec.constants)
            and self.grid == spec.grid
            and self.threads == 32 * spec.num_warps
            and self.source_sha256 == source_sha256(spec.function)
        )

    def runs_on(self, device: Device) -> bool:
        """Whether the code runs there.

        Up to sm89 that is a GPU of the same major architecture that is no older; from sm90 on
        Triton assembles for `sm_90a`, `sm_120a`, ..., which are for that very GPU.
        """
        own, gpu = self.compute_capability, device.compute_capability
        if own >= _EXACT_FROM:
            return own == gpu
        return own[0] == gpu[0] and own[1] <= gpu[1]


@cache
def source_sha256(function: str) -> str:
    """Hash of the file that `module:function` stands in and of those of ours that it imports.

    Triton is not imported.

    Raises:
        ValueError: there is no such file.
    """
    module = function.partition(":")[0]
    if module.endswith(".cu"):  # CUDA C++, which takes nothing from other files
        return hashlib.sha256(kernel_source(module).read_bytes()).hexdigest()
    sources = {module: _source_file(module)}
    waiting = [module]
    while waiting:
        for imported in _imported_from(sources[waiting.pop()], module.partition(".")[0]):
            if imported not in sources:
                sources[imported] = _source_file(imported)
                waiting.append(imported)
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(hashlib.sha256(sources[name].read_bytes()).digest())
    return digest.hexdigest()


def kernel_source(path: str) -> Path:
    """Where the CUDA C++ of a kernel lies, of `path/file.cu` within a package.

    Raises:
        ValueError: there is no such file.
    """
    folder, _, name = path.rpartition("/")
    file = _source_file(folder.replace("/", ".")).with_name(name)
    if not file.is_file():
        raise ValueError(f"there is no source of the kernels in {path}")
    return file


def _source_file(module: str) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ValueError(f"there is no source of the kernels in {module}")
    return Path(found.origin)


def _imported_from(source: Path, package: str) -> list[str]:
    """Modules of a package that a file takes names from (`from package.module import name`)."""
    tree = ast.parse(source.read_bytes())
    taken = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [name for name in taken if name is not None and name.partition(".")[0] == package]


@dataclass(frozen=True, kw_only=True)
class OpUse:
    """How a model uses a custom op, so that its kernels can be run without the model.

    Attributes:
        op: ONNX name of the op.
        attributes: of the node.
        shapes: dimensions by name of an input or output, -1 for what varies.
        dtypes: numpy's names, by the same names.
        nodes: how many nodes of the model are alike.
    """

    op: str
    attributes: dict[str, int | float]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    nodes: int

    @property
    def key(self) -> str:
        """Equal for equal uses, in whatever order their parts stand; of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    def make_kernels(self) -> OpKernels:
        """The kernels of these nodes.

        Raises:
            ValueError: an unknown op, or one that no kernel covers.
        """
        ops = {op.name: op for op in OPS}
        if self.op not in ops:
            raise ValueError(f"no custom op is called {self.op}; there are {', '.join(ops)}")
        return ops[self.op].make_kernels(self.attributes, self.shapes, self.dtypes)


_ENTRY_KINDS: Kinds = {
    "name": (str,),
    "target": (str,),
    "file": (str,),
    "sha256": (str,),
    "entry": (str,),
    "threads": (int,),
    "shared_bytes": (int,),
    "arguments": (list,),
    "constants": (dict,),
    "grid": (list,),
    "toolkit": (str,),
    "source_sha256": (str,),
}
_USE_KINDS: Kinds = {
    "op": (str,),
    "attributes": (dict,),
    "shapes": (dict,),
    "dtypes": (dict,),
    "nodes": (int,),
}
_MANIFEST_KINDS: Kinds = {
    "format": (int,),
    "triton": (str,),
    "uses": (list,),
    "kernels": (list,),
}


@dataclass(frozen=True, kw_only=True)
class KernelLibrary:
    """The kernels of a bundle.

    Attributes:
        folder: where the cubins lie.
        triton_version: what compiled them.
        uses: what the model does with the kernels, in every number format that was asked for.
        entries: every kernel for every target.
    """

    folder: Path = field(repr=False)
    triton_version: str
    uses: tuple[OpUse, ...]
    entries: tuple[KernelEntry, ...]

    @classmethod
    def open(cls, bundle_folder: Path) -> Self:
        """Read the launch manifest of a bundle; cubins are read when they are loaded.

        Raises:
            BackendUnavailableError: the bundle has no kernels.
            ValueError: a manifest that is broken or of another format.
        """
        file = bundle_folder / KERNEL_MANIFEST
        if not file.is_file():
            raise BackendUnavailableError(
                f"bundle {bundle_folder} has no kernels; {_BUILD_HINT} sm89"
            )
        return cls.from_dict(parse_json(file.read_text(encoding="utf-8")), file.parent)

    @classmethod
    def from_dict(cls, data: Any, folder: Path) -> Self:
        """Read what `as_dict` gives.

        Raises:
            ValueError: another format, or every problem at once.
        """
        if isinstance(data, dict) and data.get("format") != LAUNCH_FORMAT:
            raise ValueError(
                f"the launch manifest in {folder} has format {data.get('format')!r}, this version "
                f"of the project reads {LAUNCH_FORMAT}; {_BUILD_HINT} sm89"
            )
        problems: list[str] = []
        values = read_object(data, "", _MANIFEST_KINDS, problems)
        read = read_list(values.get("kernels", []), "kernels", _ENTRY_KINDS, problems)
        uses = read_list(values.get("uses", []), "uses", _USE_KINDS, problems)
        if not problems:
            problems += [problem for entry in read for problem in _entry_problems(entry)]
        if problems:
            raise ValueError(f"the launch manifest in {folder} is broken: {'; '.join(problems)}")
        entries = tuple(
            KernelEntry(
                **entry
                | {
                    "arguments": tuple((name, kind) for name, kind in entry["arguments"]),
                    "grid": tuple(entry["grid"]),
                }
            )
            for entry in read
        )
        return cls(
            folder=folder,
            triton_version=values["triton"],
            uses=tuple(
                OpUse(
                    **use
                    | {"shapes": {name: tuple(shape) for name, shape in use["shapes"].items()}}
                )
                for use in uses
            ),
            entries=entries,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "format": LAUNCH_FORMAT,
            "triton": self.triton_version,
            "uses": [asdict(use) for use in self.uses],
            "kernels": [asdict(entry) for entry in self.entries],
        }

    def to_json(self) -> str:
        """The text of the launch manifest: equal libraries give equal text."""
        return json.dumps(self.as_dict(), indent=1, sort_keys=True) + "\n"

    @property
    def targets(self) -> tuple[str, ...]:
        """The architectures that there is code for."""
        return tuple(sorted({entry.target for entry in self.entries}))

    @property
    def names(self) -> frozenset[str]:
        """Every variant, of whatever target."""
        return frozenset(entry.name for entry in self.entries)

    def require(self, specs: Iterable[KernelSpec]) -> None:
        """Make sure that each variant is there and was made from the same specification.

        Raises:
            ValueError: lists what is missing or differs.
        """
        by_name: dict[str, list[KernelEntry]] = {}
        for entry in self.entries:
            by_name.setdefault(entry.name, []).append(entry)
        problems = []
        for spec in specs:
            found = by_name.get(spec.name)
            if not found:
                problems.append(f"{spec.name} is missing")
            elif any(not entry.is_of(spec) for entry in found):
                problems.append(f"{spec.name} was made by another version of the project")
        if problems:
            raise ValueError(
                f"the kernels in {self.folder} do not serve this model: {'; '.join(problems)}; "
                f"{_BUILD_HINT} {','.join(self.targets) or 'sm89'}"
            )

    def best_for(
        self, device: Device, names: frozenset[str] | None = None
    ) -> tuple[KernelEntry, ...]:
        """The best code of each variant for a GPU, by name.

        Args:
            device: the GPU.
            names: the variants that are wanted; all of them if None.

        Raises:
            BackendUnavailableError: no code for this GPU, or a driver that is too old for it.
        """
        best: dict[str, KernelEntry] = {}
        for entry in sorted(self.entries, key=lambda entry: entry.compute_capability):
            if entry.runs_on(device):
                best[entry.name] = entry
        wanted = self.names if names is None else names
        major, minor = device.compute_capability
        if missing := wanted - best.keys():
            raise BackendUnavailableError(
                f"{device.name} is sm{major}{minor}, the bundle's kernels are for "
                f"{', '.join(self.targets) or 'no GPU'} ({len(missing)} of {len(wanted)} have "
                f"no code that it runs); {_BUILD_HINT} sm{major}{minor}{self._precision_flag()}"
            )
        found = tuple(best[name] for name in sorted(wanted))
        _check_driver(found, device)
        return found

    def _precision_flag(self) -> str:
        """The flag of build_kernels that asks for the number formats that are here."""
        dtypes = {dtype for use in self.uses for dtype in use.dtypes.values()}
        formats = [name for name, dtype in _PRECISIONS.items() if dtype in dtypes]
        return f" --precision {','.join(formats)}" if formats else ""

    def binaries_for(
        self, device: Device, names: frozenset[str] | None = None
    ) -> list[KernelBinary]:
        """The code of `best_for`, with its bytes read and compared.

        Raises:
            BackendUnavailableError: as `best_for`.
            ValueError: a cubin is missing or altered.
        """
        return [self._binary(entry) for entry in self.best_for(device, names)]

    def open_launcher(self, names: frozenset[str] | None = None) -> CudaLauncher:
        """Load the kernels on the current GPU, all of them or those with these names.

        Raises:
            BackendUnavailableError: as `binaries_for`.
            LaunchError: no driver or GPU, or the driver refuses a kernel.
            ValueError: as `binaries_for`.
        """
        driver = open_driver()
        return CudaLauncher(driver, self.binaries_for(current_device(driver), names))

    def _binary(self, entry: KernelEntry) -> KernelBinary:
        path = self.folder / entry.file
        if not path.is_file():
            raise ValueError(f"kernel {entry.file} is missing in {self.folder}; copy it again")
        cubin = path.read_bytes()
        found = hashlib.sha256(cubin).hexdigest()
        if found != entry.sha256:
            raise ValueError(
                f"refusing to load {path}: its sha256 is {found}, expected {entry.sha256}; copy or "
                "build it again"
            )
        return KernelBinary(
            name=entry.name,
            entry=entry.entry,
            cubin=cubin,
            threads=entry.threads,
            shared_bytes=entry.shared_bytes,
            arguments=dict(entry.arguments),
            grid=entry.grid,
        )


def _entry_problems(entry: dict[str, Any]) -> Iterable[str]:
    label = f"kernel {entry['name']}"
    if not re.fullmatch(r"sm\d{2,3}", entry["target"]):
        yield f"{label} has target {entry['target']!r}, expected one like sm89"
    if not re.fullmatch(r"[\w.-]+", entry["file"]):
        yield f"{label} has file {entry['file']!r}, expected a plain name"
    if not re.fullmatch(r"\d+\.\d+", entry["toolkit"]):
        yield f"{label} has toolkit {entry['toolkit']!r}, expected one like 12.9"
    if not all(_is_texts(pair, 2) for pair in entry["arguments"]):
        yield f"{label} has arguments that are no pairs of name and type"
    if not _is_texts(entry["grid"], 3):
        yield f"{label} has grid {entry['grid']!r}, expected three rules"


def _is_texts(values: object, count: int) -> bool:
    return (
        isinstance(values, Sequence)
        and not isinstance(values, str)
        and len(values) == count
        and all(isinstance(value, str) for value in values)
    )


def _check_driver(entries: Iterable[KernelEntry], device: Device) -> None:
    """A cubin runs on drivers of its toolkit's major version and later ones."""
    needed = max((int(entry.toolkit.split(".")[0]) for entry in entries), default=0)
    major, minor = device.driver_version
    if major < needed:
        raise BackendUnavailableError(
            f"the NVIDIA driver goes up to CUDA {major}.{minor}, the kernels were assembled by "
            f"CUDA {needed}; install a driver for CUDA {needed}"
        )
