"""How many CPU threads compute a step, and whether they wait by spinning."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

# The products of models this small are split into pieces that cost less than waking a thread: more
# threads than this are taken only when asked for. A judgement: no more than 2 cores were measured.
MOST_BY_DEFAULT = 8
_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class CpuThreads:
    """What a backend that computes on the CPU is told.

    Attributes:
        count: threads of one step; None leaves it to the backend.
        spinning: whether they wait for their next piece of work by spinning. That is faster on a
            machine with nothing else to do, and slower where others want the same cores.
    """

    count: int | None = None
    spinning: bool = True

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"threads must be at least 1, got {self.count}")

    def warn_if_more_than_cores(self) -> None:
        """Say so in one line where more threads are asked for than can run at once."""
        logical = _usable()
        if self.count is not None and self.count > len(logical):
            logger.warning(
                "%d threads on %d CPU cores: they will wait for each other; --threads %d or fewer "
                "is faster",
                self.count,
                len(logical),
                default_threads(),
            )


THE_BACKENDS_CHOICE = CpuThreads()


def default_threads(topology: Path = _TOPOLOGY, quota: Path = _QUOTA) -> int:
    """One thread for each physical core that this process may use, at most `MOST_BY_DEFAULT`.

    Args:
        topology: where Linux describes its CPUs; a CPU that is not described there counts as a
            core of its own.
        quota: the control group's share of CPU time (cgroup v2), `MICROSECONDS PERIOD` or `max`.
    """
    cores = {_core(topology / f"cpu{cpu}" / "topology", cpu) for cpu in _usable()}
    return max(1, min(len(cores), _allowed(quota), MOST_BY_DEFAULT))


def _usable() -> set[int]:
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


def _allowed(quota: Path) -> int:
    """Whole CPUs within the quota, a part of one counting as one."""
    try:
        share, period = quota.read_text().split()
        return MOST_BY_DEFAULT if share == "max" else -(-int(share) // int(period))
    except (OSError, ValueError):
        return MOST_BY_DEFAULT
