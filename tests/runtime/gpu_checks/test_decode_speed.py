"""The section of decode speed: what it runs in which order, and what it makes of the times."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

import plugins.projection.launches as projection_launches
import plugins.projection.matrix as projection_matrix
from runtime.backends.base import Limits
from runtime.gpu_checks import decode_speed, report
from runtime.gpu_checks.decode_pace import Pace
from runtime.gpu_checks.decode_speed import DecodeSpeedSection
from runtime.gpu_checks.section import Deadline
from runtime.roofline import step_bytes
from tests.fake_decode_timing import STEP_MS
from tests.gpu_check_subject import subject_of
from tests.host_device import HostDevice, HostLauncher
from tests.interpreter import InterpreterLauncher
from tests.speed_bundle import speed_bundle

PACE = Pace(warmup=2, tokens=3, repeats=1)
EARLIER = {"bandwidth": {"verdict": "pass", "gb_per_s": 2.0}}
TORCH = [
    f"torch:{t}:{m}" for t in ("float16", "bfloat16") for m in ("growing", "eager", "compiled")
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one by one: fewer and larger ones compute the same."""
    monkeypatch.setattr(projection_launches, "ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(projection_launches, "ENOUGH_HEAD_PROGRAMS", 1)
    monkeypatch.setattr(projection_matrix, "_FEW_PROGRAMS", 1)


@pytest.fixture
def section_run(tmp_path, monkeypatch):
    """Runs the section with a worker that does what the seed says; gives report and log."""
    return section_runner(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """What comes of two variants where nothing goes wrong."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return section_runner(tmp_path_factory.mktemp("usual"), monkeypatch)()


def section_runner(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_speed, "_WORKER", "tests.fake_decode_timing")
    log = tmp_path / "systems"
    log.touch()
    monkeypatch.setenv("TIMED_SYSTEMS", str(log))

    def profile(device, launcher, bundle, variant, positions, rhythm):
        return [
            {"position": p, "step_us": 9.0, "sum_us": 8.0, "launches": 6, "parts": []}
            for p in positions
        ]

    def run(seed=0, seconds=600.0, earlier=EARLIER, device=None, real_profile=False, **options):
        checked, packed = speed_bundle(tmp_path, **{"precisions": ("fp16", "int8"), **options})
        if not real_profile:
            monkeypatch.setattr(decode_speed, "profile_step", profile)
        device = device or HostDevice()
        launcher = HostLauncher(device, InterpreterLauncher(packed.kernels.specs))
        subject = dataclasses.replace(
            subject_of(device, seed=seed), bundles=(checked,), launchers={"tiny": launcher},
            deadline=Deadline(seconds),
        )  # fmt: skip
        section = DecodeSpeedSection(PACE, prompts=(4, 1900))
        found = section.run(subject, earlier)
        json.dumps(found, allow_nan=False)
        return found, [line.split() for line in log.read_text().splitlines()], checked

    return run


def case_of(found, system, batch, prompt):
    (case,) = (
        c for c in found["cases"]
        if (c["system"], c["batch"], c.get("prompt_tokens")) == (system, batch, prompt)
    )  # fmt: skip
    return case


def test_every_system_is_timed_what_tells_most_first(usual):
    found, log, _ = usual
    assert found["verdict"] == "pass"
    assert found["left_out"] == []
    ours = ["cuda:fp16", "cuda:int8"]
    assert [line[0] for line in log] == [*ours, *TORCH] * 2
    assert [line[2] for line in log] == ["1"] * 8 + ["2"] * 8
    # The longer prompt is what 32 slots leave beside five tokens.
    assert log[0][1:] == [
        "--batch-size", "1", "--lengths", "4,27", "--pace", "2,3,1", "--seed", "0",
        "--device", "cuda",
    ]  # fmt: skip
    assert len(found["cases"]) == 2 * len(log)
    assert case_of(found, "torch:float16:compiled", 1, 4)["compiler"] == {
        "graphs": 1, "cuda_graph_skips": 0,
    }  # fmt: skip


def test_bundles_take_turns_so_that_a_limit_cuts_off_what_tells_least(usual):
    checked = usual[2]
    both = [dataclasses.replace(checked, name=name) for name in ("a", "b")]
    order = [
        (timed.batch_size, timed.bundle.name, timed.system.split(":")[1])
        for timed in DecodeSpeedSection(PACE)._order(both)
    ]
    assert list(dict.fromkeys(order)) == [
        (batch, name, kind)
        for batch in (1, 2)
        for kinds in (("fp16", "int8"), ("float16",), ("bfloat16",))
        for name in ("a", "b")
        for kind in kinds
    ]
    assert len(order) == 2 * 16


def test_a_token_is_one_of_the_same_system_prompt_and_batch():
    profile = {"bundle": "a", "system": "cuda:fp16", "position": 6}
    case = {
        "bundle": "a", "system": "cuda:fp16", "batch": 1, "prompt_tokens": 4, "step_ms": 0.5,
    }  # fmt: skip
    assert decode_speed._token_us(profile, [case], 2) == 500
    for other in ({"bundle": "b"}, {"system": "cuda:int8"}, {"batch": 2}, {"prompt_tokens": 5}):
        assert decode_speed._token_us(profile, [{**case, **other}], 2) is None


@pytest.mark.parametrize(("batch", "prompt"), [(1, 4), (1, 27), (2, 4), (2, 27)])
def test_ratios_are_to_the_same_batch_and_prompt(usual, batch, prompt):
    found, _, _ = usual
    ratios = case_of(found, "cuda:fp16", batch, prompt)["times_torch"]
    steps = batch - 1 + (prompt == 27)
    assert ratios == {
        system.removeprefix("torch:"): pytest.approx(
            STEP_MS[system] * (1 + 0.5 * steps) / 0.25 / (1 + 0.1 * steps), abs=0.01
        )
        for system in TORCH
    }
    assert "times_torch" not in case_of(found, "torch:float16:eager", 2, 27)


@pytest.mark.parametrize(("batch", "prompt"), [(1, 4), (1, 27), (2, 27)])
def test_the_floor_is_the_bytes_at_the_mean_length_by_the_copies(usual, batch, prompt):
    found, _, checked = usual
    case = case_of(found, "cuda:int8", batch, prompt)
    variant = checked.bundle.variant("cuda", "int8")
    # Steps that count find two tokens of warm-up and one to three more.
    needed = step_bytes(checked.bundle, variant, batch, prompt + 4)
    assert needed > 100_000, "weights and the cache"
    assert case["read_bytes"] == round(needed)
    assert case["floor_ms"] == pytest.approx(1e3 * needed / 2e9, rel=1e-3)
    assert case["of_bandwidth"] == pytest.approx(case["floor_ms"] / case["step_ms"], rel=1e-2)


def test_without_a_bandwidth_there_is_no_share(section_run):
    found, _, _ = section_run(earlier={}, checkpoint=False)
    case = case_of(found, "cuda:fp16", 1, 4)
    assert case["read_bytes"] > 0
    assert "floor_ms" not in case
    assert "of_bandwidth" not in case


def test_profiles_tell_what_the_host_saw(usual):
    found, _, _ = usual
    seen = [(p["system"], p["position"], p["token_us"]) for p in found["profiles"]]
    assert seen == [
        ("cuda:fp16", 6, 250.0), ("cuda:fp16", 29, 275.0),
        ("cuda:int8", 6, 200.0), ("cuda:int8", 29, 220.0),
    ]  # fmt: skip


def test_a_process_that_dies_is_a_failure_and_ends_nothing_else(section_run):
    found, log, _ = section_run(seed=1)
    assert found["verdict"] == "fail"
    assert len(log) == 16
    (case, _) = (c for c in found["cases"] if c["verdict"] == "fail")
    assert (case["system"], case["batch"]) == ("cuda:fp16", 1)
    assert case["said"] == "the process was ended by SIGKILL"
    assert case_of(found, "cuda:int8", 1, 4)["times_torch"]
    assert {p["token_us"] for p in found["profiles"] if p["system"] == "cuda:fp16"} == {None}


def test_where_pytorch_cannot_run_it_is_not_asked_again(section_run):
    found, log, _ = section_run(seed=2)
    assert found["verdict"] == "pass"
    assert [line[0] for line in log] == [
        "cuda:fp16", "cuda:int8", TORCH[0], "cuda:fp16", "cuda:int8",
    ]  # fmt: skip
    (skipped,) = (c for c in found["cases"] if c["verdict"] == "skipped")
    assert skipped["said"] == "Refusal: no CUDA"
    assert len(found["left_out"]) == 11
    assert found["left_out"][0] == "tiny, torch:float16:eager, batch 1: Refusal: no CUDA"
    assert case_of(found, "cuda:fp16", 1, 4)["times_torch"] == {}


def test_what_was_measured_before_a_failure_is_kept(section_run):
    found, _, _ = section_run(seed=3)
    assert found["verdict"] == "fail"
    verdicts = [c["verdict"] for c in found["cases"] if c["system"] == "torch:float16:compiled"]
    assert verdicts == ["pass", "fail"] * 2
    assert "float16 compiled" not in case_of(found, "cuda:fp16", 1, 27)["times_torch"]
    assert case_of(found, "cuda:fp16", 1, 4)["times_torch"]["float16:compiled"] == 2.0


def test_a_process_that_takes_too_long_is_left_out(section_run, monkeypatch):
    monkeypatch.setattr(decode_speed, "_MOST_S", 0.4)
    found, _, _ = section_run(seed=4, seconds=1.5)
    assert found["cases"] == []
    assert found["verdict"] == "pass", "steps were profiled"
    assert found["left_out"][0] == "tiny, cuda:fp16, batch 1: it took longer than the 0 s it had"
    assert found["left_out"][-1].endswith(", batch 2: the time was up")
    assert len(found["left_out"]) == 16


def test_nothing_starts_after_the_deadline(section_run):
    found, log, _ = section_run(seconds=0)
    assert (found["verdict"], found["cases"], found["profiles"], log) == ("skipped", [], [], [])
    assert len(found["left_out"]) == 2 + 16
    assert "tiny, parts of a step of cuda:int8: the time was up" in found["left_out"]


def test_a_bundle_without_a_checkpoint_is_timed_alone(section_run):
    limits = Limits(max_batch_size=1, max_input_len=8, max_seq_len=32)
    found, log, _ = section_run(checkpoint=False, limits=limits)
    assert [line[0] for line in log] == ["cuda:fp16", "cuda:int8"]
    assert found["left_out"] == [
        "tiny: no PyTorch beside it, the bundle has no checkpoint (--no-checkpoint)"
    ]


def test_a_router_that_takes_a_prompt_whole_limits_its_length(section_run):
    experts = {"is_moe": True, "num_experts": 69, "num_experts_per_tok": 5}
    _, log, _ = section_run(router_mode="mixed", precisions=("fp16",), checkpoint=False, **experts)
    assert log[0][4] == "4,8"


def test_limits_without_room_are_named(section_run):
    limits = Limits(max_batch_size=1, max_input_len=5, max_seq_len=5)
    found, log, checked = section_run(limits=limits)
    assert (found["verdict"], log) == ("skipped", [])
    assert found["left_out"] == ["tiny: max_seq_len 5 leaves no room for 5 tokens behind a prompt"]
    assert DecodeSpeedSection(PACE).plan([checked]) == [
        "time no decoding: no bundle has a model for backend cuda"
    ]


def test_a_gpu_that_fails_while_steps_are_profiled_is_a_failure(section_run):
    def lose(launch, device):
        device.lost = True

    found, _, _ = section_run(real_profile=True, device=HostDevice(mischief=lose), checkpoint=False)
    assert found["verdict"] == "fail"
    (profile,) = found["profiles"]
    assert profile["problems"] == ["the call failed with CUDA_ERROR_ILLEGAL_ADDRESS"]
    assert "tiny, parts of a step of cuda:int8: the GPU no longer answers" in found["left_out"]
    assert case_of(found, "cuda:fp16", 1, 4)["verdict"] == "pass"


def test_plan_names_what_would_be_timed(tmp_path):
    checked, _ = speed_bundle(tmp_path)
    assert DecodeSpeedSection(PACE, prompts=(4, 1900)).plan([checked]) == [
        f"time decoding of tiny, batch {batch}, behind 4 and 27 tokens: cuda:fp16, "
        f"{', '.join(TORCH)}"
        for batch in (1, 2)
    ]


def test_it_is_printed_for_people(section_run, usual):
    found, _, _ = section_run(seed=2)
    found["profiles"][0]["parts"] = [{"part": "qkv", "launches": 1, "us": 1.5}]
    text = io.StringIO()
    report._print_decode_speed(Console(file=text, width=200), "decode_speed", found)
    printed = text.getvalue()
    assert "cuda:int8" in printed
    assert "Refusal: no CUDA" in printed
    line = next(line for line in printed.splitlines() if "slot 6" in line)
    assert line == (
        "decode_speed: tiny, cuda:fp16, slot 6, µs (launches): qkv 1.5 (1); sum 8.0, step 9.0, "
        "token 250.0"
    )
    found, _, _ = usual
    text = io.StringIO()
    report._print_decode_speed(Console(file=text, width=200), "decode_speed", found)
    assert "float16:eager 8.0x" in text.getvalue()


@pytest.mark.slow
def test_the_real_process_times_pytorch_and_says_why_ours_cannot_run(tmp_path, monkeypatch):
    """On the CPU: here is no GPU for our kernels, whose steps the interpreter profiles."""
    monkeypatch.setattr(decode_speed, "_TORCH_DTYPES", ("bfloat16",))
    monkeypatch.setattr(decode_speed, "_TORCH_MODES", ("eager",))
    limits = Limits(max_batch_size=1, max_input_len=8, max_seq_len=16)
    checked, packed = speed_bundle(tmp_path, limits=limits)
    device = HostDevice()
    launcher = HostLauncher(device, InterpreterLauncher(packed.kernels.specs))
    subject = dataclasses.replace(
        subject_of(device), bundles=(checked,), launchers={"tiny": launcher}
    )
    found = DecodeSpeedSection(PACE, prompts=(4,), device="cpu").run(subject, EARLIER)
    json.dumps(found, allow_nan=False)
    ours, torch_eager = found["cases"]
    assert torch_eager["verdict"] == "pass"
    assert torch_eager["system"] == "torch:bfloat16:eager"
    assert torch_eager["prompt_tokens"] == 4
    assert torch_eager["step_ms"] > 0
    assert (ours["system"], ours["verdict"]) == ("cuda:fp16", "skipped")
    assert "BackendUnavailableError" in ours["said"]
    (profile,) = found["profiles"]
    assert profile["position"] == 6
    assert profile["token_us"] is None
    assert profile["step_us"] > 0
    assert found["verdict"] == "pass"
    assert device.allocated == 0
