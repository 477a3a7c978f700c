"""A bundle: the folder that a build writes and every backend opens. No PyTorch."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from model.config import SEED_FIELDS, DogeConfig, RouterMode, UnsupportedModelError
from model.contract import DTYPE_BYTES, StepContract, step_contract
from model.generations import GENERATIONS, generation_named
from runtime.backends.base import BackendUnavailableError, Limits
from runtime.kernel_library import KERNEL_FOLDER, KERNEL_MANIFEST, KernelLibrary
from runtime.manifest import MANIFEST_NAME, BundleFile, Manifest, Variant
from runtime.strict_json import Kinds, read_object

__all__ = ["Bundle", "Variant", "config_from_dict", "sha256_of"]

TOKENIZER_FOLDER = "tokenizer"
_BUILD_COMMAND = "python export/build_engine.py"
_BUILD_HINT = f"build one with: {_BUILD_COMMAND} --output DIR"


class Bundle:
    """An opened bundle: its manifest has been read and every listed file is there, in full size.

    Files that the manifest does not list may lie in the folder; they are never opened.

    Attributes:
        path: the folder.
        manifest: what `manifest.json` says.
        config: the architecture.
        generation: the checkpoint's generation.
        contract: inputs and outputs of the canonical model's step.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Check that `manifest` is consistent and describes the files in `path`.

        Raises:
            ValueError: as `open`.
        """
        self.path = path
        self.manifest = manifest
        self.config = config_from_dict(manifest.config)
        try:
            self.generation = generation_named(manifest.generation, GENERATIONS)
        except UnsupportedModelError as error:
            raise ValueError(
                f"{error}; the bundle was written by version {manifest.project_version}"
            ) from error
        router_mode = self.config.router_mode if self.config.is_moe else None
        if manifest.router_mode != router_mode:
            raise ValueError(
                f"router_mode is {manifest.router_mode!r}, its config says {router_mode!r}"
            )
        self.contract = step_contract(
            self.config, self.generation, max_seq_len=manifest.limits.max_seq_len
        )
        if manifest.contract != self.contract.as_dict():
            raise ValueError(
                "the step contract differs from that of this version of the project (the bundle "
                f"was written by {manifest.project_version}); build it again"
            )
        problems = [problem for file in manifest.files for problem in self._size_problems(file)]
        if problems:
            raise ValueError("; ".join(problems) + "; copy or build the bundle again")

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> Bundle:
        """Open the bundle in folder `path`.

        Args:
            path: the folder with `manifest.json`.
            verify: also compare the hash of every file.

        Raises:
            FileNotFoundError: no folder, or no manifest in it.
            ValueError: a broken manifest, parts that do not belong together, or a file that is
                missing, of another size, outside the folder, or, with `verify`, altered.
        """
        file = path / MANIFEST_NAME
        if not file.is_file():
            raise FileNotFoundError(_not_a_bundle(path))
        try:
            bundle = cls(path, Manifest.from_json(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(f"bundle {path} is broken: {error}") from error
        if verify:
            problems = bundle.altered_files()
            if problems:
                raise ValueError(f"bundle {path} is damaged: {'; '.join(problems)}")
        return bundle

    @property
    def limits(self) -> Limits:
        """What the models of the bundle accept."""
        return self.manifest.limits

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer's files, None when the checkpoint had none."""
        listed = any(path.startswith(f"{TOKENIZER_FOLDER}/") for path in self._files)
        return self.path / TOKENIZER_FOLDER if listed else None

    @cached_property
    def _files(self) -> Mapping[str, BundleFile]:
        return {file.path: file for file in self.manifest.files}

    def variants(self, backend: str) -> tuple[Variant, ...]:
        """The models that `backend` can run, the default first."""
        return tuple(v for v in self.manifest.variants if v.backend == backend)

    def variant(self, backend: str, name: str | None = None) -> Variant:
        """The model called `name`, else the first of the precision `name`; None is the default.

        Raises:
            ValueError: the bundle has no such model; lists those it has.
        """
        candidates = self.variants(backend)
        if name is not None:
            exact = tuple(v for v in candidates if v.name == name)
            candidates = exact or tuple(v for v in candidates if v.precision == name)
        if candidates:
            return candidates[0]
        wanted = backend if name is None else f"{backend}:{name}"
        present = ", ".join(f"{v.backend}:{v.name}" for v in self.manifest.variants)
        raise ValueError(
            f"bundle {self.path} has no model {wanted}; it has {present or 'none'}. "
            f"{self.how_to_add(backend, name)}"
        )

    def contract_of(self, variant: Variant) -> StepContract:
        """Inputs and outputs of a variant's step: the canonical ones in the variant's cache types.

        Raises:
            ValueError: the variant's details are not what a build writes.
        """
        details = variant.details
        dtypes = [details.get(name, "float32") for name in ("cache_dtype", "score_dtype")]
        heads = details.get("score_heads")
        if not set(dtypes) <= set(DTYPE_BYTES) or not (heads is None or isinstance(heads, int)):
            raise ValueError(
                f"variant {variant.name} caches {dtypes} and {heads!r} scores; no build writes that"
            )
        return step_contract(
            self.config,
            self.generation,
            max_seq_len=self.limits.max_seq_len,
            cache_dtype=dtypes[0],
            score_dtype=dtypes[1],
            score_heads=heads,
        )

    def file(self, relative: str) -> Path:
        """Where the listed file, or the folder of listed files, `relative` lies.

        Raises:
            ValueError: the manifest lists neither.
        """
        self._listed(relative)
        return self.path / relative

    def executable_file(self, variant: Variant) -> Path:
        """The file or folder of `variant`, with every byte of it compared with its hash.

        For engines, whose content the machine runs.

        Raises:
            ValueError: altered since the build, or not listed.
        """
        return self._checked(variant.path, f"{variant.backend}:{variant.name}")

    def kernel_library(self) -> KernelLibrary:
        """The compiled kernels, with every byte of them compared with its hash.

        Raises:
            BackendUnavailableError: the bundle has none.
            ValueError: altered since the build, or a launch manifest of another format.
        """
        if KERNEL_MANIFEST not in self._files:
            raise BackendUnavailableError(
                f"bundle {self.path} has no kernels; build them with: python "
                f"export/build_kernels.py {self.path}"
            )
        self._checked(KERNEL_FOLDER, "the kernels")
        return KernelLibrary.open(self.path)

    def _checked(self, relative: str, label: str) -> Path:
        problems = [p for file in self._listed(relative) for p in self._hash_problems(file)]
        if problems:
            raise ValueError(
                f"refusing to load {label} of bundle {self.path}: {'; '.join(problems)}; copy or "
                "build it again"
            )
        return self.path / relative

    def altered_files(self) -> tuple[str, ...]:
        """Hash every file; one sentence for each that is not as the manifest says."""
        return tuple(p for file in self.manifest.files for p in self._hash_problems(file))

    def how_to_add(self, backend: str, name: str | None) -> str:
        """The command that adds a model for `backend` and keeps what the bundle has.

        With another checkpoint or other limits the same command would replace the bundle.
        """
        source, limits = self.manifest.source, self.limits
        flags = {"--model": "DIR"}
        if source.kind != "folder":
            flags = {"--random-weights" if source.kind == "random" else "--model": source.name}
        if self.manifest.router_mode is not None:
            flags["--router"] = self.manifest.router_mode
        for field in dataclasses.fields(limits):
            flags[f"--{field.name.replace('_', '-')}"] = str(getattr(limits, field.name))
        flags |= _flags_for(backend, name)
        flags["--output"] = str(self.path)
        words = [word for flag in flags.items() for word in flag if word]
        command = f"Add it with: {_BUILD_COMMAND} {shlex.join(words)}"
        if source.kind == "folder":
            command += f" (DIR: the folder of the checkpoint {source.name})"
        return command if backend != "torch" else f"{command}, without --no-checkpoint"

    def _listed(self, relative: str) -> list[BundleFile]:
        found = [
            file
            for path, file in self._files.items()
            if path == relative or path.startswith(f"{relative}/")
        ]
        if not found:
            raise ValueError(
                f"bundle {self.path} lists no {relative}; it lists {', '.join(self._files)}"
            )
        return found

    def _size_problems(self, file: BundleFile) -> list[str]:
        place = self.path / file.path
        try:
            real = place.resolve()  # a loop of symbolic links is an error of its own
            if not real.is_relative_to(self.path.resolve()):
                return [f"{file.path} is a link that leads out of the bundle; put a copy there"]
            if not real.is_file():
                return [f"{file.path} is missing, expected a file of {file.bytes} bytes"]
            size = real.stat().st_size
        except (OSError, RuntimeError) as error:
            return [f"{file.path} cannot be found: {error}"]
        if size != file.bytes:
            return [f"{file.path} has {size} bytes, expected {file.bytes}"]
        return []

    def _hash_problems(self, file: BundleFile) -> list[str]:
        problems = self._size_problems(file)
        if not problems:
            try:
                found = sha256_of(self.path / file.path)
            except OSError as error:
                return [f"{file.path} cannot be read: {error}"]
            if found != file.sha256:
                problems = [f"{file.path} has sha256 {found}, expected {file.sha256}"]
        return problems


def config_from_dict(values: Mapping[str, Any]) -> DogeConfig:
    """The architecture from `DogeConfig.as_dict()`.

    Raises:
        ValueError: a missing or unknown field, a wrong type, or a value that no Doge has.
    """
    problems: list[str] = []
    complete = {**dict.fromkeys(SEED_FIELDS, 0), **values}
    fields = read_object(complete, "config", _config_kinds(), problems)
    eos = fields.get("eos_token_id")
    if isinstance(eos, list):
        fields["eos_token_id"] = tuple(eos)
        if not all(type(token) is int for token in eos):
            problems.append(f"config.eos_token_id is {eos}, expected whole numbers")
    if problems:
        raise ValueError("; ".join(problems))
    try:
        return DogeConfig(**fields)
    except UnsupportedModelError as error:
        raise ValueError(f"config: {error}") from error


def _config_kinds() -> Kinds:
    """The JSON types of each field of `DogeConfig`."""
    json_types = {float: (float, int), tuple[int, ...]: (list,), RouterMode: (str,)}
    kinds = {}
    for name, hint in get_type_hints(DogeConfig).items():
        choices = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds[name] = tuple(
            kind for choice in choices for kind in json_types.get(choice, (choice,))
        )
    return kinds


def sha256_of(path: Path) -> str:
    """Hash of a file's content, 64 hexadecimal digits; reads it in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_a_bundle(path: Path) -> str:
    aside = path.with_name(f"{path.name}.old") if path.name else None
    if not path.exists() and aside is not None and (aside / MANIFEST_NAME).is_file():
        return (
            f"bundle {path} does not exist, but {aside} does, which a build that was killed may "
            f"have left: start the build again, or rename {aside} to {path}"
        )
    if not path.exists():
        return f"bundle {path} does not exist; {_BUILD_HINT}"
    if not path.is_dir():
        return f"{path} is a file, expected a bundle's folder; {_BUILD_HINT}"
    return f"{path} is no bundle: it has no {MANIFEST_NAME}; {_BUILD_HINT}"


def _flags_for(backend: str, name: str | None) -> dict[str, str]:
    """The flags that ask a build for a model of `backend` alone.

    An engine's name is its precision and, behind it, its targets and its plugins, if any:
    fp16-sm89-sm86-doge. One of backend cuda may have "persistent" behind its precision.
    """
    if backend == "torch":
        return {"--backend": "none"}
    if backend == "onnxruntime":
        return {"--backend": "none", "--cpu": name or "fp32"}
    flags = {"--backend": backend}
    precision, *rest = (name or "").split("-")
    targets = [word for word in rest if word.startswith("sm")]
    if precision:
        flags["--precision"] = precision
    if targets:
        flags["--target"] = ",".join(targets)
    if backend == "cuda" and "persistent" in rest:
        flags["--persistent"] = ""
    elif plugins := [word for word in rest if not word.startswith("sm")]:
        flags["--plugin"] = "-".join(plugins)
    return flags
