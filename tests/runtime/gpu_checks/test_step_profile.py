"""The parts of a decode step and their times, every kernel in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from safetensors import safe_open

import plugins.projection.launches as projection_launches
import plugins.projection.matrix as projection_matrix
from model.released import released_shape
from plugins.launcher import LaunchError
from runtime.backends.base import Limits
from runtime.gpu_checks import step_profile
from runtime.gpu_checks.step_profile import parts_of_step, profile_step
from runtime.kernel_step.formats import StepFormats
from runtime.kernel_step.packed_weights import stored_tensors
from runtime.kernel_step.places import Places
from runtime.kernel_step.step_kernels import StepKernels
from runtime.kernel_step.step_model import InnerValues, StepModel
from tests.gpu_check_subject import ONCE
from tests.host_device import HostDevice, HostLauncher, at
from tests.interpreter import InterpreterLauncher
from tests.speed_bundle import speed_bundle


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one by one: fewer and larger ones compute the same."""
    monkeypatch.setattr(projection_launches, "ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(projection_launches, "ENOUGH_HEAD_PROGRAMS", 1)
    monkeypatch.setattr(projection_matrix, "_FEW_PROGRAMS", 1)


@pytest.fixture
def profiled(tmp_path):
    """Profiles a step of a tiny model; gives what was found, the device and its launches."""

    def run(positions, mischief=None, **overrides):
        checked, packed = speed_bundle(tmp_path, **overrides)
        device = HostDevice(mischief=mischief)
        launcher = HostLauncher(device, InterpreterLauncher(packed.kernels.specs))
        variant = checked.bundle.variant("cuda")
        try:
            found = profile_step(device, launcher, checked.bundle, variant, positions, ONCE)
        finally:
            assert device.allocated == 0
        return found, device, packed

    return run


def test_a_step_and_its_parts_are_timed_where_they_are_asked_for(profiled):
    slots, tokens, finite, weights = Counter(), [], [], []
    qkv_bytes = (4 + 2 + 2) * 16 * 64 * 2

    def look(launch, device):
        arguments = launch.arguments
        if launch.kernel.startswith("attend"):
            slots[int(at(arguments["write_index"], 8).view(np.int64)[0])] += 1
            attended = at(arguments["output"], 4 * 64).view(np.float32)
            finite.append(bool(np.isfinite(attended).all() and attended.any()))
        if launch.kernel.startswith("head"):
            tokens.append(int(at(arguments["tokens"], 8).view(np.int64)[0]))
        if launch == device.launched[0]:  # queries, keys and values of the only layer
            weights.append(at(arguments["weights"], qkv_bytes).tobytes())

    found, device, packed = profiled([9, 20], look)
    assert [one["position"] for one in found] == [9, 20]
    for one in found:
        parts = {part["part"]: part["launches"] for part in one["parts"]}
        assert parts == dict.fromkeys(("qkv", "attend", "o", "gate_up", "down", "head"), 1)
        assert one["launches"] == sum(parts.values())
        assert one["sum_us"] == pytest.approx(sum(p["us"] for p in one["parts"]), abs=0.01)
        assert all(part["us"] > 0 for part in one["parts"])
        assert one["step_us"] > 0
    json.dumps(found, allow_nan=False)
    # A step's two replays move on by a token; attention alone, four times, stays where it is.
    assert slots == {9: 1 + 4, 10: 1, 20: 1 + 4, 21: 1}
    assert min(tokens) >= 0
    assert all(finite), "what attention finds in the cache is numbers"
    with safe_open(packed.file(packed.variant.path), framework="numpy") as file:
        stored = file.get_tensor("layers.0.qkv.weights").tobytes()
    assert set(weights) == {stored}
    whole = [launch.kernel for launch in device.launched[: found[0]["launches"]]]
    launches = packed.kernels.step_for(1).launches(places_of(packed.kernels), 1, "greedy")
    assert whole == [launch.kernel for launch in launches]


def test_memory_is_freed_when_the_gpu_fails(profiled):
    def lose(launch, device):
        device.lost = True

    with pytest.raises(LaunchError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        profiled([9], lose)


class Counting:
    """A device on which a launch takes a microsecond, and what stands around a replay two."""

    stream = 5

    def __init__(self):
        self.put = []

    def launch(self, launch, stream):
        assert stream == self.stream
        self.put.append(launch)

    def time(self, enqueue, *, warmup, replays):
        before = len(self.put)
        enqueue()
        return [1e-3 * (2 + len(self.put) - before)] * replays


def test_a_part_is_repeated_until_it_can_be_timed(monkeypatch):
    device = Counting()
    rhythm = dataclasses.replace(ONCE, target_ms=0.3, least=2, most=50)
    # Three launches and two microseconds around them: 60 times for 300, and no more than 50.
    found = step_profile._part_us(device, device, ["a", "b", "c"], rhythm)
    assert found == pytest.approx((50 * 3 + 2) / 50)
    assert device.put == ["a", "b", "c"] * 51
    assert step_profile._whole_us(device, device, ["a", "b"], rhythm) == pytest.approx(4)


def kernels_of(name, window):
    shape = released_shape(name)
    config = shape.config
    if window:
        config = dataclasses.replace(config, keep_window_size=window)
    values = InnerValues(heads=1, count=1, picks=1, mask_heads=1) if config.is_seed else None
    limits = Limits(max_batch_size=4, max_input_len=2048, max_seq_len=2048)
    model = StepModel.make(config, shape.generation, limits.max_seq_len, values)
    return StepKernels(model, StepFormats.of("fp16"), limits)


def places_of(kernels):
    """An address of its own for every tensor, area and cache tensor; 0 for what is not there."""
    names = [*stored_tensors(kernels.model, kernels.formats), *kernels.areas]
    names += kernels.cache_areas(1)
    numbers = {name: 0x10000 * (number + 1) for number, name in enumerate(names)}
    in_place = {"x_between": "x", "x_out": "x"}
    return Places(
        weight=lambda name: numbers.get(name, 0),
        area=lambda name: numbers[in_place.get(name, name)],
        cache=lambda layer, kind: numbers[f"layers.{layer}.{kind}"],
    )


# `attend` has three launches where the cache is longer than the window.
@pytest.mark.parametrize(
    ("name", "window", "more"),
    [
        ("doge-20m", None, {"attend": 1}),
        ("doge-20m", 1024, {"attend": 3}),
        ("doge-22m", None, {"attend": 1, "values": 1}),
        ("doge-20m-moe", None, {"attend": 1}),
    ],
)
def test_parts_are_all_launches_of_a_step(name, window, more):
    kernels = kernels_of(name, window)
    step, places = kernels.step_for(1), places_of(kernels)
    parts = parts_of_step(step, places)
    expected = {"qkv": 1, "o": 1, "gate_up": 1, "down": 1, **more}
    assert {part: len(found) for part, found in parts.items()} == {
        **{part: step.model.layers * count for part, count in expected.items()},
        "head": 1,
    }
    whole = step.launches(places, 1, "greedy")
    assert sum(map(len, parts.values())) == len(whole)
    assert all(launch in whole for found in parts.values() for launch in found)
    # Each kind begins and ends where it does in a step.
    assert parts["head"] == whole[-1:]
    assert (parts["qkv"][0], parts["qkv"][1]) == (whole[0], whole[sum(expected.values())])
    assert parts["down"][-1] == whole[-2]
    assert parts["o"][-1].arguments["output"] == places.area("x")
    assert parts["gate_up"][-1].arguments["output"] == places.area("inner")
    assert parts["attend"][-1] == whole[whole.index(parts["o"][-1]) - 1]
