"""ONNX models of golden checkpoints, spoilt in one place, and folders that show it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from export.lowerings.cpu import lower_for_cpu
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from runtime.backends.tapped_model import tapped_session
from runtime.comparison.record import Run, record_run
from runtime.comparison.repro import ReproSummary, Side, write_repro
from runtime.comparison.run_report import RunReport, compare_runs
from runtime.comparison.taps import comparison_taps, sources_of
from runtime.cpu_threads import CpuThreads
from tests.export.conftest import Exported
from tests.runtime.comparison.planted_faults import (
    PROMPTS,
    STEPS,
    subject_of,
)

CASES = ("g3_moe", "g4_window", "g4h_window", "g1")
FORMS = ("canonical", "lowered")
TOLERANCE = (1e-3, 1e-4)
Weights = dict[str, np.ndarray]


class Model:
    """A golden checkpoint's ONNX model in one form, to be spoilt."""

    def __init__(self, case: Exported, form: str) -> None:
        self.case, self.form, self.heads = case, form, None
        self.path = case.path
        if form != "canonical":
            self.path = case.path.parent / f"{form}.onnx"
            precision = "fp32" if form == "lowered" else form
            config, slots = case.network.config, case.slots
            lowered = lower_for_cpu(
                case.path,
                self.path,
                config,
                slots=slots,
                precision=precision,  # type: ignore[arg-type]
            )
            self.heads = lowered.score_heads
        self.weights: Weights = {
            w.name: numpy_helper.to_array(w) for w in onnx.load(self.path).graph.initializer
        }

    def spoil(self, folder: Path, name: str, change: Callable[[np.ndarray], None]) -> Path:
        """A copy in which a weight is changed."""
        model = onnx.load(self.path)
        replace_weight(model, name, self.changed(name, change))
        path = folder / "spoilt.onnx"
        onnx.save(model, path)
        return path

    def changed(self, name: str, change: Callable[[np.ndarray], None]) -> np.ndarray:
        array = self.weights[name].copy()
        change(array)
        return array

    def weight_of(self, layer: int, part: str) -> str:
        """The one stored tensor of a layer whose name holds `part`."""
        found = [n for n in self.weights if f".layers.{layer}." in f".{n}" and part in n]
        assert len(found) == 1, found
        return found[0]

    def backend(self, path: Path) -> OnnxRuntimeBackend:
        return self.case.backend_on(path, self.case.contract_with(score_heads=self.heads))

    def run(self, path: Path, like: Run) -> Run:
        config, generation = self.case.network.config, self.case.network.generation
        taps = comparison_taps(
            config, generation, selects=self.case.slots > config.keep_window_size
        )
        session, given = tapped_session(path, sources_of(taps), CpuThreads(1))
        tapped = OnnxRuntimeBackend(
            session,
            self.case.contract_with(score_heads=self.heads),
            limits=self.case.limits,
            variant=self.form,
            vocab_size=config.vocab_size,
            router_mode=config.router_mode if config.is_moe else None,
        )
        tapped.taps = given
        return record_run(
            subject_of(self.case.network, f"onnxruntime:{self.form}"),
            self.backend(path),
            tapped,
            taps,
            PROMPTS,
            STEPS,
            tokens=[prompt.tokens for prompt in like.prompts],
        )

    def sides(self, path: Path, reference: Run) -> tuple[Side, Side]:
        return (
            Side(run=reference, open=lambda: self.case.torch),
            Side(run=self.run(path, reference), open=lambda: self.backend(path), model=path),
        )


def replace_weight(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    (place,) = (w for w in model.graph.initializer if w.name == name)
    place.CopyFrom(numpy_helper.from_array(array, name))


def compare(model: Model, sides: tuple[Side, Side]) -> RunReport:
    config = model.case.network.config
    return compare_runs(sides[0].run, sides[1].run, config, atol=TOLERANCE[0], rtol=TOLERANCE[1])


def write(folder: Path, model: Model, sides: tuple[Side, Side]) -> tuple[RunReport, ReproSummary]:
    report = compare(model, sides)
    assert report.verdict == "fail", report.reason
    return report, write_repro(folder, report, *sides, tolerance=TOLERANCE)


def run_command(folder: Path) -> subprocess.CompletedProcess[str]:
    """The folder's one command in a fresh process that knows nothing of this repository."""
    return subprocess.run(
        [sys.executable, "-I", "run.py"],
        cwd=folder,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def scale_from_slot(source: Path, target: Path, value: str, consumer: str, slot: int) -> Path:
    """A copy of a model in which a cache tensor is 1.5 times as large for `consumer`, in passes
    that begin at `slot` or behind it."""
    model = onnx.load(source)
    nodes = list(model.graph.node)
    place = next(
        i for i, node in enumerate(nodes) if node.op_type == consumer and value in node.input
    )
    stored = {
        "planted.slot": np.array(slot, np.int64),
        "planted.half": np.array(0.5, np.float32),
        "planted.one": np.array(1, np.float32),
        "planted.shape": np.array([-1, 1, 1, 1], np.int64),
    }
    for name, array in stored.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    make = onnx.helper.make_node
    inserted = [
        make("GreaterOrEqual", ["write_index", "planted.slot"], ["planted.late"]),
        make("Cast", ["planted.late"], ["planted.number"], to=onnx.TensorProto.FLOAT),
        make("Mul", ["planted.number", "planted.half"], ["planted.more"]),
        make("Add", ["planted.more", "planted.one"], ["planted.factor"]),
        make("Reshape", ["planted.factor", "planted.shape"], ["planted.by_row"]),
        make("Mul", [value, "planted.by_row"], ["planted.value"]),
    ]
    for index, name in enumerate(nodes[place].input):
        if name == value:
            nodes[place].input[index] = "planted.value"
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *inserted, *nodes[place:]])
    onnx.save(model, target)
    return target


def spoilt_sides(
    model: Model, reference: Run, folder: Path, layer: int, part: str, number: float = 0.5
) -> tuple[str, tuple[Side, Side]]:
    name = model.weight_of(layer, part)

    def change(weight: np.ndarray) -> None:
        weight.reshape(-1)[1] += number

    return name, model.sides(model.spoil(folder, name, change), reference)
