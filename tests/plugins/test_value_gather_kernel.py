"""The kernel of the value gather, in Triton's interpreter, against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from plugins.kernel_spec import Shapes
from plugins.registry import VALUE_GATHER
from plugins.value_gather.launches import make_kernels
from plugins.value_gather.op import value_gather_definition
from plugins.value_gather.subsets import value_subsets
from tests.kernel_runs import assert_close_to_float64, run_kernels
from tests.op_cases import VALUE_CASES, ValueCase

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_CASES = (
    *VALUE_CASES,
    ValueCase(label="Doge-22M", T=3, R=1, N=2, K=1, H=256),
    ValueCase(label="Doge-76M", T=3, R=2, N=4, K=2, H=512),
    ValueCase(label="Doge-197M", T=3, R=3, N=6, K=3, H=768),
    ValueCase(label="Doge-197M, sums", T=3, R=3, N=6, K=3, H=768, subset_sums=True),
    ValueCase(label="parts of a row", T=3, R=5, N=9, K=4, H=264),
    ValueCase(label="parts of a row, sums", T=3, R=5, N=9, K=4, H=264, subset_sums=True),
    ValueCase(label="many rows", T=2, R=4, N=27, K=13),
    ValueCase(label="many sums", T=9, R=3, N=16, K=8, subset_sums=True),
)


def run(scores: Tensor, table: Tensor, K: int, *, subset_sums: bool = False) -> Tensor:
    ran = run_kernels(
        VALUE_GATHER,
        {"top_k": K, "subset_sums": int(subset_sums)},
        {"scores": scores, "table": table},
        {"inner_values": ((scores.shape[0], table.shape[1]), table.dtype)},
    )
    return ran.outputs["inner_values"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.label)
def test_kernel_equals_the_definition(case: ValueCase, dtype: torch.dtype) -> None:
    scores, table = case.inputs(dtype)
    expected = value_gather_definition(scores, table.double(), case.K, case.subset_sums)
    actual = run(scores, table, case.K, subset_sums=case.subset_sums)
    assert_close_to_float64(VALUE_GATHER, actual, expected)


@pytest.mark.parametrize("N", range(1, 8))
def test_every_subset_reads_its_own_row(N: int) -> None:
    for K in range(1, N + 1):
        subsets = value_subsets(N, K)
        scores = torch.zeros(len(subsets), 1, N)
        for number, subset in enumerate(subsets):
            scores[number, 0, list(subset)] = 1.0
        numbers = torch.arange(len(subsets))[:, None].float()
        assert torch.equal(run(scores, numbers, K, subset_sums=True), numbers)


@pytest.mark.parametrize("subset_sums", [False, True])
def test_signs_of_zero_and_extreme_scores(subset_sums: bool) -> None:
    lowest, largest = float("-inf"), float("inf")
    scores = torch.tensor(
        [
            [[-0.0, 0.0, -0.0, 0.0, -1.0], [0.0, -0.0, 0.0, -0.0, 1e-45]],
            [[lowest] * 5, [lowest, 3e38, lowest, -3e38, largest]],
            [[1e-40, 2e-40, 0.0, -1e-40, -2e-40], [lowest, largest, largest, lowest, 0.0]],
        ]
    )
    table = torch.arange(10.0)[:, None] if subset_sums else 2.0 ** torch.arange(5)[:, None]
    for K in (2, 3):
        expected = value_gather_definition(scores, table, K, subset_sums)
        assert torch.equal(run(scores, table, K, subset_sums=subset_sums), expected)


def test_row_that_no_head_picks_is_not_read() -> None:
    scores, table = torch.tensor([[[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]]), torch.ones(3, 8)
    table[1] = torch.inf  # times zero it would be NaN
    assert torch.equal(run(scores, table, 2), torch.full((1, 8), 4.0))


def test_scores_and_rows_of_different_types() -> None:
    case = ValueCase(label="", R=3, N=6, K=3)
    scores, table = case.inputs()
    expected = value_gather_definition(scores, table.half().double(), 3, False)
    assert_close_to_float64(VALUE_GATHER, run(scores, table.half(), 3), expected)


def shapes_of(T: int, *, R: int = 3, N: int = 6, H: int = 768, rows: int | None = None) -> Shapes:
    return {"scores": (T, R, N), "table": (rows or N, H), "inner_values": (T, H)}


HALF = {"scores": "float16", "table": "float16", "inner_values": "float16"}


def test_names_tell_all_variants_apart() -> None:
    made = [
        make_kernels(
            {"top_k": K, "subset_sums": sums},
            shapes_of(-1, R=R, N=N, H=H, rows=math.comb(N, K) if sums else N),
            HALF | {"scores": scores},
        )
        for K in (1, 2)
        for sums in (0, 1)
        for R in (1, 3)
        for N in (4, 6)
        for H in (64, 256)
        for scores in ("float16", "float32")
    ]
    specs = [spec for kernels in made for spec in kernels.specs]
    assert len({spec.name for spec in specs}) == len(specs)


@pytest.mark.parametrize(
    ("shapes", "K", "message"),
    [
        (shapes_of(-1), 0, "top_k is 0, expected 1 to 6 rows"),
        (shapes_of(-1), 7, "top_k is 7, expected 1 to 6 rows"),
        (shapes_of(-1, N=33), 2, "a head scores 33 rows, expected 1 to 32"),
        (shapes_of(-1, R=17), 2, "there are 17 heads, expected 1 to 16"),
        (shapes_of(-1, rows=5), 2, r"table is \[5, 768\], expected \[6, 768\].*the same"),
    ],
)
def test_what_no_kernel_covers_is_refused(shapes: Shapes, K: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_kernels({"top_k": K, "subset_sums": 0}, shapes, HALF)


def test_table_of_sums_has_a_row_for_each_subset() -> None:
    with pytest.raises(ValueError, match=r"table is \[6, 768\], expected \[20, 768\]"):
        make_kernels({"top_k": 3, "subset_sums": 1}, shapes_of(-1), HALF)


def test_types_that_no_kernel_covers_are_refused() -> None:
    attributes = {"top_k": 3, "subset_sums": 0}
    with pytest.raises(ValueError, match="table is int8, expected one of float32, float16"):
        make_kernels(attributes, shapes_of(-1), HALF | {"table": "int8", "inner_values": "int8"})
    with pytest.raises(ValueError, match="inner_values is float32, expected float16 like table"):
        make_kernels(attributes, shapes_of(-1), HALF | {"inner_values": "float32"})


def test_launch_at_other_shapes_is_refused() -> None:
    kernels = make_kernels({"top_k": 3, "subset_sums": 0}, shapes_of(-1), HALF)
    with pytest.raises(ValueError, match=r"scores is \[5, 2, 6\], expected \[5, 3, 6\]"):
        kernels.launches(shapes_of(5, R=2), {}, 0, 0)
