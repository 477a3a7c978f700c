"""The comparison as a command: what it prints, saves, loads and refuses."""

from __future__ import annotations

import html
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.checkpoint import inspect_checkpoint
from runtime import compare, score
from runtime.command import FAILURE, NEGATIVE, SUCCESS, USAGE
from tests.command_calls import Built, Call, build_bundle

PROMPT, TEXT = "3,14,15,92,65", "Once upon a time"


def test_of_the_cpu_backends_passes(call: Call, moe_bundle: Built) -> None:
    outcome = call(compare.main, moe_bundle, "--steps", 8, "--json")
    assert outcome.status == SUCCESS, outcome.err
    report = outcome.report
    assert set(report) >= {
        "reference",
        "candidate",
        "steps",
        "taps",
        "logits",
        "first_divergence",
        "verdict",
        "reason",
    }
    assert report["reference"] == "torch:fp32"
    assert report["candidate"] == "onnxruntime:fp32"
    assert report["steps"] == 8
    assert report["taps"] == []
    assert report["verdict"] == "pass"
    assert report["first_divergence"] is None
    assert set(report["logits"]) == {"max_abs", "mean_abs", "kl_max", "kl_mean", "top1_agreement"}
    assert report["logits"]["top1_agreement"] == 1
    assert report["logits"]["max_abs"] < 1e-3
    assert report["command"] == f"compare.py {moe_bundle} --steps 8 --json"
    assert [len(prompt["ids"]) for prompt in report["prompts"]] == [16] * 4
    assert [found["equal"] for found in report["free_running"]] == [9] * 4
    assert (report["text"], report["missing_taps"], report["growth"]) == (None, {}, [])
    for side in ("reference", "candidate"):
        assert report["rungs"][side]["rung"] == report[side]
        assert report["rungs"][side]["versions"]["numpy"] == np.__version__
        assert report["rungs"][side]["source"] == "here"
        assert not report["rungs"][side]["tapped"]


def test_with_altered_weights_is_a_negative_verdict(
    call: Call, moe_bundle: Built, copied: Path
) -> None:
    alter_weights(copied / "checkpoint")
    flags = ("--candidate", "torch", "--prompt-ids", PROMPT, "--steps", 8, "--json")
    strict = call(compare.main, moe_bundle, copied, *flags, "--atol", 1e-9, "--rtol", 0)
    assert strict.status == NEGATIVE
    assert strict.report["verdict"] == "fail"
    assert strict.report["logits"]["max_abs"] > 0.1
    assert "tolerance" in strict.report["reason"]
    lenient = call(compare.main, moe_bundle, copied, *flags, "--atol", 1000)
    assert lenient.status == SUCCESS
    assert lenient.report["verdict"] == "pass"
    assert lenient.report["logits"] == strict.report["logits"]


def alter_weights(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    size = file.stat().st_size
    generator = np.random.default_rng(0)
    tensors = {
        name: (tensor + 0.1 * generator.standard_normal(tensor.shape)).astype(tensor.dtype)
        for name, tensor in load_file(file).items()
    }
    file.unlink()
    save_file(tensors, file)
    assert file.stat().st_size == size, "the manifest gives the size, so it must stay"
    inspect_checkpoint(checkpoint, None)


def test_with_taps_looks_inside_both(call: Call, moe_bundle: Built) -> None:
    outcome = call(compare.main, moe_bundle, "--steps", 4, "--taps", "all", "--json")
    assert outcome.status == SUCCESS, outcome.err
    report = outcome.report
    taps = {tap["tap"]: tap for tap in report["taps"]}
    assert next(iter(taps)) == "embedding"
    assert list(taps)[-2:] == ["logits", "token"]
    assert {"layers.1.experts", "layers.1.cached_key", "layers.0.score"} <= set(taps)
    assert all(tap["parting"] == 0 for tap in report["taps"])
    assert report["missing_taps"]["layers.0.query"] == ["onnxruntime:fp32"]
    assert (report["verdict"], report["first_divergence"]) == ("pass", None)
    assert report["tapping_changed"]["reference"] == 0


def test_of_kinds_of_taps_keeps_to_them(call: Call, moe_bundle: Built) -> None:
    outcome = call(
        compare.main, moe_bundle, "--steps", 1, "--taps", "output,layers.1.key", "--json"
    )
    assert outcome.status == SUCCESS, outcome.err
    names = [tap["tap"] for tap in outcome.report["taps"]]
    assert names == ["layers.0.output", "layers.1.key", "layers.1.output", "layers.2.output"]


@pytest.mark.parametrize(
    ("taps", "told"),
    [
        ("layers.0.query", "onnxruntime:fp32 gives no layers.0.query"),
        ("layers.9.key", "has no tap layers.9.key"),
        (",", "has no tap"),
    ],
)
def test_of_a_tap_that_is_not_there_is_an_error(
    call: Call, moe_bundle: Built, taps: str, told: str
) -> None:
    outcome = call(compare.main, moe_bundle, "--steps", 1, "--taps", taps)
    assert outcome.status == FAILURE
    assert told in outcome.err


def test_with_an_unknown_backend_is_an_error(call: Call, moe_bundle: Built) -> None:
    outcome = call(compare.main, moe_bundle, "--candidate", "abacus")
    assert outcome.status == FAILURE
    assert "unknown backend 'abacus'" in outcome.err


# --- text ----------------------------------------------------------------------------------------


def test_text_gives_perplexities_and_distributions(
    call: Call, text_bundle: Built, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Now is the winter of our discontent made glorious summer. " * 30)
    flags = ("--prompt", TEXT, "--steps", 2, "--text", file, "--text-tokens", 200, "--json")
    outcome = call(compare.main, text_bundle, *flags)
    assert outcome.status == SUCCESS, outcome.err
    text = outcome.report["text"]
    assert text["tokens"] == 200
    scored = call(score.main, text_bundle, "--text", file, "--backend", "torch", "--json").report
    alone = np.concatenate([window[:200] for window in scored["token_logprobs"]])[:200]
    assert text["reference"]["nll"] == pytest.approx(-alone.mean(), rel=1e-6)
    assert text["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert text["kl_mean"] < 1e-7
    assert (text["top1_agreement"], text["top5_agreement"]) == (1, 1)
    assert 0 < text["of_tolerance"] < 1
    assert outcome.report["prompts"][0]["text"] == TEXT
    assert outcome.report["free_running"][0]["reference_text"]


@pytest.mark.parametrize(
    ("content", "flags", "told"),
    [
        ("", (), "holds no text"),
        ("word", ("--text-tokens", 1), "--text-tokens must be at least 2"),
    ],
)
def test_text_with_nothing_to_score_is_an_error(
    call: Call, text_bundle: Built, tmp_path: Path, content: str, flags: Any, told: str
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(content)
    outcome = call(compare.main, text_bundle, "--steps", 1, "--text", file, *flags)
    assert outcome.status == FAILURE
    assert told in outcome.err


def test_text_needs_a_tokenizer(call: Call, moe_bundle: Built, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("word")
    outcome = call(compare.main, moe_bundle, "--text", file)
    assert outcome.status == FAILURE
    assert "--text needs a tokenizer" in outcome.err


# --- saved runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(moe_bundle: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's run of a bundle; not to be changed."""
    path = tmp_path_factory.mktemp("runs") / "torch.run"
    assert compare.main([str(moe_bundle), "--steps", "3", "--save", str(path), "--quiet"]) == 0
    return path


def test_a_loaded_run_is_compared_like_one_made_here(
    call: Call, moe_bundle: Built, saved: Path, tmp_path: Path
) -> None:
    here = call(compare.main, moe_bundle, "--steps", 3, "--taps", "all", "--json").report
    kept = tmp_path / "candidate.run"
    outcome = call(compare.main, moe_bundle, "--load", saved, "--save", kept, "--json")
    assert outcome.status == SUCCESS, outcome.err
    there = outcome.report
    twice = call(compare.main, moe_bundle, "--load", saved, "--load", kept, "--json").report
    same = set(here) - {"command", "rungs"}
    assert {k: there[k] for k in same} == {k: here[k] for k in same}
    assert {k: twice[k] for k in same} == {k: here[k] for k in same}
    assert len(here["taps"]) > 20
    sources = [[found["rungs"][s]["source"] for s in found["rungs"]] for found in (there, twice)]
    assert sources == [["loaded", "here"], ["loaded", "loaded"]]


def test_taps_of_a_loaded_run_can_be_chosen(call: Call, moe_bundle: Built, saved: Path) -> None:
    outcome = call(compare.main, moe_bundle, "--load", saved, "--taps", "output", "--json")
    assert outcome.status == SUCCESS, outcome.err
    names = {tap["tap"].rpartition(".")[2] for tap in outcome.report["taps"]}
    assert names == {"output"}


def test_saving_says_what_was_saved_and_compares_nothing(
    call: Call, moe_bundle: Built, tmp_path: Path
) -> None:
    run = tmp_path / "x.run"
    outcome = call(
        compare.main,
        moe_bundle,
        "--reference",
        "onnxruntime",
        "--steps",
        1,
        "--save",
        run,
        "--json",
    )
    assert outcome.status == SUCCESS, outcome.err
    assert outcome.report["rung"] == "onnxruntime:fp32"
    assert "layers.0.query" in outcome.report["missing_taps"]
    assert "verdict" not in outcome.report
    assert [p.name for p in tmp_path.iterdir()] == ["x.run"], "no half-written file stays"


@pytest.mark.parametrize(
    "flags",
    [
        ("--steps", 3),
        ("--prompt-ids", "1,2"),
        ("--reference", "torch"),
        ("--load", "b.run", "--load", "c.run"),
        ("--load", "b.run", "--candidate", "torch"),
        ("--load", "b.run", "--save", "c.run"),
    ],
)
def test_flags_that_a_loaded_run_decides_are_wrong_usage(
    call: Call, moe_bundle: Built, saved: Path, flags: Any
) -> None:
    outcome = call(compare.main, moe_bundle, "--load", saved, *flags)
    assert outcome.status == USAGE
    assert "--load" in outcome.err


@pytest.mark.parametrize(
    "flags",
    [
        ("--candidate", "torch"),
        ("--html", "x.html"),
        ("--repro", "x"),
        ("--inside",),
        ("--atol", 0.0),
    ],
)
def test_saving_with_what_belongs_to_a_comparison_is_wrong_usage(
    call: Call, moe_bundle: Built, tmp_path: Path, flags: Any
) -> None:
    run = tmp_path / "x.run"
    outcome = call(compare.main, moe_bundle, "--save", run, *flags)
    assert outcome.status == USAGE
    assert f"compares nothing; leave out {flags[0]}" in outcome.err
    assert not run.exists()


def test_a_run_of_another_checkpoint_is_refused(
    call: Call, text_bundle: Built, saved: Path
) -> None:
    outcome = call(compare.main, text_bundle, "--load", saved)
    assert outcome.status == FAILURE
    assert "are of different checkpoints" in outcome.err


def test_bundles_of_different_checkpoints_are_refused_before_anything_runs(
    call: Call, text_bundle: Built, moe_bundle: Built
) -> None:
    outcome = call(compare.main, moe_bundle, text_bundle)
    assert outcome.status == FAILURE
    assert "are of different checkpoints" in outcome.err


def test_bundles_of_different_limits_are_refused(
    call: Call, tiny_moe: Path, moe_bundle: Built, saved: Path, tmp_path: Path
) -> None:
    flags = ("--backend", "none", "--router", "per_token", "--max-seq-len", 32)
    build_bundle("--model", tiny_moe, *flags, "--output", tmp_path / "short")
    for arguments in ((moe_bundle, tmp_path / "short"), (tmp_path / "short", "--load", saved)):
        outcome = call(compare.main, *arguments)
        assert outcome.status == FAILURE
        assert "have different limits" in outcome.err
        assert "--max-" in outcome.err


def test_runs_that_were_fed_differently_are_refused(
    call: Call, moe_bundle: Built, saved: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.run"
    call(compare.main, moe_bundle, "--prompt-ids", "5,6", "--steps", 3, "--save", other)
    outcome = call(compare.main, moe_bundle, "--load", saved, "--load", other)
    assert outcome.status == FAILURE
    assert "fed different prompts" in outcome.err


@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_an_engine_that_cannot_run_here_says_save_there_load_here(
    call: Call, copied: Path, side: str
) -> None:
    manifest = copied / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    engine = dict(
        content["variants"][0], backend="tensorrt_rtx", name="fp16-sm89", precision="fp16"
    )
    content["variants"].append(engine)
    manifest.write_text(json.dumps(content), encoding="utf-8")
    flags = ("--prompt-ids", PROMPT, "--steps", 1)
    outcome = call(compare.main, copied, f"--{side}", "tensorrt_rtx", *flags)
    assert outcome.status == FAILURE
    assert "tensorrt_rtx:fp16-sm89 cannot run here" in outcome.err
    assert "--reference tensorrt_rtx:fp16-sm89 --save RUN" in outcome.err
    assert "--load RUN" in outcome.err


# --- the published model -------------------------------------------------------------------------


def test_the_published_model_is_a_rung(call: Call, moe_bundle: Built) -> None:
    outcome = call(
        compare.main, moe_bundle, "--reference", "published", "--candidate", "torch",
        "--steps", 3, "--taps", "all", "--json",
    )  # fmt: skip
    assert outcome.status == SUCCESS, outcome.err
    report = outcome.report
    assert report["reference"] == "published:eager"
    assert report["first_divergence"] is None
    kinds = {tap["tap"].rpartition(".")[2] for tap in report["taps"]}
    assert kinds == {
        "embedding", "attention_norm", "value", "score", "key", "cached_key", "cached_value",
        "attention_output", "attention_residual", "mlp_norm", "router_scores", "experts",
        "mlp_output", "output", "final_norm", "logits", "token",
    } | ({"kept_keys"} & kinds)  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_the_published_model_has_two_attentions(
    call: Call, moe_bundle: Built, attention: str
) -> None:
    outcome = call(compare.main, moe_bundle, "--reference", f"published:{attention}", "--steps", 1)
    assert outcome.status == (SUCCESS if attention == "sdpa" else FAILURE)
    assert ("there is no attention 'flash'" in outcome.err) == (attention == "flash")


def test_recorded_results_of_published_code_are_a_reference(
    call: Call, golden: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle, recorded = tmp_path / "g3", golden("g3_moe") / "golden.npz"
    flags = ("--backend", "none", "--max-seq-len", 96)
    build_bundle(*flags, "--model", golden("g3_moe"), "--output", bundle)
    refused = call(compare.main, bundle, "--reference", "published")
    assert refused.status == FAILURE
    assert "transformers has generation g4, this is g3" in refused.err
    outcome = call(compare.main, bundle, "--load", recorded, "--json")
    assert outcome.status == SUCCESS, outcome.err
    report = outcome.report
    assert (report["reference"], report["steps"]) == ("published:recorded", 18)
    assert report["text"]["tokens"] == 18
    assert report["logits"]["max_abs"] < 1e-4
    assert report["free_running"] == []
    with np.load(recorded) as arrays:
        altered = dict(arrays)
    altered["decode_logits"][0, 7, 3] += 1
    np.savez(tmp_path / "altered.npz", **altered)
    outcome = call(compare.main, bundle, "--load", tmp_path / "altered.npz")
    assert outcome.status == NEGATIVE
    altered["decode_logits"] = altered["decode_logits"][:, :5]
    np.savez(tmp_path / "short.npz", **altered)
    outcome = call(compare.main, bundle, "--load", tmp_path / "short.npz")
    assert outcome.status == FAILURE
    assert "expected [19, 97]" in outcome.err


# --- what one rung cannot do ---------------------------------------------------------------------


def test_prompts_of_several_passes_are_compared_whole(
    call: Call, tiny_moe: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "chunked"
    flags = ("--backend", "none", "--router", "per_token", "--max-input-len", 8)
    build_bundle("--model", tiny_moe, *flags, "--output", bundle)
    prompt = ",".join(str(i) for i in range(1, 21))
    outcome = call(
        compare.main, bundle, "--prompt-ids", prompt, "--steps", 2, "--taps", "all", "--json"
    )
    assert outcome.status == SUCCESS, outcome.err
    taps = {tap["tap"]: tap for tap in outcome.report["taps"]}
    assert outcome.report["first_divergence"] is None
    assert taps["layers.1.mlp_output"]["compared"] == 3
    assert taps["layers.1.key"]["error"] > 0, "two computations, so not the same bits everywhere"


def test_looking_into_a_model_without_onnx_says_what_to_install(
    call: Call, moe_bundle: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name)
    )
    outcome = call(compare.main, moe_bundle, "--steps", 1, "--taps", "all")
    assert outcome.status == FAILURE
    assert "doge-tensorrt[export]" in outcome.err


@pytest.mark.parametrize(
    ("flag", "value"), [("--atol", "-1"), ("--rtol", "inf"), ("--atol", "nan")]
)
def test_a_tolerance_that_is_none_is_refused(
    call: Call, moe_bundle: Built, flag: str, value: str
) -> None:
    outcome = call(compare.main, moe_bundle, f"{flag}={value}")
    assert outcome.status == FAILURE
    assert "must be a finite number of at least 0" in outcome.err


# --- page, look inside, piece to send ------------------------------------------------------------


def test_the_page_and_the_json_tell_the_same(call: Call, moe_bundle: Built, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    outcome = call(compare.main, moe_bundle, "--steps", 2, "--inside", "--html", page, "--json")
    assert outcome.status == SUCCESS, outcome.err
    text = page.read_text(encoding="utf-8")
    report = outcome.report
    assert html.escape(report["command"]) in text
    for side in ("reference", "candidate"):
        inside = report["inside"][side]
        assert inside["rung"] == report[side]
        assert report[side] in text
        picks = inside["experts"]["layers"][0]["picks"]
        assert picks == 4 * (16 + 2) * inside["experts"]["per_token"]
        assert sum(inside["experts"]["layers"][0]["counts"]) == picks
    assert len(report["taps"]) > 20, "the page looks inside unless told otherwise"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_a_look_inside_is_printed(call: Call, moe_bundle: Built) -> None:
    outcome = call(compare.main, moe_bundle, "--steps", 1, "--inside")
    assert outcome.status == SUCCESS, outcome.err
    assert "inside torch:fp32" in outcome.out
    assert "inside onnxruntime:fp32" in outcome.out


def test_a_failed_comparison_leaves_a_piece_that_runs_by_itself(
    call: Call, copied: Path, tmp_path: Path
) -> None:
    alter_weights(copied / "checkpoint")
    piece = tmp_path / "piece"
    outcome = call(compare.main, copied, "--steps", 2, "--repro", piece)
    assert outcome.status == NEGATIVE
    assert "python run.py" in outcome.err
    moved = piece.rename(tmp_path / "moved")
    ran = subprocess.run(
        [sys.executable, "-I", "run.py"], cwd=moved, capture_output=True, text=True, check=False
    )
    assert ran.returncode == NEGATIVE, ran.stderr
    assert ran.stdout.startswith("differs:")
    again = call(compare.main, copied, "--steps", 2, "--repro", moved)
    assert again.status == FAILURE
    assert "is there and not empty" in again.err


def test_a_comparison_that_passes_leaves_no_piece(
    call: Call, moe_bundle: Built, tmp_path: Path
) -> None:
    outcome = call(compare.main, moe_bundle, "--steps", 1, "--repro", tmp_path / "piece")
    assert outcome.status == SUCCESS
    assert list(tmp_path.iterdir()) == []
