"""The command `inspect_bundle` on real bundles, whole and damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from export.dogetrt import COMMANDS
from runtime.bundle import Bundle
from runtime.bundle_report import bundle_report, printed_report
from runtime.inspect_bundle import main
from runtime.manifest import MANIFEST_NAME

PLAN = {
    "profiles": [
        {
            "name": "decode",
            "entries": 36,
            "entries_per_layer": 12.0,
            "by_kind": {"gemm": 12, "kgen": 24},
            "by_part": {"attention": 22, "feed_forward": 14},
            "fused_attention": 3,
            "waits": 0,
            "streams": 1,
            "activation_bytes": 3 << 20,
            "weight_bytes": 1000,
        }
    ],
    "weights_bytes": 1000,
    "unknown_kinds": [],
    "decode_estimate": {
        "launch_us": 1.5,
        "bytes_per_second": 1008e9,
        "weight_bytes": 1000,
        "cache_bytes": 1000,
        "launches_us": 54.0,
        "reading_us": 7.0,
        "total_us": 61.0,
    },
}


@pytest.fixture
def copy(moe_bundle, tmp_path) -> Path:
    """A bundle of random experts that a test may damage."""
    return Path(shutil.copytree(moe_bundle.path, tmp_path / "bundle"))


def edited(folder: Path, **changes: object) -> Path:
    """Change the manifest."""
    file = folder / MANIFEST_NAME
    manifest = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**manifest, **changes}), encoding="utf-8")
    return folder


def test_it_shows_what_the_manifest_says(moe_bundle, capsys):
    assert main([str(moe_bundle.path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    bundle = Bundle.open(moe_bundle.path)
    manifest = bundle.manifest
    assert shown["source"]["weights_sha256"] == manifest.source.weights_sha256
    assert (shown["generation"]["name"], shown["router_mode"]) == ("g4", "per_token")
    assert shown["bytes"] == sum(file.bytes for file in manifest.files)
    assert {file["path"]: file["sha256"] for file in shown["files"]} == {
        file.path: file.sha256 for file in manifest.files
    }
    assert [v["name"] for v in shown["variants"]] == [v.name for v in manifest.variants]
    assert shown["contract"] == manifest.contract
    assert shown["verify"] is None


def test_sizes_of_the_cache_and_parts_are_counted(moe_bundle):
    bundle = Bundle.open(moe_bundle.path)
    report = bundle_report(bundle)
    limits, config = bundle.limits, bundle.config
    # Keys and values of 2 heads of 16 and 2 scores, all float32.
    per_token = config.num_hidden_layers * (2 * 2 * 16 + 2) * 4
    canonical = next(v for v in report["variants"] if v["name"] == "canonical")
    assert canonical["kv_bytes_per_token"] == per_token
    assert canonical["kv_bytes"] == per_token * limits.max_seq_len * limits.max_batch_size
    parameters = report["parameters"]
    assert parameters["embedding"] == config.vocab_size * config.hidden_size
    assert parameters["experts"] == 2 * config.num_experts * config.hidden_size * 3
    assert parameters["total"] == sum(n for part, n in parameters.items() if part != "total")
    torch_files = next(v for v in report["variants"] if v["backend"] == "torch")["bytes"]
    listed = [f.bytes for f in bundle.manifest.files if f.path.startswith("checkpoint/")]
    assert torch_files == sum(listed) > 0


def test_text_names_every_file_and_variant(moe_bundle, capsys):
    assert main([str(moe_bundle.path)]) == 0
    text = capsys.readouterr().out
    manifest = Bundle.open(moe_bundle.path).manifest
    assert all(file.path in text for file in manifest.files)
    assert all(f"{v.backend}:{v.name}" in text for v in manifest.variants)
    assert "3x key float32[B,2," in text
    assert "logits float32[B,M,97]" in text
    assert "verdict" not in text


def test_plan_and_estimate_of_an_engine_are_shown(copy):
    report = bundle_report(Bundle.open(copy))
    report["variants"][0]["details"] = {
        "targets": ["sm89"], "builder_version": "1", "plugin": "none", "plan": PLAN,
    }  # fmt: skip
    text = "\n".join(printed_report(report))
    assert "engine     for sm89, built by version 1, plugins none" in text
    assert "decode: 36 kernels, 12.0 a layer (12 gemm, 24 kgen; 22 attention" in text
    assert "3.0 MiB of activations" in text
    assert "61 us a token on an RTX 4090, not measured: 54 us of launches at 1.5 us each" in text


def test_a_decode_graph_is_shown_behind_its_engine(copy):
    report = bundle_report(Bundle.open(copy))
    variant = report["variants"][0]
    assert variant["decode_graph"] is None
    graph = {"path": "engines/x.decode.engine", "width": 512, "plan": PLAN}
    variant["details"] = {"plugin": "none", "plan": PLAN, "decode_graph": graph}
    variant["decode_graph"] = {"path": graph["path"], "bytes": 3 << 20}
    text = "\n".join(printed_report(report))
    assert (
        "decode     chooses tokens among 512 candidates, without logits: 3.0 MiB in "
        "engines/x.decode.engine\n  plan       decode: 36 kernels"
    ) in text
    assert text.count("36 kernels") == 2


def test_whole_bundle_is_verified(moe_bundle, capsys):
    assert main([str(moe_bundle.path), "--verify", "--json"]) == 0
    verify = json.loads(capsys.readouterr().out)["verify"]
    assert (verify["verdict"], verify["problems"]) == ("pass", [])
    assert verify["files"] == len(Bundle.open(moe_bundle.path).manifest.files)
    assert all(fit["runs"] for fit in verify["fits"])


def test_altered_file_is_found_by_its_hash(copy, capsys):
    weights = copy / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main([str(copy)]) == 0  # sizes are as listed
    capsys.readouterr()
    assert main([str(copy), "--verify"]) == 3
    text = capsys.readouterr().out
    assert "altered    model.onnx.data has sha256" in text
    assert "cannot run here: not opened, because files of the bundle were altered" in text
    assert text.rstrip().endswith("verdict      fail")


def test_bundle_that_nothing_here_runs_is_a_negative_verdict(copy, capsys, monkeypatch):
    from runtime import bundle_verification
    from runtime.backends.base import BackendUnavailableError

    def refuse(*args: object, **options: object) -> None:
        raise BackendUnavailableError("no such device; get one")

    monkeypatch.setattr(bundle_verification, "open_backend", refuse)
    assert main([str(copy), "--verify"]) == 3
    assert "canonical cannot run here: no such device; get one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (lambda folder: (folder / MANIFEST_NAME).unlink(), "has no manifest.json"),
        (lambda folder: (folder / MANIFEST_NAME).write_text("{"), "is broken"),
        (lambda folder: (folder / "model.onnx").unlink(), "model.onnx is missing"),
        (lambda folder: edited(folder, generation="g9"), "g9"),
        (lambda folder: edited(folder, format_version=99), "format_version is 99"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_bad_bundle_is_one_line_of_error(copy, capsys, damage, message, as_json):
    damage(copy)
    assert main([str(copy), "--verify", *(["--json"] if as_json else [])]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    if as_json:
        assert message in json.loads(captured.out)["error"]["message"]


def test_it_imports_no_torch(moe_bundle):
    code = (
        "import sys; sys.modules['torch'] = None; from runtime.inspect_bundle import main; "
        f"sys.exit(main([{str(moe_bundle.path)!r}, '--quiet']))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime:canonical" in done.stdout


def test_the_installed_command_knows_it():
    assert COMMANDS["inspect"] == "runtime.inspect_bundle"
