"""Threads of a step: the default on a described machine, and what is said of too many."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import cpu_threads
from runtime.cpu_threads import MOST_BY_DEFAULT, CpuThreads, default_threads


def describe(folder: Path, cores: list[tuple[int, int]]) -> Path:
    """Write (package, core) of each logical CPU as Linux does."""
    for cpu, (package, core) in enumerate(cores):
        place = folder / f"cpu{cpu}" / "topology"
        place.mkdir(parents=True)
        (place / "physical_package_id").write_text(f"{package}\n")
        (place / "core_id").write_text(f"{core}\n")
    return folder


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_usable(count: int) -> None:
        monkeypatch.setattr(cpu_threads, "_usable", lambda: set(range(count)))

    return set_usable


@pytest.mark.parametrize(
    ("cores", "threads"),
    [
        ([(0, 0), (0, 0), (0, 1), (0, 1)], 2),  # two threads a core
        ([(0, 0), (0, 1), (0, 2)], 3),
        ([(0, 0), (1, 0)], 2),  # two packages
        ([(0, core) for core in range(16)], MOST_BY_DEFAULT),
    ],
)
def test_default_is_one_thread_a_physical_core(
    use: Callable[[int], None], tmp_path: Path, cores: list[tuple[int, int]], threads: int
) -> None:
    use(len(cores))
    found = default_threads(describe(tmp_path, cores), tmp_path / "no quota")
    assert found == threads


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("max 100000", 6), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("?", 6)],
)
def test_default_stays_within_the_control_group(
    use: Callable[[int], None], tmp_path: Path, quota: str, threads: int
) -> None:
    use(6)
    (tmp_path / "cpu.max").write_text(quota)
    assert default_threads(tmp_path / "nothing", tmp_path / "cpu.max") == threads


def test_usable_cpus_are_those_of_this_process() -> None:
    if hasattr(os, "sched_getaffinity"):
        assert cpu_threads._usable() == os.sched_getaffinity(0)
    assert 1 <= default_threads() <= MOST_BY_DEFAULT


def test_more_threads_than_cores_are_named_in_one_line(
    use: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    use(2)
    with caplog.at_level(logging.WARNING):
        CpuThreads(2).warn_if_more_than_cores()
        CpuThreads().warn_if_more_than_cores()
        assert not caplog.messages
        CpuThreads(3).warn_if_more_than_cores()
    (message,) = caplog.messages
    assert message.startswith("3 threads on 2 CPU cores")


@pytest.mark.parametrize("count", [0, -1])
def test_less_than_a_thread_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"threads must be at least 1, got {count}"):
        CpuThreads(count)
