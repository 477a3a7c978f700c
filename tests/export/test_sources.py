"""Which files of a checkpoint go into a bundle, and what a checkpoint is called."""

from __future__ import annotations

import json
import shutil

import pytest

from export.bundle_writer import BundleWriter
from export.sources import (
    BUNDLED_CHECKPOINT,
    describe_source,
    locate_checkpoint,
    read_checkpoint,
)
from model.hub import ModelLocation

COMMIT = "0123456789" * 4


def _local(folder):
    return ModelLocation(folder=folder)


def test_single_shard_keeps_its_index(tiny_dense, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_dense, folder)
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    names = read_checkpoint(_local(tiny_dense), None).header.shapes
    index = {"weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    checkpoint = read_checkpoint(_local(folder), None)
    assert [file.name for file in checkpoint.files] == [
        "config.json",
        shard,
        "model.safetensors.index.json",
    ]


def test_source_names_the_folder_and_no_path(tiny_dense):
    source = describe_source(read_checkpoint(_local(tiny_dense), None), None)
    assert (source.kind, source.name, source.revision) == ("folder", tiny_dense.name, None)


@pytest.fixture
def snapshot(tiny_dense, tmp_path):
    """The checkpoint as the hub's cache holds it: links, named by file, to blobs, named by hash."""
    repository = tmp_path / "cache" / "models--SmallDoge--Doge-Tiny"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(tiny_dense.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{number:040x}")
        (folder / file.name).symlink_to(f"../../blobs/{number:040x}")
    return ModelLocation(folder=folder, repo_id="SmallDoge/Doge-Tiny", revision=COMMIT)


def test_source_from_the_hub_is_its_id_and_commit(snapshot, tiny_dense):
    checkpoint = read_checkpoint(snapshot, None)
    source = describe_source(checkpoint, None)
    assert (source.kind, source.name, source.revision) == ("hub", "SmallDoge/Doge-Tiny", COMMIT)
    local = describe_source(read_checkpoint(_local(tiny_dense), None), None)
    assert source.weights_sha256 == local.weights_sha256
    assert checkpoint.name == "Doge-Tiny"


def test_links_of_the_cache_become_files_of_the_bundle(snapshot, tiny_dense, tmp_path):
    with BundleWriter(tmp_path / "bundle", checkpoint=snapshot.folder) as writer:
        linked = [
            writer.link_or_copy(file, f"checkpoint/{file.name}", "checkpoint")
            for file in read_checkpoint(snapshot, None).files
        ]
        assert linked
        shutil.rmtree(tmp_path / "cache")
        for file in linked:
            assert not file.is_symlink()
            assert file.read_bytes() == (tiny_dense / file.name).read_bytes()


def test_bundled_checkpoint_is_the_default():
    assert locate_checkpoint(None) == ModelLocation(folder=BUNDLED_CHECKPOINT)


def test_argument_that_names_nothing_is_told():
    with pytest.raises(FileNotFoundError, match="no folder no/such/folder, and it is no hub id"):
        locate_checkpoint("no/such/folder")
