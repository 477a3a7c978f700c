"""Timing a persistent variant: what is launched, and how it is held to the recorded steps."""

from __future__ import annotations

import dataclasses
import io
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from runtime.bundle import Bundle
from runtime.gpu_checks import decode_speed, report, step_profile
from runtime.gpu_checks.decode_pace import Pace
from runtime.gpu_checks.decode_speed import DecodeSpeedSection
from runtime.gpu_checks.step_profile import profile_step
from runtime.kernel_step.persistent import TOKENS_PER_LAUNCH
from runtime.kernel_step.variant import kernels_of_variant
from tests.fake_bundle import write_fake_bundle
from tests.gpu_check_subject import ONCE, subject_of
from tests.host_device import HostDevice, HostLauncher, at
from tests.interpreter import InterpreterLauncher
from tests.persistent_shim import compile_shim
from tests.persistent_shim.launcher import ShimInterpreter
from tests.persistent_shim.sequence import SMALL
from tests.speed_bundle import speed_bundle


@pytest.fixture
def checked(tmp_path):
    """A bundle with both variants of the same weights."""
    made, _ = speed_bundle(tmp_path, checkpoint=False)
    manifest = made.bundle.manifest
    (plain,) = made.bundle.variants("cuda")
    details = {**plain.details, "persistent": True}
    persistent = dataclasses.replace(plain, name="fp16-persistent", details=details)
    files = {
        file.path: (file.role, (made.bundle.path / file.path).read_bytes())
        for file in manifest.files
    }
    manifest = dataclasses.replace(manifest, variants=(*manifest.variants, persistent), files=())
    bundle = Bundle.open(write_fake_bundle(tmp_path / "both", manifest, files))
    return dataclasses.replace(made, bundle=bundle)


def test_a_launch_begins_at_the_position_each_time_and_barriers_are_counted(
    checked, tmp_path, monkeypatch
):
    monkeypatch.setattr("runtime.gpu_checks.decode_persistent._BARRIERS", 5)
    variant = checked.bundle.variant("cuda", "fp16-persistent")
    kernels = kernels_of_variant(checked.bundle, variant)
    spec = kernels.persistent.kernel.spec
    shim = compile_shim(tmp_path, {**spec.constants, **SMALL}, spec.arguments)
    ends, attended = [], []

    def look(launch, device):
        if launch.kernel.startswith("persistent"):
            arguments = launch.arguments
            ends.append(int(at(arguments["positions"], 8).view(np.int64)[0]))
            attended.append(at(arguments["chosen"], 8 * TOKENS_PER_LAUNCH).view(np.int64).copy())

    device = HostDevice(mischief=look)
    interpreter = ShimInterpreter(InterpreterLauncher(kernels.specs), shim)
    launcher = HostLauncher(device, interpreter)
    found = profile_step(device, launcher, checked.bundle, variant, [5, 20], ONCE)
    json.dumps(found, allow_nan=False)
    # Two replays each, which all begin anew.
    assert ends == [13, 13, 28, 28]
    assert all((tokens >= 0).all() for tokens in attended), "there are numbers in the cache"
    assert [launch.arguments.get("steps") for launch in device.launched] == [8, 8, None, None] * 2
    for one, position in zip(found, (5, 20), strict=True):
        (part,) = one["parts"]
        assert (one["position"], one["launches"]) == (position, 1)
        assert (part["part"], part["launches"]) == ("barriers", 5 * 1 + 1)
        assert part["us"] == one["sum_us"] == pytest.approx(6 * one["barrier_us"], abs=1e-3)
        assert one["step_us"] > 0
    assert device.allocated == 0


def test_it_is_timed_for_one_sequence_and_held_to_the_recorded_steps(
    checked, tmp_path, monkeypatch
):
    log = tmp_path / "systems"
    monkeypatch.setattr(decode_speed, "_WORKER", "tests.fake_decode_timing")
    monkeypatch.setenv("TIMED_SYSTEMS", str(log))
    monkeypatch.setattr(
        decode_speed, "profile_step", lambda *arguments: [{
            "position": 6, "step_us": 9.0, "sum_us": 4.0, "launches": 1, "barrier_us": 0.75,
            "parts": [{"part": "barriers", "launches": 6, "us": 4.5}],
        }],
    )  # fmt: skip
    device = HostDevice()
    launcher = HostLauncher(device, InterpreterLauncher(()))
    subject = dataclasses.replace(
        subject_of(device), bundles=(checked,), launchers={"tiny": launcher}
    )
    section = DecodeSpeedSection(Pace(warmup=2, tokens=3, repeats=1), prompts=(4,))
    found = section.run(subject, {})
    json.dumps(found, allow_nan=False)
    timed = [line.split()[:3] for line in log.read_text().splitlines()]
    assert [(words[0], words[2]) for words in timed] == [
        ("cuda:fp16", "1"), ("cuda:fp16-persistent", "1"), ("cuda:fp16", "2"),
    ]  # fmt: skip
    ratios = {(case["system"], case["batch"]): case.get("times_graph") for case in found["cases"]}
    assert ratios == {
        ("cuda:fp16", 1): None, ("cuda:fp16-persistent", 1): 1.25, ("cuda:fp16", 2): None,
    }  # fmt: skip
    text = io.StringIO()
    report._print_decode_speed(Console(file=text, width=200), "decode_speed", found)
    assert "recorded steps 1.25x" in text.getvalue()
    assert "slot 6, µs (launches): barriers 4.5 (6); sum 4.0, step 9.0, token 200" in (
        text.getvalue()
    )
    assert "persistent" in step_profile.HOW


def test_the_benchmark_builds_it_for_the_smallest_shapes():
    script = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "decode_speed.py"))
    built = {
        command[command.index("--random-weights") + 1]: "--persistent" in command
        for command in script["build_commands"](script["SHAPES"], ["fp16"], "sm90", Path("build"))
    }
    assert [shape for shape, persistent in built.items() if persistent] == ["doge-20m", "doge-60m"]
    assert len(built) == len(script["SHAPES"])
