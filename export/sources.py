"""Where a checkpoint comes from: a folder, the hub, the bundled one, or random weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import model
from model.checkpoint import CheckpointHeader, inspect_checkpoint
from model.config import DogeConfig
from model.generations import Generation
from model.hub import TOKENIZER_FILES, ModelLocation, resolve_model
from model.random_weights import write_random_checkpoint
from model.released import released_shape
from model.weight_files import INDEX_NAME, WEIGHTS_NAME
from runtime.bundle import sha256_of
from runtime.manifest import Source

BUNDLED_CHECKPOINT = Path(model.__file__).parent / "checkpoints" / "doge-tiny"
RANDOM_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose headers have been read and fit its config.

    Attributes:
        location: where it lies, and where it is from.
        config: the architecture, with the router mode that was asked for.
        generation: which Doge it is.
        header: names, shapes and files of its tensors.
    """

    location: ModelLocation
    config: DogeConfig
    generation: Generation
    header: CheckpointHeader

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.location.folder

    @property
    def name(self) -> str:
        """A short name for the bundle's folder."""
        return self.location.name

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


def locate_checkpoint(model_argument: str | None, *, quiet: bool = False) -> ModelLocation:
    """What `--model` names, downloaded if need be; the bundled checkpoint when it is not given.

    Raises:
        FileNotFoundError: there is no such folder, and it cannot be a hub id.
        CheckpointDownloadError: as `model.hub.download_checkpoint`.
        UnsupportedModelError: likewise.
    """
    if model_argument is None:
        return ModelLocation(folder=BUNDLED_CHECKPOINT)
    return resolve_model(model_argument, quiet=quiet)


def read_checkpoint(location: ModelLocation, router_mode: str | None) -> Checkpoint:
    """Read and check config and headers of the checkpoint at `location`.

    Raises:
        FileNotFoundError: as `model.checkpoint.inspect_checkpoint`.
        UnsupportedModelError: likewise.
    """
    config, generation, header = inspect_checkpoint(location.folder, router_mode)
    return Checkpoint(location=location, config=config, generation=generation, header=header)


def write_random(folder: Path, name: str, router_mode: str | None) -> Checkpoint:
    """Write random weights of the released shape `name` into `folder` and read them back.

    Raises:
        UnsupportedModelError: there is no such shape.
    """
    shape = released_shape(name)
    folder.mkdir(parents=True, exist_ok=True)
    write_random_checkpoint(folder, shape, RANDOM_SEED)
    return read_checkpoint(ModelLocation(folder=folder), router_mode)


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
    location = checkpoint.location
    if location.repo_id is not None:
        return Source(
            kind="hub", name=location.repo_id, revision=location.revision, weights_sha256=digest
        )
    return Source(kind="folder", name=location.name, weights_sha256=digest)
