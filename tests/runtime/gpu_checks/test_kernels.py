"""The kernels section on host memory: what is right passes, and each thing that is wrong shows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from plugins.launcher import LaunchError
from runtime.backends.base import Limits
from runtime.gpu_checks.kernel_case import KernelCase, compare_case
from runtime.gpu_checks.kernel_reference import difference, expected_output, op_of
from runtime.gpu_checks.kernels import KernelsSection
from runtime.gpu_checks.number_formats import from_storage
from runtime.gpu_checks.section import Deadline, run_sections
from runtime.gpu_checks.workloads import WORKLOADS
from tests.gpu_check_subject import (
    LIMITS,
    attention_use,
    checked_bundle,
    expert_use,
    subject_of,
    value_use,
)
from tests.host_device import HostDevice, at

# One token alone and nothing else.
SINGLE = Limits(max_batch_size=1, max_input_len=1, max_seq_len=24)
BANDWIDTH = {"bandwidth": {"gb_per_s": 1e-9}}


def report_of(tmp_path, device, *uses, limits=SINGLE, **options):
    subject = subject_of(device, checked_bundle(tmp_path, uses, limits), **options)
    return KernelsSection().run(subject, BANDWIDTH)


def kernel_case(use, label, limits=LIMITS):
    (case,) = (c for c in WORKLOADS[use.op].cases(use, limits) if c.label == label)
    return KernelCase(bundle="tiny", use=use, case=case)


def numbers_of(case, seed=7):
    stored = case.stored(case.workload.inputs(case.use, case.case, case.random(seed)))
    return {name: from_storage(array, case.use.dtypes[name]) for name, array in stored.items()}


@pytest.mark.parametrize(
    "use", [value_use(), value_use("bfloat16"), expert_use()],
    ids=lambda use: f"{use.op}-{use.dtypes[op_of(use).outputs[0]]}",
)  # fmt: skip
def test_right_kernels_pass_and_are_timed(tmp_path, use):
    device = HostDevice(l2_bytes=64)
    report = report_of(tmp_path, device, use, limits=LIMITS)
    assert report["verdict"] == "pass"
    assert report["left_out"] == []
    assert [case["case"] for case in report["cases"]] == [
        "decode", "decode, batch of 2", "prompt of 24",
    ]  # fmt: skip
    for case in report["cases"]:
        assert case["problems"] == []
        assert case["norm_error"] <= case["norm_limit"]
        assert case["timing"]["warm"]["median_us"] > 0
        assert case["timing"]["cold"]["gb_per_s"] is not None
    assert device.allocated == 0


def test_attention_passes_at_every_case(tmp_path):
    device = HostDevice()
    report = report_of(tmp_path, device, attention_use(window=0), limits=LIMITS)
    assert [case["verdict"] for case in report["cases"]] == ["pass"] * 7
    assert device.allocated == 0


@pytest.mark.parametrize("label", ["decode, cache full", "prompt of 12 behind a cache, batch of 2"])
def test_attention_with_a_window_passes(tmp_path, label):
    use = attention_use(window=8)
    subject = subject_of(HostDevice(), checked_bundle(tmp_path, [use]))
    case = kernel_case(use, label)
    stored = case.stored(case.workload.inputs(use, case.case, case.random(7)))
    problems, errors = compare_case(subject.device, subject.launchers["tiny"], case, stored)
    assert problems == []
    assert errors["norm_error"] > 0


# What a kernel may do wrong, done to a decode step of attention; `where` gives the bytes of one of
# the launch's arguments.


def _off_by_a_little(launch, device):
    output = at(launch.arguments["output"], 128).view(np.float16)
    output[5] += 0.05


def _unwritten(launch, device):
    at(launch.arguments["output"] + 8, 4)[:] = 0xFF


def _infinite(launch, device):
    at(launch.arguments["output"], 2).view(np.uint16)[0] = 0x7C00


def _counter_left(launch, device):
    at(launch.arguments["counters"], 4).view(np.int32)[0] = 1


def _input_written(launch, device):
    at(launch.arguments["value"], 1)[0] ^= 1


def _written_behind(launch, device):
    at(launch.arguments["output"] + 128, 1)[0] = 0


def _written_in_front(launch, device):
    at(launch.arguments["query"] - 1, 1)[0] = 0


def _different_each_time(launch, device):
    if len(device.launched) % 2:
        at(launch.arguments["output"], 1)[0] ^= 1


@pytest.mark.parametrize(
    ("mischief", "problem"),
    [
        (_off_by_a_little, "the relative error is"),
        (_unwritten, "2 numbers were not written or are not finite"),
        (_infinite, "1 numbers were not written or are not finite"),
        (_counter_left, "the counters are not zero again"),
        (_input_written, "input value was written"),
        (_written_behind, "something was written between attention_output and the workspace"),
        (_written_in_front, "something was written in front of query"),
        (_different_each_time, "1 numbers differ between two runs"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_what_a_kernel_does_wrong_is_a_failure(tmp_path, mischief, problem):
    device = HostDevice(mischief=mischief)
    report = report_of(tmp_path, device, attention_use(window=0))
    assert report["verdict"] == "fail"
    for case in report["cases"]:
        assert case["verdict"] == "fail"
        assert any(text.startswith(problem) for text in case["problems"]), case["problems"]
        assert case["timing"] is None, "what is wrong is not timed"
    assert device.allocated == 0


def _wrong(use, label, **changes):
    """How far another op's result is from the right one: attributes or inputs changed."""
    case = kernel_case(use, label)
    inputs = numbers_of(case)
    attributes = {**use.attributes, **changes.get("attributes", {})}
    wrong = expected_output(
        dataclasses.replace(use, attributes=attributes),
        {name: changes.get(name, lambda array: array)(array) for name, array in inputs.items()},
    )
    return difference(op_of(use), case.dtype, wrong, expected_output(use, inputs))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("use", "label", "changes"),
    [
        (attention_use, "decode, cache full", {"attributes": {"keep_window_size": 0}}),
        (attention_use, "decode, cache full", {"attributes": {"keep_window_size": 7}}),
        (attention_use, "5 tokens, batch of 2", {"attributes": {"keep_window_size": 9}}),
        (attention_use, "decode, cache part full", {"write_index": lambda index: index + 1}),
        (attention_use, "decode, batch of 2", {"write_index": lambda index: index[::-1]}),
        (attention_use, "prompt of 12", {"score": lambda score: score[:, ::-1]}),
        (expert_use, "decode", {"attributes": {"top_k": 3}}),
        (expert_use, "prompt of 24", {"attributes": {"top_k": 5}}),
        (value_use, "decode", {"attributes": {"top_k": 3}}),
    ],
)
def test_a_wrong_selection_is_far_out_of_tolerance(dtype, use, label, changes):
    assert _wrong(use(dtype), label, **changes).problems()


def test_inputs_depend_on_the_seed_and_on_nothing_else(tmp_path):
    case = kernel_case(expert_use(), "decode")
    other = kernel_case(expert_use(), "decode, batch of 2")
    first, again, changed = (numbers_of(case, seed)["hidden"] for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, changed)
    assert not np.array_equal(first[0], numbers_of(other)["hidden"][0])


def test_what_the_time_does_not_allow_is_recorded(tmp_path):
    report = report_of(tmp_path, HostDevice(), value_use(), seconds=0)
    assert report["verdict"] == "skipped"
    assert report["cases"] == []
    assert report["left_out"] == [
        "tiny, ValueGather float16, decode: not compared, the time was up"
    ]


def test_timings_are_the_first_to_be_left_out(tmp_path):
    bundle = checked_bundle(tmp_path, [value_use()])
    ticks = iter([0.0, *[1.0] * 3, *[9.0] * 10])
    subject = dataclasses.replace(
        subject_of(HostDevice(), bundle), deadline=Deadline(5, lambda: next(ticks))
    )
    report = KernelsSection().run(subject, {})
    assert report["verdict"] == "pass"
    assert [case["timing"] for case in report["cases"]] == [None] * 3
    assert [line.rpartition(": ")[2] for line in report["left_out"]] == [
        "not timed, the time was up"
    ] * 3


def test_a_gpu_that_no_longer_answers_ends_the_section(tmp_path):
    def fault(launch, device):
        device.lost = True

    report = report_of(tmp_path, HostDevice(mischief=fault), value_use(), limits=LIMITS)
    assert report["verdict"] == "fail"
    assert [case["problems"] for case in report["cases"]] == [
        ["the call failed with CUDA_ERROR_ILLEGAL_ADDRESS"]
    ]
    assert report["left_out"] == [
        f"tiny, ValueGather float16, {label}: not compared, the GPU no longer answers"
        for label in ("decode, batch of 2", "prompt of 24")
    ]


def test_a_refused_launch_fails_its_case_alone(tmp_path):
    def refuse(launch, device):
        if launch.sizes["tokens"] == 2:
            raise LaunchError("cuLaunchKernel failed with CUDA_ERROR_INVALID_VALUE")

    report = report_of(tmp_path, HostDevice(mischief=refuse), value_use(), limits=LIMITS)
    assert [case["verdict"] for case in report["cases"]] == ["pass", "fail", "pass"]


def test_a_fault_while_timing_fails_the_case(tmp_path):
    def fault(launch, device):
        if len(device.launched) > 2:
            raise LaunchError("cuStreamSynchronize failed with CUDA_ERROR_LAUNCH_FAILED")

    (case,) = report_of(tmp_path, HostDevice(mischief=fault), value_use())["cases"]
    assert case["verdict"] == "fail"
    assert case["problems"] == ["cuStreamSynchronize failed with CUDA_ERROR_LAUNCH_FAILED"]


def test_a_section_that_fails_as_a_whole_does_not_end_the_others(tmp_path):
    class Failing:
        name = "failing"

        def plan(self, bundles):
            return []

        def run(self, subject, earlier):
            raise LaunchError("cuMemAlloc failed with CUDA_ERROR_OUT_OF_MEMORY")

    subject = subject_of(HostDevice(), checked_bundle(tmp_path, [value_use()], SINGLE))
    reports = run_sections([Failing(), KernelsSection()], subject, lambda name: None)
    assert reports["failing"]["verdict"] == "fail"
    assert "OUT_OF_MEMORY" in reports["failing"]["error"]
    assert reports["kernels"]["verdict"] == "pass"
