"""Kernels as data: what a specification refuses, and grid rules."""

from __future__ import annotations

import pytest

from plugins.kernel_spec import KernelSpec, grid_of


def spec(**changes):
    values = {
        "name": "k",
        "function": "somewhere:k",
        "arguments": {"x": "*fp16", "n": "i32"},
        "constants": {"BLOCK": 64},
        "grid": ("ceil(n / 64)", "2 * heads", "1"),
    }
    return KernelSpec(**{**values, **changes})


def test_grid_is_a_product_of_sizes_numbers_and_rounded_up_quotients():
    sizes = {"n": 129, "heads": 3}
    assert grid_of(spec().grid, sizes) == (3, 6, 1)
    assert grid_of(("ceil(n/129) * n", "1", "heads*heads"), sizes) == (129, 1, 9)


def test_grid_names_the_size_it_misses():
    with pytest.raises(ValueError, match="needs the size 'heads', got n"):
        grid_of(spec().grid, {"n": 1})


@pytest.mark.parametrize("rules", [("n",), ("n", "n", "n", "n")])
def test_grid_has_three_rules(rules):
    with pytest.raises(ValueError, match="three rules"):
        grid_of(rules, {"n": 1})


@pytest.mark.parametrize(
    "rule", ["n + 1", "ceil(n)", "ceil(4/n)", "", "n ** 2", "__import__('os')"]
)
def test_rule_that_is_no_product_is_refused(rule):
    with pytest.raises(ValueError, match="grid rule"):
        spec(grid=(rule, "1", "1"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arguments": {"x": "fp16"}}, "'x' has unknown type 'fp16'"),
        ({"arguments": {"x": "*i16"}}, "unknown type"),
        ({"constants": {"n": 3}}, "both argument and constant: n"),
        ({"divisible": ("m",)}, "divisible but no argument: m"),
    ],
)
def test_contradiction_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(**changes)
