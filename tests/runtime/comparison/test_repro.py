"""A failed comparison as a folder: small, alone, and right about what differs."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from runtime.comparison.record import Run
from runtime.comparison.repro import Side, write_repro
from tests.runtime.comparison.planted_faults import (
    PROMPTS,
)
from tests.runtime.comparison.repro_models import (
    CASES,
    FORMS,
    TOLERANCE,
    Model,
    compare,
    replace_weight,
    run_command,
    scale_from_slot,
    spoilt_sides,
    write,
)

pytestmark = pytest.mark.slow


# Part of a weight's name in the canonical and in the lowered model, and the taps that may part.
PARTS = {
    "attention": ("o_proj", "o_proj", ("attention_output",)),
    "feed-forward": ("down_proj", "down_proj", ("mlp_output",)),
    "query": ("q_proj.weight", "q_proj.weight", ("query", "attention_output")),
    "key": ("k_proj.weight", "k_proj.weight", ("key",)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", PARTS)
def test_the_folder_shows_a_spoilt_weight_anywhere_and_agrees_once_it_is_mended(
    model_of: Callable[[str, str], Model],
    reference_of: Callable[[str], Run],
    tmp_path: Path,
    case: str,
    form: str,
    part: str,
) -> None:
    model = model_of(case, form)
    layer = int(np.random.default_rng([*map(ord, case + form + part)]).integers(0, 3))
    name = model.weight_of(layer, PARTS[part][FORMS.index(form)])

    def change(weight: np.ndarray) -> None:
        columns = weight if part != "key" or form == "canonical" else weight[:, 64:]
        columns[1, 1] += 0.5

    sides = model.sides(model.spoil(tmp_path, name, change), reference_of(case))
    report, written = write(tmp_path / "made" / "repro", model, sides)
    assert report.first is not None
    assert report.first.tap in {f"layers.{layer}.{tap}" for tap in PARTS[part][2]}
    assert (written.tap, written.differs) == (report.first.tap, True)
    assert written.size == "from the nearest named values"
    assert not list((tmp_path / "made").glob(".repro-*"))

    folder = tmp_path / "moved"
    shutil.move(tmp_path / "made" / "repro", folder)
    piece = onnx.load(folder / "model.onnx")
    stored = {w.name for w in piece.graph.initializer}
    assert name in stored
    assert len(piece.graph.node) < len(onnx.load(model.path).graph.node) / 3
    others = {f".layers.{other}." for other in range(3) if other != layer}
    assert not [n for n in stored if any(other in f".{n}" for other in others)]
    assert not stored & {"model.embed_tokens.weight", "model.word_embed.weight"}

    told = run_command(folder)
    assert (told.returncode, told.stderr) == (3, "")
    assert told.stdout.startswith(f"differs: {report.first.tap}")
    assert "error" in told.stdout
    assert "tolerance" in told.stdout
    replace_weight(piece, name, model.weights[name])
    onnx.save(piece, folder / "model.onnx")
    told = run_command(folder)
    assert (told.returncode, told.stderr) == (0, ""), told.stdout
    assert told.stdout.startswith("agrees")


@pytest.mark.parametrize("case", ["g3_moe", "g4_window", "g1"])
@pytest.mark.parametrize("form", FORMS)
def test_a_fault_of_a_later_step_is_shown_with_the_cache_of_that_step(
    model_of: Callable[[str, str], Model],
    reference_of: Callable[[str], Run],
    tmp_path: Path,
    case: str,
    form: str,
) -> None:
    model = model_of(case, form)
    places = {
        "canonical": ("present.1.value", "DynamicMaskAttention", "layers.1.attention_output"),
        "lowered": ("past_key_values.1.value", "GroupQueryAttention", "layers.1.cached_value"),
    }
    value, consumer, tap = places[form]
    slot = len(PROMPTS[0]) + 2
    spoilt = scale_from_slot(model.path, tmp_path / "spoilt.onnx", value, consumer, slot)
    sides = model.sides(spoilt, reference_of(case))
    _, written = write(tmp_path / "repro", model, sides)
    assert (written.tap, written.step, written.differs) == (tap, 3, True)
    assert written.size == "from the nearest named values"
    told = run_command(tmp_path / "repro")
    assert told.returncode == 3, told.stderr
    with np.load(tmp_path / "repro" / "inputs.npz") as inputs:
        past = inputs["past_key_values.1.value"]
        assert past[0, :, slot - 1].any(), "the slots before the step are filled"
        assert not past[0, :, slot:].any()
        assert inputs["write_index"].tolist() == [slot]
        given = "layers.1.query" if form == "canonical" else "layers.1.attention_norm"
        recorded = sides[0].run.prompts[0].values[3][given]
        np.testing.assert_array_equal(inputs[given][0], recorded, "what the reference recorded")
    mended = onnx.load(tmp_path / "repro" / "model.onnx")
    replace_weight(mended, "planted.half", np.array(0, np.float32))
    onnx.save(mended, tmp_path / "repro" / "model.onnx")
    assert run_command(tmp_path / "repro").returncode == 0


@pytest.mark.parametrize(
    ("case", "part", "taps", "tap"),
    [
        ("g3_moe", "router_gate", "experts,mlp_norm", "layers.1.experts"),
        ("g1", "router_gate", "experts", "layers.1.experts"),
        ("g4_window", "dt_proj", "kept_keys,score,attention_norm", "layers.1.kept_keys"),
    ],
)
def test_another_choice_is_shown_by_the_scores_that_make_it(
    model_of: Callable[[str, str], Model],
    reference_of: Callable[[str], Run],
    tmp_path: Path,
    case: str,
    part: str,
    taps: str,
    tap: str,
) -> None:
    model = model_of(case, "canonical")
    name = model.weight_of(1, part)

    def change(weight: np.ndarray) -> None:
        weight[:] = weight[::-1].copy()

    spoilt = model.spoil(tmp_path, name, change)
    reference, candidate = model.sides(spoilt, reference_of(case))
    wanted = set(taps.split(","))
    kept = {*wanted, *(k for k in ("score", "router_scores"))}

    def only(side: Side) -> Side:
        prompts = tuple(
            dataclasses.replace(
                p,
                values=tuple(
                    {n: v for n, v in step.items() if n.rpartition(".")[2] in kept}
                    | {"logits": step["logits"]}
                    for step in p.values
                ),
            )
            for p in side.run.prompts
        )
        names = tuple(t for t in side.run.taps if t.rpartition(".")[2] in wanted - {"score"})
        return dataclasses.replace(
            side, run=dataclasses.replace(side.run, taps=names, prompts=prompts)
        )

    report, written = write(tmp_path / "repro", model, (only(reference), only(candidate)))
    assert report.first is not None
    assert (report.first.kind, written.tap, written.differs) == ("discrete", tap, True)
    assert report.first.tap == tap
    assert written.size == "from the nearest named values"

    # Without this project: run.py finds the rules of choices in its own folder.
    hidden = "import sys, runpy; sys.modules.update(runtime=None, model=None, plugins=None); "
    told = subprocess.run(
        [sys.executable, "-I", "-c", hidden + "runpy.run_path('run.py', run_name='__main__')"],
        cwd=tmp_path / "repro",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (told.returncode, told.stderr) == (3, "")
    assert f"choices ({tap.rpartition('.')[2]}) differ" in told.stdout
    mended = onnx.load(tmp_path / "repro" / "model.onnx")
    replace_weight(mended, name, model.weights[name])
    onnx.save(mended, tmp_path / "repro" / "model.onnx")
    assert run_command(tmp_path / "repro").returncode == 0


def test_numbers_that_are_not_finite_are_shown_where_they_begin(
    model_of: Callable[[str, str], Model], reference_of: Callable[[str], Run], tmp_path: Path
) -> None:
    model = model_of("g4h_window", "lowered")
    name, sides = spoilt_sides(
        model, reference_of("g4h_window"), tmp_path, 1, "o_proj", float("inf")
    )
    report, written = write(tmp_path / "repro", model, sides)
    assert report.first is not None
    assert report.first.kind == "not finite"
    assert (written.tap, written.differs) == ("layers.1.attention_output", True)
    told = run_command(tmp_path / "repro")
    assert told.returncode == 3
    assert "actual numbers are not finite" in told.stdout
    mended = onnx.load(tmp_path / "repro" / "model.onnx")
    replace_weight(mended, name, model.weights[name])
    onnx.save(mended, tmp_path / "repro" / "model.onnx")
    assert run_command(tmp_path / "repro").returncode == 0


@pytest.mark.parametrize(
    ("form", "part", "tap", "size"),
    [
        ("canonical", "post_attention_layernorm", "layers.1.mlp_output", "from named values furth"),
        ("canonical", "q_proj", "layers.1.output", "from named values further up"),
        ("canonical", "q_proj", "layers.2.output", "from the model's own inputs"),
        # One node gives what stands in front of this layer and the fault's own value.
        ("lowered", "input_layernorm", "layers.1.attention_residual", "the whole layer"),
    ],
)
def test_a_piece_that_agrees_alone_grows_until_it_holds_the_cause(
    model_of: Callable[[str, str], Model],
    reference_of: Callable[[str], Run],
    tmp_path: Path,
    form: str,
    part: str,
    tap: str,
    size: str,
) -> None:
    model = model_of("g4_window", form)
    name, sides = spoilt_sides(model, reference_of("g4_window"), tmp_path, 1, part)
    report = compare(model, sides)
    assert report.first is not None
    later = dataclasses.replace(report.first, tap=tap, layer=int(tap[7]))
    report = dataclasses.replace(report, first=later)
    written = write_repro(tmp_path / "repro", report, *sides, tolerance=TOLERANCE)
    assert (written.differs, written.tap) == (True, tap)
    assert (written.size or "").startswith(size)
    piece = onnx.load(tmp_path / "repro" / "model.onnx")
    assert name in {w.name for w in piece.graph.initializer}
    assert run_command(tmp_path / "repro").returncode == 3


def test_a_difference_that_no_piece_shows_is_said_to_be_none_of_the_graphs(
    model_of: Callable[[str, str], Model], reference_of: Callable[[str], Run], tmp_path: Path
) -> None:
    model = model_of("g4_window", "canonical")
    _, spoilt = spoilt_sides(model, reference_of("g4_window"), tmp_path, 1, "q_proj")
    report = compare(model, spoilt)
    sides = model.sides(model.path, reference_of("g4_window"))
    written = write_repro(tmp_path / "repro", report, *sides, tolerance=TOLERANCE)
    assert (written.differs, written.size) == (
        False, "from the model's own inputs, the whole step up to it"
    )  # fmt: skip
    assert "does NOT differ" in written.sentence
    assert "Even this, the largest piece, agrees" in (tmp_path / "repro/README.md").read_text()
    assert run_command(tmp_path / "repro").returncode == 0


def test_a_near_tie_in_front_does_not_hide_the_fault(
    model_of: Callable[[str, str], Model], reference_of: Callable[[str], Run], tmp_path: Path
) -> None:
    model = model_of("g3_moe", "lowered")
    _, sides = spoilt_sides(model, reference_of("g3_moe"), tmp_path, 2, "o_proj")
    report = compare(model, sides)
    assert report.first is not None
    tie = dataclasses.replace(
        report.first, tap="layers.0.experts", layer=0, kind="discrete", error=1, of_tolerance=0.5
    )
    assert tie.near_tie
    report = dataclasses.replace(report, first=tie)
    written = write_repro(tmp_path / "repro", report, *sides, tolerance=TOLERANCE)
    assert (written.tap, written.differs) == ("layers.2.attention_output", True)


def test_a_node_that_gives_two_named_values_is_cut_in_front_of_both(
    model_of: Callable[[str, str], Model], reference_of: Callable[[str], Run], tmp_path: Path
) -> None:
    model = model_of("g4_window", "lowered")  # one node adds the residual and norms the sum
    layer_norm = "post_attention_layernorm"
    _, sides = spoilt_sides(model, reference_of("g4_window"), tmp_path, 1, layer_norm)
    _, written = write(tmp_path / "repro", model, sides)
    assert (written.tap, written.differs, written.nodes) == ("layers.1.mlp_norm", True, 2)
    piece = onnx.load(tmp_path / "repro" / "model.onnx")
    inputs = [value.name for value in piece.graph.input]
    assert sorted(inputs) == ["layers.0.output", "layers.1.attention_output"]
    assert run_command(tmp_path / "repro").returncode == 3
