"""Perplexity, divergence and agreement of two rungs on a text, and what each says by itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from model.checkpoint import load_checkpoint
from runtime.comparison.free_running import compare_free_running
from runtime.comparison.record import Run
from runtime.comparison.run_report import compare_runs
from runtime.comparison.text import TextRun, compare_text
from tests.runtime.comparison.planted_faults import run_torch, with_precision

WINDOWS = ((0, 2, 1), (1, 1))


def text_of(*probabilities: list[list[float]]) -> TextRun:
    logits = tuple(np.log(np.array(rows, np.float32)) for rows in probabilities)
    return TextRun(windows=WINDOWS, logits=logits)


REFERENCE = text_of(
    [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.2, 0.2, 0.6]], [[0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]
)
CANDIDATE = text_of(
    [[0.25, 0.5, 0.25], [0.25, 0.5, 0.25], [0.2, 0.2, 0.6]], [[0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]
)


def test_numbers_worked_out_by_hand() -> None:
    found = compare_text(REFERENCE, CANDIDATE, atol=1.0, rtol=0.0)
    # Of window 0: token 2 behind row 0 and token 1 behind row 1; of window 1: token 1.
    nll = -(math.log(0.25) + math.log(0.5) + math.log(0.8)) / 3
    assert found.tokens == 3
    assert found.windows == 2
    assert found.reference_nll == pytest.approx(nll, rel=1e-6)
    assert found.candidate_nll == pytest.approx(nll, rel=1e-6)
    assert found.perplexity_ratio == pytest.approx(1)
    assert found.kl_max == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), rel=1e-5)
    assert found.kl_mean == pytest.approx(found.kl_max / 5, rel=1e-5)
    assert found.top1_agreement == pytest.approx(4 / 5)
    assert found.top5_agreement == 1
    assert found.max_abs == pytest.approx(math.log(2), rel=1e-5)
    assert found.of_tolerance == pytest.approx(math.log(2), rel=1e-5)


def test_the_five_likeliest_are_five() -> None:
    logits = np.arange(8, dtype=np.float32)[None].repeat(2, 0)
    reference = TextRun(windows=((0, 1),), logits=(logits,))
    for place, agreement in ((4, 1.0), (5, 0.0)):
        moved = np.zeros((2, 8), np.float32)
        # Token 7, the reference's likeliest, is put at `place` of the candidate's order.
        others = [t for t in range(8) if t != 7]
        order = [*others[:place], 7, *others[place:]]
        moved[:, order] = np.arange(8, 0, -1)
        candidate = TextRun(windows=((0, 1),), logits=(moved,))
        found = compare_text(reference, candidate, atol=1, rtol=1)
        assert found.top5_agreement == agreement


def test_numbers_that_are_none_become_null() -> None:
    spoiled = TextRun(windows=WINDOWS, logits=tuple(x.copy() for x in CANDIDATE.logits))
    spoiled.logits[1][0, 0] = np.nan
    found = compare_text(REFERENCE, spoiled, atol=1, rtol=1)
    assert found.of_tolerance == math.inf
    told = found.as_dict()
    assert told["candidate"] == {"nll": None, "perplexity": None}
    assert told["reference"]["nll"] == pytest.approx(found.reference_nll)
    assert (told["kl_max"], told["perplexity_ratio"], told["max_abs"]) == (None, None, None)
    assert "inf" in found.sentence()


@pytest.fixture(scope="module")
def run(golden: Callable[[str], Path]) -> Run:
    return run_torch(load_checkpoint(golden("g4_moe")), steps=4)


def test_a_text_over_tolerance_fails_the_comparison(
    run: Run, golden: Callable[[str], Path]
) -> None:
    reference = dataclasses.replace(run, text=REFERENCE)
    config = load_checkpoint(golden("g4_moe")).config
    same = compare_runs(reference, reference, config, atol=1e-3, rtol=0)
    other = dataclasses.replace(run, text=CANDIDATE)
    parted = compare_runs(reference, other, config, atol=1e-3, rtol=0)
    assert (same.verdict, parted.verdict) == ("pass", "fail")
    assert "text of 3 tokens: perplexity" in parted.reason


def test_narrow_weights_are_judged_by_perplexity(run: Run, golden: Callable[[str], Path]) -> None:
    config = load_checkpoint(golden("g4_moe")).config
    reference = dataclasses.replace(run, text=REFERENCE)
    # Logits far over tolerance at a position whose token is no less likely, and one whose is.
    worse = text_of(
        [[0.5, 0.25, 0.25], [0.3, 0.4, 0.3], [0.2, 0.2, 0.6]], [[0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]
    )
    for text, precision, verdict in (
        (CANDIDATE, "fp32", "fail"),
        (CANDIDATE, "int8", "pass"),
        (worse, "int8", "fail"),
        (worse, "int4", "pass"),
    ):
        candidate = with_precision(dataclasses.replace(run, text=text), precision)
        report = compare_runs(reference, candidate, config, atol=1e-3, rtol=0)
        assert (report.verdict, precision) == (verdict, precision), report.reason
        bounds = {"fp32": None, "int8": 1.02, "int4": 1.1}
        assert report.as_dict()["text"]["perplexity_bound"] == bounds[precision]


def with_own(run: Run, prompt: int, step: int, token: int) -> Run:
    own = run.prompts[prompt].own_tokens
    assert own is not None
    own = own.copy()
    own[step] = token
    changed = dataclasses.replace(run.prompts[prompt], own_tokens=own)
    prompts = list(run.prompts)
    prompts[prompt] = changed
    return dataclasses.replace(run, prompts=tuple(prompts))


def test_generation_alone_is_compared_to_its_first_other_token(run: Run) -> None:
    same = compare_free_running(run, run)
    assert [found.equal for found in same] == [5, 5]
    assert [found.first_divergence for found in same] == [None, None]
    own = run.prompts[1].own_tokens
    assert own is not None
    other = (int(own[2]) + 1) % 97
    found = compare_free_running(run, with_own(run, 1, 2, other))[1]
    assert found.equal == 2
    where = found.first_divergence
    assert where is not None
    assert (where.prompt, where.step) == (1, 2)
    assert (where.reference_token, where.candidate_token) == (int(own[2]), other)
    logits = run.prompts[1].logits[2]
    assert where.reference_margin == pytest.approx(float(logits[own[2]] - logits[other]))
    assert where.candidate_margin == -where.reference_margin
    told = found.as_dict(lambda ids: " ".join(map(str, ids)))
    assert told["reference_text"] == " ".join(map(str, own))


def test_a_reference_with_another_teacher_has_no_generation_of_its_own(run: Run) -> None:
    assert compare_free_running(with_own(run, 0, 1, 0), run) == ()
    unknown = dataclasses.replace(run.prompts[0], own_tokens=None)
    assert compare_free_running(dataclasses.replace(run, prompts=(unknown,)), run) == ()


def test_a_candidate_that_was_fed_by_another_runs_again_by_itself(
    golden: Callable[[str], Path],
) -> None:
    network = load_checkpoint(golden("g3"))
    alone = run_torch(network, steps=5)
    fed = [dataclasses.replace(p, tokens=(p.tokens + 1) % 97) for p in alone.prompts]
    forced = run_torch(network, like=dataclasses.replace(alone, prompts=tuple(fed)), steps=5)
    for a, b, c in zip(alone.prompts, forced.prompts, fed, strict=True):
        np.testing.assert_array_equal(b.tokens, c.tokens)
        assert a.own_tokens is not None
        np.testing.assert_array_equal(a.own_tokens, b.own_tokens)
        np.testing.assert_array_equal(a.own_tokens[:-1], a.tokens)
