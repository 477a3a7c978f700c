"""How long a kernel case takes: on inputs that the last cache holds, and on inputs from memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from plugins.kernel_spec import Launch
from plugins.launcher import Launcher
from runtime.gpu_checks.device import CheckDevice
from runtime.gpu_checks.kernel_case import KernelCase
from runtime.gpu_checks.number_formats import Array
from runtime.gpu_checks.section import Rhythm

# Sets of inputs together are that many times the last cache: by the time a set comes around again,
# the others have driven it out.
_TIMES_CACHE = 3
# Where memory allows fewer sets than that, below this the cache still holds some of them.
_LEAST_TIMES_CACHE = 2
_MOST_BYTES = 8 << 30
# Of every input's address; more than any kernel asks for.
_ALIGNMENT = 256

HOW = (
    "One CUDA graph holds several executions of the op, all of its launches each; device events "
    "stand around each replay. `warm`: every execution reads the same inputs, from the L2 cache "
    "where they fit. `cold`: executions take turns with copies of the inputs that are together at "
    f"least {_LEAST_TIMES_CACHE} times the L2 cache, so that they come from memory; of tables that "
    "are read in part (rows of experts) there are as many copies as that takes, and each execution "
    "picks other rows. Output and scratch memory are shared by all executions. A figure is the "
    "replay's time by its executions, the gaps between launches included."
)


def time_case(
    device: CheckDevice,
    launcher: Launcher,
    case: KernelCase,
    stored: Mapping[str, Array],
    moved_bytes: int,
    rhythm: Rhythm,
    random: np.random.Generator,
) -> dict[str, Any]:
    """JSON-ready timings of a case that works.

    Args:
        device: where it runs.
        launcher: its kernels.
        case: what to run.
        stored: its inputs.
        moved_bytes: what an execution must read and write.
        rhythm: how often.
        random: for other picks from tables.

    Raises:
        LaunchError: the GPU failed.
    """
    l2_bytes = device.facts.l2_bytes
    wanted = max(math.ceil(_TIMES_CACHE * l2_bytes / moved_bytes), 1)
    pool = _Pool(device, case, stored)
    try:
        warm = _time(device, launcher, pool.launches(1, random), moved_bytes, rhythm)
        if wanted == 1:
            return {"warm": warm, "cold": {**warm, "sets": 1}, "cold_why_not": None}
        sets = min(wanted, rhythm.sets, pool.most_sets())
        if sets * moved_bytes < _LEAST_TIMES_CACHE * l2_bytes:
            why_not = (
                f"{sets} sets of inputs, as many as are made, move {sets * moved_bytes:,} bytes; "
                f"the L2 cache has {l2_bytes:,}"
            )
            return {"warm": warm, "cold": None, "cold_why_not": why_not}
        cold = _time(device, launcher, pool.launches(sets, random), moved_bytes, rhythm)
        return {"warm": warm, "cold": {**cold, "sets": sets}, "cold_why_not": None}
    finally:
        pool.close()


def _time(
    device: CheckDevice,
    launcher: Launcher,
    sets: Sequence[Sequence[Launch]],
    moved_bytes: int,
    rhythm: Rhythm,
) -> dict[str, Any]:
    """Time the launches of each set in turn."""
    rounds = 1

    def enqueue() -> None:
        for _ in range(rounds):
            for launches in sets:
                for launch in launches:
                    launcher.launch(launch, device.stream)

    rounds = rounds_to_time(device, enqueue, len(sets), rhythm)
    executions = rounds * len(sets)
    times = device.time(enqueue, warmup=rhythm.warmup, replays=rhythm.replays)
    each = sorted(1e3 * ms / executions for ms in times)
    middle = median(each)
    return {
        "median_us": round(middle, 3),
        "p95_us": round(each[math.ceil(0.95 * len(each)) - 1], 3),
        "executions": executions,
        "replays": len(each),
        "gb_per_s": round(moved_bytes / middle / 1e3, 2) if middle else None,
    }


def rounds_to_time(
    device: CheckDevice, enqueue: Callable[[], None], sets: int, rhythm: Rhythm
) -> int:
    """How often a graph goes through all sets, so that a replay is long enough to be timed."""
    (once_ms,) = device.time(enqueue, warmup=1, replays=1)
    least = math.ceil(rhythm.least / sets)
    most = max(rhythm.most // sets, least)
    wanted = math.ceil(rhythm.target_ms / once_ms) if once_ms else most
    return min(max(wanted, least), most)


class _Layout:
    """Where several arrays lie one behind the other."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, size in sizes.items():
            self.offsets[name] = self.size
            self.size += -(-size // _ALIGNMENT) * _ALIGNMENT


class _Pool:
    """Device memory with sets of a case's inputs, made as they are asked for."""

    def __init__(self, device: CheckDevice, case: KernelCase, stored: Mapping[str, Array]) -> None:
        self._device = device
        self._case = case
        self._stored = stored
        self._buffers: list[int] = []
        tables = case.workload.tables
        # What every set has of its own, and what several may share.
        self._own = _Layout({n: a.nbytes for n, a in stored.items() if n not in tables})
        self._shared = _Layout({n: a.nbytes for n, a in stored.items() if n in tables})
        self._sets: list[int] = []
        self._tables: list[int] = []
        workspace, counters = case.scratch_bytes()
        try:
            self._outputs = {name: self._new(size) for name, size in case.output_bytes().items()}
            self._workspace = self._new(workspace)
            self._counters = self._new(counters)
            device.fill(self._counters, 0, counters)
        except BaseException:
            self.close()
            raise

    def most_sets(self) -> int:
        """How many sets a share of the memory holds beside enough copies of the tables."""
        room = min(self._device.free_bytes() // 2, _MOST_BYTES)
        tables = self._table_copies() * self._shared.size
        return max((room - tables) // max(self._own.size, 1), 1)

    def launches(self, count: int, random: np.random.Generator) -> list[tuple[Launch, ...]]:
        """The launches on each of `count` sets."""
        copies = min(count, self._table_copies())
        self._extend(self._tables, copies, self._shared)
        self._extend(self._sets, count, self._own)
        if self._shared.size:
            for base in self._sets[1:count]:
                picks = self._case.workload.other_picks(self._case.use, self._case.case, random)
                for name, array in self._case.stored(picks).items():
                    self._device.upload(base + self._own.offsets[name], array)
        return [self._launches(n, self._tables[n % copies]) for n in range(count)]

    def close(self) -> None:
        """Free everything."""
        while self._buffers:
            self._device.free(self._buffers.pop())

    def _table_copies(self) -> int:
        if not self._shared.size:
            return 1
        room = min(self._device.free_bytes() // 4, _MOST_BYTES) // self._shared.size
        wanted = math.ceil(_TIMES_CACHE * self._device.facts.l2_bytes / self._shared.size)
        return max(min(wanted, room), 1)

    def _launches(self, number: int, tables: int) -> tuple[Launch, ...]:
        own = self._sets[number]
        addresses = {name: own + offset for name, offset in self._own.offsets.items()}
        addresses |= {name: tables + offset for name, offset in self._shared.offsets.items()}
        return self._case.kernels.launches(
            self._case.case.shapes, addresses | self._outputs, self._workspace, self._counters
        )

    def _extend(self, bases: list[int], count: int, layout: _Layout) -> None:
        """Copy the inputs in `layout` until there are `count`; the first come from the host."""
        if not bases:
            bases.append(self._new(layout.size))
            for name, offset in layout.offsets.items():
                self._device.upload(bases[0] + offset, self._stored[name])
        if more := count - len(bases):
            buffer = self._new(more * layout.size)
            for number in range(more):
                bases.append(buffer + number * layout.size)
                self._device.copy(bases[-1], bases[0], layout.size)

    def _new(self, size: int) -> int:
        address = self._device.allocate(size)
        self._buffers.append(address)
        return address
