"""Engine files of the stand-in: a real header, and behind it which ONNX model to run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.decode_graph import write_decode_graph
from export.profiles import step_profiles
from runtime.bundle import Bundle
from runtime.engines.decode_graph import DecodeGraphContract, EngineInterface
from runtime.engines.header import MAGIC, EngineHeader, pack_engine_header
from runtime.manifest import MANIFEST_NAME, BundleFile, Variant

VERSION = "1.7.1.116"
# Engines of standard TensorRT begin otherwise; the rest of their header is not known, and the
# stand-in's is that of TensorRT-RTX.
STANDARD_MAGIC = b"ftrt"
TARGETS = ("sm89",)
WEIGHT_BYTES = 2_000_000
ACTIVATION_BYTES = 1_000_000


def engine_blob(
    onnx: Path,
    contract: EngineInterface,
    profiles: list[dict[str, Any]],
    *,
    version: str = VERSION,
    targets: tuple[str, ...] = TARGETS,
    standard: bool = False,
    **changes: Any,
) -> bytes:
    """An engine that runs a model; `changes` replace parts of what it says of itself."""
    said = {
        "onnx": str(onnx),
        "inputs": [spec.as_dict() for spec in contract.inputs],
        "outputs": [spec.as_dict() for spec in contract.outputs],
        "aliases": {present: past for past, present in contract.aliases},
        "profiles": profiles,
        "activation_bytes": ACTIVATION_BYTES,
        **changes,
    }
    body = json.dumps(said).encode()
    header = EngineHeader(
        file_bytes=64 + len(body),
        version=version,
        targets=targets,
        unknown_targets=0,
        weight_bytes=WEIGHT_BYTES,
    )
    packed = pack_engine_header(header)
    return (packed.replace(MAGIC, STANDARD_MAGIC) if standard else packed) + body


def add_fake_engine(
    source: Path,
    folder: Path,
    *,
    backend: str = "tensorrt_rtx",
    variant: str = "canonical",
    lowered: Path | None = None,
    details: Mapping[str, Any] | None = None,
    decode_width: int | None = None,
    decode_changes: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Bundle:
    """A copy of a bundle with an engine that runs its model `variant` of ONNX Runtime.

    Args:
        source: the bundle; its files are linked.
        folder: of the copy.
        backend: whose engine it is.
        variant: the model behind it.
        lowered: a model that `lower_for_tensorrt` wrote, instead.
        details: replace parts of what the manifest says of the engine.
        decode_width: candidates of the engine's decode graph; None for none.
        decode_changes: of the decode graph itself, as `changes`.
        **changes: of the engine itself, as `engine_blob`; it stays what the manifest lists.
    """
    shutil.copytree(source, folder, copy_function=os.link)
    bundle = Bundle.open(folder)
    model = bundle.variant("onnxruntime", variant)
    targets = changes.get("targets", TARGETS)
    dtype = "float32" if lowered is None else lowered.stem
    precision = {"float32": "fp32", "float16": "fp16"}[dtype]
    path = f"engines/{backend}-{'-'.join(targets)}-{precision}.engine"
    added = Variant(
        backend=backend,
        name=f"{precision}-{'-'.join(targets)}",
        path=path,
        precision=precision,
        details={"cache_dtype": dtype, "score_dtype": "float32"},
    )
    contract = bundle.contract_of(added)
    profiles = [profile.as_dict(contract) for profile in step_profiles(bundle.limits)]
    said = {
        **added.details,
        "targets": [*targets],
        "builder_version": changes.get("version", VERSION),
        "profiles": profiles,
        "plugin": "none",
        **(details or {}),
    }
    changes.setdefault("standard", backend == "tensorrt")
    onnx = folder / model.path if lowered is None else lowered
    blobs = {path: engine_blob(onnx, contract, changes.pop("profiles", profiles), **changes)}
    if decode_width is not None:
        graph, decode_path = (
            DecodeGraphContract(contract),
            path.replace(".engine", ".decode.engine"),
        )
        own = [step_profiles(bundle.limits)[0].as_dict(graph)]
        said["decode_graph"] = {"path": decode_path, "width": decode_width, "profiles": own}
        decode_onnx = write_decode_graph(onnx, decode_width)
        blobs[decode_path] = engine_blob(
            decode_onnx, graph, own, **(changes | dict(decode_changes or {}))
        )
    added = dataclasses.replace(added, details=said)
    (folder / path).parent.mkdir(exist_ok=True)
    files = []
    for name, blob in blobs.items():
        (folder / name).write_bytes(blob)
        digest = hashlib.sha256(blob).hexdigest()
        files.append(BundleFile(path=name, bytes=len(blob), sha256=digest, role="engine"))
    manifest = dataclasses.replace(
        bundle.manifest,
        files=(*bundle.manifest.files, *files),
        variants=(added, *bundle.manifest.variants),
    )
    (folder / MANIFEST_NAME).unlink()  # a link to the source's
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(folder)
