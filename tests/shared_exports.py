"""Exports and bundles that a run of tests makes once, whichever of its processes asks first.

Exporting a small network takes seconds, and many tests begin with the same one.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from export.graph import export_onnx
from model.doge import DogeForCausalLM
from tests.command_calls import Built, build_bundle

# Where processes of one run find what the others have made; tests/conftest.py sets it.
RUN_FOLDER = "DOGE_TESTS_RUN_FOLDER"


class _Contents(pickle.Pickler):
    """Writes all that an object holds: tensors by their numbers, sets in order."""

    def reducer_override(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            numbers = given.detach().contiguous().numpy().tobytes()
            return Tensor, (str(given.dtype), tuple(given.shape), numbers)
        if isinstance(given, nn.Module):
            parts = vars(given).items()
            return type(given), (), {n: sorted(v) if isinstance(v, set) else v for n, v in parts}
        return NotImplemented


def export_once(network: DogeForCausalLM, path: Path, *, max_seq_len: int) -> Path:
    """As `export_onnx`; of an equal network that was exported before, a copy of the files."""
    contents = io.BytesIO()
    _Contents(contents).dump((network, path.name, max_seq_len))

    def make(folder: Path) -> None:
        export_onnx(network, folder / path.name, max_seq_len=max_seq_len)

    for file in _made_once(hashlib.sha256(contents.getvalue()).hexdigest(), make).iterdir():
        shutil.copyfile(file, path.parent / file.name)
    return path


def bundle_once(name: str, *arguments: object) -> Built:
    """The bundle that the build command makes of these arguments; `name` stands for them."""

    def make(folder: Path) -> None:
        report = build_bundle(*arguments, "--output", folder / "bundle")
        (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")

    folder = _made_once(name, make)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Built(folder / "bundle", report)


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name, filled by the first who asks; others wait for it."""
    shared = Path(os.environ[RUN_FOLDER])
    folder, done = shared / name, shared / f"{name}.done"
    with _locked(shared / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
