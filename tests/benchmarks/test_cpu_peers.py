"""The script that measures peers, as people run it: what it prints, never how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from export import build_engine
from runtime.command import SUCCESS, USAGE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(tiny_dense, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / "dense"
    arguments = ("--model", str(tiny_dense), "--backend", "none", "--output", str(path), "--quiet")
    assert build_engine.main(arguments) == SUCCESS
    return path


def run(*arguments):
    command = [sys.executable, "benchmarks/cpu_peers.py", *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
def test_ratios_are_to_transformers_in_the_same_run(bundle):
    status, report = run(
        bundle, "--llama", "none", "--openvino", "none", "--variants", "fp32", "--input-len", 9,
        "--output-len", 4, "--repeats", 2, "--warmup", 0,
    )  # fmt: skip
    assert status == SUCCESS, report
    assert "transformers" in report["versions"]
    rows = [(row["backend"], row["variant"]) for row in report["results"]]
    assert rows == [("transformers", "eager-fp32"), ("onnxruntime", "fp32")]
    for row in report["results"]:
        is_baseline = row["backend"] == "transformers"
        assert (row["prefill_ratio"] == row["decode_ratio"] == 1) == is_baseline
        assert (row["roofline_fraction"] is None) == is_baseline
        assert row["repeats"] == 2
        assert row["tpot_ms"] > 0


@pytest.mark.slow
def test_prompt_beyond_the_context_is_wrong_usage(bundle):
    status, report = run(bundle, "--llama", "none", "--openvino", "none", "--input-len", 250)
    assert status == USAGE
    assert "exceed the 256 tokens" in report["error"]["message"]
