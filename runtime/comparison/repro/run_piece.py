"""Run this piece and compare what it gives with what was expected: python run.py.

Exit status 0 says that they agree, 3 that they differ, 1 that the piece could not be run. Needs
numpy and onnxruntime and nothing else; the folder can be moved anywhere.
"""

# Every folder gets a copy of this file; it imports nothing of the project.

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
AGREES, FAILED, DIFFERS = 0, 1, 3


@dataclass(frozen=True)
class Judgement:
    """What came out.

    Attributes:
        differs: whether it is more than the tolerance allows, or another choice.
        sentence: error and tolerance in words.
        error: largest absolute difference; of a choice, how many differ.
    """

    differs: bool
    sentence: str
    error: float


def run_model(folder: Path, check: Mapping[str, Any]) -> Array:
    """What the piece's model gives for its inputs.

    Raises:
        ImportError: onnxruntime is not installed.
        OSError: a file of the folder is missing.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    there = onnxruntime.get_available_providers()
    providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in there]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=providers)
    with np.load(folder / "inputs.npz", allow_pickle=False) as inputs:
        (output,) = session.run([check["output"]], dict(inputs))
    return np.asarray(output)


def judge(check: Mapping[str, Any], expected: Array, actual: Array, choices: Path) -> Judgement:
    """Compare by the rule in check.json.

    Args:
        check: that rule.
        expected: with the batch's axis.
        actual: likewise, of the same shape.
        choices: the file with the rules of choices.
    """
    if expected.shape != actual.shape:
        return Judgement(
            True, f"shape {list(actual.shape)}, expected {list(expected.shape)}", np.inf
        )
    if check["slots"] is not None:  # of a cache, those that are filled
        begin, end = check["slots"]
        expected, actual = expected[:, :, begin:end], actual[:, :, begin:end]
    for name, array in (("expected", expected), ("actual", actual)):
        if not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            return Judgement(True, f"{count} {name} numbers are not finite", np.inf)
    if check["rule"] == "numeric":
        return _judge_numbers(check, expected, actual)
    rules = _load(choices)
    a, b = (_chosen(check, array, rules) for array in (expected, actual))
    count = int((a != b).any(-1).sum())
    return Judgement(
        count > 0,
        f"{count} of {a[..., 0].size} choices ({check['rule']}) differ; scores are "
        f"{np.abs(expected - actual).max():.3g} apart, tolerated are none",
        count,
    )


def limits(check: Mapping[str, Any], expected: Array) -> npt.NDArray[np.float64]:
    """What each token may differ by: atol + rtol · its largest expected number."""
    size = _by_token(check, expected)
    relative = np.maximum(size, np.finfo(np.float32).tiny) * float(check["rtol"])
    return np.asarray(relative + float(check["atol"]), np.float64)


def _judge_numbers(check: Mapping[str, Any], expected: Array, actual: Array) -> Judgement:
    difference = _by_token(check, actual.astype(np.float64) - expected)
    tolerated = limits(check, expected)
    share = difference / tolerated
    worst = int(share.argmax())
    where = "" if check["token_axis"] is None else f" at token {worst}"
    return Judgement(
        bool(share[worst] > 1),
        f"error {difference[worst]:.6g}{where}, tolerance {tolerated[worst]:.6g} (atol "
        f"{check['atol']:g} + rtol {check['rtol']:g} of the largest expected number): "
        f"{share[worst]:.3g} of it",
        float(difference[worst]),
    )


def _by_token(check: Mapping[str, Any], array: Array) -> npt.NDArray[np.float64]:
    """[tokens] largest absolute number of each, or [1] where tokens are not told apart."""
    sizes = np.abs(array.astype(np.float64))
    if check["token_axis"] is None:
        return np.array([sizes.max()])
    moved = np.moveaxis(sizes, check["token_axis"], 0)
    largest: Array = moved.reshape(len(moved), -1).max(-1)
    return largest


def _chosen(check: Mapping[str, Any], scores: Array, rules: ModuleType) -> Array:
    """[questions, tokens, candidates] bool, by the scores alone."""
    settings = check["settings"]
    if check["rule"] == "kept_keys":
        choice = rules.kept_keys(
            scores[0, ..., 0], settings["first_slot"], settings["new"], settings["window"]
        )
    elif check["rule"] == "experts":
        choice = rules.chosen_experts(scores[0], SimpleNamespace(**settings))
    else:
        best = scores[0].argmax(-1)  # [M]
        return np.asarray(np.arange(scores.shape[-1]) == best[None, :, None])
    return np.asarray(choice.chosen)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("choices", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} is missing; copy the whole folder")
    module = importlib.util.module_from_spec(spec)
    sys.modules["choices"] = module  # where its dataclasses look their own annotations up
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Run, compare, print."""
    folder = Path(__file__).resolve().parent
    try:
        check = json.loads((folder / "check.json").read_text(encoding="utf-8"))
        with np.load(folder / check["expected"], allow_pickle=False) as arrays:
            expected = arrays[check["output"]]
        actual = run_model(folder, check)
        found = judge(check, expected, actual, folder / "choices.py")
    except Exception as error:  # onnxruntime raises classes of its own that share no base
        print(f"run.py: {error}", file=sys.stderr)
        return FAILED
    verdict = "differs" if found.differs else "agrees"
    print(f"{verdict}: {check['tap']} ({check['output']}), {found.sentence}")
    return DIFFERS if found.differs else AGREES
