"""Small bundles whose files hold a few bytes instead of models."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

from export.bundle_writer import BundleWriter
from model.config import DogeConfig
from model.contract import step_contract
from model.generations import GENERATIONS, generation_named
from runtime.backends.base import Limits
from runtime.bundle import Bundle
from runtime.manifest import MANIFEST_NAME, BundleFile, FileRole, Manifest, Source, Variant

FILES: dict[str, tuple[FileRole, bytes]] = {
    "model.onnx": ("onnx", b"graph"),
    "model.onnx.data": ("weights", b"weights"),
    "checkpoint/config.json": ("checkpoint", b"{}"),
    "checkpoint/model.safetensors": ("checkpoint", b"tensors"),
    "tokenizer/tokenizer.json": ("tokenizer", b"{ }"),
    "engines/tensorrt_rtx-sm89-fp16.engine": ("engine", b"machine code"),
}
CONFIG = DogeConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    keep_window_size=16,
    eos_token_id=(1, 2),
)
LIMITS = Limits(max_batch_size=2, max_input_len=32, max_seq_len=64)
SOURCE = Source(kind="folder", name="tiny", weights_sha256="0" * 64)


def fake_manifest(config: DogeConfig = CONFIG, limits: Limits = LIMITS) -> Manifest:
    """A manifest that lists no files yet."""
    generation = generation_named("g4", GENERATIONS)
    return Manifest(
        project_version="0.0.0",
        source=SOURCE,
        generation=generation.name,
        config=config.as_dict(),
        router_mode=config.router_mode if config.is_moe else None,
        limits=limits,
        contract=step_contract(config, generation, max_seq_len=limits.max_seq_len).as_dict(),
        variants=(
            Variant(backend="onnxruntime", name="fp32", path="model.onnx", precision="fp32"),
            Variant(
                backend="tensorrt_rtx",
                name="fp16",
                path="engines/tensorrt_rtx-sm89-fp16.engine",
                precision="fp16",
                details={"targets": ["sm89"]},
            ),
            Variant(backend="torch", name="fp32", path="checkpoint", precision="fp32"),
        ),
        versions={"numpy": "2.0.0"},
        checks={"onnx": {"passed": True}},
    )


def write_fake_bundle(
    folder: Path,
    manifest: Manifest | None = None,
    more: Mapping[str, tuple[FileRole, bytes]] | None = None,
) -> Path:
    """Write a bundle that opens, with the files of `FILES` and `more`."""
    files = []
    for path, (role, content) in {**FILES, **(more or {})}.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files.append(BundleFile(path=path, bytes=len(content), sha256=digest, role=role))
    complete = dataclasses.replace(manifest or fake_manifest(), files=tuple(files))
    (folder / MANIFEST_NAME).write_text(complete.to_json(), encoding="utf-8")
    return folder


def build_fake_bundle(output: Path, content: bytes = b"weights", **kwargs: Path) -> Bundle:
    """Build a bundle whose file of weights holds `content`."""
    with BundleWriter(output, **kwargs) as writer:
        for path, (role, usual) in FILES.items():
            writer.path_for(path).write_bytes(content if role == "weights" else usual)
            writer.add_file(role, path)
        return writer.publish(fake_manifest())


def weights_of(output: Path) -> bytes:
    """The weights of a bundle that opens and is wholly as its manifest says."""
    return Bundle.open(output, verify=True).file("model.onnx.data").read_bytes()


def names_in(folder: Path) -> list[str]:
    """Everything that lies in a folder."""
    return sorted(path.name for path in folder.iterdir())
