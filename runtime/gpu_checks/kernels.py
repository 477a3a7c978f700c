"""Section: every kernel of the bundles against the definition of its op, and how long it takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from plugins.launcher import LaunchError
from runtime.gpu_checks.kernel_case import KernelCase, compare_case
from runtime.gpu_checks.kernel_timing import HOW, time_case
from runtime.gpu_checks.section import CheckedBundle, Report, Subject, combined
from runtime.gpu_checks.workloads import WORKLOADS
from runtime.kernel_library import OpUse

_WHAT = (
    "Fresh random inputs; outputs and scratch memory hold 0xFF bytes (NaN) before, counters zero. "
    "Each case runs twice and must give the same bits, leave inputs, counters and the memory "
    "beside its arrays as they were, and agree with the op's PyTorch definition in float64 on the "
    "same rounded inputs: ‖found - expected‖ / ‖expected‖ within `norm_limit`, and every number "
    "within the op's tolerances where it has some for the type (`error_of_tolerance` at most 1)."
)

logger = logging.getLogger(__name__)


class KernelsSection:
    """Compares first, all cases; times then, those that passed. So time runs out for timings first.

    Attributes:
        name: `kernels`.
    """

    name = "kernels"

    def plan(self, bundles: Sequence[CheckedBundle]) -> list[str]:
        """A line for each use of an op."""
        lines = []
        for bundle in bundles:
            for use in bundle.library.uses:
                cases = _cases_of(bundle, use)
                labels = "; ".join(case.case.label for case in cases)
                lines.append(
                    f"compare and time {use.op} of {bundle.name} in {cases[0].dtype}, "
                    f"{len(cases)} cases: {labels}"
                )
        return lines

    def run(self, subject: Subject, earlier: Mapping[str, Report]) -> Report:
        """Compare and time."""
        compared: list[tuple[KernelCase, dict[str, Any]]] = []
        left_out: list[str] = []
        for case in _cases(subject.bundles):
            if why_not := _why_not(subject):
                left_out.append(f"{case.label}: not compared, {why_not}")
            else:
                compared.append((case, _compare(subject, case)))
        bandwidth = earlier.get("bandwidth", {}).get("gb_per_s")
        for case, result in compared:
            if result["verdict"] != "pass":
                continue
            if why_not := _why_not(subject):
                left_out.append(f"{case.label}: not timed, {why_not}")
                continue
            try:
                result["timing"] = _timed(subject, case, bandwidth)
            except LaunchError as error:
                result["problems"].append(str(error))
                result["verdict"] = "fail"
        results = [result for _, result in compared]
        return {
            "verdict": combined(result["verdict"] for result in results),
            "what": _WHAT,
            "how": HOW,
            "cases": results,
            "left_out": left_out,
        }


def _cases(bundles: Sequence[CheckedBundle]) -> Iterator[KernelCase]:
    for bundle in bundles:
        for use in bundle.library.uses:
            yield from _cases_of(bundle, use)


def _cases_of(bundle: CheckedBundle, use: OpUse) -> list[KernelCase]:
    return [
        KernelCase(bundle=bundle.name, use=use, case=case)
        for case in WORKLOADS[use.op].cases(use, bundle.bundle.limits)
    ]


def _why_not(subject: Subject) -> str | None:
    """Why nothing new can run, None where it can."""
    if subject.deadline.passed:
        return "the time was up"
    return None if subject.device.answers() else "the GPU no longer answers"


def _compare(subject: Subject, case: KernelCase) -> dict[str, Any]:
    logger.debug("comparing %s", case.label)
    numbers = case.workload.inputs(case.use, case.case, case.random(subject.seed))
    try:
        problems, errors = compare_case(
            subject.device, subject.launchers[case.bundle], case, case.stored(numbers)
        )
    except LaunchError as error:
        problems, errors = [str(error)], {}
    return {
        **case.describe(),
        "verdict": "fail" if problems else "pass",
        "problems": problems,
        **errors,
        "moved_bytes": case.workload.moved_bytes(case.use, case.case, numbers),
        "timing": None,
    }


def _timed(subject: Subject, case: KernelCase, bandwidth: float | None) -> dict[str, Any]:
    """The timings, and what share of the bandwidth each is."""
    logger.debug("timing %s", case.label)
    random = case.random(subject.seed)
    numbers = case.workload.inputs(case.use, case.case, random)
    moved = case.workload.moved_bytes(case.use, case.case, numbers)
    timing = time_case(
        subject.device, subject.launchers[case.bundle], case, case.stored(numbers), moved,
        subject.rhythm, random,
    )  # fmt: skip
    cold = timing["cold"]
    if cold is not None:
        share = cold["gb_per_s"] / bandwidth if bandwidth and cold["gb_per_s"] else None
        cold["of_bandwidth"] = None if share is None else round(share, 4)
    return timing
