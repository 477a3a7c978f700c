"""Which files of a checkpoint go into a bundle, and what a checkpoint is called."""

from __future__ import annotations

import json
import shutil

import pytest

from export.sources import checkpoint_folder, describe_source, read_checkpoint


def test_single_shard_keeps_its_index(tiny_dense, tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_dense, folder)
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    names = read_checkpoint(tiny_dense, None).header.shapes
    index = {"weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    checkpoint = read_checkpoint(folder, None)
    assert [file.name for file in checkpoint.files] == [
        "config.json",
        shard,
        "model.safetensors.index.json",
    ]


def test_source_names_the_folder_and_no_path(tiny_dense):
    source = describe_source(read_checkpoint(tiny_dense, None), None)
    assert source.kind == "folder"
    assert source.name == tiny_dense.name


def test_missing_folder_that_looks_like_a_hub_id_says_so():
    with pytest.raises(FileNotFoundError, match="folders only so far"):
        checkpoint_folder("SmallDoge/Doge-20M")
