"""How many CPU threads compute a step, and whether they wait by spinning."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

logger = logging.getLogger(__name__)

# The products of models this small are split into pieces that cost less than waking a thread: more
# threads than this are taken only when asked for. A judgement: no more than 2 cores were measured.
MOST_BY_DEFAULT = 8
_QUOTA_FILES = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))  # cgroup v2, v1


@dataclass(frozen=True)
class CpuThreads:
    """What a backend that computes on the CPU is told.

    Attributes:
        count: threads of one step; None leaves it to the backend.
        spinning: whether they wait for their next piece of work by spinning. That is faster on a
            machine with nothing else to do, and slower where others want the same cores. ONNX
            Runtime alone can be told; the others wait as their own libraries do.
        spinning_between: whether they go on spinning after a step, for the next one. Not where
            another model takes the next step: they would take its cores from it for 30 to 40 ms.
    """

    count: int | None = None
    spinning: bool = True
    spinning_between: bool = True

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"threads must be at least 1, got {self.count}")

    def warn_if_more_than_cores(self) -> None:
        """Say so in one line where more threads are asked for than can run at once."""
        usable = usable_cpus()
        if self.count is not None and self.count > usable:
            logger.warning(
                "--threads %d is more than the CPUs usable here, %d: threads will wait for each "
                "other; without --threads onnxruntime takes %d",
                self.count,
                usable,
                default_threads(),
            )


THE_BACKENDS_CHOICE = CpuThreads()


def default_threads(root: Path = Path("/")) -> int:
    """One thread for each physical core that this process may use, at most `MOST_BY_DEFAULT`.

    Args:
        root: where Linux describes the machine, in `sys` and `proc`. A CPU that is not described
            there counts as a core of its own, so on other systems logical CPUs are counted.
    """
    topology = root / "sys/devices/system/cpu"
    cores = {_core(topology / f"cpu{cpu}" / "topology", cpu) for cpu in _own_cpus()}
    return min(len(cores), usable_cpus(root), MOST_BY_DEFAULT)


def usable_cpus(root: Path = Path("/")) -> int:
    """Logical CPUs that can work for this process at once, a part of one counting as one.

    Args:
        root: where Linux describes the control groups, whose quota may be less than their CPUs.
    """
    quotas = [quota for group in _control_groups(root) if (quota := _quota(group)) is not None]
    return min([len(_own_cpus()), *quotas])


def _own_cpus() -> set[int]:
    """The logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _core(folder: Path, cpu: int) -> tuple[str, str]:
    try:
        package = (folder / "physical_package_id").read_text().strip()
        return package, (folder / "core_id").read_text().strip()
    except OSError:
        return "cpu", str(cpu)


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of this process's control groups and of those above them.

    A container may know its group by a path that only the host has, and see it mounted as the
    topmost one: not every folder exists.
    """
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        group = PurePosixPath(path.lstrip("/"))
        if not controllers:  # version 2
            yield from (root / "sys/fs/cgroup" / folder for folder in (group, *group.parents))
        elif "cpu" in controllers.split(","):
            yield from (root / "sys/fs/cgroup/cpu" / folder for folder in (group, *group.parents))


def _quota(group: Path) -> int | None:
    """Whole CPUs of a control group's share of time, None where it has no limit."""
    for files in _QUOTA_FILES:
        try:
            share, period = " ".join((group / file).read_text() for file in files).split()
            if share not in ("max", "-1"):
                return max(1, -(-int(share) // int(period)))
        except (OSError, ValueError):
            continue
    return None
