"""Maps of layer × step: in each cell the worst of what was compared there, over all prompts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.comparison.page.numbers import number
from runtime.comparison.taps import CACHED, CHOICES, LOGITS, TOKEN, TapName
from runtime.comparison.verdict import TapDifference

# Decode steps get a column each up to this many; more are put together in columns of equal width.
MOST_COLUMNS = 48
# Upper bounds of the colours 1, 2, ...; what is above the last one has a colour of its own.
SHARE_BOUNDS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
COUNT_BOUNDS = (1.0, 3.0, 10.0, 30.0, 100.0)
NOT_FINITE_COLOUR = "x"
# Which kinds of taps a map shows; the first shows all.
GROUPS: dict[str, tuple[str, ...]] = {
    "residual stream and norms": (
        "embedding", "attention_norm", "attention_residual", "mlp_norm", "output", "final_norm",
    ),
    "attention": ("query", "key", "value", "score", "attention_output"),
    "cache": tuple(CACHED),
    "feed-forward": ("router_scores", "expert_output", "mlp_output"),
    "choices": (*CHOICES, TOKEN),
    "logits": (LOGITS,),
}  # fmt: skip
ALL = "all taps"
_BEHIND = ("final_norm", LOGITS, TOKEN)

Measure = Literal["share", "count"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row in one column.

    Attributes:
        colour: class of the scale, "0" for none at all, "" where nothing was compared.
        mark: a sign that tells without colour whether and how the runs part here.
        told: the worst difference in words.
        first: whether this is the first divergence.
    """

    colour: str
    mark: str
    told: str
    first: bool


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A table of cells.

    Attributes:
        title: which taps it shows.
        columns: what each column is called: `0` is the prefill, `6–10` five steps in one.
        rows: name and cells of each row, in the order of computation.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Columns:
    """How steps are put in columns: the prefill alone, then `width` decode steps each."""

    steps: int
    width: int

    @classmethod
    def of(cls, steps: int) -> Columns:
        """Columns for a prefill and this many decode steps."""
        return cls(steps, max(1, -(-steps // MOST_COLUMNS)))

    def index(self, step: int) -> int:
        """The column of a step."""
        return 0 if step == 0 else 1 + (step - 1) // self.width

    @property
    def names(self) -> tuple[str, ...]:
        """What each is called."""
        starts = range(1, self.steps + 1, self.width)
        ends = [min(start + self.width - 1, self.steps) for start in starts]
        return ("0", *(f"{a}" if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True)))


def row_of(tap: TapName) -> str:
    """The row that a tap belongs to."""
    if tap.layer is not None:
        return str(tap.layer)
    return "head" if tap.kind in _BEHIND else "embedding"


def _rank(row: str) -> int:
    return {"embedding": -1, "head": 1 << 30}.get(row) or int(row)


def colour(value: float, measure: Measure) -> str:
    """The colour's class of a share of the tolerance, or of a count of choices."""
    if value == 0:
        return "0"
    if value == float("inf"):
        return NOT_FINITE_COLOUR
    return str(1 + bisect_left(SHARE_BOUNDS if measure == "share" else COUNT_BOUNDS, value))


def heat_map(
    found: Sequence[TapDifference],
    steps: int,
    first: tuple[int, str] | None,
    *,
    title: str = ALL,
    kinds: Sequence[str] | None = None,
    measure: Measure = "share",
) -> HeatMap | None:
    """A map of some kinds of taps, None where none of them was compared.

    Args:
        found: every comparison.
        steps: decode steps of the runs.
        first: step and tap of the first divergence.
        title: what the map is called.
        kinds: which to show, None for all.
        measure: the share of the tolerance, or how many choices differ.
    """
    columns = Columns.of(steps)
    parsed = {name: TapName.parse(name) for name in dict.fromkeys(d.tap for d in found)}
    worst: dict[tuple[str, int], TapDifference] = {}
    for difference in found:
        tap = parsed[difference.tap]
        if kinds is not None and tap.kind not in kinds:
            continue
        place = row_of(tap), columns.index(difference.step)
        held = worst.get(place)
        if held is None or _severity(difference, measure) > _severity(held, measure):
            worst[place] = difference
    if not worst:
        return None
    at = None
    if first is not None and (kinds is None or TapName.parse(first[1]).kind in kinds):
        at = row_of(TapName.parse(first[1])), columns.index(first[0])
    rows = sorted({row for row, _ in worst}, key=_rank)
    return HeatMap(
        title=title,
        columns=columns.names,
        rows=tuple(
            (
                row,
                tuple(
                    _cell(worst.get((row, i)), measure, (row, i) == at)
                    for i in range(len(columns.names))
                ),
            )
            for row in rows
        ),
    )


def _severity(difference: TapDifference, measure: Measure) -> tuple[bool, float]:
    """What no near tie explains is worse than all else; within either, the larger value is."""
    value = difference.error if measure == "count" else difference.of_tolerance
    return (difference.parts and not difference.explained, value)


def _cell(worst: TapDifference | None, measure: Measure, first: bool) -> Cell:
    if worst is None:
        return Cell(colour="", mark="◆" if first else "", told="", first=first)
    value = worst.error if measure == "count" else worst.of_tolerance
    mark = "○" if worst.explained else "●"
    if worst.kind == "not finite":
        mark = "×"
    if first or not worst.parts:
        mark = "◆" if first else ""
    told = f"step {worst.step}, {worst.tap}, prompt {worst.prompt}: "
    told += number(value) + (" differ" if measure == "count" else " of tolerance")
    return Cell(colour=colour(value, measure), mark=mark, told=told, first=first)


def share_maps(
    found: Sequence[TapDifference], steps: int, first: tuple[int, str] | None
) -> tuple[HeatMap, ...]:
    """The map of all taps, then one for each group that has any."""
    maps = [heat_map(found, steps, first)]
    maps += [
        heat_map(found, steps, first, title=title, kinds=kinds) for title, kinds in GROUPS.items()
    ]
    return tuple(found_map for found_map in maps if found_map is not None)


def choice_maps(
    found: Sequence[TapDifference], steps: int, first: tuple[int, str] | None
) -> tuple[HeatMap, ...]:
    """How many choices differ, by kind; kinds of which none does are left out."""
    titles: Mapping[str, str] = {
        "kept_keys": "kept keys",
        "experts": "chosen experts",
        TOKEN: "greedy tokens",
    }
    maps = []
    for kind, title in titles.items():
        if any(d.parts and TapName.parse(d.tap).kind == kind for d in found):
            made = heat_map(found, steps, first, title=title, kinds=(kind,), measure="count")
            maps += [] if made is None else [made]
    return tuple(maps)
