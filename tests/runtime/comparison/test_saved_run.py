"""A run survives its file exactly, and a file that is no such run is refused in one sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoint import load_checkpoint
from runtime.comparison.record import Run
from runtime.comparison.saved_run import FORMAT_VERSION, check_comparable, load_run, save_run
from runtime.comparison.text import TextRun
from tests.runtime.comparison.planted_faults import run_torch


@pytest.fixture(scope="module")
def run(golden: Callable[[str], Path]) -> Run:
    """A tapped run with a text; not to be changed."""
    found = run_torch(load_checkpoint(golden("g4_moe")), steps=3)
    logits = tuple(np.random.default_rng(n).normal(size=(n, 97)).astype(np.float32) for n in (4, 2))
    text = TextRun(windows=((1, 2, 3, 4), (5, 6)), logits=logits)
    return dataclasses.replace(found, text=text)


def assert_equal(a: Any, b: Any) -> None:
    """Equal in every field and every bit; Path, kinds of sequence and of mapping aside."""
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        for field in dataclasses.fields(a):
            assert_equal(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, tuple | list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def test_a_run_comes_back_as_it_was(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "any name"
    save_run(run, path)
    assert_equal(load_run(path), run)
    check_comparable(run, load_run(path))
    assert [p.name for p in tmp_path.iterdir()] == ["any name"]


def test_a_run_without_taps_comes_back_without(run: Run, tmp_path: Path) -> None:
    prompts = tuple(
        dataclasses.replace(p, values=(), tapped_logits=None, own_tokens=None) for p in run.prompts
    )
    bare = dataclasses.replace(run, prompts=prompts, taps=(), text=None)
    save_run(bare, tmp_path / "run")
    assert_equal(load_run(tmp_path / "run"), bare)


def test_a_failed_save_keeps_the_old_run(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run"
    save_run(run, path)
    before = path.read_bytes()
    unwritable = dataclasses.replace(
        run, subject=dataclasses.replace(run.subject, config={"x": object()})
    )
    with pytest.raises(TypeError):
        save_run(unwritable, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_missing_run_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run .*none\.run; write one with .* --save"):
        load_run(tmp_path / "none.run")


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with np.load(path) as arrays:
        content = dict(arrays)
    change(content)
    with path.open("wb") as file:
        np.savez(file, **content)


def with_header(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        header = json.loads(bytes(content["header"])) | changes
        content["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)

    return change


def test_another_format_version_is_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run"
    save_run(run, path)
    rewrite(path, with_header(format_version=FORMAT_VERSION + 1))
    with pytest.raises(ValueError, match=r"has format version 2, this version .* reads 1; save it"):
        load_run(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("header"),
        lambda content: content.pop("0/logits"),
        lambda content: content.pop("text/1"),
        lambda content: content.update({"header": np.frombuffer(b"{", np.uint8)}),
        lambda content: content.update({"header": np.frombuffer(b"[1]", np.uint8)}),
        lambda content: content.update({"0/tokens": content["0/tokens"][1:]}),
        lambda content: content.update({"1/logits": content["1/logits"][1:]}),
        lambda content: content.update({"text/0": content["text/0"][1:]}),
        lambda content: content.update({"0/values/embedding": np.zeros(3, np.float32)}),
        with_header(subject={}),
        with_header(prompts=[]),
        with_header(steps="three"),
    ],
)
def test_a_damaged_run_is_refused(run: Run, tmp_path: Path, change: Any) -> None:
    path = tmp_path / "run"
    save_run(run, path)
    rewrite(path, change)
    with pytest.raises(ValueError, match="is no saved run or a damaged one"):
        load_run(path)


@pytest.mark.parametrize("content", [b"", b"words", b"PK\x03\x04 truncated"])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no saved run, or a truncated one") as told:
        load_run(path)
    assert "pickle" not in str(told.value)


def test_a_truncated_run_and_a_flipped_byte_are_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run"
    save_run(run, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        load_run(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match="damaged"):
        load_run(path)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("weights_sha256", "1" * 64, "different checkpoints"),
        ("config", {}, "different checkpoints"),
        ("max_seq_len", 1, "--max-seq-len"),
        ("max_input_len", 1, "--max-input-len"),
        ("router_mode", "mixed", "--router"),
    ],
)
def test_runs_of_other_subjects_are_refused(run: Run, field: str, value: Any, told: str) -> None:
    subject = dataclasses.replace(run.subject, **{field: value})
    with pytest.raises(ValueError, match=told):
        check_comparable(run, dataclasses.replace(run, subject=subject))


def test_runs_that_were_fed_differently_are_refused(run: Run) -> None:
    other = dataclasses.replace(run.prompts[0], tokens=run.prompts[0].tokens + 1)
    changed = dataclasses.replace(run, prompts=(other, *run.prompts[1:]))
    with pytest.raises(ValueError, match="different steps or tokens"):
        check_comparable(run, changed)
    with pytest.raises(ValueError, match="different texts"):
        check_comparable(run, dataclasses.replace(run, text=None))
