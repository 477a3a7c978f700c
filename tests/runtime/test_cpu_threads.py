"""Threads of a step: the default on a described machine, and what is said of too many."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import cpu_threads
from runtime.cpu_threads import MOST_BY_DEFAULT, CpuThreads, default_threads, usable_cpus


def describe(root: Path, cores: list[tuple[int, int]]) -> None:
    """Write (package, core) of each logical CPU as Linux does."""
    for cpu, (package, core) in enumerate(cores):
        write(root, f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id", str(package))
        write(root, f"sys/devices/system/cpu/cpu{cpu}/topology/core_id", str(core))


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(f"{text}\n")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_usable(count: int) -> None:
        monkeypatch.setattr(cpu_threads, "_own_cpus", lambda: set(range(count)))

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
    describe(tmp_path, cores)
    assert default_threads(tmp_path) == threads


def test_without_a_description_every_logical_cpu_counts_as_a_core(
    use: Callable[[int], None], tmp_path: Path
) -> None:
    use(6)
    assert default_threads(tmp_path) == usable_cpus(tmp_path) == 6


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("max 100000", 6), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("?", 6)],
)
def test_quota_of_version_2_bounds_what_can_be_used(
    use: Callable[[int], None], tmp_path: Path, quota: str, cpus: int
) -> None:
    use(6)
    write(tmp_path, "proc/self/cgroup", "0::/")
    write(tmp_path, "sys/fs/cgroup/cpu.max", quota)
    assert default_threads(tmp_path) == usable_cpus(tmp_path) == cpus


@pytest.mark.parametrize(("quota", "cpus"), [("-1", 6), ("300000", 3), ("350000", 4)])
def test_quota_of_version_1_bounds_what_can_be_used(
    use: Callable[[int], None], tmp_path: Path, quota: str, cpus: int
) -> None:
    use(6)
    write(tmp_path, "proc/self/cgroup", "4:memory:/other\n3:cpu,cpuacct:/service\n0::/")
    write(tmp_path, "sys/fs/cgroup/cpu/service/cpu.cfs_quota_us", quota)
    write(tmp_path, "sys/fs/cgroup/cpu/service/cpu.cfs_period_us", "100000")
    assert default_threads(tmp_path) == usable_cpus(tmp_path) == cpus


def test_the_tightest_quota_of_the_groups_above_counts(
    use: Callable[[int], None], tmp_path: Path
) -> None:
    use(6)
    write(tmp_path, "proc/self/cgroup", "0::/slice/service")
    write(tmp_path, "sys/fs/cgroup/slice/service/cpu.max", "400000 100000")
    write(tmp_path, "sys/fs/cgroup/slice/cpu.max", "200000 100000")
    write(tmp_path, "sys/fs/cgroup/neighbour/cpu.max", "100000 100000")
    assert usable_cpus(tmp_path) == 2


def test_container_that_knows_its_group_by_the_path_of_the_host(
    use: Callable[[int], None], tmp_path: Path
) -> None:
    use(6)
    write(tmp_path, "proc/self/cgroup", "0::/docker/0123")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "300000 100000")
    assert usable_cpus(tmp_path) == 3


def test_usable_cpus_of_this_machine_are_some_of_this_process() -> None:
    if hasattr(os, "sched_getaffinity"):
        assert usable_cpus() <= len(os.sched_getaffinity(0))
    assert 1 <= default_threads() <= min(usable_cpus(), MOST_BY_DEFAULT)


def test_more_threads_than_cores_are_named_in_one_line(
    use: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    use(1)
    with caplog.at_level(logging.WARNING):
        CpuThreads(1).warn_if_more_than_cores()
        CpuThreads().warn_if_more_than_cores()
        assert not caplog.messages
        CpuThreads(3).warn_if_more_than_cores()
    (message,) = caplog.messages
    assert message.startswith("--threads 3 is more than the CPUs usable here, 1: ")
    assert message.endswith("without --threads onnxruntime takes 1")


@pytest.mark.parametrize("count", [0, -1])
def test_less_than_a_thread_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"threads must be at least 1, got {count}"):
        CpuThreads(count)
