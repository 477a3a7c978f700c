"""A fault planted at a random place of an ONNX model is named with its layer, tap, kind and step.

Three generations, dense and mixtures, as exported and as lowered for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime.comparison.run_report import RunReport
from runtime.comparison.taps import CACHED, TapName
from tests.runtime.comparison.planted_onnx_faults import (
    FORMS,
    STEPS,
    FaultyCase,
    Form,
    drop_bias,
    drop_norm,
    nudge,
    overflow,
    permute_router,
    perturb,
    roll_experts,
    shift_positions,
    spoil_slot,
)

DENSE, MOE = ("g3", "g4h_window", "g4_window"), ("g1", "g3_moe", "g4_moe")
LAYERS = 3
Cases = Callable[[str], FaultyCase]
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("form", FORMS)]


@pytest.fixture(scope="module")
def cases(golden: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Cases:
    made: dict[str, FaultyCase] = {}

    def get(name: str) -> FaultyCase:
        if name not in made:
            made[name] = FaultyCase(golden(name), tmp_path_factory.mktemp(name))
        return made[name]

    return get


def expect(
    report: RunReport, tap: str, kind: str, *, step: int = 0, prompt: int | None = None
) -> None:
    first = report.first
    assert first is not None, report.reason
    assert (first.tap, first.kind, first.step) == (tap, kind, step), report.reason
    assert prompt is None or first.prompt == prompt
    layer = first.layer
    if layer is not None and report.growth:
        assert all(error is not None and error < 2e-4 for error in report.growth[:layer])


@pytest.mark.parametrize("case", [*DENSE, *MOE])
def test_the_model_without_a_fault_is_clean(cases: Cases, case: str, form: Form) -> None:
    report = cases(case).compare(form)
    assert (report.verdict, report.first) == ("pass", None), report.reason


@pytest.mark.parametrize("case", [*DENSE, *MOE])
@pytest.mark.parametrize("share", [0.5, 0.01])
@pytest.mark.parametrize("number", range(2))
def test_one_element_of_one_tensor_is_named_by_the_tap_behind_it(
    cases: Cases, case: str, form: Form, share: float, number: int
) -> None:
    subject = cases(case)
    place = subject.random_place(form, subject.random(form, str(share), str(number)))
    expect(subject.compare(form, perturb(place, share)), place.tap, "numeric")


@pytest.mark.parametrize("case", [*DENSE, *MOE])
def test_a_dropped_mask_bias_is_named_by_its_layers_attention(
    cases: Cases, case: str, form: Form
) -> None:
    subject = cases(case)
    layer = int(subject.random(form, "bias").integers(0, LAYERS))
    expect(subject.compare(form, drop_bias(layer)), f"layers.{layer}.attention_output", "numeric")


@pytest.mark.parametrize("case", MOE)
def test_shifted_experts_are_named_by_their_output_with_equal_choices(
    cases: Cases, case: str, form: Form
) -> None:
    subject = cases(case)
    layer = int(subject.random(form, "experts").integers(0, LAYERS))
    report = subject.compare(form, roll_experts(layer))
    expect(report, f"layers.{layer}.expert_output", "numeric")
    (choice,) = (tap for tap in report.taps if tap.worst.tap == f"layers.{layer}.experts")
    assert choice.parting == 0 or layer > 0  # what the first layer picks rests on no experts


@pytest.mark.parametrize("case", MOE)
def test_a_permuted_router_is_named_by_its_scores_and_parts_the_choice(
    cases: Cases, case: str, form: Form
) -> None:
    subject = cases(case)
    layer = int(subject.random(form, "router").integers(0, LAYERS))
    report = subject.compare(form, permute_router(layer))
    expect(report, f"layers.{layer}.router_scores", "numeric")
    (choice,) = (tap for tap in report.taps if tap.worst.tap == f"layers.{layer}.experts")
    assert choice.parting == choice.compared
    assert choice.near_ties < choice.parting


@pytest.mark.parametrize("case", [*DENSE, *MOE])
@pytest.mark.parametrize("number", range(2))
def test_overflow_of_half_precision_is_named_where_it_begins(
    cases: Cases, case: str, form: Form, number: int
) -> None:
    subject = cases(case)
    random = subject.random(form, "overflow", str(number))
    layer = random.integers(0, LAYERS)
    given = [name for name in subject.clean[form].taps if name.startswith(f"layers.{layer}.")]
    tap = str(random.choice(given))
    largest = float(np.abs(subject.prefill[tap]).max())
    report = subject.compare(form, overflow(tap, largest))
    expect(report, tap, "not finite", prompt=0)
    assert report.first is not None
    assert report.first.where == (f"onnxruntime:{form}",)


@pytest.mark.parametrize("case", [*DENSE, *MOE])
@pytest.mark.parametrize("kind", CACHED)
def test_an_overwritten_cache_slot_is_named_with_its_step(
    cases: Cases, case: str, form: Form, kind: str
) -> None:
    subject = cases(case)
    random = subject.random(form, kind)
    tap = TapName.parse(f"layers.{random.integers(0, LAYERS)}.{kind}")
    if tap not in subject.taps:
        assert case == "g1"  # which caches no scores
        return
    at = int(random.integers(1, STEPS + 1))
    slot = int(random.integers(0, 12))
    report = subject.compare(form, before_step=spoil_slot(tap, at, slot))
    expect(report, tap.name, "numeric", step=at, prompt=0)


@pytest.mark.parametrize("case", [*DENSE, *MOE])
def test_rotation_by_another_position_is_named_by_the_first_rotated_tap(
    cases: Cases, case: str, form: Form
) -> None:
    subject = cases(case)
    layer = int(subject.random(form, "rotation").integers(0, LAYERS))
    report = subject.compare(form, shift_positions(layer))
    first = "query" if form == "canonical" else "key"
    if case == "g1" and form == "lowered":  # its keys are not rotated
        first = "attention_output"
    expect(report, f"layers.{layer}.{first}", "numeric")


@pytest.mark.parametrize("case", [*DENSE, *MOE])
@pytest.mark.parametrize("norm", ["attention_norm", "mlp_norm", "query", "key", "final_norm"])
def test_a_dropped_norm_weight_is_named_by_what_it_weighs(
    cases: Cases, case: str, form: Form, norm: str
) -> None:
    subject = cases(case)
    layer = int(subject.random(form, norm).integers(0, LAYERS))
    tap = norm if norm == "final_norm" else f"layers.{layer}.{norm}"
    tensor = {
        "attention_norm": ("pre_layernorm", "input_layernorm", "in_attn_layernorm"),
        "mlp_norm": ("post_layernorm", "post_attention_layernorm", "in_ff_layernorm"),
        "query": ("q_norm",),
        "key": ("k_norm",),
        "final_norm": ("model.final_layernorm", "model.norm"),
    }[norm]
    found = [
        stored.name
        for stored in subject.model(form).graph.initializer
        if stored.name.removesuffix(".weight").endswith(tensor)
        and (norm == "final_norm" or f"layers.{layer}." in stored.name)
    ]
    if not found:
        assert norm in ("query", "key")
        assert not subject.generation.qk_norm
        return
    expect(subject.compare(form, drop_norm(found[0])), subject.named(form, tap), "numeric")


@pytest.mark.parametrize(
    ("case", "kind"), [*((c, "experts") for c in MOE), *((c, "kept_keys") for c in DENSE[1:])]
)
def test_another_choice_within_rounding_is_discrete_and_a_near_tie(
    cases: Cases, case: str, form: Form, kind: str
) -> None:
    """Scores are nudged by half of what bfloat16 may move them by."""
    subject = cases(case)
    random = subject.random(form, kind)
    name, token, by = subject.turning_nudge(random, kind)
    report = subject.compare(form, nudge(name, token, by), precision="bf16")
    expect(report, name.rpartition(".")[0] + f".{kind}", "discrete")
    first = report.first
    assert first is not None
    assert first.near_tie
    assert first.reference_margin is not None
    assert first.candidate_margin is not None
    assert first.reference_margin + first.candidate_margin > 0
    scores = next(tap for tap in report.taps if tap.worst.tap == name)
    assert 0 < scores.worst.of_tolerance <= 1
