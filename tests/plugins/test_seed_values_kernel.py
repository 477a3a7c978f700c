"""The seed's values in a step of our own, interpreted, against float64 on the same numbers."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from plugins.value_gather.op import value_gather_definition
from plugins.value_gather.step_launches import SeedValues
from plugins.value_gather.subsets import value_subsets
from tests.interpreter import InterpreterLauncher
from tests.kernel_runs import NAN, Guarded, guarded

EPS = 1e-3  # large enough to be missed
PLAIN = SeedValues(columns=40, heads=2, values=4, picks=2, table="float32", eps=EPS)
CASES = {
    "Doge-22M": replace(PLAIN, columns=256, heads=1, values=2, picks=1, table="float16"),
    "Doge-76M": replace(
        PLAIN, columns=512, table="bfloat16", output_offset=1024, output_stride=1536
    ),
    "Doge-197M": replace(
        PLAIN,
        columns=768,
        heads=3,
        values=6,
        picks=3,
        table="float16",
        output_offset=1536,
        output_stride=2304,
    ),
    "sums": replace(PLAIN, columns=264, heads=3, values=6, picks=3, subset_sums=True),
    "one row for all": replace(
        PLAIN, heads=1, values=1, picks=1, output_offset=3, output_stride=45
    ),
    "half precision": replace(PLAIN, activation="float16", table="float16"),
}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(kernel: SeedValues, tokens: int, scores: Tensor | None = None) -> None:
    """Launch twice and compare; nothing between the rows is written."""
    H, K = kernel.columns, kernel.picks
    dtype = getattr(torch, kernel.activation)
    x = (2 * randn(tokens, H, seed=1)).to(dtype)
    norm = (1 + 0.3 * randn(H, seed=2)).to(dtype)
    if scores is None:
        scores = randn(tokens, kernel.heads, kernel.values, seed=3)
    rows = randn(kernel.values, H, seed=4)
    if kernel.subset_sums:
        rows = torch.stack([rows[list(some)].sum(0) for some in value_subsets(len(rows), K)])
    table = rows.to(getattr(torch, kernel.table))
    stride = kernel.output_stride or H
    arrays = {
        "x": guarded(x), "norm": guarded(norm), "scores": guarded(scores), "table": guarded(table),
        "output": Guarded((kernel.output_offset + tokens * stride,), torch.float32),
    }  # fmt: skip
    launch = kernel.launch(tokens=tokens, **{name: array.address for name, array in arrays.items()})
    output = arrays["output"].tensor
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double()
    expected = normed * value_gather_definition(scores, table.double(), K, kernel.subset_sums)
    for _ in range(2):
        output.view(torch.uint8).fill_(NAN)
        InterpreterLauncher([kernel.spec]).launch(launch)
        for name, array in arrays.items():
            array.check(name)
        for token in range(tokens):
            place = output[kernel.output_offset + token * stride :][:H]
            error = (place.double() - expected[token]).norm() / expected[token].norm()
            assert error <= 1e-6
            place.fill_(torch.nan)
        assert output.isnan().all(), "written between the rows"


@pytest.mark.parametrize("label", CASES)
def test_values_equal_float64(label: str) -> None:
    check(CASES[label], 3)


def test_of_equal_scores_the_lower_rows_are_picked() -> None:
    scores = torch.tensor(
        [[[0.0, -0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 1.0]], [[-1.0, 3.0, 3.0, 3.0], [0.0] * 4]]
    )
    check(PLAIN, 2, scores)


def test_names_tell_all_variants_apart() -> None:
    variants = [
        PLAIN,
        *(
            replace(PLAIN, **changes)
            for changes in (
                {"columns": 48}, {"heads": 1}, {"values": 5}, {"picks": 1}, {"table": "float16"},
                {"subset_sums": True}, {"activation": "float16"}, {"output_offset": 4},
                {"output_stride": 44},
            )
        ),
    ]  # fmt: skip
    assert len({variant.spec.name for variant in variants}) == len(variants)
    assert replace(PLAIN, output_stride=40).spec == PLAIN.spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": 8193}, "H is 8193, expected 1 to 8192"),
        ({"heads": 17}, "there are 17 heads, expected 1 to 16"),
        ({"values": 33}, "a head scores 33 rows, expected 1 to 32"),
        ({"picks": 5}, "top_k is 5, expected 1 to 4 rows"),
        ({"table": "int8"}, "table is int8, expected one of float32, float16, bfloat16"),
        ({"activation": "int8"}, "activation is int8, expected one of float32"),
        ({"output_offset": -1}, "values from number -1 on, expected 0 or more"),
        ({"output_stride": 39}, "rows 39 apart, expected at least 40"),
    ],
)
def test_values_that_no_kernel_covers_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(PLAIN, **changes)


def test_launch_asks_for_every_address() -> None:
    whole = {"x": 16, "norm": 32, "scores": 48, "table": 64, "output": 80}
    launch = PLAIN.launch(tokens=5, **whole)
    assert launch.arguments == {**whole, "eps": EPS}
    assert launch.arguments.keys() == PLAIN.spec.arguments.keys()
    assert (launch.sizes, PLAIN.workspace_bytes, PLAIN.counters) == ({"tokens": 5}, 0, 0)
    for name in whole:
        with pytest.raises(ValueError, match=f"{name} missing"):
            PLAIN.launch(tokens=5, **{**whole, name: 0})
    with pytest.raises(ValueError, match="0 tokens, expected 1 or more"):
        PLAIN.launch(tokens=0, **whole)
