"""What `score --ids` refuses, before any model is opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.command import FAILURE
from runtime.score import main
from tests.fake_bundle import write_fake_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    write_fake_bundle(folder)
    return folder


def refusal(bundle: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(bundle), "--ids", str(file)]) == FAILURE
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize("content", [b"", b"1 2 3\n"])
def test_file_that_is_no_array_is_named(bundle, tmp_path, capsys, content):
    file = tmp_path / "ids.npy"
    file.write_bytes(content)
    message = refusal(bundle, file, capsys)
    assert "ids.npy is no .npy file of int64 [B, S]" in message
    assert "pickle" not in message


@pytest.mark.parametrize("shape", [(3,), (2, 1), (0, 4)])
def test_array_of_another_shape_is_described(bundle, tmp_path, capsys, shape):
    file = tmp_path / "ids.npy"
    np.save(file, np.zeros(shape, np.int64))
    assert f"holds int64 {list(shape)}, expected int64 [B, S]" in refusal(bundle, file, capsys)


def test_archive_of_arrays_is_refused(bundle, tmp_path, capsys):
    file = tmp_path / "ids.npz"
    np.savez(file, a=np.zeros((1, 4)))
    assert "several arrays" in refusal(bundle, file, capsys)


def test_folder_instead_of_a_file_is_one_line(bundle, tmp_path, capsys):
    assert "directory" in refusal(bundle, tmp_path, capsys)
