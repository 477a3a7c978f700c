"""The benchmark command: what it prints and what it refuses, never how fast anything is."""

from __future__ import annotations

import json

import pytest

from export import build_engine
from runtime.benchmark import main
from runtime.command import FAILURE, SUCCESS, USAGE
from runtime.cpu_threads import usable_cpus
from tests.fake_bundle import write_fake_bundle
from tests.fake_tensorrt.engine_file import ACTIVATION_BYTES, add_fake_engine

FIELDS = {
    "bundle",
    "backend",
    "variant",
    "input_len",
    "output_len",
    "load_s",
    "ttft_ms",
    "tpot_ms",
    "itl_ms",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_rss_mb",
    "roofline_fraction",
    "repeats",
}
QUICK = ("--repeats", 2, "--warmup", 0, "--threads", 1, "--quiet")


@pytest.fixture(scope="module")
def mixed_bundle(tiny_moe, tmp_path_factory):
    """Random experts with the router mode `mixed`, prompts of up to 32 tokens."""
    path = tmp_path_factory.mktemp("bundles") / "mixed"
    flags = ("--backend", "none", "--max-input-len", "32", "--output", str(path), "--quiet")
    assert build_engine.main(["--model", str(tiny_moe), *flags]) == SUCCESS
    return path


@pytest.fixture
def fake_bundle(tmp_path):
    return write_fake_bundle(tmp_path / "fake")


def call(capsys, *arguments):
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr()


def refusal(capsys, *arguments, status):
    found, printed = call(capsys, *arguments)
    assert found == status
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_json_has_a_result_for_each_backend_and_length(mixed_bundle, capsys):
    status, printed = call(
        capsys, mixed_bundle, "--backend", "onnxruntime:fp32,onnxruntime", "--input-len", "5,32",
        "--output-len", 4, *QUICK, "--json",
    )  # fmt: skip
    assert status == SUCCESS, printed.err
    report = json.loads(printed.out)
    assert set(report) == {"machine", "versions", "results"}
    assert report["machine"]["read_gb_per_s"] > 0
    assert report["machine"]["read_threads"] == 1
    assert {"python", "numpy", "onnxruntime"} <= set(report["versions"])
    assert [result["input_len"] for result in report["results"]] == [5, 5, 32, 32]
    for result in report["results"]:
        assert set(result) == FIELDS
        assert result["bundle"] == str(mixed_bundle)
        assert (result["backend"], result["variant"]) == ("onnxruntime", "fp32")
        assert (result["output_len"], result["repeats"]) == (4, 2)
        assert result["itl_ms"]["p50"] <= result["itl_ms"]["p95"] <= result["itl_ms"]["p99"]
        positive = FIELDS - {"bundle", "backend", "variant", "itl_ms"}
        assert all(result[name] > 0 for name in positive)


def test_single_token_leaves_out_what_it_cannot_tell(mixed_bundle, capsys):
    status, printed = call(
        capsys, mixed_bundle, "--backend", "onnxruntime", "--output-len", 1, *QUICK, "--json"
    )
    assert status == SUCCESS, printed.err
    [result] = json.loads(printed.out)["results"]
    missing = {name for name, value in result.items() if value is None}
    assert missing == {"tpot_ms", "itl_ms", "decode_tokens_per_s", "roofline_fraction"}


@pytest.mark.slow
def test_table_compares_backends_and_bundles(mixed_bundle, capsys):
    status, printed = call(
        capsys, mixed_bundle, mixed_bundle, "--backend", "torch,onnxruntime", "--batch-size", 2,
        "--output-len", 3, *QUICK,
    )  # fmt: skip
    assert status == SUCCESS, printed.err
    assert printed.out.count("torch:fp32") == printed.out.count("onnxruntime:fp32") == 2
    assert "1.00" in printed.out
    assert "3 tokens from each prompt, batch of 2, 2 rounds" in printed.out
    assert printed.err == ""


def test_tokens_beyond_the_context_are_wrong_usage(fake_bundle, capsys):
    message = refusal(capsys, fake_bundle, "--input-len", "8,60", "--output-len", 5, status=USAGE)
    assert "--input-len 60 and --output-len 5 exceed the 64 tokens of bundle" in message


def test_mixed_prompt_of_several_passes_is_wrong_usage(mixed_bundle, capsys):
    message = refusal(capsys, mixed_bundle, "--input-len", 33, status=USAGE)
    assert "exceeds the 32 tokens of one pass" in message
    assert "mixed" in message


def test_batch_beyond_the_limit_is_wrong_usage(fake_bundle, capsys):
    message = refusal(capsys, fake_bundle, "--batch-size", 3, "--output-len", 1, status=USAGE)
    assert "--batch-size 3 exceeds the 2 sequences" in message


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--input-len", "8,x"), "got '8,x'"),
        (("--input-len", "0"), "got '0'"),
        (("--backend", "torch,,"), "got 'torch,,'"),
        (("--output-len", 0), "--output-len must be at least 1, got 0"),
        (("--repeats", 0), "--repeats must be at least 1, got 0"),
        (("--warmup", -1), "--warmup must be at least 0, got -1"),
        (("--threads", 0), "--threads must be at least 1, got 0"),
    ],
)
def test_numbers_that_make_no_sense_are_wrong_usage(fake_bundle, capsys, flags, told):
    assert told in refusal(capsys, fake_bundle, *flags, status=USAGE)


def test_too_many_threads_are_told_once_however_many_are_opened(mixed_bundle, capfd):
    threads = usable_cpus() + 1
    flags = ("--backend", "onnxruntime,onnxruntime", "--output-len", 1, "--repeats", 1)
    status = main([*map(str, (mixed_bundle, *flags, "--warmup", 0, "--threads", threads))])
    assert status == SUCCESS
    assert capfd.readouterr().err.count(f"--threads {threads} is more than") == 1


def test_unknown_backend_or_variant_is_an_error(fake_bundle, capsys):
    short = ("--output-len", 4)
    message = refusal(capsys, fake_bundle, *short, "--backend", "torch,abacus", status=FAILURE)
    assert "unknown backend 'abacus'" in message
    message = refusal(capsys, fake_bundle, *short, "--backend", "torch:int3", status=FAILURE)
    assert "has no model torch:int3" in message


def test_bundle_that_cannot_be_opened_is_an_error(fake_bundle, tmp_path, capsys):
    message = refusal(capsys, fake_bundle, tmp_path / "none", status=FAILURE)
    assert "does not exist" in message


def test_model_that_does_not_load_is_an_error_that_names_the_system(fake_bundle, capsys):
    message = refusal(
        capsys, fake_bundle, "--backend", "onnxruntime", "--output-len", 4, *QUICK, status=FAILURE
    )
    assert f"{fake_bundle} onnxruntime, prompt of 16: onnxruntime cannot load" in message


def test_an_engine_is_measured_beside_the_cpu_with_its_gpus_memory(
    engine_bundle, gpu, here, capsys
):
    names = "tensorrt_rtx,onnxruntime:canonical"
    flags = ("--backend", names, "--input-len", "5,70", "--output-len", 4, "--batch-size", 2)
    starts = []
    for _ in range(2):
        status, printed = call(capsys, engine_bundle.path, *flags, *QUICK, "--json")
        assert status == SUCCESS, printed.err
        results = json.loads(printed.out)["results"]
        engines, others = results[::2], results[1::2]
        assert [set(result) for result in others] == [FIELDS, FIELDS]
        for result in engines:
            assert set(result) == FIELDS | {"device"}
            assert (result["backend"], result["peak_rss_mb"]) == ("tensorrt_rtx", 100.0)
            assert result["itl_ms"]["p50"] <= result["itl_ms"]["p95"] <= result["itl_ms"]["p99"]
            device = result["device"]
            assert "sm89" in device["gpu"]
            # Weights 2 MB, activations 1 MB, and two sequences of 420 slots.
            contract = engine_bundle.contract_of(engine_bundle.variant("tensorrt_rtx"))
            cache_mb = 2 * 420 * contract.bytes_per_token() / 2**20
            assert cache_mb < device["memory_mb"] - 3e6 / 2**20 < cache_mb + 2
            # The floor follows the GPU's speed, not the CPU's.
            assert result["roofline_fraction"] > 0
            assert device["verdicts"] == ["VALID"]
            assert device["activations_mb"] == round(ACTIVATION_BYTES / 2**20, 1)
        starts.append([result["device"]["runtime_cache"] for result in engines])
        saved = [result["device"]["runtime_cache_mb"] for result in engines]
    assert starts == [["cold", "cold"], ["warm", "warm"]]
    assert saved == [0.0, 0.0]  # the stand-in's is a few bytes


def test_standard_tensorrt_keeps_no_kernels_and_its_library_gives_no_verdict(
    engine_source, tmp_path, gpu, here, capsys
):
    bundle = add_fake_engine(
        engine_source, tmp_path / "bundle", backend="tensorrt", decode_width=64
    )
    flags = ("--backend", "tensorrt", "--input-len", 5, "--output-len", 4)
    for _ in range(2):
        status, printed = call(capsys, bundle.path, *flags, *QUICK, "--json")
        assert status == SUCCESS, printed.err
        (result,) = json.loads(printed.out)["results"]
        assert (result["backend"], result["variant"]) == ("tensorrt", "fp32-sm89")
        device = result["device"]
        assert (device["runtime_cache"], device["runtime_cache_mb"]) == ("none", 0.0)
        assert device["verdicts"] == [None, None]
        assert device["activations_mb"] == round(2 * ACTIVATION_BYTES / 2**20, 1)


def test_the_table_names_the_gpu_and_its_memory(engine_bundle, gpu, here, capsys):
    flags = ("--backend", "tensorrt_rtx", "--output-len", 3)
    status, printed = call(capsys, engine_bundle.path, *flags, *QUICK)
    assert status == SUCCESS, printed.err
    (line,) = (line for line in printed.out.splitlines() if "runtime cache" in line)
    assert line.startswith("tensorrt_rtx:fp32-sm89, prompt of 16: ")
    assert line.endswith("GB/s, runtime cache cold")
