"""The definition of the value gather against plain loops, and its torch op."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from plugins.value_gather.op import pick_values, value_gather, value_gather_definition
from plugins.value_gather.subsets import value_subsets
from tests.op_cases import VALUE_CASES, ValueCase


def by_hand(case: ValueCase, scores: Tensor, table: Tensor) -> Tensor:
    result = torch.zeros(case.T, case.H)
    for t in range(case.T):
        for r in range(case.R):
            best = sorted(range(case.N), key=lambda a: (-scores[t, r, a].item(), a))[: case.K]
            if case.subset_sums:
                result[t] += table[value_subsets(case.N, case.K).index(tuple(sorted(best)))]
            else:
                for row in best:
                    result[t] += table[row]
    return result


@pytest.mark.parametrize("case", VALUE_CASES, ids=lambda case: case.label)
def test_definition_equals_plain_loops(case: ValueCase) -> None:
    scores, table = case.inputs()
    actual = value_gather_definition(scores, table, case.K, case.subset_sums)
    torch.testing.assert_close(actual, by_hand(case, scores, table))


def test_sums_of_subsets_give_what_the_rows_give() -> None:
    rows, sums = ValueCase(label="", N=6, K=3), ValueCase(label="", N=6, K=3, subset_sums=True)
    torch.testing.assert_close(
        value_gather_definition(*rows.inputs(), 3, False),
        value_gather_definition(*sums.inputs(), 3, True),
    )


def test_equal_scores_pick_the_lower_rows() -> None:
    scores = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 2.0]]])
    assert pick_values(scores, 2).tolist() == [[[0, 1], [1, 2]]]


def test_row_picked_by_two_heads_counts_twice() -> None:
    scores = torch.tensor([[[1.0, 0.0], [3.0, 2.0]]])
    table = torch.tensor([[10.0], [1.0]])
    assert value_gather_definition(scores, table, 1, False).tolist() == [[20.0]]


def test_subsets_are_counted_and_ordered() -> None:
    assert value_subsets(4, 2) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert len(value_subsets(6, 3)) == math.comb(6, 3)


@pytest.mark.parametrize("case", VALUE_CASES, ids=lambda case: case.label)
def test_torch_op_is_the_definition_and_passes_its_checks(case: ValueCase) -> None:
    scores, table = case.inputs()
    arguments = (scores, table, case.K, case.subset_sums)
    assert torch.equal(
        value_gather(scores, table, top_k=case.K, subset_sums=case.subset_sums),
        value_gather_definition(*arguments),
    )
    torch.library.opcheck(torch.ops.doge.value_gather.default, arguments)


def test_table_has_a_gradient() -> None:
    scores, table = ValueCase(label="").inputs()
    table.requires_grad_()
    value_gather(scores, table, top_k=2).sum().backward()
    assert table.grad is not None
    assert table.grad[:, 0].sum().item() == 5 * 2 * 2  # every token, head and pick
