"""Where a checkpoint comes from: a folder, the bundled one, or random weights of a named shape."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import model
from model.checkpoint import INDEX_NAME, WEIGHTS_NAME, CheckpointHeader, inspect_checkpoint
from model.config import DogeConfig
from model.generations import Generation
from model.random_weights import write_random_checkpoint
from model.released import released_shape
from runtime.bundle import sha256_of
from runtime.manifest import Source

BUNDLED_CHECKPOINT = Path(model.__file__).parent / "checkpoints" / "doge-tiny"
RANDOM_SEED = 0
# What a tokenizer folder may hold; `tokenizer.json` makes it one.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose headers have been read and fit its config.

    Attributes:
        folder: where it lies.
        name: a short name for the bundle's folder.
        config: the architecture, with the router mode that was asked for.
        generation: which Doge it is.
        header: names, shapes and files of its tensors.
    """

    folder: Path
    name: str
    config: DogeConfig
    generation: Generation
    header: CheckpointHeader

    @property
    def files(self) -> list[Path]:
        """Config, weight files, and the index where there are several."""
        names = {"config.json", *(file.name for file in self.header.files)}
        if WEIGHTS_NAME not in names:  # shards, even a single one, are found through the index
            names.add(INDEX_NAME)
        return [self.folder / name for name in sorted(names)]

    @property
    def tokenizer_files(self) -> list[Path]:
        """Those of `TOKENIZER_FILES` that the checkpoint has."""
        return [f for name in TOKENIZER_FILES if (f := self.folder / name).is_file()]


def checkpoint_folder(model_argument: str | None) -> Path:
    """The folder that `--model` names; the bundled checkpoint when it is not given.

    Raises:
        FileNotFoundError: there is no such folder; a hub id is said to be one.
    """
    if model_argument is None:
        return BUNDLED_CHECKPOINT
    folder = Path(model_argument)
    if not folder.exists() and _HUB_ID.fullmatch(model_argument):
        raise FileNotFoundError(
            f"there is no folder {model_argument}; if it is a hub id, --model takes folders only "
            "so far: "
            "download the repository's safetensors, config.json and tokenizer files and name "
            "their folder"
        )
    return folder


def read_checkpoint(folder: Path, router_mode: str | None) -> Checkpoint:
    """Read and check config and headers of the checkpoint in `folder`.

    Raises:
        FileNotFoundError: as `model.checkpoint.inspect_checkpoint`.
        UnsupportedModelError: likewise.
    """
    config, generation, header = inspect_checkpoint(folder, router_mode)
    return Checkpoint(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        generation=generation,
        header=header,
    )


def write_random(folder: Path, name: str, router_mode: str | None) -> Checkpoint:
    """Write random weights of the released shape `name` into `folder` and read them back.

    Raises:
        UnsupportedModelError: there is no such shape.
    """
    shape = released_shape(name)
    folder.mkdir(parents=True, exist_ok=True)
    write_random_checkpoint(folder, shape, RANDOM_SEED)
    return read_checkpoint(folder, router_mode)


def describe_source(checkpoint: Checkpoint, shape: str | None) -> Source:
    """What the manifest says of a checkpoint's origin; hashes its weights.

    A folder is named by its last part alone: a bundle travels, paths of the machine do not.
    """
    hashes = [sha256_of(file) for file in checkpoint.header.files]
    digest = hashes[0]
    if len(hashes) > 1:
        digest = hashlib.sha256("".join(hashes).encode()).hexdigest()
    if shape is not None:
        return Source(
            kind="random", name=shape, revision=f"seed {RANDOM_SEED}", weights_sha256=digest
        )
    return Source(kind="folder", name=checkpoint.name, weights_sha256=digest)
