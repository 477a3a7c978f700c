"""How sessions of ONNX Runtime are set up, and when the CPU's instructions are looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from runtime.backends import onnxruntime_backend
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend, make_session
from runtime.bundle import Bundle
from runtime.cpu_threads import THE_BACKENDS_CHOICE, CpuThreads, default_threads
from tests.fake_bundle import write_fake_bundle


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model that gives back its input."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "same", ends[:1], ends[1:])
    path = tmp_path / "same.onnx"
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return str(path)


@pytest.mark.parametrize(
    ("threads", "count", "spinning"),
    [
        (THE_BACKENDS_CHOICE, default_threads(), "1"),
        (CpuThreads(3), 3, "1"),
        (CpuThreads(1, spinning=False), 1, "0"),
    ],
)
def test_session_has_the_threads_that_were_asked_for(
    model: str, threads: CpuThreads, count: int, spinning: str
) -> None:
    options = make_session(model, threads).get_session_options()
    assert options.intra_op_num_threads == count
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == spinning
    assert options.inter_op_num_threads == 1
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL


@pytest.mark.parametrize(("precision", "told"), [("fp32", False), ("int8", True), ("int4", True)])
def test_only_narrow_weights_ask_what_the_cpu_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, told: bool
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        onnxruntime_backend, "warn_of_missing_instructions", lambda: asked.append(precision)
    )
    monkeypatch.setattr(onnxruntime_backend, "make_session", lambda *_: _NoSession())
    bundle = Bundle.open(write_fake_bundle(tmp_path / "bundle"))
    variant = replace(bundle.variant("onnxruntime", None), precision=precision)  # type: ignore[arg-type]
    OnnxRuntimeBackend.open(bundle, variant, CpuThreads(1))
    assert bool(asked) == told


class _NoSession:
    def get_providers(self) -> list[Any]:
        return []
