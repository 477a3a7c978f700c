"""Pieces of a model from the smallest to the whole step, tried until one shows the difference."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import runtime.comparison.choices
from model.config import DogeConfig
from model.generations import GENERATIONS, generation_named
from runtime.backends.base import Backend, BackendUnavailableError
from runtime.comparison.repro import run_piece
from runtime.comparison.repro.cut import Graph, Piece
from runtime.comparison.repro.replay import Caches, Pass, Side, caches_before, passes_of
from runtime.comparison.repro.run_piece import Judgement
from runtime.comparison.repro.target import Target
from runtime.comparison.repro.values import Fed, Moment, NoValueError, feed, past_of
from runtime.comparison.taps import CHOICES, LOGITS, TapName, comparison_taps

Array = npt.NDArray[Any]
SIDES = ("reference", "candidate")
NEAREST = "from the nearest named values"
FURTHER = "from named values further up in the layer"
WHOLE_LAYER = "the whole layer up to it"
WHOLE_STEP = "from the model's own inputs, the whole step up to it"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A piece that was written and run.

    Attributes:
        target: what it was to show.
        size: how much of the model it is, in words.
        piece: the cut model.
        fed: its inputs.
        check: the rule, as check.json has it.
        given: what each side gave for its output; no entry where that was not recorded.
        judgement: what came out.
        notes: what the reader must know besides.
    """

    target: Target
    size: str
    piece: Piece
    fed: Fed
    check: dict[str, Any]
    given: dict[str, Array]
    judgement: Judgement
    notes: tuple[str, ...] = ()


def find_piece(
    folder: Path, targets: Sequence[Target], sides: tuple[Side, Side], cut: int, config: DogeConfig
) -> Attempt:
    """Write the smallest piece that differs into `folder`; the last one tried if none does.

    Args:
        folder: gets the model and its inputs.
        targets: what to show, the best first.
        sides: reference and candidate.
        cut: which of them has the model that is cut.
        config: the architecture.

    Raises:
        BackendUnavailableError: a package is missing.
        ValueError: values that a piece needs were not recorded, or onnxruntime refuses a piece.
    """
    model = sides[cut].model
    if model is None:
        raise AssertionError("the side that is cut has a model")
    graph = Graph(model)
    last: Attempt | None = None
    reasons: list[str] = []
    for target in targets:
        moments, notes = _moments(target, sides, cut)
        for size, piece in _sizes(graph, target, sides, config):
            for moment in moments:
                try:
                    last = _try(folder, target, (size, piece), moment, graph, cut, config)
                except NoValueError as error:
                    reasons.append(str(error))
                    continue
                last = replace(last, notes=notes)
                if last.judgement.differs:
                    return last
    if last is None:
        raise ValueError(f"no piece can be written: {'; '.join(dict.fromkeys(reasons))}")
    return last


def _sizes(
    graph: Graph, target: Target, sides: tuple[Side, Side], config: DogeConfig
) -> Iterator[tuple[str, Piece]]:
    """Pieces that compute a target, each from values further up than the one before."""
    output, layer = target.output(graph), target.tap.layer
    stops = _named_before(target, sides, config)
    further = False
    while True:
        piece = graph.cut(output, stops)
        frontier = [spec.name for spec in piece.inputs if spec.name in stops]
        here = {name for name in frontier if TapName.parse(name).layer == layer}
        size = (FURTHER if here else WHOLE_LAYER) if further else NEAREST
        yield size if frontier else WHOLE_STEP, piece
        if not frontier or target.nearest_only:
            return
        stops = [name for name in stops if name not in here] if here else []
        further = True


def _named_before(target: Target, sides: tuple[Side, Side], config: DogeConfig) -> list[str]:
    """Names of the values in front of a target that both runs recorded, as computed."""
    subject, found, layer = sides[0].run.subject, target.found, target.tap.layer
    values = [side.run.prompts[found.prompt].values for side in sides]
    if not all(values):
        return []
    taps = comparison_taps(
        config,
        generation_named(subject.generation, GENERATIONS),
        selects=subject.max_seq_len > config.keep_window_size,
    )
    names = [tap.name for tap in taps]
    source = CHOICES.get(target.tap.kind)  # what makes a choice is to be computed, not given
    before = [n for n in names[: names.index(target.tap.name)] if not _is(n, layer, source)]
    return [
        name
        for name in before
        if name != LOGITS and all(name in steps[found.step] for steps in values)
    ]


def _is(name: str, layer: int | None, kind: str | None) -> bool:
    tap = TapName.parse(name)
    return (tap.layer, tap.kind) == (layer, kind)


def _moments(
    target: Target, sides: tuple[Side, Side], cut: int
) -> tuple[list[Moment], tuple[str, ...]]:
    """The passes of the step that parts, with the caches before them, and what could not be had."""
    found = target.found
    prompts = (sides[0].run.prompts[found.prompt], sides[1].run.prompts[found.prompt])
    passes: tuple[Pass, ...] = ()
    caches: dict[int, list[Caches]] = {}
    notes = []
    for side in (cut, 1 - cut):  # the passes are those of the model that is cut
        try:
            with closing(_open(sides[side])) as backend:
                passes = passes or passes_of(prompts[side], found.step, backend)
                caches[side] = caches_before(backend, prompts[side], found.step, passes)
        except BackendUnavailableError as error:
            if side == cut:
                raise
            caches[side] = [{} for _ in passes]
            notes.append(f"The {SIDES[side]} could not be run again for its cache: {error}.")
    moments = [
        Moment(runs=prompts, step=found.step, at=one, caches=(caches[0][i], caches[1][i]))
        for i, one in enumerate(passes)
        if one.last or target.tap.layer is not None or target.tap.kind == "embedding"
    ]
    return moments, tuple(notes)


def _open(side: Side) -> Backend:
    if side.open is None:
        raise BackendUnavailableError("its run was made elsewhere")
    return side.open()


def _try(
    folder: Path,
    target: Target,
    sized: tuple[str, Piece],
    moment: Moment,
    graph: Graph,
    cut: int,
    config: DogeConfig,
) -> Attempt:
    """Write a piece with its inputs and run it."""
    size, piece = sized
    output = target.output(graph)
    spec = graph.spec(past_of(output) if output.startswith("present.") else output)
    fed = feed(piece.inputs, moment)
    compared = 1 - cut  # a candidate's piece must give the reference's numbers, and the reverse
    given = {SIDES[compared]: target.expected(output, spec, moment, compared)}
    with suppress(NoValueError):  # it is there for the reader alone
        given[SIDES[cut]] = target.expected(output, spec, moment, cut)
    check = target.check(output, moment, config) | {"expected": f"{SIDES[compared]}.npz"}
    for old in folder.iterdir():
        old.unlink()
    piece.save(folder / "model.onnx")
    shutil.copyfile(str(runtime.comparison.choices.__file__), folder / "choices.py")
    np.savez(folder / "inputs.npz", allow_pickle=False, **fed.arrays)
    try:
        actual = run_piece.run_model(folder, check)
    except Exception as error:  # onnxruntime raises classes of its own that share no base
        raise ValueError(
            f"the piece of {graph.path.name} that computes {output} cannot be run: {error}"
        ) from error
    judgement = run_piece.judge(check, given[SIDES[compared]], actual, folder / "choices.py")
    return Attempt(
        target=target,
        size=size,
        piece=piece,
        fed=fed,
        check=check,
        given=given,
        judgement=judgement,
    )
