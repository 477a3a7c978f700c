"""The manifest of a bundle: what the folder holds and what it was made from. Nothing is loaded."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

from model.config import RouterMode
from runtime.backends.base import Limits
from runtime.strict_json import (
    KIND_NAMES,
    JsonObject,
    Kinds,
    kind_of,
    parse_json,
    read_list,
    read_object,
)

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

FileRole = Literal["onnx", "weights", "checkpoint", "tokenizer", "cpu", "engine", "kernels"]
SourceKind = Literal["folder", "hub", "random"]

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class BundleFile:
    """One file of a bundle.

    Attributes:
        path: where it lies in the bundle, with `/` on every system.
        bytes: its size.
        sha256: its hash, 64 lower-case hexadecimal digits.
        role: what it is for.
    """

    path: str
    bytes: int
    sha256: str
    role: FileRole


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One runnable model of a bundle.

    Attributes:
        backend: key of the backend that runs it.
        name: what `--variant` calls it, unique within the backend.
        path: the listed file, or the folder of listed files, that the backend opens.
        precision: number format of its weights and arithmetic, in words.
        details: what this backend's builder wants to remember, JSON-ready.
    """

    backend: str
    name: str
    path: str
    precision: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The checkpoint a bundle was made from.

    Attributes:
        kind: a folder, a repository of the hub, or random weights of a named shape.
        name: the folder, the hub's id, or the shape's name.
        revision: the hub's commit.
        weights_sha256: one hash over all weights.
    """

    kind: SourceKind
    name: str
    revision: str | None = None
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that `manifest.json` says.

    Attributes:
        format_version: layout of the bundle; this project reads `FORMAT_VERSION` alone.
        project_version: version of this project that wrote the bundle.
        source: the checkpoint.
        generation: name of the checkpoint's generation.
        config: `DogeConfig.as_dict()`.
        router_mode: how the experts' router is split, None for a dense model.
        limits: what the models accept.
        contract: `StepContract.as_dict()` of the canonical model.
        variants: the runnable models; of one backend's, the first is its default.
        versions: package to version, of what took part in the build.
        checks: name of a check to its JSON-ready result.
        files: every file but the manifest; a `BundleWriter` fills it in.
    """

    format_version: int = FORMAT_VERSION
    project_version: str
    source: Source
    generation: str
    config: Mapping[str, Any]
    router_mode: RouterMode | None
    limits: Limits
    contract: Mapping[str, Any]
    variants: tuple[Variant, ...]
    versions: Mapping[str, str]
    checks: Mapping[str, Mapping[str, Any]]
    files: tuple[BundleFile, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Every field, as JSON-ready values."""
        values = dataclasses.asdict(self)
        for name in ("variants", "files"):
            values[name] = list(values[name])
        return values

    def to_json(self) -> str:
        """The text of `manifest.json`: equal manifests give equal text.

        It is ASCII: the name of a folder need not be valid UTF-8.

        Raises:
            ValueError: a number among the details or checks is not finite.
        """
        text = json.dumps(self.as_dict(), indent=2, sort_keys=True, allow_nan=False)
        return text + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the text of a `manifest.json`.

        Raises:
            ValueError: not JSON, or as `from_dict`.
        """
        return cls.from_dict(parse_json(text))

    @classmethod
    def from_dict(cls, data: object) -> Manifest:
        """Read what `as_dict` gives; every key must be there and no other.

        Raises:
            ValueError: another format version, or every other problem at once.
        """
        if not isinstance(data, dict):
            raise ValueError(f"expected an object, found {kind_of(data)}")
        version = data.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ValueError(
                f"format_version is {version!r}, this version of the project reads "
                f"{FORMAT_VERSION}; build the bundle again or use the version that wrote it"
            )
        problems: list[str] = []
        values = read_object(data, "", _MANIFEST_KINDS, problems)
        source = read_object(values.get("source", {}), "source", _SOURCE_KINDS, problems)
        limits = read_object(values.get("limits", {}), "limits", _LIMITS_KINDS, problems)
        variants = read_list(values.get("variants", []), "variants", _VARIANT_KINDS, problems)
        files = read_list(values.get("files", []), "files", _FILE_KINDS, problems)
        problems += _mapping_problems(values)
        if not problems:
            problems += _limits_problems(limits)
            problems += _file_problems(files)
            problems += _variant_problems(variants, {str(file["path"]) for file in files})
            problems += _choice_problems(values, source, files)
        if problems:
            raise ValueError("; ".join(problems))
        parts: dict[str, Any] = {
            "source": Source(**source),
            "limits": Limits(**limits),
            "variants": tuple(Variant(**variant) for variant in variants),
            "files": tuple(BundleFile(**file) for file in files),
        }
        return cls(**(values | parts))


_OPTIONAL_TEXT = (str, type(None))
_MANIFEST_KINDS: Kinds = {
    "format_version": (int,),
    "project_version": (str,),
    "source": (dict,),
    "generation": (str,),
    "config": (dict,),
    "router_mode": _OPTIONAL_TEXT,
    "limits": (dict,),
    "contract": (dict,),
    "variants": (list,),
    "versions": (dict,),
    "checks": (dict,),
    "files": (list,),
}
_SOURCE_KINDS: Kinds = {
    "kind": (str,),
    "name": (str,),
    "revision": _OPTIONAL_TEXT,
    "weights_sha256": (str,),
}
_LIMITS_KINDS: Kinds = {name.name: (int,) for name in dataclasses.fields(Limits)}
_VARIANT_KINDS: Kinds = {
    "backend": (str,),
    "name": (str,),
    "path": (str,),
    "precision": (str,),
    "details": (dict,),
}
_FILE_KINDS: Kinds = {"path": (str,), "bytes": (int,), "sha256": (str,), "role": (str,)}


def _mapping_problems(values: JsonObject) -> Iterator[str]:
    for name, kind in (("versions", str), ("checks", dict)):
        for key, value in values.get(name, {}).items():
            if type(value) is not kind:
                yield f"{name}.{key} is {kind_of(value)}, expected {KIND_NAMES[kind]}"


def _limits_problems(limits: JsonObject) -> Iterator[str]:
    for name, value in limits.items():
        if value < 1:
            yield f"limits.{name} is {value}, expected at least 1"
    if limits["max_seq_len"] < limits["max_input_len"]:
        yield (
            f"limits.max_seq_len ({limits['max_seq_len']}) is below limits.max_input_len "
            f"({limits['max_input_len']})"
        )


def _file_problems(files: Sequence[JsonObject]) -> Iterator[str]:
    seen: set[str] = set()
    for file in files:
        path = file["path"]
        fault = path_fault(path)
        if fault:
            yield f"files: path {path!r} {fault}"
        if path in seen:
            yield f"files: {path} is listed more than once"
        seen.add(path)
        if file["bytes"] < 0:
            yield f"files: {path} has {file['bytes']} bytes"
        if not _SHA256.fullmatch(file["sha256"]):
            yield f"files: sha256 of {path} is not 64 lower-case hexadecimal digits"


def _variant_problems(variants: Sequence[JsonObject], paths: set[str]) -> Iterator[str]:
    seen: set[tuple[str, str]] = set()
    for variant in variants:
        key, path = (variant["backend"], variant["name"]), variant["path"]
        label = f"variant {key[0]}:{key[1]}"
        if key in seen:
            yield f"{label} is listed more than once"
        seen.add(key)
        if path_fault(path):
            yield f"{label}: path {path!r} {path_fault(path)}"
        elif path not in paths and not any(other.startswith(f"{path}/") for other in paths):
            yield f"{label}: no listed file is {path} or lies in it"


def _choice_problems(
    values: JsonObject, source: JsonObject, files: Sequence[JsonObject]
) -> Iterator[str]:
    choices: list[tuple[str, object, tuple[object, ...]]] = [
        ("source.kind", source["kind"], get_args(SourceKind)),
        ("router_mode", values["router_mode"], (*get_args(RouterMode), None)),
    ]
    choices += [(f"role of {file['path']}", file["role"], get_args(FileRole)) for file in files]
    for name, value, allowed in choices:
        if value not in allowed:
            yield f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}"
    if not _SHA256.fullmatch(source["weights_sha256"]):
        yield "source.weights_sha256 is not 64 lower-case hexadecimal digits"


def path_fault(path: str) -> str | None:
    """What keeps `path` from naming a file inside a bundle, or None when nothing does."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or re.match(r"[A-Za-z]:", path):
        return "is absolute, expected one relative to the bundle"
    if ".." in pure.parts:
        return "contains `..`, expected one inside the bundle"
    if str(pure) != path or path == "." or "\\" in path or "\0" in path:
        return "is not in its plain form, e.g. cpu/int8.onnx"
    if path == MANIFEST_NAME:
        return "is the manifest itself, which is not listed"
    return None
