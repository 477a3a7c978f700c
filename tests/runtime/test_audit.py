"""The audit command: what it prints, which rows it has for which checkpoint, its exit status."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import model.doge
from export import dogetrt
from runtime.audit import main
from runtime.command import FAILURE, NEGATIVE, SUCCESS, USAGE
from tests.tiny_doge import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "model" / "checkpoints" / "doge-tiny"
Golden = Callable[[str], Path]
Report = dict[str, Any]
# What a router that mixes the tokens of a prompt moves.
MIXED = {
    "future_leak",
    "cached_equals_uncached",
    "prefill_then_decode",
    "chunked_prefill",
    "end_of_context",
}
PLAY = """\
First Citizen:
Before we proceed any further, hear me speak.

All:
Speak, speak.

First Citizen:
You are all resolved rather to die than to famish?

All:
Resolved. resolved.
"""


Audit = Callable[..., tuple[int, Report]]


def run_audit(folder: Path, *arguments: object) -> tuple[int, Report]:
    """Exit status and report of the command."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["--model", str(folder), "--json", "--quiet", *map(str, arguments)])
    report: Report = json.loads(printed.getvalue())
    return status, report


@pytest.fixture(scope="session")
def audit(golden: Golden) -> Audit:
    """Audits a golden checkpoint, once for each set of arguments."""

    @cache
    def run(case: str, *arguments: str) -> tuple[int, Report]:
        return run_audit(golden(case), *arguments)

    return run


def rows(report: Report, result: str) -> set[tuple[str, str]]:
    """Subject and check of the findings with this result."""
    return {(f["subject"], f["check"]) for f in report["findings"] if f["result"] == result}


def finding(report: Report, subject: str, check: str) -> Report:
    [found] = [f for f in report["findings"] if (f["subject"], f["check"]) == (subject, check)]
    result: Report = found
    return result


# --- clean models ---


SLOW = ("g4_window", "g4_untied_mha", "g3", "g4h_window")


@pytest.mark.parametrize(
    "case",
    [
        "g4",
        "g4h",
        "g1",
        *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_dense_model_passes(audit: Audit, case: str) -> None:
    status, report = audit(case)
    assert status == SUCCESS
    assert report["verdict"] == "pass"
    assert report["generation"] == case.split("_")[0]
    assert rows(report, "fail") == set()
    # Of repeated tokens beyond the window rounding or the device decides: docs/audit.md.
    assert {check for _, check in rows(report, "expected")} <= {"selection_of_repeated_tokens"}
    subjects = {found["subject"] for found in report["findings"]} - {"prompts"}
    theirs = {"transformers"}
    if report["generation"] == "g4":
        theirs = {"transformers, eager", "transformers, sdpa"}
    assert subjects == {"ours", *theirs}


def test_report_has_the_contract_of_the_command(audit: Audit) -> None:
    _, report = audit("g4")
    assert list(report) == ["generation", "findings", "verdict"]
    for found in report["findings"]:
        assert list(found) == ["subject", "check", "result", "value", "limit", "meaning"]
        assert found["result"] in {"pass", "fail", "expected", "skipped"}
        assert found["meaning"]
    compared = finding(report, "transformers, sdpa", "ours_against_transformers")
    assert compared["result"] == "pass"
    assert compared["value"] < compared["limit"] < 0.01


@pytest.mark.slow
def test_published_routing_is_expected_and_clean_per_token(audit: Audit) -> None:
    status, report = audit("g4_moe")
    assert status == SUCCESS
    assert rows(report, "fail") == set()
    theirs = {*MIXED, "batch_independence", "unequal_lengths"}
    assert rows(report, "expected") == {
        *(("ours", check) for check in (*MIXED, "router_modes")),
        *(("transformers, eager", check) for check in theirs),
        *(("transformers, sdpa", check) for check in theirs),
    }
    for found in report["findings"]:
        if found["result"] == "expected":
            assert "docs/reference.md, Router: `mixed` and `per_token`" in found["meaning"]
    for attention in ("eager", "sdpa"):
        compared = finding(report, f"transformers, {attention}", "ours_against_transformers")
        assert compared["result"] == "pass"
    assert {
        check for subject, check in rows(report, "pass") if subject == "ours, per_token"
    } > MIXED
    assert ("ours", "router_perplexity") in rows(report, "skipped")
    assert "--text" in finding(report, "ours", "router_perplexity")["meaning"]


@pytest.mark.parametrize("case", ["g4_moe", "g3_moe"])
def test_router_per_token_is_clean(audit: Audit, case: str) -> None:
    status, report = audit(case, "--router", "per_token")
    assert status == SUCCESS
    assert {check for subject, check in rows(report, "expected") if subject == "ours"} == {
        "router_modes"
    }
    assert not any(found["subject"] == "ours, per_token" for found in report["findings"])


# --- transformers ---


def test_transformers_is_skipped_for_another_generation(audit: Audit) -> None:
    _, report = audit("g4h")
    skipped = finding(report, "transformers", "ours_against_transformers")
    assert skipped["result"] == "skipped"
    assert (skipped["value"], skipped["limit"]) == (None, None)
    assert "does not compute g4h" in skipped["meaning"]


@pytest.mark.parametrize(
    ("version", "reason"), [("5.17.0", "5.17.0 is too old"), (None, "is not installed")]
)
def test_old_or_missing_transformers_is_skipped_with_the_reason(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str
) -> None:
    if version is None:
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        # By name: transformers puts another module in its place as it loads its parts.
        monkeypatch.setattr("transformers.__version__", version)
    status, report = run_audit(golden("g4"))
    assert status == SUCCESS
    for attention in ("eager", "sdpa"):
        skipped = finding(report, f"transformers, {attention}", "ours_against_transformers")
        assert skipped["result"] == "skipped"
        assert reason in skipped["meaning"]


def test_what_transformers_refuses_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("no such luck\nand a long report")

    monkeypatch.setattr(transformers.DogeForCausalLM, "from_pretrained", refuse)
    _, report = run_audit(write_checkpoint(tmp_path))
    meaning = finding(report, "transformers, eager", "ours_against_transformers")["meaning"]
    assert meaning.endswith("does not load it: RuntimeError: no such luck")


# --- negative verdicts ---


def leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of ours sees the future: every query stands in the last slot of its pass."""
    right = model.doge.dynamic_mask_attention

    def attention(query: torch.Tensor, *rest: torch.Tensor, **keywords: Any) -> torch.Tensor:
        *cached, write_index = rest
        last = write_index + query.shape[2] - 1
        return torch.cat([right(q, *cached, last, **keywords) for q in query.split(1, 2)], dim=1)

    monkeypatch.setattr(model.doge, "dynamic_mask_attention", attention)


def test_defect_of_ours_is_a_negative_verdict(golden: Golden, monkeypatch: Any) -> None:
    leak(monkeypatch)
    status, report = run_audit(golden("g4"))
    assert (status, report["verdict"]) == (NEGATIVE, "fail")
    failed = rows(report, "fail")
    assert {("ours", "future_leak"), ("ours", "cached_equals_uncached")} <= failed
    assert ("transformers, eager", "ours_against_transformers") in failed
    assert ("transformers, eager", "future_leak") not in failed


def test_published_routing_hides_no_defect(golden: Golden, monkeypatch: Any) -> None:
    leak(monkeypatch)
    status, report = run_audit(golden("g3_moe"))
    assert status == NEGATIVE
    assert ("ours", "future_leak") in rows(report, "expected")
    assert ("ours, per_token", "future_leak") in rows(report, "fail")


# --- the seed generation ---


@pytest.fixture
def seed(golden: Golden, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the G1 checkpoint, changed."""

    def copy(*, mask_of_ones: bool, keys_of_zeros: bool) -> Path:
        folder = shutil.copytree(golden("g1"), tmp_path / "g1")
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            if mask_of_ones and name.endswith(".attn.dynamic_mask"):
                tensor.fill_(1)
            if keys_of_zeros and name.endswith(".attn.v_keys"):
                tensor.zero_()
        save_file(tensors, folder / "model.safetensors")
        return folder

    return copy


def test_inert_parts_of_the_seed_are_expected(seed: Any) -> None:
    """As every published checkpoint has them: docs/reference.md."""
    status, report = run_audit(seed(mask_of_ones=True, keys_of_zeros=True))
    assert status == SUCCESS
    mask = finding(report, "ours", "dynamic_mask_inert")
    assert (mask["result"], mask["value"]) == ("expected", 0)
    keys = finding(report, "ours", "value_keys_inert")
    assert (keys["result"], keys["value"]) == ("expected", 0)
    heading = "What training leaves untouched in the seed"
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert f"## {heading}\n" in reference
    for found in (mask, keys):
        assert found["meaning"].endswith(f"docs/reference.md, {heading}")
    assert rows(report, "fail") == set()


def test_parts_of_the_seed_that_are_used_are_counted(golden: Golden, audit: Audit) -> None:
    tensors = load_file(golden("g1") / "model.safetensors")
    zeros = sum(int((t == 0).sum()) for n, t in tensors.items() if n.endswith("dynamic_mask"))
    keys = sum(t.numel() for n, t in tensors.items() if n.endswith("v_keys"))
    assert min(zeros, keys) > 0
    _, report = audit("g1")
    mask = finding(report, "ours", "dynamic_mask_inert")
    assert (mask["result"], mask["value"]) == ("pass", zeros)
    used = finding(report, "ours", "value_keys_inert")
    assert (used["result"], used["value"]) == ("pass", keys)


# --- a text ---


@pytest.mark.slow
@pytest.mark.parametrize("router", ["per_token", "mixed"])
def test_text_tells_which_router_mode_the_model_was_trained_for(
    tmp_path: Path, router: str
) -> None:
    text = tmp_path / "play.txt"
    text.write_text(PLAY, encoding="utf-8")
    status, report = run_audit(TINY, "--router", router, "--text", text)
    assert status == SUCCESS
    right = finding(report, "ours, per_token", "router_perplexity")
    wrong = finding(report, "ours, mixed", "router_perplexity")
    assert (right["result"], wrong["result"]) == ("pass", "expected")
    assert 1 < right["value"] < wrong["value"]
    assert ("use --router per_token" in wrong["meaning"]) == (router == "mixed")


@pytest.mark.slow
def test_text_that_the_model_cannot_read_tells_nothing(tmp_path: Path) -> None:
    text = tmp_path / "noise.txt"
    text.write_text("0x7f: ++q[i--]; // \u00b5\u00df\u00e9 {}~^|\n" * 20, encoding="utf-8")
    status, report = run_audit(TINY, "--router", "per_token", "--text", text)
    assert status == SUCCESS
    for mode in ("mixed", "per_token"):
        told = finding(report, f"ours, {mode}", "router_perplexity")
        assert told["result"] == "skipped"
        assert told["value"] > 2048
        assert "tells nothing" in told["meaning"]


def test_text_without_a_tokenizer_is_told(golden: Golden, tmp_path: Path) -> None:
    text = tmp_path / "play.txt"
    text.write_text(PLAY, encoding="utf-8")
    _, report = run_audit(golden("g3_moe"), "--text", text)
    skipped = finding(report, "ours", "router_perplexity")
    assert skipped["result"] == "skipped"
    assert "no tokenizer.json" in skipped["meaning"]


def test_text_for_a_model_without_a_router_is_told(golden: Golden, tmp_path: Path) -> None:
    text = tmp_path / "play.txt"
    text.write_text(PLAY, encoding="utf-8")
    status, report = run_audit(golden("g1"), "--text", text)
    assert status == SUCCESS
    skipped = finding(report, "ours", "router_perplexity")
    assert skipped["result"] == "skipped"
    assert "there is no router" in skipped["meaning"]


# --- output and errors ---


def test_table_names_every_finding(golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(golden("g1")), "--quiet"]) == SUCCESS
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0].startswith("generation g1")
    for word in ("future_leak", "batch_independence", "value_keys_inert", "skipped"):
        assert any(word in line for line in lines)
    assert lines[-1].startswith("pass: ")


def error(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(arguments)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return status, printed.err


def test_folder_that_is_not_there_is_one_line(tmp_path: Path, capsys: Any) -> None:
    status, message = error(["--model", str(tmp_path / "a" / "b" / "none")], capsys)
    assert status == FAILURE
    assert "none" in message


def test_model_too_small_to_audit_is_one_line(tmp_path: Path, capsys: Any) -> None:
    write_checkpoint(tmp_path, max_position_embeddings=4)
    status, message = error(["--model", str(tmp_path), "--quiet"], capsys)
    assert status == FAILURE
    assert "a context of 4 tokens" in message


def test_model_must_be_named(capsys: Any) -> None:
    status, message = error([], capsys)
    assert status == USAGE
    assert "--model" in message


def test_installed_command_has_it(capsys: Any) -> None:
    assert dogetrt.main(["audit"]) == USAGE
    assert "--model" in capsys.readouterr().err


def test_help_and_errors_need_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None; from runtime.audit import main; "
        f"sys.exit(main(['--model', {str(tmp_path)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == FAILURE
    assert "torch is not installed" in done.stderr
    assert done.stderr.count("\n") == 1
