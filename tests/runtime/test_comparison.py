"""The difference of two backends, on backends that disagree where they are told to."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import pytest

from runtime.backends.base import Backend, Cache, Ids, Limits, Logits
from runtime.bundle import Bundle
from runtime.comparison import (
    TOLERANCES,
    ComparisonReport,
    Divergence,
    compare_backends,
    random_prompts,
    variant_tolerance,
)
from runtime.cpu_threads import CpuThreads
from runtime.manifest import Variant

V = 6
# (last token, its position) to what is added to the logits there.
Errors = dict[tuple[int, int], list[float]]


@dataclass
class CountingBackend(Backend):
    """After token t it prefers t + 1 (logit 4) and then t + 2 (logit 3)."""

    variant: str = "fp32"
    errors: Errors = field(default_factory=dict)
    vocab_size: int = V
    name: str = "counting"
    limits: Limits = field(
        default_factory=lambda: Limits(max_batch_size=1, max_input_len=8, max_seq_len=16)
    )
    router_mode: str | None = None
    capacities: list[int] = field(default_factory=list)
    seen: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def open(cls, bundle: Bundle, variant: Variant, threads: CpuThreads) -> Self:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def new_cache(self, batch_size: int, capacity: int | None = None) -> Cache:
        slots = self.check_cache_size(batch_size, capacity)
        self.capacities.append(slots)
        return Cache(capacity=slots, lengths=np.zeros(batch_size, np.int64))

    def _step(
        self, input_ids: Ids, write_index: Ids, logits_index: Ids, cache: Cache, row: int | None
    ) -> Logits:
        logits = np.zeros((*logits_index.shape, self.vocab_size), np.float32)
        for b, m in np.ndindex(logits_index.shape):
            index = int(logits_index[b, m])
            token, position = int(input_ids[b, index]), int(write_index[b]) + index
            self.seen.append((token, position))
            logits[b, m, (token + 1) % self.vocab_size] = 4
            logits[b, m, (token + 2) % self.vocab_size] = 3
            logits[b, m] += self.errors.get((token, position), 0)
        return logits


def compare(
    errors: Errors,
    *,
    reference_errors: Errors | None = None,
    prompts: tuple[tuple[int, ...], ...] = ((0,),),
    steps: int = 3,
    atol: float = 0.01,
    rtol: float = 0.0,
) -> ComparisonReport:
    reference = CountingBackend(errors=reference_errors or {})
    candidate = CountingBackend("fp16", errors)
    return compare_backends(reference, candidate, prompts, steps, atol=atol, rtol=rtol)


def one(token: int, value: float) -> list[float]:
    return [value if i == token else 0.0 for i in range(V)]


def test_equal_backends_pass_without_any_difference() -> None:
    report = compare({}, prompts=((0,), (2, 3)), steps=3)
    assert report == ComparisonReport(
        reference="counting:fp32",
        candidate="counting:fp16",
        steps=3,
        positions=8,
        max_abs=0.0,
        mean_abs=0.0,
        kl_max=0.0,
        kl_mean=0.0,
        top1_agreement=1.0,
        first_divergence=None,
        verdict="pass",
        reason=report.reason,
    )
    assert report.reason.startswith("largest difference is 0 of the tolerance")


def test_difference_is_measured_over_all_positions() -> None:
    report = compare({(1, 1): one(5, 0.5)}, steps=3, atol=1.0)
    assert report.max_abs == 0.5
    assert report.mean_abs == pytest.approx(0.5 / (4 * V))
    weights = np.exp([0.0, 0.0, 4.0, 3.0, 0.0, 0.0])
    p = weights / weights.sum()
    changed = weights * np.exp(one(5, 0.5))
    divergence = float((p * np.log(p / (changed / changed.sum()))).sum())
    assert report.kl_max == pytest.approx(divergence, rel=1e-4)
    assert report.kl_mean == pytest.approx(divergence / 4, rel=1e-4)


@pytest.mark.parametrize(
    ("error", "atol", "rtol", "verdict"),
    [
        (0.25, 0.25, 0.0, "pass"),
        (0.25, 0.2, 0.0, "fail"),
        (-0.25, 0.2, 0.0, "fail"),
        (0.25, 0.0, 0.0625, "pass"),  # of the row's largest logit, 4
        (0.25, 0.0, 0.06, "fail"),
        (0.25, 0.125, 0.03125, "pass"),
        (0.25, 0.125, 0.03, "fail"),
    ],
)
def test_verdict_is_within_tolerance_of_the_rows_largest_logit(
    error: float, atol: float, rtol: float, verdict: str
) -> None:
    report = compare({(0, 0): one(4, error)}, atol=atol, rtol=rtol)
    assert report.verdict == verdict
    assert report.first_divergence is None
    assert f"atol {atol:g}, rtol {rtol:g}" in report.reason


def test_reason_says_how_much_of_the_tolerance_is_used() -> None:
    assert "is 0.5 of the tolerance" in compare({(0, 0): one(4, 0.25)}, atol=0.5).reason
    assert "is 2.5 of the tolerance" in compare({(0, 0): one(4, 0.25)}, atol=0.1).reason


def test_first_divergence_has_both_tokens_and_by_how_much_each_is_preferred() -> None:
    report = compare({(2, 2): one(4, 1.5), (3, 3): one(5, 3.0)}, steps=4)
    assert report.first_divergence == Divergence(
        prompt=0,
        step=2,
        reference_token=3,
        candidate_token=4,
        reference_margin=1.0,
        candidate_margin=0.5,
    )
    assert report.top1_agreement == pytest.approx(3 / 5)
    assert report.verdict == "fail"


def test_first_divergence_counts_prompts_and_steps() -> None:
    report = compare({(4, 1): one(0, 1.5)}, prompts=((0,), (1,), (3, 4)), steps=2)
    assert report.first_divergence is not None
    assert (report.first_divergence.prompt, report.first_divergence.step) == (2, 0)


def test_both_get_the_references_tokens_after_they_part() -> None:
    reference, candidate = CountingBackend(), CountingBackend(errors={(0, 0): one(2, 1.5)})
    compare_backends(reference, candidate, [[0], [3, 3]], 3, atol=1, rtol=0)
    assert candidate.seen == reference.seen
    assert reference.seen == [(0, 0), (1, 1), (2, 2), (3, 3), (3, 1), (4, 2), (5, 3), (0, 4)]
    assert reference.capacities == candidate.capacities == [4, 5]


def test_close_tokens_that_part_within_tolerance_pass() -> None:
    report = compare({(0, 0): one(2, 1.5)}, atol=2)
    assert report.verdict == "pass"
    assert report.first_divergence is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("guilty", ["reference", "candidate", "both"])
def test_logits_that_are_no_numbers_fail_whatever_the_tolerance(bad: float, guilty: str) -> None:
    errors = {(1, 1): one(5, bad)}
    report = compare(
        {} if guilty == "reference" else errors,
        reference_errors={} if guilty == "candidate" else errors,
        atol=1e9,
    )
    assert report.verdict == "fail"
    names = {
        "reference": "counting:fp32",
        "candidate": "counting:fp16",
        "both": "counting:fp32 and counting:fp16",
    }
    assert report.reason == f"logits that are not finite numbers from {names[guilty]}"
    assert report.as_dict()["logits"]["kl_max"] is None


def test_missing_numbers_of_a_nan_are_null_in_json() -> None:
    report = compare({(1, 1): [math.nan] + [0.0] * (V - 1)}, prompts=((1, 1),), steps=0)
    assert report.verdict == "fail"
    numbers = report.as_dict()["logits"]
    assert [numbers[k] for k in ("max_abs", "mean_abs", "kl_max", "kl_mean")] == [None] * 4
    json.dumps(numbers, allow_nan=False)


def test_json_form_has_all_of_the_report() -> None:
    report = compare({(0, 0): one(2, 1.5)}, steps=1)
    assert report.as_dict() == {
        "reference": "counting:fp32",
        "candidate": "counting:fp16",
        "steps": 1,
        "taps": [],
        "logits": {
            "max_abs": 1.5,
            "mean_abs": 0.125,
            "kl_max": report.kl_max,
            "kl_mean": report.kl_mean,
            "top1_agreement": 0.5,
        },
        "first_divergence": {
            "prompt": 0,
            "step": 0,
            "reference_token": 1,
            "candidate_token": 2,
            "reference_margin": 1.0,
            "candidate_margin": 0.5,
        },
        "verdict": "fail",
        "reason": report.reason,
    }


def test_steps_zero_compares_the_prefill_alone() -> None:
    assert compare({}, steps=0).positions == 1


def test_vocabularies_must_be_equal() -> None:
    with pytest.raises(ValueError, match="vocabularies differ: 6 and 7 tokens"):
        compare_backends(CountingBackend(), CountingBackend(vocab_size=7), [[0]], 1, atol=1, rtol=1)


@pytest.mark.parametrize(("prompts", "steps"), [((), 1), (((0,),), -1)])
def test_nothing_to_compare_is_an_error(prompts: tuple[tuple[int, ...], ...], steps: int) -> None:
    with pytest.raises(ValueError, match=f"at least one prompt and 0 or more.*got {steps} steps"):
        compare({}, prompts=prompts, steps=steps)


def test_prompt_and_steps_beyond_the_context_are_an_error() -> None:
    with pytest.raises(ValueError, match="a cache of 17 tokens is outside 1 to 16"):
        compare({}, prompts=((0, 0),), steps=15)


def test_tolerances_grow_as_precision_falls() -> None:
    assert TOLERANCES["fp32"] < TOLERANCES["fp16"] < TOLERANCES["bf16"]
    assert all(atol > 0 and rtol > 0 for atol, rtol in TOLERANCES.values())


def test_random_prompts_follow_from_the_seed() -> None:
    prompts = random_prompts(50, 3, 7, seed=1)
    assert [len(prompt) for prompt in prompts] == [7, 7, 7]
    assert all(type(i) is int and 0 <= i < 50 for prompt in prompts for i in prompt)
    assert prompts == random_prompts(50, 3, 7, seed=1)
    assert prompts != random_prompts(50, 3, 7, seed=2)


@pytest.mark.parametrize("tolerance", [{"atol": math.nan}, {"rtol": -1.0}, {"atol": math.inf}])
def test_tolerance_that_is_no_tolerance_is_an_error(tolerance: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be a finite number of at least 0"):
        compare({}, **tolerance)


def test_id_outside_the_vocabulary_is_an_error_however_large() -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        compare({}, prompts=((1, 2**70),))


def test_equal_logits_pass_a_tolerance_of_zero_with_a_number_in_the_reason() -> None:
    report = compare({}, atol=0.0, rtol=0.0)
    assert report.verdict == "pass"
    assert "nan" not in report.reason


def test_report_with_infinite_logits_is_valid_json() -> None:
    report = compare({(1, 1): one(5, math.inf)}, atol=1e9)
    assert report.as_dict()["logits"]["max_abs"] is None
    json.dumps(report.as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("precision", "cache_dtype", "expected"),
    [
        ("fp32", "float32", "fp32"),
        ("fp32", "int8", "int8"),
        ("fp16", "float16", "fp16"),
        ("int8", "float32", "int8"),
        ("int4", "int8", "int4"),
    ],
)
def test_tolerance_is_that_of_the_coarser_of_weights_and_cache(precision, cache_dtype, expected):
    variant = Variant(
        backend="onnxruntime",
        name="x",
        path="cpu/x.onnx",
        precision=precision,
        details={"cache_dtype": cache_dtype},
    )
    assert variant_tolerance(variant) == TOLERANCES[expected]


def test_precision_without_a_tolerance_is_an_error_that_says_what_to_give():
    variant = Variant(backend="cuda", name="x", path="x", precision="fp6")
    with pytest.raises(ValueError, match="no tolerance is known for fp6; name one by --atol"):
        variant_tolerance(variant)
