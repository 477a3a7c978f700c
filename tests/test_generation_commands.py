"""Every golden generation through the commands: folder to bundle with an engine, to tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import build_engine
from export.quality import BOUNDS
from runtime import compare, generate, score
from runtime.bundle import Bundle
from runtime.command import FAILURE, SUCCESS, USAGE
from tests.export.conftest import SLOTS
from tests.golden_cases import GOLDEN_CASES

CASES = ("g1", "g3", "g3_moe", "g4h_window")
PROMPT = "3,14,15,92,65"


@pytest.fixture(scope="module", params=CASES)
def built(
    request: pytest.FixtureRequest,
    golden: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """A golden case and the bundle that the build command made of it, engine included."""
    path = tmp_path_factory.mktemp("bundles") / request.param
    arguments = ("--model", golden(request.param), "--output", path, "--quiet", "--json")
    arguments = (*arguments, "--max-seq-len", SLOTS.get(request.param, 96))
    assert build_engine.main([str(argument) for argument in arguments]) == SUCCESS
    return request.param, path


def run(capsys: pytest.CaptureFixture[str], main: Callable[..., int], *arguments: Any) -> Any:
    capsys.readouterr()
    status = main([*map(str, arguments), "--json", "--quiet"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_bundle_names_its_generation_and_holds_an_engine(built: tuple[str, Path]) -> None:
    case, path = built
    bundle = Bundle.open(path, verify=True)
    assert bundle.manifest.generation == GOLDEN_CASES[case]
    backends = {variant.backend for variant in bundle.manifest.variants}
    assert backends == {"tensorrt_rtx", "onnxruntime", "torch"}
    rewrites = bundle.manifest.checks.get("rewrites", {})
    assert bool(rewrites) == (case == "g1")
    assert all(rewrite["reason"] for rewrite in rewrites.values())


@pytest.mark.slow
def test_both_cpu_backends_generate_and_score_the_same(
    built: tuple[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, path = built
    text = tmp_path / "ids.npy"
    np.save(text, np.arange(20)[None])
    results = []
    for backend in ("torch", "onnxruntime"):
        arguments = (path, "--backend", backend)
        status, generated = run(
            capsys, generate.main, *arguments, "--prompt-ids", PROMPT, "--temperature", 0,
            "--max-tokens", 24, "--ignore-eos",
        )  # fmt: skip
        assert status == SUCCESS
        status, scored = run(capsys, score.main, *arguments, "--ids", text)
        assert status == SUCCESS
        results.append((generated["outputs"][0]["ids"], scored["nll"]))
    assert len(results[0][0]) == 24
    assert results[0][0] == results[1][0]
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)


@pytest.mark.slow
def test_prompt_longer_than_the_stored_mask_is_refused(
    golden: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    arguments = ("--model", golden("g1"), "--output", bundle, "--backend", "none")
    status, error = run(capsys, build_engine.main, *arguments, "--max-seq-len", 65)
    assert status == USAGE
    assert (
        "exceeds the 64 tokens up to which the checkpoint is defined" in error["error"]["message"]
    )
    assert run(capsys, build_engine.main, *arguments)[0] == SUCCESS
    prompt = ",".join(str(i) for i in range(65))
    status, error = run(capsys, generate.main, bundle, "--prompt-ids", prompt)
    assert status == FAILURE
    assert "65" in error["error"]["message"]
    assert "64" in error["error"]["message"]


@pytest.mark.parametrize("name", ["doge-22m", "doge-60m-g3", "doge-120m-moe-g4h", "doge-20m-g2"])
def test_every_generation_has_an_estimate(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(capsys, build_engine.main, "--random-weights", name, "--dry-run")
    assert status == SUCCESS
    # A tied dense model reads all of itself; experts and an untied embedding are read in part.
    part = found["read_bytes_per_token"] / found["engine_bytes"]
    expected = {"doge-22m": 0.53, "doge-60m-g3": 1, "doge-120m-moe-g4h": 0.46, "doge-20m-g2": 0.6}
    assert part == pytest.approx(expected[name], abs=0.01)


def test_cache_of_8_bits_is_refused_where_no_model_has_it(
    golden: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", golden("g3"), "--output", tmp_path / "bundle", "--cpu", "none")
    status, error = run(capsys, build_engine.main, *arguments, "--kv-cache-dtype", "int8")
    assert status == USAGE
    assert "an engine caches in its own precision" in error["error"]["message"]


@pytest.mark.slow
def test_narrow_models_are_added_and_one_that_loses_too_much_is_refused(
    tmp_path: Path,
    tiny_moe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = tmp_path / "bundle"
    flags = ("--model", tiny_moe, "--router", "per_token", "--output", bundle, "--backend", "none")
    status, _ = run(capsys, build_engine.main, *flags)
    assert status == SUCCESS
    status, report = run(capsys, build_engine.main, *flags, "--kv-cache-dtype", "int8")
    assert status == SUCCESS
    assert report["quality"]["variant"] == "onnxruntime:fp32-kv8"
    assert report["quality"]["increase"] <= report["quality"]["bound"] == 0.02
    monkeypatch.setitem(BOUNDS, 4, 1e-4)
    status, error = run(capsys, build_engine.main, *flags, "--cpu", "int4")
    assert status == FAILURE
    assert error["error"]["kind"] == "QualityError"
    assert "int4 loses more than its bound" in error["error"]["message"]
    names = [v.name for v in Bundle.open(bundle, verify=True).variants("onnxruntime")]
    assert names == ["fp32", "fp32-kv8", "canonical"]
    status, report = run(capsys, build_engine.main, *flags, "--cpu", "int4", "--force")
    assert status == SUCCESS
    assert any("loses more than its bound" in warning for warning in report["warnings"])
    for variant in ("int4", "canonical"):
        arguments = (bundle, "--candidate", f"onnxruntime:{variant}", "--steps", 4, "--atol", 99)
        status, compared = run(capsys, compare.main, *arguments)
        assert status == SUCCESS
        assert compared["candidate"] == f"onnxruntime:{variant}"
        arguments = (bundle, "--prompt-ids", PROMPT, "--max-tokens", 5, "--variant", variant)
        status, generated = run(capsys, generate.main, *arguments, "--backend", "onnxruntime")
        assert status == SUCCESS
        assert generated["variant"] == variant
