"""Folders of other rungs than an ONNX candidate, and everything in a folder beside the piece."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from runtime.backends.base import Backend, BackendUnavailableError
from runtime.comparison.record import Run
from runtime.comparison.repro import Side, write_repro
from runtime.comparison.repro.cut import InputSpec
from runtime.comparison.repro.values import fit
from tests.runtime.comparison.planted_faults import (
    PROMPTS,
    run_torch,
    with_precision,
)
from tests.runtime.comparison.repro_models import (
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


def test_without_the_reference_the_candidates_cache_is_taken_and_the_readme_says_so(
    model_of: Callable[[str, str], Model], reference_of: Callable[[str], Run], tmp_path: Path
) -> None:
    model = model_of("g4_window", "canonical")
    spoilt = scale_from_slot(
        model.path, tmp_path / "spoilt.onnx", "present.1.value", "DynamicMaskAttention", 14
    )
    reference, candidate = model.sides(spoilt, reference_of("g4_window"))

    def refuse() -> Backend:
        raise BackendUnavailableError("no such GPU")

    for number, opened in enumerate((None, refuse)):
        folder = tmp_path / f"repro{number}"
        sides = (dataclasses.replace(reference, open=opened), candidate)
        _, written = write(folder, model, sides)
        assert written.differs
        readme = (folder / "README.md").read_text()
        why = "no such GPU" if opened else "its run was made elsewhere"
        assert f"The reference could not be run again for its cache: {why}." in readme
        assert "of the candidate, run again to this step: `past_key_values.1.key`" in readme
        assert run_command(folder).returncode == 3


def test_of_a_candidate_without_a_graph_the_references_piece_is_cut(
    model_of: Callable[[str, str], Model], reference_of: Callable[[str], Run], tmp_path: Path
) -> None:
    from model.checkpoint import load_checkpoint

    model = model_of("g4_window", "lowered")
    _, clean = model.sides(model.path, reference_of("g4_window"))
    network = load_checkpoint(model.case.folder)
    network.model.layers[1].mlp.down_proj.weight.data.view(-1)[1] += 0.5
    candidate = Side(run=run_torch(network, "torch:faulty", clean.run))
    _, written = write(tmp_path / "repro", model, (clean, candidate))
    assert (written.tap, written.differs) == ("layers.1.mlp_output", True)
    folder = tmp_path / "repro"
    assert "The model is that of the reference" in (folder / "README.md").read_text()
    assert run_command(folder).returncode == 3
    shutil.copyfile(folder / "reference.npz", folder / "candidate.npz")
    assert run_command(folder).returncode == 0


def test_of_two_rungs_without_a_graph_the_numbers_and_the_command_are_written(
    model_of: Callable[[str, str], Model], reference_of: Callable[[str], Run], tmp_path: Path
) -> None:
    from model.checkpoint import load_checkpoint

    model = model_of("g4_window", "canonical")
    reference = reference_of("g4_window")
    network = load_checkpoint(model.case.folder)
    network.model.layers[1].mlp.down_proj.weight.data.view(-1)[1] += 0.5
    candidate = run_torch(network, "torch:faulty", reference)
    _, written = write(tmp_path / "repro", model, (Side(run=reference), Side(run=candidate)))
    assert (written.differs, written.size, written.nodes) == (None, None, 0)
    ids = ",".join(map(str, PROMPTS[0]))
    assert (
        "python runtime/compare.py BUNDLE --reference torch:fp32 --candidate torch:faulty "
        f"--prompt-ids {ids} --steps 0 --taps layers.1.mlp_output"
    ) in (tmp_path / "repro" / "README.md").read_text()
    found = [np.load(tmp_path / "repro" / f"{n}.npz") for n in ("reference", "candidate")]
    a, b = (arrays["layers.1.mlp_output"] for arrays in found)
    assert np.abs(a - b).max() > 0.01


def test_untapped_logits_that_alone_are_over_tolerance_give_the_whole_step(
    model_of: Callable[[str, str], Model], reference_of: Callable[[str], Run], tmp_path: Path
) -> None:
    model = model_of("g4_window", "lowered")
    _, sides = spoilt_sides(model, reference_of("g4_window"), tmp_path, 1, "o_proj")
    bare = tuple(
        dataclasses.replace(
            side,
            run=dataclasses.replace(
                side.run,
                taps=(),
                prompts=tuple(dataclasses.replace(p, values=()) for p in side.run.prompts),
            ),
        )
        for side in sides
    )
    report, written = write(tmp_path / "repro", model, (bare[0], bare[1]))
    assert report.first is None
    assert (written.tap, written.differs) == ("logits", True)
    assert (written.size or "").startswith("from the model's own inputs")
    told = run_command(tmp_path / "repro")
    assert (told.returncode, "atol 0.001 + rtol 0.0001" in told.stdout) == (3, True)


def test_of_a_prompt_in_several_passes_the_one_that_parts_is_shown(
    model_of: Callable[[str, str], Model],
    reference_of: Callable[[str], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("g4_window", "canonical")
    limits = dataclasses.replace(model.case.limits, max_input_len=5)
    monkeypatch.setattr(model.case, "limits", limits)
    spoilt = scale_from_slot(
        model.path, tmp_path / "spoilt.onnx", "present.1.value", "DynamicMaskAttention", 5
    )
    sides = model.sides(spoilt, reference_of("g4_window"))
    _, written = write(tmp_path / "repro", model, sides)
    assert (written.tap, written.step) == ("layers.1.attention_output", 0)
    with np.load(tmp_path / "repro" / "inputs.npz") as inputs:
        assert inputs["write_index"].tolist() == [5]
        assert inputs["layers.1.query"].shape[2] == 5
    assert run_command(tmp_path / "repro").returncode == 3


def test_large_weights_stand_beside_the_model_and_move_with_it(
    model_of: Callable[[str, str], Model],
    reference_of: Callable[[str], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime.comparison.repro.cut._INSIDE", 0)
    model = model_of("g3_moe", "canonical")
    _, sides = spoilt_sides(model, reference_of("g3_moe"), tmp_path, 1, "down_proj")
    write(tmp_path / "repro", model, sides)
    shutil.move(tmp_path / "repro", tmp_path / "moved")
    assert (tmp_path / "moved" / "model.onnx.data").stat().st_size > 64 * 96 * 4
    assert run_command(tmp_path / "moved").returncode == 3


def test_nothing_in_the_folder_names_a_path_of_this_machine(
    model_of: Callable[[str, str], Model], reference_of: Callable[[str], Run], tmp_path: Path
) -> None:
    model = model_of("g3_moe", "canonical")
    _, sides = spoilt_sides(model, reference_of("g3_moe"), tmp_path, 1, "down_proj")
    write(tmp_path / "repro", model, sides)
    needles = [os.fsencode(p) for p in (tmp_path, Path.cwd(), Path.home(), sys.prefix)]
    for file in (tmp_path / "repro").iterdir():
        content = file.read_bytes()
        assert not [needle for needle in needles if needle in content], file.name
    versions = json.loads((tmp_path / "repro" / "versions.json").read_text())
    assert versions["weights_sha256"] == "0" * 64
    assert versions["candidate"]["rung"] == "onnxruntime:canonical"
    assert versions["written_with"]["onnxruntime"]


def test_polygraphys_command_fails_where_ours_does(
    model_of: Callable[[str, str], Model], reference_of: Callable[[str], Run], tmp_path: Path
) -> None:
    pytest.importorskip("polygraphy")
    model = model_of("g4h_window", "canonical")
    name, sides = spoilt_sides(model, reference_of("g4h_window"), tmp_path, 1, "o_proj")
    write(tmp_path / "repro", model, sides)
    readme = (tmp_path / "repro" / "README.md").read_text().splitlines()
    (command,) = (line for line in readme if line.startswith("polygraphy run"))
    tool = [sys.executable, str(Path(sys.executable).parent / "polygraphy")]

    def exit_status() -> int:
        words = [*tool, *command.split()[1:]]
        done = subprocess.run(words, cwd=tmp_path / "repro", capture_output=True, check=False)
        return done.returncode

    assert exit_status() != 0
    mended = onnx.load(tmp_path / "repro" / "model.onnx")
    replace_weight(mended, name, model.weights[name])
    onnx.save(mended, tmp_path / "repro" / "model.onnx")
    assert exit_status() == 0


def test_narrow_weights_are_cut_with_the_operators_of_onnx_runtime(
    model_of: Callable[[str, str], Model], reference_of: Callable[[str], Run], tmp_path: Path
) -> None:
    model = model_of("g4_window", "int8")
    reference, candidate = model.sides(model.path, reference_of("g4_window"))
    # Judged as if it were float32, the rounding of 8 bits is over tolerance.
    report, written = write(tmp_path / "repro", model, (reference, candidate))
    assert report.first is not None
    assert (written.tap, written.differs) == (report.first.tap, True)
    assert run_command(tmp_path / "repro").returncode == 3
    narrow = dataclasses.replace(candidate, run=with_precision(candidate.run, "int8"))
    assert compare(model, (reference, narrow)).logits.verdict == "fail"


def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    model_of: Callable[[str, str], Model],
    reference_of: Callable[[str], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("g4_window", "canonical")
    _, sides = spoilt_sides(model, reference_of("g4_window"), tmp_path, 1, "o_proj")
    report = compare(model, sides)
    folder = tmp_path / "out" / "repro"
    folder.mkdir(parents=True)
    passed = dataclasses.replace(report, verdict="pass")
    with pytest.raises(ValueError, match="nothing to reproduce"):
        write_repro(folder, passed, *sides, tolerance=TOLERANCE)

    def missing(name: str) -> None:
        return None

    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", missing)
        with pytest.raises(BackendUnavailableError, match=r"onnx_ir; run: pip install"):
            write_repro(folder, report, *sides, tolerance=TOLERANCE)
    assert [p.name for p in folder.parent.iterdir()] == ["repro"]
    write_repro(folder, report, *sides, tolerance=TOLERANCE)  # an empty folder is taken
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(FileExistsError, match="is there and not empty"):
        write_repro(folder, report, *sides, tolerance=TOLERANCE)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="name a new one"):
        write_repro(tmp_path / "file", report, *sides, tolerance=TOLERANCE)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_values_are_fitted_to_the_heads_slots_and_types_of_a_model() -> None:
    scores = np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1)
    spec = InputSpec(name="past_key_values.0.score", dtype="float32", shape=(None, 4, 5, 1))
    wide = fit(scores, spec)
    assert wide is not None
    assert wide[0, :, :, 0].tolist() == [
        [0, 1, 2, 0, 0], [0, 1, 2, 0, 0], [3, 4, 5, 0, 0], [3, 4, 5, 0, 0]
    ]  # fmt: skip
    back = fit(wide, dataclasses.replace(spec, shape=(None, 2, 3, 1)))
    np.testing.assert_array_equal(back, scores)
    assert fit(scores, dataclasses.replace(spec, dtype="int8")) is None, "other scales"
    assert fit(scores, dataclasses.replace(spec, shape=(None, 4, 5, 2))) is None
    assert fit(scores, dataclasses.replace(spec, shape=(None, 3, 5, 1))) is None
