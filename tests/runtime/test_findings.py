"""How far logits are apart, and what that may be."""

from __future__ import annotations

import json

import numpy as np
import pytest

from runtime.findings import ATOL, RTOL, Difference, Finding, largest_difference


def test_limit_grows_with_the_largest_logit_of_the_row() -> None:
    expected = np.array([[1.0, -50.0]], np.float32)
    found = largest_difference([(expected, expected + np.float32(0.5))])
    assert found == Difference(pytest.approx(0.5), pytest.approx(ATOL + 50 * RTOL))
    assert not found.within


def test_row_nearest_to_its_limit_is_shown() -> None:
    """A smaller difference may be the worse one."""
    expected = np.array([[1.0, 1.0], [1000.0, 1.0]], np.float32)
    actual = expected + np.array([[0.02, 0.0], [0.0, 0.05]], np.float32)
    for pairs in (
        [(expected, actual)],
        [(e[None], a[None]) for e, a in zip(expected, actual, strict=True)],
    ):
        found = largest_difference(pairs)
        assert found.value == pytest.approx(0.02, rel=1e-3)
        assert found.limit == pytest.approx(ATOL + RTOL)


def test_equal_logits_are_within() -> None:
    logits = np.ones((3, 4), np.float32)
    found = largest_difference([(logits, logits)])
    assert found.value == 0
    assert found.within


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_infinitely_far(number: float) -> None:
    right = np.ones((2, 3), np.float32)
    wrong = right.copy()
    wrong[1, 2] = number
    for pair in ((right, wrong), (wrong, right), (wrong, wrong)):
        found = largest_difference([pair])
        assert found.value == np.inf
        assert not found.within


def test_nothing_compared_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was compared"):
        largest_difference([])


def test_finding_is_json() -> None:
    finding = Finding(
        subject="ours", check="a", result="skipped", value=None, limit=None, meaning="why"
    )
    assert json.loads(json.dumps(finding.as_dict())) == {
        "subject": "ours",
        "check": "a",
        "result": "skipped",
        "value": None,
        "limit": None,
        "meaning": "why",
    }
