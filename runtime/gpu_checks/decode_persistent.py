"""What several steps in one launch cost, by the device's clock, and what of it are barriers."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from plugins.launcher import Launcher
from runtime.gpu_checks.device import CheckDevice
from runtime.gpu_checks.section import Rhythm
from runtime.kernel_step.persistent import TOKENS_PER_LAUNCH, PersistentDecode
from runtime.kernel_step.places import Places

_BARRIERS = 1000


def profile_launch(
    device: CheckDevice,
    launcher: Launcher,
    persistent: PersistentDecode,
    places: Places,
    saved: int,
    position: int,
    rhythm: Rhythm,
) -> dict[str, Any]:
    """JSON-ready: a step's share of a launch of several that begins at a position.

    Args:
        device: where.
        launcher: has the kernels.
        persistent: what is launched.
        places: addresses; the token, the cache and the weights are there.
        saved: address of an int64 that keeps the position for the repetitions.
        position: slot of the first step's token.
        rhythm: how often.
    """
    device.upload(saved, np.array([position], np.int64))

    def steps() -> None:
        device.copy(places.area("positions"), saved, np.dtype(np.int64).itemsize)
        launcher.launch(persistent.launch(places, TOKENS_PER_LAUNCH), device.stream)

    def barriers() -> None:
        launcher.launch(persistent.barriers(places, _BARRIERS), device.stream)

    step_us = _median_us(device, steps, rhythm) / TOKENS_PER_LAUNCH
    barrier_us = _median_us(device, barriers, rhythm) / _BARRIERS
    count = persistent.barriers_of_step
    part = {"part": "barriers", "launches": count, "us": round(count * barrier_us, 3)}
    return {
        "position": position,
        "step_us": round(step_us, 3),
        "barrier_us": round(barrier_us, 4),
        "sum_us": part["us"],
        "launches": 1,
        "parts": [part],
    }


def _median_us(device: CheckDevice, enqueue: Callable[[], None], rhythm: Rhythm) -> float:
    return 1e3 * median(device.time(enqueue, warmup=rhythm.warmup, replays=rhythm.replays))
