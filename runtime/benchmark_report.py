"""What a benchmark tells: machine, versions, one result for each contender, as JSON or a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from runtime.benchmarking import (
    Contender,
    Measurement,
    Statistics,
    decode_ratio,
    prefill_ratio,
    summarize,
)
from runtime.cpu_threads import usable_cpus
from runtime.environment import cpu_name, proc_field, system_name
from runtime.roofline import BandwidthMeter, last_cache_bytes

_PIPED_WIDTH = 160


@dataclass(frozen=True, kw_only=True)
class Result:
    """One contender's figures.

    Attributes:
        bundle: the bundle, or what else was measured.
        backend: what ran it.
        variant: which of its models.
        contender: what was asked for.
        measurement: what was measured.
        statistics: the figures of it.
        roofline_fraction: the floor of a step's time by the measured one; None where the floor or
            the time is unknown.
        prefill_ratio: speed of prompts by that of the first contender of the same input length.
        decode_ratio: likewise of later tokens; None where there are none.
    """

    bundle: str
    backend: str
    variant: str
    contender: Contender
    measurement: Measurement
    statistics: Statistics
    roofline_fraction: float | None
    prefill_ratio: float
    decode_ratio: float | None

    def as_dict(self) -> dict[str, Any]:
        """The JSON form of the command's contract."""
        figures = self.statistics
        itl = figures.itl_ms
        return {
            "bundle": self.bundle,
            "backend": self.backend,
            "variant": self.variant,
            "input_len": self.contender.input_len,
            "output_len": self.contender.output_len,
            "load_s": round(self.measurement.opened.load_s, 4),
            "ttft_ms": round(figures.ttft_ms, 4),
            "tpot_ms": _rounded(figures.tpot_ms, 4),
            "itl_ms": None if itl is None else {name: round(ms, 4) for name, ms in itl.items()},
            "prefill_tokens_per_s": round(figures.prefill_tokens_per_s, 2),
            "decode_tokens_per_s": _rounded(figures.decode_tokens_per_s, 2),
            "peak_rss_mb": round(self.measurement.peak_rss_mb, 1),
            "roofline_fraction": _rounded(self.roofline_fraction, 4),
            "repeats": len(self.measurement.timings),
            **({} if self.device is None else {"device": dict(self.device)}),
        }

    @property
    def device(self) -> Mapping[str, Any] | None:
        """What is known of the GPU that ran it."""
        return self.measurement.opened.device


def make_results(
    names: Sequence[str],
    contenders: Sequence[Contender],
    measurements: Sequence[Measurement],
    floors_s: Sequence[float | None],
) -> list[Result]:
    """One result for each contender.

    Args:
        names: what each is of, as `Result.bundle`.
        contenders: what was asked for.
        measurements: what was measured of each.
        floors_s: seconds that a later token takes at the least, None where that is unknown.
    """
    results = []
    for name, contender, measurement, floor_s in zip(
        names, contenders, measurements, floors_s, strict=True
    ):
        baseline = next(
            other.timings
            for peer, other in zip(contenders, measurements, strict=True)
            if peer.input_len == contender.input_len
        )
        figures = summarize(measurement.timings, contender.batch_size, contender.input_len)
        fraction = None
        if floor_s is not None and figures.tpot_ms is not None:
            fraction = floor_s * 1e3 / figures.tpot_ms
        results.append(
            Result(
                bundle=name,
                backend=measurement.opened.backend,
                variant=measurement.opened.variant,
                contender=contender,
                measurement=measurement,
                statistics=figures,
                roofline_fraction=fraction,
                prefill_ratio=prefill_ratio(baseline, measurement.timings),
                decode_ratio=decode_ratio(baseline, measurement.timings),
            )
        )
    return results


def describe_machine(meter: BandwidthMeter) -> dict[str, Any]:
    """The CPU, its memory and the bandwidth measured in this run."""
    return {
        "system": system_name(),
        "cpu": cpu_name(),
        "cores": usable_cpus(),
        "memory_mb": _memory_mb(),
        "last_cache_mb": _rounded((last_cache_bytes() or 0) / 2**20 or None, 1),
        "read_threads": meter.threads,
        "read_gb_per_s": round(meter.bytes_per_s / 1e9, 2),
    }


def print_table(results: Sequence[Result], machine: dict[str, Any]) -> None:
    """Print medians and ratios, one row for each result."""
    table = Table(box=box.SIMPLE)
    for column in ("bundle", "backend"):
        table.add_column(column, overflow="fold")
    numbers = (
        "prompt\ntokens",
        "load\ns",
        "first\ntoken ms",
        "token\nms",
        "p95\nms",
        "prompt\ntok/s",
        "\ntok/s",
        "peak\nMiB",
        "of the\nroofline",
        "prompt\nratio",
        "\nratio",
    )
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        figures = result.statistics
        itl = figures.itl_ms or {}
        table.add_row(
            result.bundle.replace("[", r"\["),
            f"{result.backend}:{result.variant}",
            str(result.contender.input_len),
            f"{result.measurement.opened.load_s:.2f}",
            f"{figures.ttft_ms:.2f}",
            _number(figures.tpot_ms, ".3f"),
            _number(itl.get("p95"), ".3f"),
            f"{figures.prefill_tokens_per_s:.0f}",
            _number(figures.decode_tokens_per_s, ".1f"),
            f"{result.measurement.peak_rss_mb:.0f}",
            _number(result.roofline_fraction, ".0%"),
            f"{result.prefill_ratio:.2f}",
            _number(result.decode_ratio, ".2f"),
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    console.print(table)
    first = results[0]
    print(
        f"{first.contender.output_len} tokens from each prompt, batch of "
        f"{first.contender.batch_size}, {len(first.measurement.timings)} rounds; ratios to the "
        "first row of the same prompt length"
    )
    print(
        f"{machine['cpu']}, {machine['cores']} cores; memory was read at "
        f"{machine['read_gb_per_s']} GB/s with {machine['read_threads']} threads"
    )
    for result in results:
        if (device := result.device) is not None:
            copies = _number(device["copy_gb_per_s"], ".0f") or "?"
            print(
                f"{result.backend}:{result.variant}, prompt of {result.contender.input_len}: "
                f"{device['gpu']}, {device['memory_mb']:.0f} MiB of its memory, copies at {copies} "
                f"GB/s, runtime cache {device['runtime_cache']}"
            )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _memory_mb() -> int | None:
    total = proc_field("meminfo", "MemTotal")
    return None if total is None else int(total.split()[0]) // 1024
