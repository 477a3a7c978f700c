"""The evidence file: what is written is read, and anything else is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from pathlib import Path

import pytest

from runtime.gpu_checks.evidence import Evidence
from runtime.gpu_checks.kernels import KernelsSection
from runtime.gpu_checks.machine_paths import without_machine_paths
from runtime.gpu_checks.report import print_evidence
from runtime.gpu_checks.section import run_sections
from tests.gpu_check_subject import checked_bundle, subject_of, value_use
from tests.host_device import HostDevice
from tests.test_architecture import machine_paths

EVIDENCE = Evidence(
    gpu="NVIDIA GeForce RTX 4090 (D)",
    compute_capability="8.9",
    driver_cuda="13.0",
    project_version="0.1.0",
    commit="0123456789" * 4,
    command="python runtime/gpu_check.py build/doge-tiny --seed 3",
    date="2026-12-01",
    seed=3,
    seconds=61.5,
    verdict="fail",
    sections={
        "environment": {"verdict": "pass", "gpu": {"l2_bytes": 1}, "seconds": 0.1},
        "bandwidth": {
            "verdict": "pass", "gb_per_s": 900.5, "fill_gb_per_s": 910.0, "node_us": 1.1
        },
        "kernels": {
            "verdict": "fail",
            "cases": [
                {
                    "bundle": "build/doge-tiny", "op": "ValueGather", "case": "decode [1]",
                    "dtype": "float16", "verdict": "fail", "norm_error": 0.1,
                    "norm_limit": 0.0005, "problems": ["the relative error is 0.1"],
                    "timing": None,
                },
            ],
            "left_out": ["build/doge-tiny, ValueGather float16, prompt of 24: not timed"],
        },
        "engines": {
            "verdict": "skipped",
            "cases": [
                {
                    "bundle": "build/doge-tiny", "candidate": "tensorrt_rtx:fp16",
                    "reference": "torch:fp32", "verdict": "skipped", "report": None,
                    "step_ms": None, "said": "first\\nnot this [GPU]",
                    "chosen": None, "starts": None, "speeds": None,
                },
                {
                    "bundle": "build/doge-tiny", "candidate": "cuda:fp16",
                    "reference": "torch:fp32", "verdict": "pass", "said": "",
                    "report": {"logits": {"max_abs": 0.0123}}, "step_ms": {"median": 0.456},
                    "chosen": {
                        "rules": [
                            {"rule": "drawn", "equal": 63, "steps": 64, "token_ms": 9.0},
                            {"rule": "greedy", "equal": 64, "steps": 64, "token_ms": 0.321},
                        ],
                    },
                    "starts": [{"first_prompt_ms": 812.4}, {"first_prompt_ms": None}],
                    "speeds": [],
                },
            ],
        },
        "later": {"verdict": "pass", "anything": [1, 2]},
    },
)  # fmt: skip


def test_what_is_written_is_read(tmp_path):
    path = EVIDENCE.write(tmp_path / "new" / "folder")
    assert path.name == "evidence-nvidia-geforce-rtx-4090-d.json"
    assert Evidence.read(path) == EVIDENCE
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_later_run_takes_the_place_of_an_earlier_one(tmp_path):
    EVIDENCE.write(tmp_path)
    later = dataclasses.replace(EVIDENCE, seed=4)
    assert Evidence.read(later.write(tmp_path)).seed == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format is 2, this version of the project reads 1"),
        ({"format": True}, "format is True"),
        ({"verdict": "good"}, "verdict is 'good', expected one of pass, fail, skipped"),
        ({"seed": "3"}, "seed is text, expected a whole number"),
        ({"compute_capability": "sm89"}, "compute_capability is 'sm89', expected one like 8.9"),
        ({"commit": "HEAD"}, "commit is 'HEAD'"),
        ({"date": "yesterday"}, "date is 'yesterday'"),
        ({"surplus": 1}, "surplus is an unknown key"),
        ({"sections": {"kernels": []}}, "sections.kernels is a list, expected an object"),
        ({"sections": {"kernels": {}}}, "sections.kernels.verdict is None"),
        (
            {"sections": {"kernels": {"verdict": "pass", "cases": [{"verdict": "fine"}]}}},
            r"sections.kernels.cases\[0\].verdict is 'fine'",
        ),
        ({"sections": {"k": {"verdict": "pass", "cases": 1}}}, "sections.k.cases is a whole num"),
    ],
)
def test_anything_else_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Evidence.from_dict({**EVIDENCE.as_dict(), **change})


def test_every_field_is_needed():
    data = EVIDENCE.as_dict()
    del data["seed"], data["gpu"]
    with pytest.raises(ValueError, match="gpu is missing; seed is missing"):
        Evidence.from_dict(data)


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "evidence-x.json"
    path.write_text('{"format": 1, "seconds": NaN}')
    with pytest.raises(ValueError, match=r"evidence .*evidence-x.json is broken: not whole"):
        Evidence.read(path)


def test_a_real_report_is_evidence(tmp_path):
    subject = subject_of(HostDevice(), checked_bundle(tmp_path, [value_use()]), seconds=0)
    sections = run_sections([KernelsSection()], subject, lambda name: None)
    evidence = dataclasses.replace(EVIDENCE, sections=sections, verdict="skipped")
    assert Evidence.read(evidence.write(tmp_path)) == evidence


def test_no_folder_of_a_machine_gets_into_the_evidence(tmp_path):
    places = (Path.cwd(), Path.home(), Path(tempfile.gettempdir()), "/" + "home/somebody/venv")
    said = "; ".join(f"cannot open {place}/libx.so: no" for place in places)
    cleaned = without_machine_paths(said)
    assert "somebody" not in cleaned
    assert cleaned.count("/libx.so: no") == 4
    (tmp_path / "evidence.json").write_text(json.dumps({"said": cleaned}))
    assert list(machine_paths(tmp_path)) == []


def test_names_inside_a_model_are_no_folders():
    said = "node /model/layers.0/MatMul (Attention) failed; see docs/work/plan.md"
    assert without_machine_paths(said) == said


def test_the_summary_shows_each_section_and_what_is_wrong(capsys):
    print_evidence(EVIDENCE)
    printed = capsys.readouterr().out
    for text in (
        "bandwidth: copies 900 GB/s",
        "decode [1]",
        "kernels: build/doge-tiny, ValueGather, float16, decode [1]: the relative error is 0.1",
        "kernels, left out: build/doge-tiny, ValueGather float16, prompt of 24: not timed",
        "not this [GPU]",
        "later: pass",
        "fail: environment pass, bandwidth pass, kernels fail, engines skipped, later pass; NVIDIA",
    ):
        assert text in printed
    assert re.search(r"0\.0123 +0\.456 +0\.321 +127/128 +812, - +pass", printed), printed
