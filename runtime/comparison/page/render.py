"""A comparison as one HTML page that needs nothing else: docs/compare_page.md."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from runtime.comparison.page.charts import FRAME, layer_charts
from runtime.comparison.page.heat_map import (
    COUNT_BOUNDS,
    SHARE_BOUNDS,
    Columns,
    choice_maps,
    share_maps,
)
from runtime.comparison.page.numbers import close_number, id_list, number, printable, share
from runtime.comparison.page.sections import (
    choice_rows,
    environment,
    looks,
    marked_texts,
    missing_taps,
    origin,
    quarter_bars,
)
from runtime.comparison.verdict import TapDifference

_TEMPLATE = "page.html.j2"
# Of the document's optional keys, what stands for "not asked for".
_EMPTY: dict[str, Any] = {
    "rungs": {},
    "command": None,
    "prompts": [],
    "free_running": [],
    "text": None,
    "inside": None,
    "taps": [],
    "missing_taps": {},
    "first_divergence": None,
    "first_token": None,
    "tapping_changed": {},
}


def render_page(document: Mapping[str, Any], differences: Sequence[TapDifference]) -> str:
    """The page's text; equal arguments give equal pages.

    Args:
        document: what `compare.py --json` prints; a key that is missing, null or empty leaves its
            section out.
        differences: every comparison of every tap, empty where no taps were asked for.
    """
    told = _EMPTY | {key: value for key, value in document.items() if value is not None}
    # Without taps the first divergence is that of tokens.
    first = told["first_divergence"]
    if first is not None and "tap" not in first:
        told |= {"first_divergence": None, "first_token": first}
        first = None
    steps = int(told["steps"])
    place = None if first is None else (first["step"], first["tap"])
    template = _template_environment().get_template(_TEMPLATE)
    page = template.render(
        told=told,
        charts=layer_charts(
            differences, None if first is None else (first["prompt"], first["step"])
        ),
        frame=FRAME,
        failing=next((d for d in differences if d.parts and not d.explained), None),
        maps=share_maps(differences, steps, place),
        choice_maps=choice_maps(differences, steps, place),
        choices=choice_rows(told["taps"]),
        missing=missing_taps(told["missing_taps"]),
        looks=looks(told["inside"] or {}),
        environment=environment(told["rungs"]),
        columns=Columns.of(steps),
        share_bounds=SHARE_BOUNDS,
        count_bounds=COUNT_BOUNDS,
    )
    return printable(page)


def write_page(
    path: Path, document: Mapping[str, Any], differences: Sequence[TapDifference]
) -> None:
    """Write the page, whole or not at all: a file that was there stays until the new one is done.

    Args:
        path: the file.
        document: as `render_page`.
        differences: likewise.

    Raises:
        OSError: the file cannot be written.
    """
    page = render_page(document, differences).encode("utf-8")
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(page)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _template_environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": number,
        "share": share,
        "close": close_number,
        "ids": id_list,
        "origin": origin,
        "bars": quarter_bars,
    }
    made.globals["marked_texts"] = marked_texts
    return made
