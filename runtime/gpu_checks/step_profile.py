"""What a decode step of our kernels spends its time on, by the device's clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from plugins.kernel_spec import Launch
from plugins.launcher import Launcher
from runtime.bundle import Bundle
from runtime.gpu.device_memory import aligned
from runtime.gpu_checks.decode_persistent import profile_launch
from runtime.gpu_checks.device import CheckDevice
from runtime.gpu_checks.kernel_timing import rounds_to_time
from runtime.gpu_checks.section import Rhythm
from runtime.kernel_step.decode_step import DecodeStep
from runtime.kernel_step.packed_weights import PackedWeights
from runtime.kernel_step.places import Places
from runtime.kernel_step.variant import kernels_of_variant
from runtime.manifest import Variant

# Cached numbers where no token was: 1.06 in float16, 0.012 in bfloat16 and float32.
_CACHED_BYTE = 0x3C
# The residual stream stays where it is from layer to layer.
_IN_PLACE = {"x_between": "x", "x_out": "x"}

HOW = (
    "Device events around replays of CUDA graphs, the median. `step_us`: a whole step of one "
    "sequence, one graph a replay; it moves on by a token each time, from `position` on. `parts`: "
    "the launches of one kind, of all layers, one behind the other, at `position`; `sum_us` adds "
    "them up. A part alone finds more of what it reads in the L2 cache than in a step, and a step "
    "pays for going from one kind of kernel to the next, so the sum may be less than the step. "
    "A persistent variant: `step_us` is an eighth of a launch of eight steps, from `position` on "
    "each time; its only part is what its barriers cost where nothing stands between them. "
    "`token_us`: what the host saw of a token at about that length, the graph's launch and the "
    "reading of the token included."
)


def parts_of_step(step: DecodeStep, places: Places) -> dict[str, tuple[Launch, ...]]:
    """The launches of one greedy step of one sequence by their kind, all layers together."""
    parts: dict[str, list[Launch]] = {}
    count = 0
    for layer in range(step.model.layers):
        launches = list(step.layer_launches(places, layer, 1))
        count += len(launches)
        values = [] if step.model.inner_values is None else ["values"]
        attend = ["attend"] * (len(launches) - 4 - len(values))
        names = ["qkv", *values, *attend, "o", "gate_up", "down"]
        for name, launch in zip(names, launches, strict=True):
            parts.setdefault(name, []).append(launch)
    parts["head"] = list(step.launches(places, 1, "greedy")[count:])
    return {name: tuple(launches) for name, launches in parts.items()}


def profile_step(
    device: CheckDevice,
    launcher: Launcher,
    bundle: Bundle,
    variant: Variant,
    positions: Sequence[int],
    rhythm: Rhythm,
) -> list[dict[str, Any]]:
    """JSON-ready: a step's time at each position, and that of its parts.

    Args:
        device: where.
        launcher: has the kernels of the bundle, of this version of the project.
        bundle: of the variant.
        variant: of backend `cuda`.
        positions: slots of the step's token.
        rhythm: how often.

    Raises:
        LaunchError: the GPU failed, or has too little memory.
        ValueError: the variant is not what a build writes.
    """
    kernels = kernels_of_variant(bundle, variant)
    weights = PackedWeights(bundle.file(variant.path), kernels.model, kernels.formats)
    step = kernels.step_for(1)
    memory = _Memory(device)
    try:
        weights_at = memory.allocate({name: t.bytes for name, t in weights.tensors.items()})
        cache_at = memory.allocate(kernels.cache_areas(1), _CACHED_BYTE)
        area_at = memory.allocate(kernels.areas, 0)
        for name, array in weights.arrays():
            device.upload(weights_at[name], np.ascontiguousarray(array))
        places = Places(
            weight=lambda name: weights_at.get(name, 0),
            area=lambda name: area_at[_IN_PLACE.get(name, name)],
            cache=lambda layer, kind: cache_at[f"layers.{layer}.{kind}"],
        )
        whole = step.launches(places, 1, "greedy")
        parts = parts_of_step(step, places)

        def restart(position: int) -> None:
            device.upload(area_at["positions"], np.array([position], np.int64))

        found = []
        for position in positions:
            if kernels.persistent is not None:
                saved = memory.allocate({"position": 8})["position"]
                found.append(
                    profile_launch(
                        device, launcher, kernels.persistent, places, saved, position, rhythm
                    )
                )
                continue
            restart(position)
            step_us = _whole_us(device, launcher, whole, rhythm)
            timed: list[dict[str, Any]] = []
            for name, launches in parts.items():
                restart(position)
                each_us = _part_us(device, launcher, launches, rhythm)
                timed.append({"part": name, "launches": len(launches), "us": round(each_us, 3)})
            total = sum(part["us"] for part in timed)
            found.append(
                {
                    "position": position,
                    "step_us": round(step_us, 3),
                    "sum_us": round(total, 3),
                    "launches": len(whole),
                    "parts": timed,
                }
            )
        return found
    finally:
        memory.close()


def _whole_us(
    device: CheckDevice, launcher: Launcher, launches: Sequence[Launch], rhythm: Rhythm
) -> float:
    """Microseconds of a step, a graph each."""
    times = device.time(
        _putting(device, launcher, launches), warmup=rhythm.warmup, replays=rhythm.replays
    )
    return 1e3 * median(times)


def _part_us(
    device: CheckDevice, launcher: Launcher, launches: Sequence[Launch], rhythm: Rhythm
) -> float:
    """Microseconds of these launches, one of many times in a graph."""
    once = _putting(device, launcher, launches)
    rounds = rounds_to_time(device, once, 1, rhythm)
    times = device.time(
        _putting(device, launcher, [*launches] * rounds),
        warmup=rhythm.warmup,
        replays=rhythm.replays,
    )
    return 1e3 * median(times) / rounds


def _putting(
    device: CheckDevice, launcher: Launcher, launches: Sequence[Launch]
) -> Callable[[], None]:
    def enqueue() -> None:
        for launch in launches:
            launcher.launch(launch, device.stream)

    return enqueue


class _Memory:
    """Named pieces of device memory, freed together."""

    def __init__(self, device: CheckDevice) -> None:
        self._device = device
        self._buffers: list[int] = []

    def allocate(self, sizes: Mapping[str, int], byte: int | None = None) -> dict[str, int]:
        """Addresses in one piece of memory, filled with a byte unless it is None."""
        addresses, end = {}, 0
        for name, size in sizes.items():
            addresses[name] = end
            end += aligned(size)
        base = self._device.allocate(end)
        self._buffers.append(base)
        if byte is not None:
            self._device.fill(base, byte, end)
        return {name: base + offset for name, offset in addresses.items()}

    def close(self) -> None:
        """Free everything."""
        while self._buffers:
            self._device.free(self._buffers.pop())
