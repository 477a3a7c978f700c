"""An ONNX model with named values among its outputs, for looking inside. Needs the package onnx."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.backends.base import BackendUnavailableError
from runtime.cpu_threads import THE_BACKENDS_CHOICE, CpuThreads

_COPY = "tapped.onnx"


def tapped_session(
    path: Path, names: Sequence[str], threads: CpuThreads = THE_BACKENDS_CHOICE
) -> tuple[Any, tuple[str, ...]]:
    """A session on the model at `path` that also gives named values.

    The copy that has them as outputs lies in a temporary folder beside links to the weights, and
    is gone once the session has been made.

    Args:
        path: an ONNX model; it is not changed.
        names: values to give, where the model has them.
        threads: of the session.

    Returns:
        The session, and those of the names that it gives, in the order of `names`.

    Raises:
        BackendUnavailableError: a package is missing, or onnxruntime refuses the copy.
    """
    from runtime.backends.onnxruntime_backend import make_session

    with tempfile.TemporaryDirectory(prefix="dogetrt-taps-") as folder:
        copy, given = _write_copy(path, names, Path(folder))
        return make_session(str(copy), threads), given


def _write_copy(path: Path, names: Sequence[str], folder: Path) -> tuple[Path, tuple[str, ...]]:
    if importlib.util.find_spec("onnx") is None:
        raise BackendUnavailableError(
            "looking inside an ONNX model needs the package onnx; run: pip install "
            "'doge-tensorrt[export]', or compare without --taps"
        )
    import onnx

    model = onnx.load(path, load_external_data=False)
    computed = {name for node in model.graph.node for name in node.output}
    outputs = {value.name for value in model.graph.output}
    given = tuple(name for name in names if name in computed)
    for name in given:
        if name not in outputs:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    for location in sorted(
        entry.value
        for weight in model.graph.initializer
        for entry in weight.external_data
        if entry.key == "location"
    ):
        _link(path.parent / location, folder / location)
    copy = folder / _COPY
    copy.write_bytes(model.SerializeToString())
    return copy, given


def _link(source: Path, target: Path) -> None:
    """A hard link, which onnxruntime takes for a file of the folder; a copy where there is none."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
