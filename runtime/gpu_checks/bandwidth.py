"""Section: how fast the device's memory is, and what a launch costs at the least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from runtime.gpu_checks.device import CheckDevice
from runtime.gpu_checks.section import CheckedBundle, Report, Rhythm, Subject

_BUFFER_BYTES = 512 << 20
# Copies in a replay, and fills of a few bytes whose only cost is their node.
_COPIES, _NODES = 4, 200

_HOW = (
    "Replays of a CUDA graph between device events, the median. `gb_per_s`: copies from one buffer "
    "to another on the device, each byte counted as read and as written; it is what shares of the "
    "bandwidth are of. Memory that is only read can be somewhat faster, so a share may exceed 1. "
    "`fill_gb_per_s`: fills of a buffer, each byte counted once. `node_us`: a fill of 4 bytes, one "
    "of many in a row: what a node of a graph costs that does next to nothing."
)


class BandwidthSection:
    """Measured in the same run as the kernels, so that their shares are of this very GPU.

    Attributes:
        name: `bandwidth`.
    """

    name = "bandwidth"

    def plan(self, bundles: Sequence[CheckedBundle]) -> list[str]:
        """One line."""
        del bundles
        return [f"measure bandwidth: copies and fills of {_BUFFER_BYTES >> 20} MiB on the device"]

    def run(self, subject: Subject, earlier: Mapping[str, Report]) -> Report:
        """Measure."""
        del earlier
        device = subject.device
        size = min(_BUFFER_BYTES, device.free_bytes() // 4) // 4096 * 4096
        source, target = device.allocate(size), device.allocate(size)
        try:
            device.fill(source, 1, size)
            device.fill(target, 1, size)

            def copy() -> None:
                device.copy(target, source, size)

            def fill() -> None:
                device.fill(target, 2, size)

            def fill_little() -> None:
                device.fill(target, 2, 4)

            rhythm = subject.rhythm
            copy_ms = _median_ms(device, copy, _COPIES, rhythm)
            fill_ms = _median_ms(device, fill, _COPIES, rhythm)
            node_ms = _median_ms(device, fill_little, _NODES, rhythm)
        finally:
            device.free(source)
            device.free(target)
        measured = copy_ms > 0 and fill_ms > 0
        return {
            "verdict": "pass" if measured else "fail",
            "how": _HOW,
            "buffer_bytes": size,
            "gb_per_s": round(2 * size / copy_ms / 1e6, 2) if measured else None,
            "fill_gb_per_s": round(size / fill_ms / 1e6, 2) if measured else None,
            "node_us": round(1e3 * node_ms, 3),
        }


def _median_ms(
    device: CheckDevice, action: Callable[[], None], count: int, rhythm: Rhythm
) -> float:
    """Milliseconds of one of `count` actions in a row."""

    def enqueue() -> None:
        for _ in range(count):
            action()

    return median(device.time(enqueue, warmup=rhythm.warmup, replays=rhythm.replays)) / count
