"""The page of a comparison: what it shows, what it leaves out, and that it needs nothing else."""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime.comparison.page.render as page_module
from runtime.comparison.page.heat_map import colour
from runtime.comparison.page.numbers import number, share
from runtime.comparison.page.render import render_page, write_page
from runtime.comparison.taps import TapName
from runtime.comparison.verdict import TapDifference

VOID = {"meta", "input", "link", "br", "img", "hr"}
STEPS, LAYERS, PROMPTS = 6, 3, 2
KINDS = ("key", "kept_keys", "attention_output", "output")
FIRST = (1, 4, "layers.1.attention_output")  # prompt, step, tap


class Element:
    """One element of a parsed page."""

    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes = tag, attributes
        self.children: list[Element | str] = []

    def all(self, tag: str = "", **wanted: str) -> list[Element]:
        return [
            e
            for e in self._below()
            if tag in ("", e.tag)
            and all(v in (e.attributes.get(k.rstrip("_")) or "").split() for k, v in wanted.items())
        ]

    def one(self, tag: str = "", **wanted: str) -> Element:
        found = self.all(tag, **wanted)
        assert len(found) == 1, (tag, wanted, len(found))
        return found[0]

    def _below(self) -> Iterator[Element]:
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child._below()

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)


class StrictParser(HTMLParser):
    """Builds a tree and insists that every tag is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.top = Element("", {})
        self.open = [self.top]
        self.doctype = ""

    def handle_decl(self, decl: str) -> None:
        self.doctype = decl

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        made = Element(tag, dict(attrs))
        self.open[-1].children.append(made)
        if tag not in VOID:
            self.open.append(made)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, (self.open[-1].tag, tag, self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(page: str) -> Element:
    parser = StrictParser()
    parser.feed(page)
    parser.close()
    assert parser.open == [parser.top]
    assert parser.doctype == "DOCTYPE html"
    ids = [e.attributes["id"] for e in parser.top.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for element in parser.top.all():
        assert element.attributes.get("aria-labelledby", ids[0]) in ids
        if element.tag == "a":
            assert (element.attributes["href"] or "").removeprefix("#") in ids
    return parser.top


def made_differences(steps: int = STEPS) -> list[TapDifference]:
    """Seeded comparisons within tolerance but for what follows FIRST in its layer."""
    random = np.random.default_rng(7)
    names = ["embedding", *(f"layers.{i}.{k}" for i in range(LAYERS) for k in KINDS), "logits"]
    found = []
    for step in range(steps + 1):
        for name in names:
            tap = TapName.parse(name)
            for prompt in range(PROMPTS):
                share = float(10 ** random.uniform(-4, -0.1))
                parts = step >= FIRST[1] and name == FIRST[2] and prompt == FIRST[0]
                choice = tap.kind == "kept_keys"
                differ = float(random.integers(0, 5)) if choice else share * 1e-3
                found.append(
                    TapDifference(
                        prompt=prompt,
                        step=step,
                        tap=name,
                        layer=tap.layer,
                        kind="discrete" if choice else "numeric",
                        error=differ,
                        relative=share / 50,
                        of_tolerance=share * (0 if choice and not differ else 300 if parts else 1),
                        reference_margin=0.01 if choice and differ else None,
                        candidate_margin=0.02 if choice and differ else None,
                    )
                )
    return found


def summary(found: list[TapDifference]) -> list[dict[str, Any]]:
    taps: dict[str, list[TapDifference]] = {}
    for difference in found:
        taps.setdefault(difference.tap, []).append(difference)
    return [
        max(group, key=lambda d: d.of_tolerance).as_dict()
        | {
            "compared": len(group),
            "parting": sum(d.parts for d in group),
            "near_ties": sum(d.parts and d.near_tie for d in group),
            "following": sum(d.follows for d in group),
        }
        for group in taps.values()
    ]


def plain_document(**changes: Any) -> dict[str, Any]:
    """What the command prints without taps or any other of the options."""
    return {
        "reference": "torch:fp32",
        "candidate": "onnxruntime:int8",
        "steps": STEPS,
        "taps": [],
        "logits": {
            "max_abs": 0.25, "mean_abs": 1.5e-5, "kl_max": 0.0, "kl_mean": None,
            "top1_agreement": 1.0,
        },
        "first_divergence": None,
        "verdict": "pass",
        "reason": "largest difference is 0.5 of the tolerance",
    } | changes  # fmt: skip


def head(**changes: Any) -> dict[str, Any]:
    return {
        "head": 0, "queries": 5, "left_out": 0, "kept_share": 0.75, "age_mean": 3.25,
        "age_median": 2, "age_p95": 9, "age_max": 11, "age_quarters": [0.5, 0.25, 0.125, 0.125],
        "recent_share": 0.9, "never_kept_share": 0.0,
    } | changes  # fmt: skip


def full_document() -> tuple[dict[str, Any], list[TapDifference]]:
    found = made_differences()
    first = next(d for d in found if d.parts and not d.near_tie)
    assert (first.prompt, first.step, first.tap) == FIRST
    rung = {
        "rung": "torch:fp32", "precision": "fp32", "source": "here", "tapped": True,
        "versions": {"python": "3.11.4"}, "machine": {"system": "Linux", "cores": 2},
        "weights_sha256": "ab" * 32, "generation": "g4", "max_input_len": 64, "max_seq_len": 128,
    }  # fmt: skip
    other = rung | {"rung": "onnxruntime:int8", "source": "loaded", "machine": {"cores": 26}}
    token = {
        "prompt": 0, "step": 5, "reference_token": 11, "candidate_token": 12,
        "reference_margin": 0.5, "candidate_margin": 0.125,
    }  # fmt: skip
    look = {
        "rung": "torch:fp32",
        "queries": 9,
        "window": {
            "keep_window_size": 8,
            "layers": [
                {"layer": 0, "heads": [head(), head(head=1, age_mean=None, age_quarters=None)]}
            ],
        },
        "experts": {
            "experts": 4, "unreachable": 0, "per_token": 2,
            "layers": [
                {
                    "layer": 0, "heads": 1, "picks": 18, "left_out": 2, "counts": [3, 0, 10, 5],
                    "dead": [1], "dead_share": 0.25, "expected_dead": 0.01, "effective": 2.5,
                    "top_share": 0.556,
                }
            ],
        },
    }  # fmt: skip
    return plain_document(
        verdict="fail",
        reason=f"first {first.sentence()}",
        taps=summary(found),
        missing_taps={f"layers.{i}.query": ["onnxruntime:int8"] for i in range(2)},
        first_divergence=first.as_dict(),
        first_token=token,
        tapping_changed={"reference": 0.0, "candidate": None},
        rungs={"reference": rung, "candidate": other},
        command="compare.py build/doge-tiny --taps all",
        prompts=[{"ids": [5, 6, 7], "text": "a small dog"}, {"ids": [8], "text": None}],
        free_running=[
            {
                "prompt": 0, "tokens": 7, "equal": 5, "first_divergence": token,
                "reference_text": "the dog ran home", "candidate_text": "the dog rested there",
            },
            {
                "prompt": 1, "tokens": 7, "equal": 7, "first_divergence": None,
                "reference_text": None, "candidate_text": None,
            },
        ],
        text={
            "tokens": 100, "windows": 1, "reference": {"nll": 2.0, "perplexity": 7.38906},
            "candidate": {"nll": 2.001, "perplexity": 7.39645}, "perplexity_ratio": 1.001,
            "kl_max": 0.5, "kl_mean": 0.01, "top1_agreement": 0.98, "top5_agreement": 0.999999,
        },
        inside={"reference": look, "candidate": None},
    ), found  # fmt: skip


def sections(page: str) -> set[str]:
    return {str(e.attributes["id"]) for e in parse(page).one("main").all("section")}


@pytest.fixture(scope="module")
def whole() -> set[str]:
    return sections(render_page(*full_document()))


def test_full_document_has_every_section_and_valid_html() -> None:
    page = render_page(*full_document())
    top = parse(page)
    assert sections(page) == {
        "first", "logits", "text", "layers", "map", "choices", "taps", "inside", "environment",
    }  # fmt: skip
    assert top.one("head").one("title").text == "FAIL: onnxruntime:int8 against torch:fp32"
    assert len(top.all("h1")) == 1
    for table in top.all("table"):
        assert table.one("caption").text.strip()
        columns = sum(int(th.attributes.get("colspan") or 1) for th in table.one("thead").all("th"))
        assert {len(tr.all("td") + tr.all("th")) for tr in table.one("tbody").all("tr")} == {
            columns
        }
    targets = {(a.attributes["href"] or "")[1:] for a in top.one("nav").all("a")}
    assert targets == sections(page) - {"first"}


def facts(section: Element) -> dict[str, str]:
    return {dt.text: dd.text for dt, dd in zip(section.all("dt"), section.all("dd"), strict=True)}


def test_first_divergence_and_logits_show_the_documents_numbers() -> None:
    document, found = full_document()
    first, main = document["first_divergence"], parse(render_page(document, found)).one("main")
    told = facts(main.one("section", id="first"))
    assert told["tap"] == FIRST[2]
    assert told["where"] == "prompt 1, step 4"
    assert told["error"] == number(first["error"])
    assert told["of its tolerance"] == number(first["of_tolerance"])
    assert facts(main.one("section", id="logits")) == {
        "largest difference": "0.25",
        "mean difference": "1.5e-5",
        "KL divergence, largest (nats)": "0",
        "KL divergence, mean (nats)": "not finite",
        "same greedy token": "100%",
        "decode steps": "6",
    }


def test_plain_document_shows_logits_alone() -> None:
    page = render_page(plain_document(), [])
    assert sections(page) == {"logits"}
    assert not parse(page).all("table")
    assert "Greedy tokens are the same at every position" in page


@pytest.mark.parametrize(
    ("key", "gone"),
    [
        ("rungs", None), ("command", None), ("prompts", None), ("free_running", None),
        ("text", None), ("inside", "inside"), ("taps", "choices taps"), ("missing_taps", None),
        ("first_divergence", "first"), ("first_token", None), ("tapping_changed", None),
    ],
)  # fmt: skip
def test_a_key_that_says_nothing_leaves_its_section_out(
    key: str, gone: str | None, whole: set[str]
) -> None:
    document, found = full_document()
    says_nothing = [document | {key: None}, {k: v for k, v in document.items() if k != key}]
    if key not in ("command", "text", "first_divergence", "first_token"):
        says_nothing.append(document | {key: type(document[key])()})
    for told in says_nothing:
        assert sections(render_page(told, found)) == whole - set((gone or "").split())


def test_text_section_goes_with_its_last_part(whole: set[str]) -> None:
    document, found = full_document()
    document |= {"text": None, "free_running": []}
    assert sections(render_page(document, found)) == whole - {"text"}


def test_environment_section_goes_with_its_last_part(whole: set[str]) -> None:
    document, found = full_document()
    document |= {"rungs": {}, "command": None, "prompts": []}
    assert sections(render_page(document, found)) == whole - {"environment"}


def test_without_differences_there_is_no_chart_and_no_map() -> None:
    document, _ = full_document()
    assert sections(render_page(document, [])).isdisjoint({"layers", "map"})


def test_the_verdict_is_told_in_words_at_the_top() -> None:
    for verdict, word in (("pass", "PASS"), ("fail", "FAIL")):
        top = parse(render_page(plain_document(verdict=verdict, reason="so it is"), []))
        box = top.one("header").one("div", class_="verdict")
        assert word in box.one("strong").text
        assert box.one("p").text == "so it is"


def test_divergence_of_tokens_without_taps_is_no_divergence_of_taps() -> None:
    token = full_document()[0]["first_token"]
    page = render_page(plain_document(first_divergence=token), [])
    assert sections(page) == {"logits"}
    assert "prompt 0, step 5: 11 (margin 0.5) became 12 (margin 0.125)" in page


def colour_of(share: float) -> str:
    """The scale, told once more."""
    if share == 0:
        return "c0"
    if math.isinf(share):
        return "cx"
    return f"c{min(7, max(1, math.ceil(math.log10(share)) + 4))}"


@pytest.mark.parametrize("share_of", [0, 1e-9, 1e-3, 0.0011, 0.1, 0.99, 1, 1.01, 10, 101, math.inf])
def test_scale_has_a_colour_for_each_power_of_ten(share_of: float) -> None:
    assert f"c{colour(share_of, 'share')}" == colour_of(share_of)


def map_cells(top: Element, index: int) -> dict[tuple[str, int], Element]:
    body = top.one("div", class_=f"map-{index}").one("tbody")
    return {
        (row.one("th").text, column): cell
        for row in body.all("tr")
        for column, cell in enumerate(row.all("td"))
    }


@pytest.mark.parametrize("index", [0, 2])
def test_map_cells_are_the_worst_of_the_differences(index: int) -> None:
    document, found = full_document()
    cells = map_cells(parse(render_page(document, found)), index)
    wanted: dict[tuple[str, int], float] = {}
    for d in found:
        if index == 2 and TapName.parse(d.tap).kind not in ("key", "attention_output"):
            continue
        row = str(d.layer) if d.layer is not None else {"logits": "head"}.get(d.tap, d.tap)
        wanted[row, d.step] = max(wanted.get((row, d.step), 0.0), d.of_tolerance)
    assert cells.keys() == wanted.keys()
    for place, worst in wanted.items():
        assert colour_of(worst) in (cells[place].attributes["class"] or "").split(), place
        assert f"{worst:.3g} of tolerance" in (cells[place].attributes["title"] or "")
        assert ("●" in cells[place].text or "◆" in cells[place].text) == (worst > 1)


def test_first_divergence_is_marked_in_its_cell_alone() -> None:
    top = parse(render_page(*full_document()))
    for index, there in ((0, True), (1, False), (2, True), (3, False)):
        marked = {
            place
            for place, cell in map_cells(top, index).items()
            if "f" in (cell.attributes["class"] or "").split()
        }
        assert marked == ({("1", FIRST[1])} if there else set())


def test_many_steps_share_columns_and_the_page_says_so() -> None:
    document, _ = full_document()
    found = made_differences(steps=200)
    document |= {"steps": 200, "first_divergence": document["first_divergence"] | {"step": 123}}
    page = render_page(document, found)
    cells = map_cells(parse(page), 0)
    assert "each other column puts 5 decode steps together" in page
    assert max(column for _, column in cells) == 40
    # Steps 121 to 125 are column 25.
    assert "f" in (cells["1", 25].attributes["class"] or "").split()
    worst = max(d.of_tolerance for d in found if d.layer == 1 and 121 <= d.step <= 125)
    assert f"{worst:.3g} of tolerance" in (cells["1", 25].attributes["title"] or "")
    prefill = max(d.of_tolerance for d in found if d.layer == 1 and d.step == 0)
    assert f"{prefill:.3g} of tolerance" in (cells["1", 0].attributes["title"] or "")


def test_a_near_tie_is_marked_unlike_another_choice() -> None:
    place: dict[str, Any] = {"prompt": 0, "layer": 0, "tap": "layers.0.experts", "kind": "discrete"}
    size = {"error": 2.0, "relative": 0.1}
    found = [
        TapDifference(**place, **size, step=0, of_tolerance=0.5),
        TapDifference(**place, **size, step=1, of_tolerance=3.0),
        TapDifference(**place, step=2, error=0.0, relative=0.0, of_tolerance=0.0),
    ]
    top = parse(render_page(plain_document(steps=2, taps=summary(found)), found))
    cells = map_cells(top, 0)
    assert [cells["0", i].text.strip() for i in range(3)] == ["○", "●", ""]
    counts = top.one("section", id="choices").one("table", class_="map").all("td")
    assert [c.attributes["class"] for c in counts] == ["n2", "n2", "n0"]


def test_behind_a_near_tie_the_first_real_difference_is_told() -> None:
    document, found = full_document()
    tie = next(d for d in found if d.parts)
    assert tie.near_tie
    real = next(d for d in found if d.parts and not d.near_tie)
    document["first_divergence"] = tie.as_dict()
    section = parse(render_page(document, found)).one("section", id="first")
    told = facts(section)
    assert (told["tap"], told["kind"]) == (tie.tap, "discrete, a near tie")
    assert told["margin, reference"] == number(tie.reference_margin)
    assert told["margin, candidate"] == number(tie.candidate_margin)
    assert told["margin, of a near tie’s largest"] == number(tie.of_tolerance)
    assert f"no near tie explains: {real.sentence()}." in section.text
    assert "no near tie explains:" not in render_page(*full_document())


def test_numbers_that_are_not_finite_are_words() -> None:
    found = made_differences()
    infinite = dict.fromkeys(("error", "relative", "of_tolerance"), math.inf)
    found = [
        dataclasses.replace(d, kind="not finite", where=("onnxruntime:int8",), **infinite)
        if d.tap == "layers.2.output" and d.step > 3
        else d
        for d in found
    ]
    first = next(d for d in found if d.kind == "not finite")
    logits = dict.fromkeys(("max_abs", "mean_abs", "kl_max", "kl_mean")) | {"top1_agreement": 0.5}
    document = plain_document(
        verdict="fail", taps=summary(found), logits=logits, first_divergence=first.as_dict()
    )
    page = render_page(document, found)
    top = parse(page)
    assert top.one("section", id="logits").text.count("not finite") == 4
    assert top.one("section", id="first").text.count("not finite") >= 3
    cell = map_cells(top, 0)["2", 5]
    assert ("cx" in (cell.attributes["class"] or "").split(), cell.text) == (True, "×")
    assert not re.search(r"\b(nan|inf|None|null|Infinity|undefined)\b", top.one("body").text)
    assert "nan" not in page.split("<main")[1].lower().replace("nance", "")


def test_charts_hold_the_worst_of_each_layer_and_the_first_diverging_step() -> None:
    document, found = full_document()
    tables = parse(render_page(document, found)).one("section", id="layers").all("table")
    measures: list[Callable[[TapDifference], float | None]] = [
        lambda d: d.relative if d.tap.endswith(".output") else None,
        lambda d: d.of_tolerance,
    ]
    for table, measure in zip(tables, measures, strict=True):
        for layer, row in enumerate(table.one("tbody").all("tr")):
            inside = [d for d in found if d.layer == layer]
            there = [d for d in inside if (d.prompt, d.step) == FIRST[:2]]
            wanted = [f"{max(measure(d) or 0 for d in side):.3g}" for side in (inside, there)]
            assert [cell.text for cell in row.all("td")] == wanted


def test_the_chart_puts_larger_errors_higher_and_decades_apart_alike() -> None:
    found = [
        TapDifference(
            prompt=0, step=0, tap=f"layers.{i}.output", layer=i, kind="numeric",
            error=error, relative=error, of_tolerance=error,
        )
        for i, error in enumerate([0.0, 1e-6, 1e-5, 1e-4, math.inf])
    ]  # fmt: skip
    svg = parse(render_page(plain_document(), found)).one("section", id="layers").all("polyline")[0]
    ys = [float(point.split(",")[1]) for point in (svg.attributes["points"] or "").split()]
    assert ys == sorted(ys, reverse=True)
    assert ys[1] - ys[2] == pytest.approx(ys[2] - ys[3], abs=0.2)
    assert len(set(ys)) == 5


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "not finite"), (math.nan, "not finite"), (math.inf, "not finite"), (0.0, "0"),
        (12.0, "12"), (0.123456, "0.123"), (1234.5, "1.23e3"), (1.5e-5, "1.5e-5"), (-2.5, "-2.5"),
    ],
)  # fmt: skip
def test_number_has_three_digits(value: float | None, told: str) -> None:
    assert number(value) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "none"), (0.0, "0%"), (1.0, "100%"), (0.99999, ">99.99%"), (1e-6, "<0.01%"),
        (0.12345, "12.35%"), (math.nan, "not finite"),
    ],
)  # fmt: skip
def test_share_is_rounded_to_neither_none_nor_all(value: float | None, told: str) -> None:
    assert share(value) == told


def test_text_marks_the_first_word_that_differs() -> None:
    top = parse(render_page(*full_document()))
    assert [m.text for m in top.all("mark")] == ["an", "ested"]
    texts = [t.text for t in top.one("section", id="text").all("div", class_="text")]
    assert texts == ["the dog ran home", "the dog rested there"]


def test_hostile_text_stays_text() -> None:
    document, found = full_document()
    evil = (
        "</style><script>alert(1)</script>\"' onload=x <img src=//e.example>\x00\x1b\ud800 \u202e"
    )
    document |= {"command": evil, "reason": evil, "reference": evil, "candidate": evil}
    document["prompts"] = [{"ids": [1], "text": evil}]
    free = document["free_running"][0]
    free |= {"reference_text": evil + "a", "candidate_text": evil + "b"}
    document["missing_taps"] = {evil: [evil]}
    document["inside"]["reference"]["rung"] = evil
    for rung in document["rungs"].values():
        rung |= {"machine": {evil: evil}, "versions": {evil: evil}, "rung": evil}
    page = render_page(document, found)
    page.encode("utf-8")
    top = parse(page)
    assert not top.all("script")
    assert not top.all("img")
    assert len(top.all("style")) == 1
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)
    assert all(not name.startswith("on") for e in top.all() for name in e.attributes)
    assert html.escape("<script>alert(1)</script>") in page


def test_the_page_refers_to_nothing_outside_itself() -> None:
    page = render_page(*full_document())
    assert not re.search(r"https?:|//\w|url\(|@import|@font-face|src=|<link|<script", page)
    policy = next(
        m.attributes["content"] for m in parse(page).all("meta") if "http-equiv" in m.attributes
    )
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_environment_tells_where_the_rungs_differ() -> None:
    rows = parse(render_page(*full_document())).one("section", id="environment").all("tr")[1:]
    told = {tr.all("th")[0].text: [td.text for td in tr.all("td")] for tr in rows}
    assert told["rung"] == ["torch:fp32", "onnxruntime:int8", "≠"]
    assert told["machine: cores"] == ["2", "26", "≠"]
    assert told["machine: system"] == ["Linux", "none", "≠"]
    assert told["weights_sha256"] == ["ab" * 32, "ab" * 32, "="]


def test_a_look_inside_draws_shares_and_sorted_uses() -> None:
    top = parse(render_page(*full_document()))
    inside = top.one("section", id="inside")
    bars = [
        (float(r.attributes["x"] or 0), float(r.attributes["width"] or 0))
        for r in inside.one("svg", class_="bar").all("rect")
    ]
    assert bars == [(0, 64), (64, 32), (96, 16), (112, 16)]
    curve = (inside.one("polyline").attributes["points"] or "").split()
    heights = [36 * (1 - n / 10) for n in (10, 5, 3, 0)]
    assert [float(p.split(",")[1]) for p in curve] == pytest.approx(heights)
    assert "18 (2 left out, not finite)" in inside.text
    assert "Candidate" not in inside.text


@pytest.mark.parametrize("part", ["window", "experts"])
def test_a_look_inside_leaves_out_what_a_model_lacks(part: str) -> None:
    document, found = full_document()
    document["inside"]["reference"][part] = None
    inside = parse(render_page(document, found)).one("section", id="inside")
    left = {"window": "Experts", "experts": "Kept keys"}[part]
    assert inside.one("div", role="region").attributes["aria-label"] == f"{left} of torch:fp32"
    assert len(inside.all("ul")) == (part == "experts")
    document["inside"]["reference"] |= {"window": None, "experts": None}
    assert "inside" not in sections(render_page(document, found))


def test_a_window_that_no_query_outgrew_is_left_out() -> None:
    document, found = full_document()
    document["inside"]["reference"]["window"]["layers"][0]["heads"] = [head(queries=0)]
    inside = parse(render_page(document, found)).one("section", id="inside")
    assert inside.one("div", role="region").attributes["aria-label"] == "Experts of torch:fp32"


def test_equal_documents_give_equal_pages() -> None:
    assert render_page(*full_document()) == render_page(*full_document())


def test_a_large_comparison_stays_under_two_megabytes() -> None:
    found = [
        dataclasses.replace(d, tap=d.tap.replace(f"layers.{d.layer}.", f"layers.{i}."), layer=i)
        for d in made_differences(steps=200)
        if d.layer == 1
        for i in range(30)
    ]
    page = render_page(plain_document(steps=200, taps=summary(found)), found)
    assert len(page.encode()) < 2_000_000


def test_a_page_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.html"
    write_page(target, plain_document(reason="the first"), [])
    old = target.read_bytes()
    broken = plain_document()
    del broken["logits"]
    with pytest.raises(Exception, match="logits"):
        write_page(target, broken, [])

    def fill_the_disk(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page_module.Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        write_page(target, plain_document(reason="the second"), [])
    assert target.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_written_page_is_the_rendered_one(tmp_path: Path) -> None:
    write_page(tmp_path / "a.html", *full_document())
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == render_page(*full_document())
