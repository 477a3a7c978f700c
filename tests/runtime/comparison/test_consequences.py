"""What follows from a near tie is told apart from what parts by itself, token by token."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint import load_checkpoint
from model.doge import DogeForCausalLM
from runtime.comparison.choices import Choice
from runtime.comparison.consequences import NEVER, Consequences
from runtime.comparison.record import Run
from runtime.comparison.run_report import RunReport, compare_runs
from runtime.comparison.taps import TapName
from runtime.comparison.verdict import _compare_choices, _Place
from tests.runtime.comparison.planted_faults import run_torch

LAYER, TOKEN = 1, 9  # of 3 layers and of a prompt of 12 tokens
Change = Callable[[dict[str, Any]], None]


def test_a_choice_is_followed_in_its_layer_by_its_token_and_later_by_every_later_one() -> None:
    found = Consequences(mixes=False)
    assert found.first_slot(1, "output") == NEVER
    found.note(1, 9)
    found.note(1, 11)
    assert found.first_slot(0, "output") == NEVER
    assert found.first_slot(1, "output") == 9
    assert found.first_slot(2, "key") == 9
    assert found.first_slot(None, "logits") == 9
    assert found.first_slot(None, "embedding") == NEVER
    found.next_step()
    # The choice of a token of an earlier step moves no later token in the same layer.
    assert found.first_slot(1, "attention_output") == NEVER
    assert found.first_slot(2, "attention_output") == 9
    found.note(0, 12)
    assert found.first_slot(1, "output") == 12
    assert found.first_slot(2, "output") == 9


def test_a_router_that_mixes_a_prompt_carries_a_choice_to_all_its_tokens() -> None:
    found = Consequences(mixes=True)
    assert found.first_slot(1, "output") == NEVER
    found.note(0, 5)
    assert found.first_slot(1, "output") == 0
    found.next_step()
    assert found.first_slot(1, "output") == 5


@pytest.fixture(scope="module")
def network(golden: Callable[[str], Path]) -> DogeForCausalLM:
    return load_checkpoint(golden("g4_window"))


@pytest.fixture(scope="module")
def reference(network: DogeForCausalLM) -> Run:
    return run_torch(network)


def changed(run: Run, change: Mapping[int, Change]) -> Run:
    """The run with the values of some steps of its first prompt changed."""
    values = tuple({k: np.array(v) for k, v in step.items()} for step in run.prompts[0].values)
    for step, apply in change.items():
        apply(values[step])
    first = dataclasses.replace(run.prompts[0], values=values)
    subject = dataclasses.replace(run.subject, rung="torch:other")
    return dataclasses.replace(run, prompts=(first, *run.prompts[1:]), subject=subject)


def tied(run: Run, layer: int = LAYER) -> tuple[Run, Change]:
    """A run in which the last kept score of `TOKEN` and the first dropped one almost tie.

    Returns:
        The run, and the change that makes them fall the other way.
    """
    window = run.subject.config["keep_window_size"]
    score = np.array(run.prompts[0].values[0][f"layers.{layer}.score"])
    order = np.argsort(-score[0, : TOKEN + 1, 0], kind="stable")
    kept, dropped = order[window - 1], order[window]
    value = score[0, kept, 0]

    def tie(values: dict[str, Any]) -> None:
        values[f"layers.{layer}.score"][:, [kept, dropped], 0] = [value, value * (1 - 1e-6)]

    def flip(values: dict[str, Any]) -> None:
        values[f"layers.{layer}.score"][:, [kept, dropped], 0] = [value * (1 - 1e-6), value]

    return changed(run, {0: tie}), flip


def compare(reference: Run, candidate: Run, network: DogeForCausalLM) -> RunReport:
    return compare_runs(reference, candidate, network.config, atol=1e-3, rtol=1e-4)


def move(tap: str, token: int | slice) -> Change:
    def apply(values: dict[str, Any]) -> None:
        values[tap][token] += 1.0

    return apply


def both(*changes: Change) -> Change:
    def apply(values: dict[str, Any]) -> None:
        for change in changes:
            change(values)

    return apply


@pytest.mark.parametrize(
    ("tap", "token", "follows"),
    [
        ("attention_output", 11, True),
        ("attention_output", 0, False),
        ("output", slice(11, 12), True),
        ("attention_norm", 11, False),  # stands before the choice
    ],
)
def test_only_what_is_computed_from_a_near_tie_is_explained_by_it(
    reference: Run, network: DogeForCausalLM, tap: str, token: Any, follows: bool
) -> None:
    right, flip = tied(reference)
    wrong = changed(right, {0: both(flip, move(f"layers.{LAYER}.{tap}", token))})
    report = compare(right, wrong, network)
    found = {d.tap: d for d in report.differences if d.parts and d.prompt == 0 and d.step == 0}
    assert found[f"layers.{LAYER}.kept_keys"].near_tie
    assert found[f"layers.{LAYER}.{tap}"].follows == follows
    assert report.verdict == ("pass" if follows else "fail")
    if not follows:
        assert report.unexplained is not None
        assert report.unexplained.tap == f"layers.{LAYER}.{tap}"
        assert report.as_dict()["first_unexplained"]["tap"] == report.unexplained.tap
        assert "no near tie explains" in report.reason or tap == "attention_norm"


def test_a_layer_below_and_another_prompt_are_judged_as_ever(
    reference: Run, network: DogeForCausalLM
) -> None:
    right, flip = tied(reference)
    below = changed(right, {0: both(flip, move("layers.0.output", 11))})
    assert compare(right, below, network).verdict == "fail"
    swapped = dataclasses.replace(right, prompts=right.prompts[::-1])
    other = changed(swapped, {0: move("layers.2.output", 11)})
    spoiled = dataclasses.replace(other, prompts=other.prompts[::-1])
    flipped = changed(spoiled, {0: flip})
    report = compare(right, flipped, network)
    assert report.verdict == "fail"
    assert report.unexplained is not None
    assert (report.unexplained.prompt, report.unexplained.tap) == (1, "layers.2.output")


def test_later_steps_follow_in_later_layers_only(reference: Run, network: DogeForCausalLM) -> None:
    right, flip = tied(reference)
    for layer, verdict in ((LAYER, "fail"), (LAYER + 1, "pass")):
        wrong = changed(right, {0: flip, 2: move(f"layers.{layer}.attention_output", 0)})
        assert compare(right, wrong, network).verdict == verdict


def test_numbers_that_are_none_are_never_explained(
    reference: Run, network: DogeForCausalLM
) -> None:
    right, flip = tied(reference)

    def spoil(values: dict[str, Any]) -> None:
        values["layers.2.output"][11] = np.nan

    report = compare(right, changed(right, {0: both(flip, spoil)}), network)
    assert report.unexplained is not None
    assert (report.verdict, report.unexplained.kind) == ("fail", "not finite")


def test_logits_over_tolerance_fail_whatever_the_cause(
    reference: Run, network: DogeForCausalLM
) -> None:
    right, flip = tied(reference)
    wrong = changed(right, {0: flip})
    logits = wrong.prompts[0].logits.copy()
    logits[-1, 0] += 1
    spoiled = dataclasses.replace(wrong.prompts[0], logits=logits)
    wrong = dataclasses.replace(wrong, prompts=(spoiled, *wrong.prompts[1:]))
    report = compare(right, wrong, network)
    assert (report.verdict, report.unexplained) == ("fail", None)


def test_repeated_tokens_beyond_the_window_pass_where_scores_tie_but_for_rounding(
    golden: Callable[[str], Path],
) -> None:
    """A real run: scores an ulp apart make other keys be kept, and all behind that differs."""
    right = load_checkpoint(golden("g4_window"))
    wrong = copy.deepcopy(right)
    with torch.no_grad():
        for layer in wrong.model.layers:
            layer.self_attn.A.mul_(1 + 2e-7)
    reference = run_torch(right)
    report = compare(reference, run_torch(wrong, "torch:ulp", reference), right)
    assert report.verdict == "pass", report.reason


def test_a_tie_in_a_decode_step_excuses_no_slot_before_it(
    reference: Run, network: DogeForCausalLM
) -> None:
    first = len(reference.prompts[0].prompt)
    window = network.config.keep_window_size
    score = np.concatenate(
        [reference.prompts[0].values[step]["layers.1.score"] for step in range(3)], 1
    )[0, :, 0]
    order = np.argsort(-score, kind="stable")
    # The newest token takes part in the tie, so its own step holds the score that is changed.
    edge = float(score[order[window - 1]])
    newest = len(score) - 1
    if newest in order[:window]:
        edge = float(score[order[window]])

    def tie(share: float) -> Change:
        def apply(values: dict[str, Any]) -> None:
            values["layers.1.score"][:, 0, 0] = edge * share

        return apply

    right = changed(reference, {2: tie(1 + 1e-6)})
    for slot, verdict in ((3, "fail"), (first + 1, "pass")):
        wrong = changed(reference, {2: tie(1 - 1e-6), 3: move("layers.2.cached_key", slot)})
        report = compare(right, wrong, network)
        kept = [d for d in report.differences if d.tap == "layers.1.kept_keys" and d.error]
        assert [(d.prompt, d.step) for d in kept][:1] == [(0, 2)]
        assert report.verdict == verdict, report.reason


def test_what_follows_another_choice_that_is_no_tie_is_not_excused(
    reference: Run, network: DogeForCausalLM
) -> None:
    def other(values: dict[str, Any]) -> None:
        values["layers.1.score"][:, :, 0] = values["layers.1.score"][:, ::-1, 0]

    wrong = changed(reference, {0: both(other, move("layers.1.output", 11))})
    report = compare(reference, wrong, network)
    found = {d.tap: d for d in report.differences if d.parts}
    assert not found["layers.1.kept_keys"].explained
    assert not found["layers.1.output"].follows


def test_margins_are_those_of_a_token_that_follows_from_nothing() -> None:
    chosen = np.zeros((1, 12, 12), bool)
    a = Choice(chosen, np.full((1, 12), 5.0), np.ones((1, 12)))
    b = Choice(chosen.copy(), np.full((1, 12), 5.0), np.ones((1, 12)))
    b.chosen[0, [8, 11]] = True
    b.margin[0, 8] = a.margin[0, 8] = 1e-9
    behind = Consequences(mixes=False)
    behind.note(0, 9)
    place = _Place(0, 0, TapName.parse("layers.1.kept_keys"), 12, behind)
    found = _compare_choices(place, (a, b), "fp32")
    assert found.near_tie
    assert found.reference_margin == 1e-9
    assert behind.first_slot(1, "output") == 8
