"""What an engine's precision loses: measured on lowered models, refused, reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import pytest

from export.build_engine import main
from export.engine import EngineConfig, Precision
from export.engine_config import DTYPES
from export.engine_quality import EngineQuality
from export.lowerings.engine_weights import weight_format
from export.lowerings.tensorrt import lower_for_tensorrt
from export.quality import Quality, QualityError, measure_quality
from export.sources import read_checkpoint
from model.hub import ModelLocation
from model.released import RELEASED_SHAPES
from runtime.backends.base import Backend
from runtime.backends.onnxruntime_backend import make_session
from runtime.manifest import Manifest
from tests.command_calls import Call
from tests.export.conftest import Exported


def config(precision: str, exported: Exported) -> EngineConfig:
    return EngineConfig(
        precision=cast(Precision, precision),
        max_input_len=exported.slots,
        max_seq_len=exported.slots,
    )


def measures(
    exported: Exported, *, trained: bool = True, eval_text: Path | None = None
) -> EngineQuality:
    return EngineQuality(
        exported.path,
        read_checkpoint(ModelLocation(folder=exported.folder), None),
        exported.limits,
        trained=trained,
        eval_text=eval_text,
    )


def lowered(exported: Exported, folder: Path, precision: str) -> Path:
    dtype = DTYPES[cast(Precision, precision)]
    return lower_for_tensorrt(exported.path, folder, dtype, weights=weight_format(precision))


# The golden weights are random. Logits of this case are small, so that they are not too fragile.
CASE = "g4_untied_mha"


@pytest.mark.parametrize("case", [CASE, "g3_moe"])
def test_fewer_bits_lose_more(
    exported_case: Callable[[str], Exported], tmp_path: Path, case: str
) -> None:
    exported = exported_case(case)
    found = {}
    for precision in ("fp16", "int8", "int4"):
        path = lowered(exported, tmp_path, precision)
        found[precision] = measures(exported).measure(config(precision, exported), path, force=True)
    # 0.09 and 0.08 %, 0.2 and 1 %, 190 and 620 %
    assert abs(found["fp16"].increase) < 0.003
    assert abs(found["fp16"].increase) < abs(found["int8"].increase) < 0.02
    assert found["int4"].increase > 0.5
    assert [found[p].accepted for p in ("fp16", "int8", "int4")] == [True, True, False]
    assert found["fp16"].bound == found["int8"].bound == 0.02
    assert found["int4"].bound == 0.10
    assert len({(quality.tokens, quality.reference_perplexity) for quality in found.values()}) == 1


@pytest.mark.parametrize(("case", "mode"), [(CASE, "prefill"), ("g3_moe", "decode")])
def test_routers_as_published_are_measured_token_by_token_and_activations_stay_float16(
    exported_case: Callable[[str], Exported],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    mode: str,
) -> None:
    exported = exported_case(case)
    path = lowered(exported, tmp_path, "int8")
    modes, settings = [], []

    def measured(*backends: Backend, **options: Any) -> Quality:
        modes.append(options["mode"])
        return measure_quality(*backends, **options)

    def opened(path: str, **options: Any) -> Any:
        settings.append(options["settings"])
        return make_session(path, **options)

    monkeypatch.setattr("export.engine_quality.measure_quality", measured)
    monkeypatch.setattr("export.engine_quality.make_session", opened)
    measures(exported).measure(config("int8", exported), path, force=True)
    assert modes == [mode]
    assert settings == [{"session.disable_quant_qdq": "1"}] * 2


def test_bfloat16_is_measured_by_the_network(
    exported_case: Callable[[str], Exported], tmp_path: Path
) -> None:
    """The lowered model is not even there: ONNX Runtime could not run it."""
    exported = exported_case(CASE)
    quality = measures(exported).measure(config("bf16", exported), tmp_path / "no", force=True)
    assert 1e-4 < abs(quality.increase) < 0.05  # 2.5 %


def damaged(path: Path) -> Path:
    """The lowered model with larger steps than it should have."""
    model = ir.load(path)
    for name, value in model.graph.initializers.items():
        if name.endswith("o_proj.weight.int8.scale") and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy() * np.float16(2), name=name)
    result = path.with_name("damaged.onnx")
    ir.save(model, result, external_data="damaged.onnx.data")
    return result


def test_loss_beyond_the_bound_is_refused_and_forced(
    exported_case: Callable[[str], Exported], tmp_path: Path
) -> None:
    exported = exported_case(CASE)
    whole = lowered(exported, tmp_path, "int8")
    assert measures(exported).measure(config("int8", exported), whole, force=False).accepted
    path = damaged(whole)
    with pytest.raises(
        QualityError, match=r"int8-sm89 loses more than its bound: .*at most \+2%.*--force"
    ):
        measures(exported).measure(config("int8", exported), path, force=False)
    quality = measures(exported).measure(config("int8", exported), path, force=True)
    assert quality.increase > quality.bound
    assert not quality.accepted


def test_quality_is_measured_only_where_it_says_something(
    exported_case: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    exported = exported_case(CASE)
    settings = {p: config(p, exported) for p in DTYPES}

    def asked(**options: Any) -> dict[str, bool]:
        measured = measures(exported, **options)
        return {p: measured.why_not(c) is None for p, c in settings.items()}

    every = dict.fromkeys(settings, True) | {"fp32": False}
    assert asked() == every
    assert not any(asked(trained=False).values())
    assert asked(trained=False, eval_text=tmp_path / "text") == every
    monkeypatch.setattr("export.engine_quality.MEASURED_HALF_UP_TO", 1000)
    assert asked() == every | {"fp16": False, "bf16": False}
    assert "--eval-text" in str(measures(exported).why_not(settings["bf16"]))


def test_eval_text_without_a_tokenizer_is_an_error(
    exported_case: Callable[[str], Exported], tmp_path: Path
) -> None:
    exported = exported_case(CASE)
    measured = measures(exported, eval_text=tmp_path / "text.txt")
    with pytest.raises(FileNotFoundError, match="has no tokenizer, which --eval-text needs"):
        measured.measure(config("int8", exported), lowered(exported, tmp_path, "int8"), force=False)


def check_report(report: dict[str, Any], bundle: Path, precision: str, *, passed: bool) -> None:
    """Report and manifest say the same of the engine's quality."""
    name = f"tensorrt_rtx:{precision}-sm89"
    manifest = Manifest.from_json((bundle / "manifest.json").read_text())
    (variant,) = [v for v in manifest.variants if v.backend == "tensorrt_rtx"]
    assert variant.precision == precision
    assert variant.details["quality"] == report["quality"] == report["engine"]["quality"]
    assert report["quality"]["variant"] == name
    check = manifest.checks[f"engine_{precision}-sm89_quality"]
    assert check["passed"] is passed
    assert check["increase"] == report["quality"]["increase"]


@pytest.mark.slow
def test_build_reports_the_quality_of_its_engine_and_refuses_a_bad_one(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    arguments = ("--max-seq-len", 128, "--cpu", "none", "--no-sampling-tail")
    arguments = (*arguments, "--output", bundle, "--json")
    built = call(main, *arguments, "--precision", "int4")
    assert built.status == 0, built.err
    report = built.report
    # Of so short a sample the perplexity may fall as well: it is noise of a hundredth of the bound.
    assert 0 != report["quality"]["increase"] < report["quality"]["bound"] == 0.10
    check_report(report, bundle, "int4", passed=True)
    (engine,) = [file for file in report["files"] if file["role"] == "engine"]
    assert engine["path"] == "engines/tensorrt_rtx-sm89-int4.engine"

    before = (bundle / "manifest.json").read_bytes()
    monkeypatch.setattr("export.quality.BOUNDS", {16: 0.02, 8: 0.02, 4: -0.01})
    refused = call(main, *arguments, "--precision", "int4")
    assert refused.status == 1
    assert "loses more than its bound" in refused.report["error"]["message"]
    assert (bundle / "manifest.json").read_bytes() == before
    forced = call(main, *arguments, "--precision", "int4", "--force")
    assert forced.status == 0
    report = forced.report
    assert any("loses more than its bound" in warning for warning in report["warnings"])
    check_report(report, bundle, "int4", passed=False)


@pytest.mark.slow
def test_random_weights_get_an_engine_and_no_quality(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = RELEASED_SHAPES["doge-20m"]
    short = dataclasses.replace(shape.config, num_hidden_layers=2)
    monkeypatch.setitem(RELEASED_SHAPES, "doge-20m", dataclasses.replace(shape, config=short))
    arguments = ("--random-weights", "doge-20m", "--max-seq-len", 64, "--cpu", "none")
    arguments = (*arguments, "--no-sampling-tail", "--json")
    sizes = {}
    for precision in ("fp16", "int8"):
        built = call(main, *arguments, "--output", tmp_path / "bundle", "--precision", precision)
        assert built.status == 0, built.err
        report = built.report
        assert report["quality"] is None
        assert report["engine"]["quality"] is None
        sizes |= {file["path"]: file["bytes"] for file in report["files"]}
    engines = [sizes[f"engines/tensorrt_rtx-sm89-{p}.engine"] for p in ("fp16", "int8")]
    assert engines[0] - engines[1] > 0.3e6
