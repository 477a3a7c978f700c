"""The commands, from arguments to exit status: what they print, write, refuse and leave alone."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import export.engine_models
import export.pipeline
from export import build_engine
from export.engine import EngineBuildError
from runtime import compare, generate, score
from runtime.command import FAILURE, INTERRUPTED, SUCCESS, USAGE
from runtime.cpu_threads import usable_cpus
from tests.command_calls import Built, Call, build_bundle
from tests.tiny_doge import BASE_CONFIG

ROOT = Path(__file__).resolve().parents[1]
LAYERS: int = BASE_CONFIG["num_hidden_layers"]
POSITIONS: int = BASE_CONFIG["max_position_embeddings"]
CPU_BACKENDS = ("torch", "onnxruntime")
PROMPTS = ("3,14,15,92,65", "7", "35,89,79,32,38,46,26,43,38,32,79")
TEXT = "Once upon a time"
# The logits of random weights are so far apart that anything cooler repeats one token.
HOT = ("--temperature", 20)
Main = Callable[[Sequence[str]], int]


@pytest.fixture
def generated(call: Call) -> Callable[..., list[dict[str, Any]]]:
    """The outputs of generate with these arguments, which must succeed."""

    def run(*arguments: object) -> list[dict[str, Any]]:
        outcome = call(generate.main, *arguments, "--json", "--quiet")
        assert outcome.status == SUCCESS, outcome.err
        outputs: list[dict[str, Any]] = outcome.report["outputs"]
        return outputs

    return run


def _contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _ids(count: int) -> str:
    return ",".join(str(i % 90 + 3) for i in range(count))


# --- build ---------------------------------------------------------------------------------------


def test_build_reports_the_files_it_wrote(moe_bundle: Built) -> None:
    report = moe_bundle.report
    assert set(report) == {
        "bundle",
        "files",
        "timings",
        "peak_rss_mb",
        "engine",
        "quality",
        "warnings",
    }
    assert report["bundle"] == str(moe_bundle.path.resolve())
    assert report["engine"] is None
    assert report["quality"] is None
    assert report["warnings"] == []
    assert report["peak_rss_mb"] > 0
    assert all(seconds >= 0 for seconds in report["timings"].values())
    told = {file["path"]: file["sha256"] for file in report["files"]}
    found = _contents(moe_bundle.path)
    del found["manifest.json"]
    assert told == found
    for file in report["files"]:
        assert set(file) == {"path", "bytes", "sha256", "role"}
        assert file["bytes"] == (moe_bundle.path / file["path"]).stat().st_size


def test_build_puts_the_tokenizer_of_the_checkpoint_into_the_bundle(
    text_bundle: Built, moe_bundle: Built
) -> None:
    assert (text_bundle.path / "tokenizer" / "tokenizer.json").is_file()
    assert not (moe_bundle.path / "tokenizer").exists()


@pytest.mark.slow
def test_an_engine_has_a_layer_for_each_part_and_says_what_it_lacks_to_run(
    call: Call, tiny_dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "engine"
    arguments = ("--model", tiny_dense, "--output", path, "--backend", "tensorrt_rtx")
    report = build_bundle(*arguments, "--target", "sm89", "--no-sampling-tail")
    engine = report["engine"]
    assert engine["backend"] == "tensorrt_rtx"
    assert engine["targets"] == ["sm89"]
    assert engine["precision"] == "fp16"
    assert engine["attention"] == LAYERS
    assert engine["cache_updates"] == 3 * LAYERS
    assert engine["plugin_layers"] == 0
    assert engine["layers"]
    assert "fused_attention" in engine
    assert any(file["role"] == "engine" for file in report["files"])

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # no GPU, also where there is one
    ids = ("--prompt-ids", "3,4", "--max-tokens", "2", "--temperature", "0")
    asked = call(generate.main, path, "--backend", "tensorrt_rtx", *ids)
    assert asked.status == FAILURE
    assert "NVIDIA" in asked.err
    assert "--backend onnxruntime" in asked.err
    assert "Traceback" not in asked.err
    chosen = call(generate.main, path, *ids, "--json")
    assert chosen.status == SUCCESS, chosen.err
    assert chosen.report["backend"] == "onnxruntime"


def test_dry_run_prints_sizes_and_writes_nothing(
    call: Call, tiny_moe: Path, tmp_path: Path
) -> None:
    path = tmp_path / "nothing"
    arguments = ("--model", tiny_moe, "--output", path, "--dry-run")
    printed = call(build_engine.main, *arguments)
    assert printed.status == SUCCESS
    assert "model.onnx.data" in printed.out
    assert "KV cache" in printed.out
    outcome = call(build_engine.main, *arguments, "--json")
    assert outcome.status == SUCCESS
    report = outcome.report
    assert report["bundle"] == str(path)
    parameters = sum(p.size for p in load_file(tiny_moe / "model.safetensors").values())
    assert report["parameters"] == parameters
    assert report["onnx_bytes"] == 4 * parameters
    assert report["engine_bytes"] == 2 * parameters
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_a_file_is_refused(call: Call, tiny_moe: Path, tmp_path: Path) -> None:
    file = tiny_moe / "model.safetensors"
    outcome = call(build_engine.main, "--model", file, "--output", tmp_path / "b")
    assert outcome.status == FAILURE
    assert str(file) in outcome.err
    assert "folder" in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_missing_model_is_named(call: Call, tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such" / "checkpoint"
    outcome = call(build_engine.main, "--model", missing, "--output", tmp_path / "b", "--json")
    assert outcome.status == FAILURE
    error = outcome.report["error"]
    assert error["kind"] == "FileNotFoundError"
    assert str(missing) in error["message"]
    assert not list(tmp_path.iterdir())


def test_a_context_beyond_the_positions_is_wrong_usage(
    call: Call, tiny_moe: Path, tmp_path: Path
) -> None:
    arguments = ("--max-seq-len", POSITIONS + 1, "--output", tmp_path / "b", "--json")
    outcome = call(build_engine.main, "--model", tiny_moe, *arguments)
    assert outcome.status == USAGE
    error = outcome.report["error"]
    assert error["kind"] == "usage"
    assert f"--max-seq-len {POSITIONS + 1}" in error["message"]
    assert f"exceeds the {POSITIONS} tokens" in error["message"]


def test_an_output_that_is_a_file_is_refused_and_kept(
    call: Call, tiny_moe: Path, tmp_path: Path
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine", encoding="utf-8")
    outcome = call(
        build_engine.main, "--model", tiny_moe, "--backend", "none", "--output", file, "--quiet"
    )
    assert outcome.status == FAILURE
    assert f"{file} is a file" in outcome.err
    assert file.read_text(encoding="utf-8") == "mine"
    assert list(tmp_path.iterdir()) == [file]


def _rebuild(tiny_moe: Path, bundle: Path, backend: str) -> tuple[object, ...]:
    return (
        *("--model", tiny_moe, "--router", "per_token"),
        *("--backend", backend, "--output", bundle, "--json", "--quiet"),
    )


def test_an_interrupted_build_leaves_the_bundle_as_it_was(
    call: Call, tiny_moe: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export.pipeline, "export_onnx", interrupt)
    before = _contents(copied)
    outcome = call(build_engine.main, *_rebuild(tiny_moe, copied, "none"), "--force")
    assert outcome.status == INTERRUPTED
    assert outcome.report["error"]["kind"] == "interrupted"
    assert _contents(copied) == before
    assert list(copied.parent.iterdir()) == [copied]


def test_a_failed_engine_leaves_the_bundle_as_it_was(
    call: Call, tiny_moe: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EngineBuildError("no tactic was found")

    monkeypatch.setattr(export.pipeline, "check_builder", lambda _: None)
    monkeypatch.setattr(export.engine_models, "build_engine", fail)
    before = _contents(copied)
    outcome = call(build_engine.main, *_rebuild(tiny_moe, copied, "tensorrt_rtx"))
    assert outcome.status == FAILURE
    assert outcome.report == {
        "error": {"kind": "EngineBuildError", "message": "no tactic was found"}
    }
    assert _contents(copied) == before
    assert list(copied.parent.iterdir()) == [copied]


# --- generate ------------------------------------------------------------------------------------


def test_generate_prints_one_json_object(call: Call, text_bundle: Built) -> None:
    flags = ("--max-tokens", 5, "--ignore-eos", "--logprobs", 2, "--json")
    outcome = call(generate.main, text_bundle, "--prompt", TEXT, "--prompt", "The", *flags)
    assert outcome.status == SUCCESS, outcome.err
    report = outcome.report
    assert set(report) == {"backend", "variant", "outputs", "usage", "timings"}
    assert report["backend"] == "onnxruntime"
    assert report["variant"] == "fp32"
    assert set(report["timings"]) == {"load_s", "ttft_s", "decode_s", "tokens_per_s"}
    for index, (output, prompt) in enumerate(zip(report["outputs"], (TEXT, "The"), strict=True)):
        assert set(output) == {
            "index",
            "prompt",
            "prompt_ids",
            "ids",
            "text",
            "finish_reason",
            "logprobs",
        }
        assert output["index"] == index
        assert output["prompt"] == prompt
        assert len(output["ids"]) == len(output["logprobs"]) == 5
        assert output["finish_reason"] == "length"
        for entry in output["logprobs"]:
            assert len(entry["top"]) == 2
            assert entry["top"][0][1] >= max(entry["logprob"], entry["top"][1][1])
    assert report["usage"] == {
        "prompt_tokens": sum(len(output["prompt_ids"]) for output in report["outputs"]),
        "completion_tokens": 10,
    }


def test_plain_output_is_the_text_alone(
    call: Call, generated: Callable[..., list[dict[str, Any]]], text_bundle: Built
) -> None:
    flags = (text_bundle, "--prompt", TEXT, "--max-tokens", 12, "--seed", 1)
    expected = generated(*flags)[0]["text"] + "\n"
    assert call(generate.main, *flags, "--stream").out == expected
    assert call(generate.main, *flags, "--no-stream").out == expected


@pytest.mark.parametrize("which", ["moe_bundle", "text_bundle"])
def test_greedy_tokens_are_the_same_on_both_cpu_backends(
    generated: Callable[..., list[dict[str, Any]]], request: pytest.FixtureRequest, which: str
) -> None:
    bundle = request.getfixturevalue(which)
    # A repetition penalty keeps random weights from repeating one token.
    rules = ("--temperature", 0, "--repetition-penalty", 3, "--ignore-eos")
    flags = ("--prompt-ids", PROMPTS[0], "--max-tokens", 64, *rules)
    ids = [generated(bundle, "--backend", b, *flags)[0]["ids"] for b in CPU_BACKENDS]
    assert len(ids[0]) == 64
    assert len(set(ids[0])) > 16
    assert ids[0] == ids[1]


def test_a_seed_gives_the_same_tokens_on_both_cpu_backends_and_another_seed_others(
    generated: Callable[..., list[dict[str, Any]]], text_bundle: Built
) -> None:
    def ids(backend: str, seed: int) -> list[int]:
        flags = ("--prompt", TEXT, "--max-tokens", 40, "--ignore-eos", "--seed", seed)
        found: list[int] = generated(text_bundle, "--backend", backend, *flags)[0]["ids"]
        return found

    by_torch = ids("torch", 11)
    assert len(by_torch) == 40
    assert ids("onnxruntime", 11) == by_torch
    assert ids("onnxruntime", 12) != by_torch


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_row_of_a_batch_equals_its_prompt_alone(
    generated: Callable[..., list[dict[str, Any]]], moe_bundle: Built, backend: str
) -> None:
    flags = (moe_bundle, "--backend", backend, "--max-tokens", 16, "--ignore-eos", *HOT)
    for turn in range(len(PROMPTS)):
        prompts = PROMPTS[turn:] + PROMPTS[:turn]
        batch = generated(*flags, "--seed", 5, *(f"--prompt-ids={p}" for p in prompts))
        alone = generated(*flags, "--seed", 5, "--prompt-ids", prompts[0])
        assert [output["index"] for output in batch] == [0, 1, 2]
        assert batch[0] == alone[0]
        assert len(set(batch[0]["ids"])) > 4


def test_every_row_of_a_greedy_batch_equals_its_prompt_alone(
    generated: Callable[..., list[dict[str, Any]]], text_bundle: Built
) -> None:
    flags = (text_bundle, "--max-tokens", 16, "--ignore-eos", "--temperature", 0)
    prompts = (*PROMPTS, "5,6,7", "8,9")  # more than run side by side
    batch = generated(*flags, *(f"--prompt-ids={p}" for p in prompts))
    alone = [generated(*flags, "--prompt-ids", p)[0]["ids"] for p in prompts]
    assert [output["ids"] for output in batch] == alone
    assert len({tuple(ids) for ids in alone}) == len(prompts)


def test_a_copied_bundle_generates_the_same(
    generated: Callable[..., list[dict[str, Any]]], moe_bundle: Built, copied: Path
) -> None:
    for backend in CPU_BACKENDS:
        flags = ("--backend", backend, "--prompt-ids", PROMPTS[0], "--max-tokens", 8, *HOT)
        assert generated(copied, *flags) == generated(moe_bundle, *flags)


def test_onnxruntime_generates_without_torch(text_bundle: Built) -> None:
    program = (
        "import sys; sys.modules['torch'] = None; from runtime.generate import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    flags = ["--backend", "onnxruntime", "--prompt", TEXT, "--max-tokens", "4", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", program, str(text_bundle), *flags, "--ignore-eos"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == SUCCESS, done.stderr
    assert len(json.loads(done.stdout)["outputs"][0]["ids"]) == 4


@pytest.mark.parametrize("flags", [(), ("--prompt", "-")])
def test_the_prompt_comes_from_stdin(
    generated: Callable[..., list[dict[str, Any]]],
    text_bundle: Built,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    rest = ("--max-tokens", 6, "--seed", 2)
    piped = generated(text_bundle, *flags, *rest)
    assert piped[0]["prompt"] == TEXT
    assert piped == generated(text_bundle, "--prompt", TEXT, *rest)


def test_a_stop_string_ends_the_text_before_it(
    generated: Callable[..., list[dict[str, Any]]], text_bundle: Built
) -> None:
    flags = (text_bundle, "--prompt", TEXT, "--temperature", 0, "--ignore-eos")
    whole = generated(*flags, "--max-tokens", 30)[0]
    assert whole["finish_reason"] == "length"
    stop = whole["text"][10:14]
    ended = generated(*flags, "--max-tokens", 30, "--stop", stop)[0]
    assert ended["finish_reason"] == "stop"
    assert ended["text"] == whole["text"][: whole["text"].index(stop)]
    assert ended["ids"] == whole["ids"][: len(ended["ids"])]
    assert len(ended["ids"]) < 30


def test_a_stop_id_and_end_of_text_end_the_sequence(
    generated: Callable[..., list[dict[str, Any]]], text_bundle: Built
) -> None:
    flags = (text_bundle, "--prompt", TEXT, "--temperature", 0, "--max-tokens", 20)
    whole = generated(*flags, "--ignore-eos")[0]
    assert whole["finish_reason"] == "length"
    stop = whole["ids"][4]
    assert whole["ids"].index(stop) > 0
    ended = generated(*flags, "--ignore-eos", "--stop-token-ids", stop)[0]
    assert ended["finish_reason"] == "stop"
    assert ended["ids"] == whole["ids"][: whole["ids"].index(stop) + 1]
    eos = BASE_CONFIG["eos_token_id"]
    at_once = generated(*flags, "--logit-bias", f"{eos}=1000")[0]
    assert at_once["ids"] == [eos]
    assert at_once["finish_reason"] == "stop"


def test_the_context_ends_a_sequence_or_refuses_it(
    call: Call, generated: Callable[..., list[dict[str, Any]]], moe_bundle: Built
) -> None:
    flags = (moe_bundle, "--prompt-ids", _ids(POSITIONS - 6), "--max-tokens", 20, "--ignore-eos")
    ended = generated(*flags)[0]
    assert len(ended["ids"]) == 6
    assert ended["finish_reason"] == "length"
    assert generated(*flags, "--context-policy", "stop")[0] == ended
    refused = call(generate.main, *flags, "--context-policy", "error")
    assert refused.status == FAILURE
    assert f"{POSITIONS - 6} tokens and 20 new ones" in refused.err
    assert f"context of {POSITIONS}" in refused.err


def test_a_prompt_beyond_the_context_is_an_error(call: Call, moe_bundle: Built) -> None:
    outcome = call(generate.main, moe_bundle, "--prompt-ids", _ids(POSITIONS), "--json")
    assert outcome.status == FAILURE
    message = outcome.report["error"]["message"]
    assert f"prompt 0 has {POSITIONS} tokens" in message
    assert f"the limit is {POSITIONS}" in message


@pytest.mark.parametrize("token", [BASE_CONFIG["vocab_size"], 1 << 40])
def test_an_id_outside_the_vocabulary_is_named(call: Call, moe_bundle: Built, token: int) -> None:
    outcome = call(generate.main, moe_bundle, "--prompt-ids", "3", "--prompt-ids", f"4,{token}")
    assert outcome.status == FAILURE
    assert f"prompt 1: token id {token} is outside the vocabulary" in outcome.err


def test_all_bad_sampling_values_are_named_at_once(call: Call, moe_bundle: Built) -> None:
    flags = ("--temperature", "-1", "--top-p", "2", "--max-tokens", "0", "--seed", "-3")
    outcome = call(generate.main, moe_bundle, "--prompt-ids", "3", *flags, "--json")
    assert outcome.status == FAILURE
    error = outcome.report["error"]
    assert error["kind"] == "ValueError"
    for name in ("temperature", "top_p", "max_tokens", "seed"):
        assert f"{name} must be" in error["message"]
    assert "top_k must be" not in error["message"]


def test_more_threads_than_cpus_are_told_in_one_line_and_run(call: Call, moe_bundle: Built) -> None:
    threads = usable_cpus() + 1
    flags = ("--backend", "onnxruntime", "--prompt-ids", "3", "--max-tokens", 1)
    outcome = call(generate.main, moe_bundle, *flags, "--threads", threads)
    assert outcome.status == SUCCESS, outcome.err
    assert outcome.err.startswith(f"--threads {threads} is more than the CPUs usable here")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(("backend", "lines"), [("torch", 1), ("onnxruntime", 0)])
def test_waiting_without_spinning_is_onnxruntimes_alone(
    call: Call, moe_bundle: Built, backend: str, lines: int
) -> None:
    flags = ("--backend", backend, "--prompt-ids", "3", "--max-tokens", 1, "--threads", 1)
    outcome = call(generate.main, moe_bundle, *flags, "--no-spinning")
    assert outcome.status == SUCCESS, outcome.err
    assert outcome.err.count("--no-spinning is for onnxruntime") == lines
    assert outcome.err.count("\n") == lines


@pytest.mark.parametrize("count", [0, -2])
def test_less_than_one_thread_is_wrong_usage(call: Call, moe_bundle: Built, count: int) -> None:
    outcome = call(generate.main, moe_bundle, "--prompt-ids", "3", "--threads", count)
    assert outcome.status == USAGE
    assert f"--threads must be at least 1, got {count}" in outcome.err


def test_an_unknown_backend_is_wrong_usage(call: Call, moe_bundle: Built) -> None:
    flags = ("--prompt-ids", "3", "--backend", "abacus", "--json")
    outcome = call(generate.main, moe_bundle, *flags)
    assert outcome.status == USAGE
    error = outcome.report["error"]
    assert error["kind"] == "usage"
    assert "abacus" in error["message"]
    assert "onnxruntime" in error["message"]


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt_rtx"])
def test_an_unknown_variant_lists_those_of_the_bundle(
    call: Call, moe_bundle: Built, backend: str
) -> None:
    flags = ("--prompt-ids", "3", "--backend", backend, "--variant", "fp16")
    outcome = call(generate.main, moe_bundle, *flags)
    assert outcome.status == FAILURE
    assert f"no model {backend}:fp16" in outcome.err
    assert "onnxruntime:fp32, onnxruntime:canonical, torch:fp32" in outcome.err


def test_a_text_prompt_without_a_tokenizer_points_to_ids(call: Call, moe_bundle: Built) -> None:
    outcome = call(generate.main, moe_bundle, "--prompt", TEXT)
    assert outcome.status == FAILURE
    assert "tokenizer" in outcome.err
    assert "--prompt-ids" in outcome.err


def test_two_kinds_of_prompts_are_wrong_usage(call: Call, text_bundle: Built) -> None:
    outcome = call(generate.main, text_bundle, "--prompt", TEXT, "--prompt-ids", "3")
    assert outcome.status == USAGE
    assert "--prompt and --prompt-ids" in outcome.err
    assert not outcome.out


def test_a_cut_weights_file_is_found_when_the_bundle_is_opened(call: Call, copied: Path) -> None:
    weights = copied / "model.onnx.data"
    size = weights.stat().st_size
    os.truncate(weights, size - 1)
    outcome = call(generate.main, copied, "--prompt-ids", "3")
    assert outcome.status == FAILURE
    assert "model.onnx.data" in outcome.err
    assert str(size) in outcome.err
    assert str(size - 1) in outcome.err


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("router_mode", "mixed", "router_mode is 'mixed'"),
        ("generation", "G99", "G99"),
        ("contract", {}, "contract"),
        ("files", 7, "files"),
        ("config", {"hidden_size": 64}, "config"),
    ],
)
def test_an_altered_manifest_is_refused(
    call: Call, copied: Path, field: str, value: object, found: str
) -> None:
    manifest = copied / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    assert field in content
    manifest.write_text(json.dumps({**content, field: value}), encoding="utf-8")
    outcome = call(generate.main, copied, "--prompt-ids", "3")
    assert outcome.status == FAILURE
    assert f"bundle {copied} is broken" in outcome.err
    assert found in outcome.err


@pytest.mark.parametrize("command", [generate, score, compare])
def test_a_folder_that_is_no_bundle_is_named(call: Call, tmp_path: Path, command: Any) -> None:
    flags = ("--ids", tmp_path / "ids.npy") if command is score else ("--prompt-ids", "3")
    outcome = call(command.main, tmp_path, *flags)
    assert outcome.status == FAILURE
    assert f"{tmp_path} is no bundle" in outcome.err


# --- score ---------------------------------------------------------------------------------------


def test_score_of_ids_agrees_between_prefill_and_decode(
    call: Call, moe_bundle: Built, tmp_path: Path
) -> None:
    vocab = BASE_CONFIG["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocab, (2, 12))
    np.save(tmp_path / "ids.npy", ids)
    results = {}
    for mode in ("prefill", "decode"):
        written = tmp_path / f"{mode}.npy"
        flags = ("--ids", tmp_path / "ids.npy", "--mode", mode, "--logits", written, "--json")
        outcome = call(score.main, moe_bundle, *flags)
        assert outcome.status == SUCCESS, outcome.err
        results[mode] = (outcome.report, np.load(written))
    report, logits = results["prefill"]
    assert set(report) == {
        "backend",
        "variant",
        "mode",
        "tokens",
        "nll",
        "perplexity",
        "token_logprobs",
    }
    assert report["mode"] == "prefill"
    assert report["tokens"] == 2 * 11
    assert logits.dtype == np.float32
    assert logits.shape == (2, 12, vocab)
    shifted = logits[:, :-1].astype(np.float64)
    normalised = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    expected = np.take_along_axis(normalised, ids[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(report["token_logprobs"], expected, atol=1e-4)
    assert report["nll"] == pytest.approx(-expected.mean(), abs=1e-4)
    assert report["perplexity"] == pytest.approx(np.exp(report["nll"]))
    other, other_logits = results["decode"]
    assert other["mode"] == "decode"
    np.testing.assert_allclose(other_logits, logits, atol=1e-3)
    np.testing.assert_allclose(other["token_logprobs"], report["token_logprobs"], atol=1e-3)


def test_score_of_a_text_cuts_it_into_windows(
    call: Call, text_bundle: Built, tmp_path: Path
) -> None:
    file = tmp_path / "story.txt"
    file.write_text("Once upon a time there was a little dog. " * 4, encoding="utf-8")
    outcome = call(score.main, text_bundle, "--text", file, "--window", 16, "--json")
    assert outcome.status == SUCCESS, outcome.err
    report = outcome.report
    windows = report["token_logprobs"]
    assert len(windows) > 1
    assert {len(window) for window in windows[:-1]} == {15}
    assert report["tokens"] == sum(map(len, windows))
    assert all(x <= 0 for window in windows for x in window)
    beyond = call(score.main, text_bundle, "--text", file, "--window", 1025)
    assert beyond.status == FAILURE
    assert "--window 1025" in beyond.err


def test_flags_of_score_that_do_not_fit_are_wrong_usage(
    call: Call, text_bundle: Built, tmp_path: Path
) -> None:
    text, ids = ("--text", tmp_path / "a.txt"), ("--ids", tmp_path / "a.npy")
    for flags, named in [
        ((*text, "--logits", tmp_path / "l.npy"), "--logits"),
        ((*ids, "--window", 8), "--window"),
        ((*ids, *text), "--text"),
        ((), "--ids"),
    ]:
        outcome = call(score.main, text_bundle, *flags)
        assert outcome.status == USAGE
        assert named in outcome.err
