"""Charts of the report's page as coordinates of inline SVG; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.comparison.page.numbers import number
from runtime.comparison.taps import TapName
from runtime.comparison.verdict import TapDifference

# A viewBox that is still readable at the width of a phone.
WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 66, WIDTH - 10, 24, HEIGHT - 38
FRAME = LEFT, RIGHT, BOTTOM, WIDTH, HEIGHT  # for the template
CURVE_WIDTH, CURVE_HEIGHT, CURVE_POINTS = 160, 36, 64

Series = Mapping[int, float]  # layer to value; infinity where a number is not finite


@dataclass(frozen=True, kw_only=True)
class Point:
    """A value at its place; `beyond` tells that it is zero or not finite and sits at the edge."""

    x: float
    y: float
    told: str
    beyond: bool


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series: its name, its points, and whether it is the dashed one."""

    name: str
    points: tuple[Point, ...]
    dashed: bool

    @property
    def path(self) -> str:
        """The points as SVG's `points`."""
        return " ".join(f"{p.x:g},{p.y:g}" for p in self.points)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Values per layer on a logarithmic axis.

    Attributes:
        title: what it shows.
        lines: the series.
        layers: x and name of each label of the horizontal axis.
        ticks: y and name of each line of the vertical one.
        limit: y of the tolerance, None where the chart has none.
        table: layer and each series' value in words.
    """

    title: str
    lines: tuple[Line, ...]
    layers: tuple[tuple[float, str], ...]
    ticks: tuple[tuple[float, str], ...]
    limit: float | None
    table: tuple[tuple[str, tuple[str, ...]], ...]


def layer_charts(
    found: Sequence[TapDifference], first: tuple[int, int] | None
) -> tuple[Chart, ...]:
    """Error of the residual stream and worst share of the tolerance per layer.

    Args:
        found: every comparison.
        first: prompt and step of the first divergence, None where nothing parts.
    """
    parsed = {name: TapName.parse(name) for name in dict.fromkeys(d.tap for d in found)}
    streams: tuple[dict[int, float], dict[int, float]] = {}, {}
    shares: tuple[dict[int, float], dict[int, float]] = {}, {}
    for difference in found:
        layer = difference.layer
        if layer is None:
            continue
        both = (True, (difference.prompt, difference.step) == first)
        for wanted, stream, over in zip(both, streams, shares, strict=True):
            if not wanted:
                continue
            over[layer] = max(over.get(layer, 0.0), difference.of_tolerance)
            if parsed[difference.tap].kind == "output":
                stream[layer] = max(stream.get(layer, 0.0), difference.relative)
    names = ["worst over all steps"]
    if first is not None:
        names.append(f"first diverging step (prompt {first[0]}, step {first[1]})")
    made = (
        _chart("Relative error of the residual stream behind each layer", names, streams, None),
        _chart("Worst share of tolerance of any tap in each layer", names, shares, 1.0),
    )
    return tuple(chart for chart in made if chart is not None)


def _chart(
    title: str, names: Sequence[str], series: Sequence[Series], limit: float | None
) -> Chart | None:
    series = series[: len(names)]
    layers = sorted(series[0])
    if not layers:
        return None
    low, high = _decades([v for s in series for v in s.values()], limit)

    def x(layer: int) -> float:
        inner = RIGHT - LEFT - 16
        return round(LEFT + 8 + inner * layers.index(layer) / max(1, len(layers) - 1), 1)

    def y(value: float) -> float:
        if value <= 0:
            return BOTTOM
        if not math.isfinite(value):
            return TOP
        part = (math.log10(value) - low) / (high - low)
        return round(BOTTOM - 14 - part * (BOTTOM - TOP - 28), 1)

    lines = tuple(
        Line(
            name=name,
            dashed=index > 0,
            points=tuple(
                Point(
                    x=x(layer),
                    y=y(values[layer]),
                    told=f"layer {layer}: {number(values[layer])}",
                    beyond=values[layer] <= 0 or not math.isfinite(values[layer]),
                )
                for layer in layers
                if layer in values
            ),
        )
        for index, (name, values) in enumerate(zip(names, series, strict=True))
    )
    every = max(1, -(-len(layers) // 10))
    step = max(1, -(-(high - low) // 6))
    ticks = [(y(10.0**k), number(10.0**k)) for k in range(low, high + 1, step)]
    if any(v == 0 for s in series for v in s.values()):
        ticks.append((BOTTOM, "0"))
    if any(not math.isfinite(v) for s in series for v in s.values()):
        ticks.append((TOP, "not finite"))
    return Chart(
        title=title,
        lines=lines,
        layers=tuple((x(layer), str(layer)) for layer in layers[::every]),
        ticks=tuple(ticks),
        limit=None if limit is None else y(limit),
        table=tuple(
            (str(layer), tuple(number(s.get(layer), "none") for s in series)) for layer in layers
        ),
    )


def _decades(values: Sequence[float], limit: float | None) -> tuple[int, int]:
    """Powers of ten around all values that a logarithm has, and around the limit."""
    usual = [v for v in values if 0 < v < math.inf] + ([] if limit is None else [limit])
    usual = usual or [1.0]
    low, high = math.floor(math.log10(min(usual))), math.ceil(math.log10(max(usual)))
    return low, max(high, low + 1)


def sorted_curve(counts: Sequence[int]) -> str:
    """Uses of the experts from the most used to the least, as SVG's `points`.

    Args:
        counts: [E] picks of each expert. Many are drawn by at most `CURVE_POINTS` of them.
    """
    falling = sorted(counts, reverse=True)
    most = max(falling, default=0) or 1
    last = max(1, len(falling) - 1)
    chosen = sorted({round(i * last / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)})
    return " ".join(
        f"{CURVE_WIDTH * i / last:.4g},{CURVE_HEIGHT * (1 - falling[i] / most):.4g}"
        for i in chosen
        if i < len(falling)
    )
