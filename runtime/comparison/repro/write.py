"""A difference as a folder that another engineer can run."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.bundle import config_from_dict
from runtime.comparison.repro import run_piece
from runtime.comparison.repro.pieces import SIDES, Attempt, find_piece
from runtime.comparison.repro.polygraphy_files import write_polygraphy_files
from runtime.comparison.repro.readme import describe_numbers, describe_piece
from runtime.comparison.repro.replay import Side
from runtime.comparison.repro.target import Target, targets_of
from runtime.comparison.repro.values import NoValueError
from runtime.comparison.run_report import RunReport
from runtime.comparison.taps import CHOICES, LOGITS, TOKEN, TapName
from runtime.environment import cpu_name, describe_versions, system_name

Array = npt.NDArray[Any]
_AS_SCRIPT = '\n\nif __name__ == "__main__":\n    sys.exit(main())\n'


@dataclass(frozen=True, kw_only=True)
class ReproSummary:
    """What was written.

    Attributes:
        folder: where.
        tap: the value that parts.
        prompt: in which prompt.
        step: at which step.
        size: how much of the model the piece is, in words; None where no model could be cut.
        differs: whether the piece, run alone, still differs; None where there is none.
        nodes: how many nodes it has.
        weight_bytes: of its stored tensors.
        sentence: all of this in words.
    """

    folder: Path
    tap: str
    prompt: int
    step: int
    size: str | None
    differs: bool | None
    nodes: int
    weight_bytes: int
    sentence: str


def write_repro(
    folder: Path,
    report: RunReport,
    reference: Side,
    candidate: Side,
    *,
    tolerance: tuple[float, float],
) -> ReproSummary:
    """Write the smallest piece that shows why a comparison failed; the whole folder or nothing.

    The candidate's ONNX model is cut, or the reference's where the candidate has none. Where
    neither has one, the folder holds both rungs' numbers and the command that makes them again.

    Args:
        folder: must not be there or be empty.
        report: with the verdict `fail`.
        reference: the run that is right by definition.
        candidate: the run in question.
        tolerance: atol and rtol of the untapped logits.

    Raises:
        BackendUnavailableError: a package is missing, or the rung that is cut cannot run here.
        FileExistsError: there is something at `folder`.
        ValueError: the verdict is not `fail`, or a value that a piece needs was not recorded.
    """
    if report.verdict != "fail":
        raise ValueError("the comparison passed; there is nothing to reproduce")
    check_folder(folder)
    sides = (reference, candidate)
    config = config_from_dict(reference.run.subject.config)
    targets = targets_of(report.first, (reference.run, candidate.run), config, tolerance)
    cut = next((side for side in (1, 0) if sides[side].model is not None), None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".repro-", dir=folder.parent) as work:
        written = Path(work) / "piece"
        written.mkdir()
        if cut is None:
            summary = _write_numbers(written, folder, targets[-1], sides)
        else:
            attempt = find_piece(written, targets, sides, cut, config)
            summary = _complete(written, folder, attempt, sides, cut)
        _write_json(written / "versions.json", _versions(sides))
        if folder.exists():
            folder.rmdir()
        os.rename(written, folder)
    return summary


def check_folder(folder: Path) -> None:
    """Refuse to write into something; to be called before a long comparison.

    Raises:
        FileExistsError: there is a file, or a folder that holds something.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(
            f"{folder} is there and not empty; --repro writes a folder of its own, name a new one"
        )


def _complete(
    written: Path, folder: Path, attempt: Attempt, sides: tuple[Side, Side], cut: int
) -> ReproSummary:
    """Everything of a piece's folder but what running it needed already."""
    output = attempt.check["output"]
    for name, array in attempt.given.items():
        np.savez(written / f"{name}.npz", allow_pickle=False, **{output: array})
    _write_json(written / "check.json", attempt.check)
    script = Path(run_piece.__file__).read_text(encoding="utf-8") + _AS_SCRIPT
    (written / "run.py").write_text(script, encoding="utf-8")
    command = write_polygraphy_files(
        written, attempt.fed.arrays, attempt.check, attempt.given[SIDES[1 - cut]]
    )
    (written / "README.md").write_text(
        describe_piece(attempt, sides, cut, command), encoding="utf-8"
    )
    found, shows = attempt.target.found, attempt.judgement.differs
    weights = sum(attempt.piece.weights.values())
    told = "and still differs" if shows else "and does NOT differ when it runs alone"
    return ReproSummary(
        folder=folder,
        tap=found.tap,
        prompt=found.prompt,
        step=found.step,
        size=attempt.size,
        differs=shows,
        nodes=attempt.piece.nodes,
        weight_bytes=weights,
        sentence=(
            f"{folder}: {found.tap} of prompt {found.prompt}, step {found.step}, computed "
            f"{attempt.size} ({attempt.piece.nodes} nodes, {weights} bytes of weights) {told}; "
            "run it with: python run.py"
        ),
    )


def _write_numbers(
    written: Path, folder: Path, target: Target, sides: tuple[Side, Side]
) -> ReproSummary:
    """Neither rung has a graph: what both gave, and how to make it again."""
    found = target.found
    for word, side in zip(SIDES, sides, strict=True):
        run = side.run.prompts[found.prompt]
        name = _recorded_under(target.tap)
        value = run.values[found.step].get(name) if run.values else None
        if value is None and name == LOGITS:
            value = run.logits[found.step]
        if value is None:
            raise NoValueError(name)
        np.savez(written / f"{word}.npz", allow_pickle=False, **{name: value})
    prompt = sides[0].run.prompts[found.prompt]
    np.savez(
        written / "inputs.npz",
        allow_pickle=False,
        prompt=np.array(prompt.prompt, np.int64),
        tokens=prompt.tokens[: found.step],
    )
    (written / "README.md").write_text(describe_numbers(target, sides), encoding="utf-8")
    return ReproSummary(
        folder=folder,
        tap=found.tap,
        prompt=found.prompt,
        step=found.step,
        size=None,
        differs=None,
        nodes=0,
        weight_bytes=0,
        sentence=(
            f"{folder}: neither rung has an ONNX model to cut, so it holds the numbers of "
            f"{found.tap} on both sides and the command that makes them again"
        ),
    )


def _recorded_under(tap: TapName) -> str:
    """The recorded value that a tap is, or is made of."""
    if tap.kind in CHOICES:
        return f"layers.{tap.layer}.{CHOICES[tap.kind]}"
    return LOGITS if tap.kind == TOKEN else tap.name


def _versions(sides: tuple[Side, Side]) -> dict[str, Any]:
    """What the numbers depend on; no path and no name of a person or host."""
    rungs = {}
    for word, side in zip(SIDES, sides, strict=True):
        subject = side.run.subject
        rungs[word] = {
            "rung": subject.rung,
            "precision": subject.precision,
            "versions": dict(subject.versions),
            "machine": dict(subject.machine),
        }
    subject = sides[0].run.subject
    return {
        "weights_sha256": subject.weights_sha256,
        "generation": subject.generation,
        "config": dict(subject.config),
        "written_with": describe_versions("onnx", "onnx-ir", "polygraphy"),
        "written_on": {"system": system_name(), "processor": cpu_name()},
        **rungs,
    }


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
