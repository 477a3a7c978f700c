"""Parts of the report's document in the order in which the page's template shows them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from runtime.comparison.page.charts import sorted_curve
from runtime.comparison.page.numbers import NOT_THERE, id_list
from runtime.comparison.taps import CHOICES, COMPUTED_BY, TOKEN, TapName

_SIDES = ("reference", "candidate")
_FIRST_WORD = re.compile(r"\s*\S+|\s+")


@dataclass(frozen=True, kw_only=True)
class MarkedText:
    """A text in three parts: what both say, the first word that differs, what follows."""

    same: str
    marked: str
    rest: str


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """One property of both rungs."""

    name: str
    reference: str
    candidate: str

    @property
    def differs(self) -> bool:
        """Whether the rungs differ in it."""
        return self.reference != self.candidate


def marked_texts(reference: str, candidate: str) -> tuple[MarkedText, MarkedText]:
    """Two texts, each from its first word that the other does not have there.

    A word is marked from its first character that differs: tokens have no text of their own here.
    """
    pairs = zip(reference, candidate, strict=False)  # one may be the beginning of the other
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    found = []
    for text in (reference, candidate):
        word = _FIRST_WORD.match(text, length)
        end = length if word is None else word.end()
        found.append(MarkedText(same=text[:length], marked=text[length:end], rest=text[end:]))
    return found[0], found[1]


def environment(rungs: Mapping[str, Any]) -> tuple[SideBySide, ...]:
    """What both rungs are and where they ran; a property that neither names is left out."""
    facts = [_facts(rungs.get(side) or {}) for side in _SIDES]
    names = dict.fromkeys([*facts[0], *facts[1]])
    return tuple(
        SideBySide(
            name=name,
            reference=facts[0].get(name, NOT_THERE),
            candidate=facts[1].get(name, NOT_THERE),
        )
        for name in names
    )


def _facts(rung: Mapping[str, Any]) -> dict[str, str]:
    found = {
        "rung": rung.get("rung"),
        "precision": rung.get("precision"),
        "run": {"here": "in this comparison", "loaded": "loaded from a file"}.get(
            rung.get("source", ""), rung.get("source")
        ),
        "tapped": {True: "yes, in a second run", False: "no"}.get(rung.get("tapped", "")),
        "generation": rung.get("generation"),
        "max_input_len": rung.get("max_input_len"),
        "max_seq_len": rung.get("max_seq_len"),
        "weights_sha256": rung.get("weights_sha256"),
    }
    found |= {f"machine: {name}": value for name, value in (rung.get("machine") or {}).items()}
    found |= {f"version: {name}": value for name, value in (rung.get("versions") or {}).items()}
    return {name: str(value) for name, value in found.items() if value is not None}


def origin(tap: str) -> str:
    """What computes a tap, in words."""
    return COMPUTED_BY.get(TapName.parse(tap).kind, "")


def choice_rows(taps: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The summaries of those taps that are choices."""
    return [tap for tap in taps if TapName.parse(tap["tap"]).kind in (*CHOICES, TOKEN)]


def missing_taps(missing: Mapping[str, Sequence[str]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Taps that were not compared, by the rungs that lack them."""
    found: dict[str, list[str]] = {}
    for name, rungs in missing.items():
        found.setdefault(" and ".join(rungs), []).append(name)
    return tuple((rungs, tuple(names)) for rungs, names in found.items())


def looks(inside: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was found inside either rung, with the curves of its experts; empty where nothing."""
    found = []
    for side in _SIDES:
        look = inside.get(side)
        if not look:
            continue
        window = look.get("window")
        if window and not any(head["queries"] for at in window["layers"] for head in at["heads"]):
            window = None  # no query saw more keys than the window
        if not (window or look.get("experts")):
            continue
        experts = look.get("experts")
        if experts:
            layers = [
                layer | {"curve": sorted_curve(layer["counts"]), "dead_ids": id_list(layer["dead"])}
                for layer in experts["layers"]
            ]
            experts = experts | {"layers": layers}
        found.append(dict(look) | {"side": side, "window": window, "experts": experts})
    return found


def quarter_bars(quarters: Sequence[float], width: float) -> list[tuple[float, float]]:
    """Start and width of each part of a stacked bar."""
    starts, at = [], 0.0
    for part in quarters:
        starts.append((round(at * width, 2), round(part * width, 2)))
        at += part
    return starts
