"""Checkpoints from the hub, by the real client, from a stand-in for the hub on the loopback."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from export import build_engine
from export.sources import BUNDLED_CHECKPOINT
from model.config import UnsupportedModelError
from model.hub import (
    CheckpointDownloadError,
    HubId,
    ModelLocation,
    download_checkpoint,
    resolve_model,
)
from runtime import generate
from runtime.bundle import Bundle
from tests.fake_hub import Answer, FakeHub, use_only

ROOT = Path(__file__).parents[2]
REPO = "SmallDoge/Doge-Tiny"
ALLOWED = {
    "config.json": b"{}",
    "generation_config.json": b'{"eos_token_id": 1}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{ }",
    "special_tokens_map.json": b"{  }",
    "chat_template.jinja": b"{{ messages }}",
}
WEIGHTS = {"model.safetensors": b"tensors" * 1000}
SHARDS = {f"model-0000{i}-of-00002.safetensors": b"shard" * (1000 + i) for i in (1, 2)}
INDEX_NAME = "model.safetensors.index.json"
INDEX = {INDEX_NAME: json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode()}
PICKLES = {"pytorch_model.bin": b"pickle", "optimizer.pt": b"pickled", "old.pth": b"pickle!"}
REFUSED = {
    **PICKLES,
    "modeling_doge.py": b"raise SystemExit('code of the repository was run')",
    "configuration_doge.py": b"raise SystemExit",
    "README.md": b"# Doge",
    ".gitattributes": b"",
    "adapter_model.safetensors": b"adapter",
    "onnx/config.json": b"[]",
    "step-100/model.safetensors": b"older",
    "training_args.json": b"{}",
}
WHOLE = {**ALLOWED, **WEIGHTS, **REFUSED}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub without repositories, with an empty cache, and nothing else to be reached."""
    server = FakeHub()
    use_only(server.endpoint, tmp_path / "hf-home", monkeypatch)
    yield server
    server.stop()


def _get(text: str, **settings: Any) -> ModelLocation:
    return download_checkpoint(HubId.parse(text), **settings)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def _cached(folder: Path) -> set[bytes]:
    """Contents of everything in the cache that is not the cache's own."""
    return {file.read_bytes() for file in (folder.parents[1] / "blobs").iterdir()}


# --- ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "repo_id", "revision"),
    [
        ("SmallDoge/Doge-20M", "SmallDoge/Doge-20M", None),
        ("SmallDoge/Doge-20M@main", "SmallDoge/Doge-20M", "main"),
        ("a/b@refs/pr/7", "a/b", "refs/pr/7"),
        ("a/b@v1.0", "a/b", "v1.0"),
        (f"a_1/b.2-c@{'0f' * 20}", "a_1/b.2-c", "0f" * 20),
    ],
)
def test_id_and_revision_are_told_apart(text: str, repo_id: str, revision: str | None) -> None:
    parsed = HubId.parse(text)
    assert (parsed.repo_id, parsed.revision) == (repo_id, revision)
    assert str(parsed) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "name", "a/b/c", "/a/b", "./b", "../b", "a/..", "a/", "a/b\n", "a b/c", "-a/b"),
        *("ä/b", "a--b/c", "a/b..c", "a/b.git", f"a/{'b' * 95}", "https://hub/a/b"),
        *("a/b@", "a/b@..", "a/b@../../x", "a/b@x/../y", "a/b@/x", "a/b@x/", "a/b@-x", "a/b@x@y"),
        "a/b@v1..v2",
    ],
)
def test_malformed_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"hub id|revision"):
        HubId.parse(text)


# --- what is downloaded --------------------------------------------------------------------------


def test_only_the_files_of_a_checkpoint_arrive(fake: FakeHub) -> None:
    commit = fake.push(REPO, WHOLE)
    location = _get(REPO)
    assert location == ModelLocation(folder=location.folder, repo_id=REPO, revision=commit)
    assert location.name == "Doge-Tiny"
    assert _files(location.folder) == {**ALLOWED, **WEIGHTS}
    assert fake.sent == {*ALLOWED, *WEIGHTS}
    assert _cached(location.folder) == {*ALLOWED.values(), *WEIGHTS.values()}


def test_shards_arrive_with_their_index(fake: FakeHub) -> None:
    fake.push(REPO, {**ALLOWED, **SHARDS, **INDEX, **REFUSED})
    assert _files(_get(REPO).folder) == {**ALLOWED, **SHARDS, **INDEX}
    assert fake.sent == {*ALLOWED, *SHARDS, *INDEX}


def test_whole_file_is_preferred_to_shards(fake: FakeHub) -> None:
    fake.push(REPO, {**WHOLE, **SHARDS, **INDEX})
    assert _files(_get(REPO).folder) == {**ALLOWED, **WEIGHTS}


def test_cache_and_endpoint_can_be_named(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.push(REPO, WHOLE)
    other = FakeHub()
    try:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "never"))
        commit = other.push(REPO, {**WHOLE, "config.json": b"[1]"})
        location = _get(REPO, cache_dir=tmp_path / "cache", endpoint=other.endpoint)
    finally:
        other.stop()
    assert location.folder.is_relative_to(tmp_path / "cache")
    assert location.revision == commit
    assert not (tmp_path / "never").exists()


def test_revision_is_a_branch_a_tag_or_a_commit(fake: FakeHub) -> None:
    first = fake.push(REPO, {**WHOLE, "config.json": b"[1]"}, "main", "v1.0")
    second = fake.push(REPO, {**WHOLE, "config.json": b"[2]"}, "main", "refs/pr/3")
    for revision, commit, config in (
        ("@v1.0", first, b"[1]"),
        (f"@{first}", first, b"[1]"),
        ("", second, b"[2]"),
        ("@main", second, b"[2]"),
        ("@refs/pr/3", second, b"[2]"),
    ):
        location = _get(REPO + revision)
        assert location.revision == commit
        assert (location.folder / "config.json").read_bytes() == config


def test_moving_revision_is_told_with_its_commit(
    fake: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "model.hub")
    commit = fake.push(REPO, WHOLE)
    _get(REPO)
    assert f"{REPO} is commit {commit}" in caplog.text
    caplog.clear()
    _get(f"{REPO}@{commit}")
    assert caplog.text == ""


def test_what_the_cache_has_is_not_sent_again(fake: FakeHub) -> None:
    fake.push(REPO, WHOLE)
    _get(REPO)
    fake.requests.clear()
    _get(REPO)
    assert fake.requests
    assert fake.sent == set()


def test_branch_that_moved_is_downloaded_anew(fake: FakeHub) -> None:
    fake.push(REPO, WHOLE)
    _get(REPO)
    fake.requests.clear()
    commit = fake.push(REPO, {**WHOLE, "model.safetensors": b"newer"})
    location = _get(REPO)
    assert location.revision == commit
    assert _files(location.folder)["model.safetensors"] == b"newer"
    assert fake.sent == {"model.safetensors"}


# --- what is refused -----------------------------------------------------------------------------


def test_pickle_is_refused_by_name_before_anything_is_sent(fake: FakeHub) -> None:
    fake.push(REPO, {**ALLOWED, **PICKLES})
    with pytest.raises(UnsupportedModelError, match="pickle, which can run code") as raised:
        _get(REPO)
    assert all(name in str(raised.value) for name in PICKLES)
    assert "convert it to safetensors" in str(raised.value)
    assert fake.sent == set()


def test_repository_without_weights_is_refused(fake: FakeHub) -> None:
    fake.push(REPO, {**ALLOWED, "adapter_model.safetensors": b"adapter"})
    with pytest.raises(UnsupportedModelError, match=r"no model\.safetensors .*adapter_model"):
        _get(REPO)
    assert fake.sent == set()


def test_repository_without_a_config_is_refused(fake: FakeHub) -> None:
    fake.push(REPO, {**WEIGHTS, "onnx/config.json": b"{}"})
    with pytest.raises(UnsupportedModelError, match=r"has no config\.json"):
        _get(REPO)


@pytest.mark.parametrize(
    "shard", ["../../escaped.safetensors", "/escaped.safetensors", "a/b.safetensors", "code.py"]
)
def test_index_that_points_elsewhere_is_refused(fake: FakeHub, shard: str) -> None:
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    fake.push(REPO, {**ALLOWED, INDEX_NAME: index, shard: b"x"})
    expected = "safetensors files beside it" if shard == "code.py" else "points out of its folder"
    with pytest.raises(UnsupportedModelError, match=expected):
        _get(REPO)
    assert fake.sent == {INDEX_NAME}


def test_index_that_is_none_is_refused(fake: FakeHub) -> None:
    fake.push(REPO, {**ALLOWED, INDEX_NAME: b"[]"})
    with pytest.raises(UnsupportedModelError, match="not an index of shards"):
        _get(REPO)


def test_shard_that_the_repository_lacks_is_named(fake: FakeHub) -> None:
    present, absent = SHARDS
    fake.push(REPO, {**ALLOWED, **INDEX, present: b"x"})
    with pytest.raises(UnsupportedModelError, match=f"lacks {absent}"):
        _get(REPO)
    assert fake.sent == {INDEX_NAME}


def test_names_in_the_list_that_lead_out_of_the_folder_are_not_followed(fake: FakeHub) -> None:
    outside = {"../config.json": b"out", "../../model.safetensors": b"out", "/tokenizer.json": b"o"}
    fake.push(REPO, {**WHOLE, **outside})
    location = _get(REPO)
    assert _files(location.folder) == {**ALLOWED, **WEIGHTS}
    assert not _cached(location.folder) & set(outside.values())


def test_names_that_a_terminal_would_obey_are_escaped(fake: FakeHub) -> None:
    fake.push(REPO, {**ALLOWED, "\x1b[2J.bin": b"x"})
    with pytest.raises(UnsupportedModelError, match=r"x1b\[2J\.bin") as raised:
        _get(REPO)
    assert str(raised.value).isprintable()


def test_commit_that_is_no_hash_is_not_believed(fake: FakeHub, tmp_path: Path) -> None:
    listed = {"id": REPO, "sha": "../../../out", "siblings": [{"rfilename": n} for n in WHOLE]}
    fake.answer_to_all = Answer(200, json.dumps(listed).encode())
    with pytest.raises(CheckpointDownloadError, match="gives no commit"):
        _get(REPO)
    assert not list(tmp_path.rglob("out"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SmallDoge/Doge-21M", "no model SmallDoge/Doge-21M, or it is private.*hf auth login"),
        (f"{REPO}@v9", "no revision v9: expected a branch, a tag or a commit hash of 40 digits"),
        (f"{REPO}@{'0' * 40}", f"no revision {'0' * 40}"),
        ("SmallDoge/Gated", "gated: accept its conditions on .*/SmallDoge/Gated, then log in with"),
    ],
)
def test_what_the_hub_refuses_is_told_with_the_remedy(
    fake: FakeHub, text: str, message: str
) -> None:
    fake.push(REPO, WHOLE)
    fake.push("SmallDoge/Gated", WHOLE, gated=True)
    with pytest.raises(CheckpointDownloadError, match=message) as raised:
        _get(text)
    assert "\n" not in str(raised.value)
    assert fake.sent == set()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(401, headers={"X-Error-Message": "Invalid credentials"}), "access token that it"),
        (Answer(429), "with status 429"),
        (Answer(403, headers={"X-Error-Message": "no"}), r"with status 403 \(no\)"),
        (Answer(403, headers={"X-Error-Message": "Access to this resource is disabled."}), "disab"),
        (Answer(503), "cannot be reached .it answered 503. and its cache does not hold"),
        (Answer(200, b"<html>log in to the hotel</html>"), "does not answer as a hub"),
        (Answer(200, b"[]"), "does not answer as a hub"),
    ],
)
def test_other_answers_are_told(fake: FakeHub, answer: Answer, message: str) -> None:
    fake.answer_to_all = answer
    with pytest.raises(CheckpointDownloadError, match=message):
        _get(REPO)


def test_tree_that_is_refused_is_told(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.push(REPO, WHOLE)
    answer = fake.answer
    refusal = Answer(403, headers={"X-Error-Message": "not for you"})
    monkeypatch.setattr(fake, "answer", lambda path: refusal if "/tree/" in path else answer(path))
    with pytest.raises(CheckpointDownloadError, match=r"with status 403 \(not for you\)"):
        _get(REPO)


@pytest.mark.parametrize(
    ("listed", "message"),
    [(True, "is gated"), (False, "does not send model.safetensors .* gives access to files")],
)
def test_part_in_the_cache_does_not_pass_for_a_gated_repository(
    fake: FakeHub, tmp_path: Path, listed: bool, message: str
) -> None:
    fake.push(REPO, WHOLE)
    original = Path(constants.HF_HUB_CACHE)
    folder = tmp_path / "copy" / _get(REPO).folder.relative_to(original)
    shutil.copytree(original, tmp_path / "copy", symlinks=True)
    (folder / "model.safetensors").resolve().unlink()
    (folder / "model.safetensors").unlink()
    if not listed:
        shutil.rmtree(folder.parents[1] / "trees")
    fake.repositories[REPO].gated = True
    with pytest.raises(CheckpointDownloadError, match=message):
        _get(REPO, cache_dir=tmp_path / "copy")


def test_repository_that_changes_during_the_download_is_told(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fake.push(REPO, WHOLE)
    answer = fake.answer

    def answer_and_change(path: str) -> Answer:
        given = answer(path)
        if path.endswith(REPO) and len(fake.repositories[REPO].commits) == 1:
            fake.push(REPO, {**WHOLE, "config.json": b"[2]"})
        return given

    monkeypatch.setattr(fake, "answer", answer_and_change)
    with pytest.raises(CheckpointDownloadError, match=f"changed from commit {first}"):
        _get(REPO)


def test_download_that_breaks_off_is_told_and_goes_on_at_the_next_run(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.push(REPO, WHOLE)
    answer = fake.answer

    def answer_in_part(path: str) -> Answer:
        given = answer(path)
        return Answer(200, given.body[:9]) if path.startswith("/large/") else given

    with monkeypatch.context() as patch:
        patch.setattr(fake, "answer", answer_in_part)
        with pytest.raises(CheckpointDownloadError, match=r"broke off .* run again") as raised:
            _get(REPO)
    assert "\n" not in str(raised.value)
    assert _files(_get(REPO).folder) == {**ALLOWED, **WEIGHTS}


def test_missing_package_is_named_with_what_installs_it(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("huggingface_hub", "httpx2"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            message = rf"the package {package} is missing: pip install 'doge-tensorrt\[hub\]'"
            with pytest.raises(CheckpointDownloadError, match=message):
                _get(REPO)
    assert fake.requests == []


# --- without a network ---------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [WEIGHTS, {**SHARDS, **INDEX}], ids=["whole", "shards"])
@pytest.mark.parametrize("revision", ["", "@main", "@v1", "@COMMIT"])
def test_cache_serves_without_a_network_and_says_so(
    fake: FakeHub,
    caplog: pytest.LogCaptureFixture,
    weights: Mapping[str, bytes],
    revision: str,
) -> None:
    commit = fake.push(REPO, {**ALLOWED, **weights, **REFUSED}, "main", "v1")
    name = REPO + revision.replace("COMMIT", commit)
    online = _get(name)
    caplog.clear()
    fake.stop()
    assert _get(name) == online
    assert _files(online.folder) == {**ALLOWED, **weights}
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "cannot be reached" in warning
    assert name in warning


def test_offline_mode_of_the_client_asks_nothing(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake.push(REPO, WHOLE)
    online = _get(REPO)
    fake.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert _get(REPO) == online
    assert fake.requests == []
    assert "HF_HUB_OFFLINE is set" in caplog.text


def test_hub_that_is_down_is_as_none(fake: FakeHub) -> None:
    fake.push(REPO, WHOLE)
    online = _get(REPO)
    fake.answer_to_all = Answer(502)
    assert _get(REPO) == online


@pytest.mark.parametrize("revision", ["", "@v2", f"@{'1' * 40}"])
def test_no_network_and_nothing_in_the_cache_is_told(fake: FakeHub, revision: str) -> None:
    fake.push(REPO, WHOLE, "v1")
    _get(f"{REPO}@v1")
    fake.stop()
    message = f"cannot be reached .* its cache does not hold {REPO}{revision}; run again with a net"
    with pytest.raises(CheckpointDownloadError, match=message):
        _get(REPO + revision)


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", *SHARDS])
@pytest.mark.parametrize("listed", [True, False])
def test_incomplete_cache_is_told_and_completed_later(
    fake: FakeHub, tmp_path: Path, lost: str, listed: bool
) -> None:
    fake.push(REPO, {**ALLOWED, **SHARDS, **INDEX})
    original = Path(constants.HF_HUB_CACHE)
    folder = tmp_path / "copy" / _get(REPO).folder.relative_to(original)
    # A copy, since huggingface_hub remembers the list of files of the original in memory.
    shutil.copytree(original, tmp_path / "copy", symlinks=True)
    if not listed:  # as older versions of huggingface_hub leave their cache
        shutil.rmtree(folder.parents[1] / "trees")
    (folder / lost).resolve().unlink()
    (folder / lost).unlink()
    fake.answer_to_all = Answer(502)
    if lost == "tokenizer.json" and not listed:
        # Nothing tells that the repository has one.
        assert _get(REPO, cache_dir=tmp_path / "copy").folder == folder
    else:
        with pytest.raises(CheckpointDownloadError, match=r"its cache (lacks|holds only)"):
            _get(REPO, cache_dir=tmp_path / "copy")
    fake.answer_to_all = None
    assert _get(REPO, cache_dir=tmp_path / "copy").folder == folder
    assert _files(folder) == {**ALLOWED, **SHARDS, **INDEX}


# --- progress ------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [{**ALLOWED, **WEIGHTS}, {**ALLOWED, **SHARDS, **INDEX}])
def test_progress_goes_to_stderr_unless_quiet(
    fake: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    files: Mapping[str, bytes],
) -> None:
    monkeypatch.setenv("TQDM_POSITION", "-1")  # show it where there is no terminal, too
    fake.push(REPO, files)
    _get(REPO, cache_dir=tmp_path / "quiet", quiet=True)
    assert capsys.readouterr() == ("", "")
    _get(REPO, cache_dir=tmp_path / "loud")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "100%" in shown.err


# --- what --model names --------------------------------------------------------------------------


def test_folder_wins_over_the_hub(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = fake.push(REPO, WHOLE)
    monkeypatch.chdir(tmp_path)
    Path(REPO).mkdir(parents=True)
    location = resolve_model(REPO)
    assert location == ModelLocation(folder=Path(REPO))
    assert location.name == "Doge-Tiny"
    assert fake.requests == []
    assert resolve_model(f"{REPO}@main").revision == commit


@pytest.mark.parametrize("argument", ["no/such/folder", "nothing", "./SmallDoge/Doge-20M"])
def test_what_is_neither_folder_nor_id_is_told(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no folder {argument}, and it is no hub id"):
        resolve_model(argument)
    assert fake.requests == []


# --- the command ---------------------------------------------------------------------------------

Build = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Build:
    """Runs build_engine with these arguments in an empty folder; status, JSON and stderr."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        status = build_engine.main([*arguments, "--backend", "none", "--json"])
        printed = capsys.readouterr()
        return status, json.loads(printed.out), printed.err

    return run


def _checkpoint_files(folder: Path) -> dict[str, bytes]:
    """The tiny checkpoint in two shards, with a tokenizer."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = (names[::2], names[1::2])
    files = {
        "config.json": (folder / "config.json").read_bytes(),
        "tokenizer.json": (BUNDLED_CHECKPOINT / "tokenizer.json").read_bytes(),
        "generation_config.json": b'{"eos_token_id": 1}',
    }
    weight_map = {}
    for shard, half in zip(SHARDS, halves, strict=True):
        part = {name: np.ascontiguousarray(tensors[name]) for name in half}
        save_file(part, folder.parent / shard)
        files[shard] = (folder.parent / shard).read_bytes()
        weight_map |= dict.fromkeys(half, shard)
    files[INDEX_NAME] = json.dumps({"weight_map": weight_map}).encode()
    return files


@pytest.mark.slow
def test_bundle_from_the_hub_names_the_commit_and_needs_no_cache(
    fake: FakeHub,
    build: Build,
    tiny_dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copied = shutil.copytree(tiny_dense, tmp_path / "source" / "tiny")
    commit = fake.push(REPO, {**_checkpoint_files(copied), **REFUSED}, "main", "v1")
    status, report, err = build("--model", f"{REPO}@v1")
    assert status == 0, err
    assert report["bundle"] == "build/Doge-Tiny"

    moved = shutil.move("build/Doge-Tiny", tmp_path / "moved")
    shutil.rmtree(tmp_path / "hf-home")
    assert not [path for path in Path(moved).rglob("*") if path.is_symlink()]
    bundle = Bundle.open(Path(moved), verify=True)
    source = bundle.manifest.source
    assert (source.kind, source.name, source.revision) == ("hub", REPO, commit)
    assert {file.name for file in (Path(moved) / "checkpoint").iterdir()} == {
        "config.json",
        INDEX_NAME,
        *SHARDS,
    }
    assert (Path(moved) / "tokenizer" / "tokenizer.json").is_file()
    assert str(tmp_path) not in (Path(moved) / "manifest.json").read_text(encoding="utf-8")
    arguments = ["--backend", "torch", "--prompt-ids", "3,4", "--max-tokens", "2", "--quiet"]
    capsys.readouterr()
    assert generate.main([str(moved), *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "torch"


def test_build_of_a_pickle_repository_is_one_line(fake: FakeHub, build: Build) -> None:
    fake.push(REPO, {**ALLOWED, **PICKLES})
    status, report, err = build("--model", REPO)
    assert status == 1
    assert report["error"]["kind"] == "UnsupportedModelError"
    assert err == f"build_engine: {report['error']['message']}\n"
    assert not list(Path().iterdir())


def test_build_of_a_gated_repository_is_one_line(fake: FakeHub, build: Build) -> None:
    fake.push(REPO, WHOLE, gated=True)
    status, report, err = build("--model", REPO)
    assert status == 1
    assert report["error"]["kind"] == "CheckpointDownloadError"
    assert err == f"build_engine: {report['error']['message']}\n"


def test_quiet_build_from_the_cache_says_nothing(
    fake: FakeHub, build: Build, tiny_dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_POSITION", "-1")
    fake.push(REPO, {name: (tiny_dense / name).read_bytes() for name in os.listdir(tiny_dense)})
    for network in (True, False):
        if not network:
            fake.stop()
        status, report, err = build("--model", REPO, "--dry-run", "--quiet")
        assert (status, err) == (0, "")
        assert report["bundle"] == "build/Doge-Tiny"
    assert "cannot be reached" in build("--model", REPO, "--dry-run")[2]
    assert not list(Path().iterdir())


@pytest.mark.slow
def test_environment_names_the_hub_and_its_cache(
    fake: FakeHub, tiny_dense: Path, tmp_path: Path
) -> None:
    fake.push(REPO, {name: (tiny_dense / name).read_bytes() for name in os.listdir(tiny_dense)})
    command = [sys.executable, str(ROOT / "export" / "build_engine.py"), "--dry-run"]
    home = tmp_path / "another"
    done = subprocess.run(
        [*command, "--model", REPO],
        cwd=tmp_path,
        env={**os.environ, "HF_ENDPOINT": fake.endpoint, "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "build/Doge-Tiny (not written)" in done.stdout
    assert list(home.glob("hub/models--*/snapshots/*/model.safetensors"))
