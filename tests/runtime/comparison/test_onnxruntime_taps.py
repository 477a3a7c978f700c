"""Taps of ONNX models, canonical and lowered, against those of the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from export.lowerings.cpu import CpuPrecision, lower_for_cpu
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from runtime.backends.tapped_model import tapped_session
from runtime.comparison.record import Run, record_run
from runtime.comparison.run_report import RunReport, compare_runs
from runtime.comparison.taps import comparison_taps, sources_of
from runtime.cpu_threads import CpuThreads
from tests.export.conftest import Exported
from tests.runtime.comparison.planted_faults import (
    PROMPTS,
    STEPS,
    run_torch,
    subject_of,
    with_precision,
)

CASES = ("g3_moe", "g4h_window", "g4_window")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=CASES)
def exported(
    request: pytest.FixtureRequest,
    golden: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    return Exported(golden(request.param), tmp_path_factory.mktemp(request.param))


def run_onnx(case: Exported, path: Path, heads: int | None, like: Run) -> Run:
    config, generation = case.network.config, case.network.generation
    taps = comparison_taps(config, generation, selects=case.slots > config.keep_window_size)
    contract = case.contract_with(score_heads=heads)
    untapped = case.backend_on(path, contract)
    session, given = tapped_session(path, sources_of(taps), CpuThreads(1))
    tapped = OnnxRuntimeBackend(
        session,
        contract,
        limits=case.limits,
        variant=path.stem,
        vocab_size=config.vocab_size,
        router_mode=config.router_mode if config.is_moe else None,
    )
    tapped.taps = given
    return record_run(
        subject_of(case.network, f"onnxruntime:{path.stem}"),
        untapped,
        tapped,
        taps,
        PROMPTS,
        STEPS,
        tokens=[prompt.tokens for prompt in like.prompts],
    )


def compare_lowered(case: Exported, precision: CpuPrecision) -> RunReport:
    path = case.path.parent / f"{precision}.onnx"
    config = case.network.config
    lowered = lower_for_cpu(case.path, path, config, slots=case.slots, precision=precision)
    reference = run_torch(case.network)
    run = with_precision(run_onnx(case, path, lowered.score_heads, reference), precision)
    tolerance = (1e-3, 1e-4) if precision == "fp32" else (3.0, 0.3)
    return compare_runs(reference, run, config, atol=tolerance[0], rtol=tolerance[1])


def test_canonical_model_gives_every_tap_and_is_clean(exported: Exported) -> None:
    reference = run_torch(exported.network)
    run = run_onnx(exported, exported.path, None, reference)
    report = compare_runs(reference, run, exported.network.config, atol=1e-3, rtol=1e-4)
    assert not report.missing
    assert (report.verdict, report.first) == ("pass", None), report.reason


def test_model_lowered_for_the_cpu_is_clean_where_it_has_names(exported: Exported) -> None:
    report = compare_lowered(exported, "fp32")
    assert {name.rpartition(".")[2] for name in report.missing} == {"query"}
    assert (report.verdict, report.first) == ("pass", None), report.reason


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rounding_of_narrow_weights_is_told_from_other_choices(
    exported: Exported, precision: CpuPrecision
) -> None:
    report = compare_lowered(exported, precision)
    choices = [tap for tap in report.taps if tap.worst.kind == "discrete"]
    numbers = [tap for tap in report.taps if tap.worst.kind == "numeric"]
    assert max(tap.worst.error for tap in numbers) > 1e-3
    parted = [tap for tap in choices if tap.parting]
    assert parted, "random weights of 8 bits choose otherwise somewhere"
    for tap in parted:
        assert tap.worst.reference_margin is not None
        assert tap.worst.candidate_margin is not None
        assert 0 <= tap.near_ties <= tap.parting


def test_the_model_itself_is_not_changed_and_nothing_is_left_behind(exported: Exported) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in exported.path.parent.iterdir()}
    _, given = tapped_session(exported.path, ["layers.1.output", "no.such.value"], CpuThreads(1))
    assert given == ("layers.1.output",)
    assert {p.name: p.stat().st_mtime_ns for p in exported.path.parent.iterdir()} == before
