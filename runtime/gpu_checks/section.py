"""What every section of the GPU check is: what it would do, what it runs on, what it found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from plugins.launcher import Launcher, LaunchError
from runtime.bundle import Bundle
from runtime.gpu_checks.device import CheckDevice
from runtime.kernel_library import KernelLibrary

Verdict = Literal["pass", "fail", "skipped"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
# What a section reports: JSON-ready, with a "verdict". Sections of single cases have "cases", each
# with a verdict of its own, and "left_out", a line for each that the time did not allow.
Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CheckedBundle:
    """A bundle with kernels.

    Attributes:
        name: what reports call it.
        bundle: opened, every kernel hashed.
        library: its kernels.
    """

    name: str
    bundle: Bundle
    library: KernelLibrary


class Deadline:
    """When to start nothing new any more."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Count from now; `clock` gives seconds."""
        self._clock = clock
        self._end = clock() + seconds

    @property
    def remaining_s(self) -> float:
        """Seconds left, 0 when it has passed."""
        return max(self._end - self._clock(), 0.0)

    @property
    def passed(self) -> bool:
        """Whether nothing new should start."""
        return self.remaining_s == 0.0


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """How often an execution is repeated to be timed.

    Attributes:
        target_ms: how long a replay of several executions should take.
        least: executions in a replay at the least.
        most: executions in a replay, unless there are more sets of inputs to go through.
        sets: most sets of inputs that executions take turns with.
        warmup: replays that do not count.
        replays: replays that count.
    """

    target_ms: float = 2.0
    least: int = 5
    most: int = 100
    sets: int = 2048
    warmup: int = 5
    replays: int = 20


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What sections run on.

    Attributes:
        device: the GPU.
        bundles: what is checked.
        launchers: each bundle's kernels on the device, by the bundle's name.
        seed: random inputs depend on it, and on what they are for.
        deadline: nothing new starts once it has passed.
        rhythm: of timings.
    """

    device: CheckDevice
    bundles: tuple[CheckedBundle, ...]
    launchers: Mapping[str, Launcher]
    seed: int
    deadline: Deadline
    rhythm: Rhythm = Rhythm()


class Section(Protocol):
    """One part of the evidence."""

    @property
    def name(self) -> str:
        """Its key in the evidence."""

    def plan(self, bundles: Sequence[CheckedBundle]) -> list[str]:
        """What it would do, a line for each thing; needs no GPU."""

    def run(self, subject: Subject, earlier: Mapping[str, Report]) -> Report:
        """Do it.

        Args:
            subject: what it runs on.
            earlier: the reports of the sections before it, by name.

        Raises:
            LaunchError: the GPU failed in a way that leaves nothing to report.
        """


def run_sections(
    sections: Iterable[Section], subject: Subject, announce: Callable[[str], None]
) -> dict[str, Report]:
    """Every section's report by name, with the `seconds` that it took; a GPU's fault is one too."""
    reports: dict[str, Report] = {}
    for section in sections:
        announce(section.name)
        begin = time.monotonic()
        try:
            report = section.run(subject, reports)
        except LaunchError as error:
            report = {"verdict": "fail", "error": str(error)}
        reports[section.name] = {**report, "seconds": round(time.monotonic() - begin, 2)}
    return reports


def combined(verdicts: Iterable[Verdict]) -> Verdict:
    """One failure fails all; what was skipped says nothing beside what passed."""
    found = set(verdicts)
    if "fail" in found:
        return "fail"
    return "pass" if "pass" in found else "skipped"


def overall(reports: Mapping[str, Report]) -> Verdict:
    """The verdict on everything: `pass` needs a case that was compared and passed."""
    if combined(report["verdict"] for report in reports.values()) == "fail":
        return "fail"
    return combined(case["verdict"] for r in reports.values() for case in r.get("cases", []))
