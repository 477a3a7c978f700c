"""Deadlines and verdicts."""

from __future__ import annotations

import pytest

from runtime.gpu_checks import SECTIONS
from runtime.gpu_checks.section import Deadline, combined, overall


def test_a_deadline_passes():
    now = [100.0]
    deadline = Deadline(5, lambda: now[0])
    assert not deadline.passed
    now[0] = 103
    assert deadline.remaining_s == 2
    now[0] = 106
    assert deadline.passed
    assert deadline.remaining_s == 0


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], "skipped"),
        (["skipped"], "skipped"),
        (["skipped", "pass"], "pass"),
        (["pass", "fail", "skipped"], "fail"),
    ],
)
def test_verdicts_combine(verdicts, expected):
    assert combined(verdicts) == expected


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ({"bandwidth": {"verdict": "pass"}}, "skipped"),  # nothing was compared
        ({"kernels": {"verdict": "skipped", "cases": []}}, "skipped"),
        ({"kernels": {"verdict": "pass", "cases": [{"verdict": "pass"}]}}, "pass"),
        (
            {
                "kernels": {"verdict": "pass", "cases": [{"verdict": "pass"}]},
                "engines": {"verdict": "skipped", "cases": [{"verdict": "skipped"}]},
            },
            "pass",
        ),
        (
            {
                "bandwidth": {"verdict": "fail", "error": "x"},
                "kernels": {"verdict": "pass", "cases": [{"verdict": "pass"}]},
            },
            "fail",
        ),
    ],
)
def test_overall_passes_only_where_something_was_compared(reports, expected):
    assert overall(reports) == expected


def test_sections_have_names_of_their_own():
    names = [section.name for section in SECTIONS]
    assert names == ["environment", "bandwidth", "kernels", "engines", "decode_speed"]
