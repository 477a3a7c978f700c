"""Sets of inputs that executions take turns with, and how often they are repeated."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from runtime.backends.base import Limits
from runtime.gpu_checks.kernel_case import KernelCase
from runtime.gpu_checks.kernel_timing import time_case
from runtime.gpu_checks.section import Rhythm
from runtime.gpu_checks.workloads import WORKLOADS
from tests.gpu_check_subject import ONCE, attention_use, expert_use, value_use
from tests.host_device import HostDevice, at

SINGLE = Limits(max_batch_size=1, max_input_len=1, max_seq_len=24)


class RecordingLauncher:
    """Runs nothing; what it was given stands in `seen`."""

    def __init__(self):
        self.seen = []

    def launch(self, launch, stream):
        self.seen.append(launch)


def timed(use, device, moved_bytes, *, rhythm=ONCE, launcher=None):
    """What timing one token finds, and the launches that it took."""
    (case, *_) = WORKLOADS[use.op].cases(use, SINGLE)
    case = KernelCase(bundle="tiny", use=use, case=case)
    stored = case.stored(case.workload.inputs(use, case.case, np.random.default_rng(1)))
    launcher = launcher or RecordingLauncher()
    found = time_case(device, launcher, case, stored, moved_bytes, rhythm, np.random.default_rng(2))
    assert device.allocated == 0
    return found, launcher.seen


def sets(count):
    return dataclasses.replace(ONCE, sets=count)


def test_sets_of_inputs_are_three_times_the_cache():
    found, seen = timed(attention_use(window=0), HostDevice(l2_bytes=1000), 300, rhythm=sets(50))
    assert found["cold"]["sets"] == 10
    warm = [launch for launch in seen if launch.arguments["key"] == seen[0].arguments["key"]]
    assert len({launch.arguments["key"] for launch in seen}) == 10
    assert len(warm) > len(seen) / 10, "the first set is the one that warm executions read"
    assert len({launch.arguments["output"] for launch in seen}) == 1


def test_inputs_beyond_the_cache_need_no_copies():
    found, seen = timed(attention_use(window=0), HostDevice(l2_bytes=1000), 3000)
    assert found["cold"] == {**found["warm"], "sets": 1}
    assert len({launch.arguments["key"] for launch in seen}) == 1


def test_too_few_sets_give_no_cold_figure_but_a_reason():
    found, _ = timed(value_use(), HostDevice(l2_bytes=1000), 600, rhythm=sets(2))
    assert found["cold"] is None
    assert found["cold_why_not"] == (
        "2 sets of inputs, as many as are made, move 1,200 bytes; the L2 cache has 1,000"
    )
    found, _ = timed(value_use(), HostDevice(l2_bytes=1000), 1000, rhythm=sets(2))
    assert found["cold"]["sets"] == 2, "twice the cache is enough"


def test_tables_are_copied_as_often_as_the_cache_asks_and_scores_are_new_in_each_set():
    scores = set()

    class ReadingLauncher(RecordingLauncher):
        def launch(self, launch, stream):
            super().launch(launch, stream)
            if "scores_x" in launch.arguments:
                scores.add(at(launch.arguments["scores_x"], 8).tobytes())

    # Two tables of 16 rows of 32 bytes each.
    found, seen = timed(
        expert_use(), HostDevice(l2_bytes=1024), 307, rhythm=sets(50), launcher=ReadingLauncher()
    )
    assert found["cold"]["sets"] == 11
    tables = {launch.arguments["down"] for launch in seen if "down" in launch.arguments}
    assert len(tables) == 3, "three times the cache"
    assert len(scores) == 11


def test_scratch_memory_and_counters_are_handed_over():
    _, seen = timed(attention_use(window=8), HostDevice(), 1)
    assert all(launch.arguments["threshold"] for launch in seen)
    assert any(launch.arguments.get("counters") for launch in seen)


class Clock(HostDevice):
    """A replay takes as many milliseconds as were asked for, for each launch."""

    def __init__(self, launcher, ms):
        super().__init__()
        self._launcher, self._ms = launcher, ms

    def time(self, enqueue, *, warmup, replays):
        before = len(self._launcher.seen)
        enqueue()
        return [self._ms * (len(self._launcher.seen) - before)] * replays


@pytest.mark.parametrize(
    ("ms", "executions"), [(1.0, 5), (0.25, 8), (0.001, 100), (0.0, 100), (10.0, 5)]
)
def test_a_replay_is_made_long_enough_to_be_timed(ms, executions):
    launcher = RecordingLauncher()
    found, _ = timed(value_use(), Clock(launcher, ms), 500, rhythm=Rhythm(), launcher=launcher)
    assert found["warm"]["executions"] == executions
    assert found["warm"]["replays"] == 20
    assert found["warm"]["median_us"] == pytest.approx(1e3 * ms)
    assert found["warm"]["p95_us"] == pytest.approx(1e3 * ms)
    assert found["warm"]["gb_per_s"] == (pytest.approx(500 / ms / 1e6, abs=0.01) if ms else None)
