from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plugins.expert_gather.op import expert_gather, expert_gather_definition, pick_experts
from plugins.registry import EXPERT_GATHER
from tests.op_cases import EXPERT_CASES, ExpertCase

INPUTS = ("hidden", "scores_x", "scores_y", "down", "up")
quickly = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def mix_slowly(case: ExpertCase, inputs: tuple[Tensor, ...]) -> list[list[float]]:
    """One token and one expert after the other over the whole grid, in plain Python floats."""
    hidden, scores_x, scores_y, down, up = (tensor.tolist() for tensor in inputs)
    result = []
    for token in range(case.T):
        mixed = [0.0] * case.H
        for head in range(case.P):
            x, y = scores_x[token][head], scores_y[token][head]
            grid = {i * case.n + j: x[i] + y[j] for i in range(case.n) for j in range(case.n)}
            picks = sorted(grid, key=lambda expert: -grid[expert])[: case.K]
            top = max(grid.values())
            whole = sum(math.exp(grid[expert] - top) for expert in picks)
            for expert in picks:
                weight = math.exp(grid[expert] - top) / whole
                z = sum(u * d for u, d in zip(hidden[token], down[expert], strict=True))
                a = silu(z * weight) if case.weight_inside else silu(z) * weight
                mixed = [m + a * u for m, u in zip(mixed, up[expert], strict=True)]
        result.append(mixed)
    return result


def silu(z: float) -> float:
    return z / (1 + math.exp(-z))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within the op's tolerance for the actual dtype; the expected values may be wider."""
    tolerance = EXPERT_GATHER.tolerances[str(actual.dtype).removeprefix("torch.")]
    torch.testing.assert_close(actual.float(), expected, atol=tolerance.atol, rtol=tolerance.rtol)


def define(case: ExpertCase, inputs: tuple[Tensor, ...]) -> Tensor:
    hidden, scores_x, scores_y, down, up = inputs
    return expert_gather_definition(
        hidden, scores_x, scores_y, down, up, case.K, case.weight_inside, case.normalize
    )


def apply(case: ExpertCase, inputs: tuple[Tensor, ...]) -> Tensor:
    hidden, scores_x, scores_y, down, up = inputs
    return expert_gather(
        hidden,
        scores_x,
        scores_y,
        down,
        up,
        top_k=case.K,
        weight_inside=case.weight_inside,
        normalize=case.normalize,
    )


@pytest.mark.parametrize("case", EXPERT_CASES, ids=lambda case: case.label)
def test_definition_equals_one_expert_after_the_other(case: ExpertCase) -> None:
    inputs = case.inputs()
    actual = define(case, inputs)
    assert actual.dtype == torch.float32
    expected = torch.tensor(mix_slowly(case, inputs))
    assert_close(actual, expected)


@pytest.mark.parametrize("case", EXPERT_CASES, ids=lambda case: case.label)
def test_op_without_gradients_equals_the_definition(case: ExpertCase) -> None:
    inputs = case.inputs()
    assert torch.equal(apply(case, inputs), define(case, inputs))


def test_half_precision_keeps_its_dtype() -> None:
    case = ExpertCase(label="", n=4, K=16)  # every expert, so rounding cannot change the picks
    inputs = case.inputs(torch.float16)
    actual = define(case, inputs)
    assert actual.dtype == torch.float16
    expected = torch.tensor(mix_slowly(case, inputs))
    assert_close(actual, expected)


def test_experts_beyond_the_grid_are_never_used() -> None:
    case = ExpertCase(label="", n=3, K=9, unreachable=5)
    inputs = case.inputs()
    before = define(case, inputs)
    inputs[3][9:] = torch.nan
    inputs[4][9:] = torch.nan
    assert torch.equal(define(case, inputs), before)


def test_weight_inside_is_another_function() -> None:
    outside, inside = ExpertCase(label=""), ExpertCase(label="", weight_inside=True)
    assert not torch.allclose(define(outside, outside.inputs()), define(inside, inside.inputs()))


def test_picks_by_hand() -> None:
    # Rows 0 5 1, columns 2 0: sums 2 0 / 7 5 / 3 1, experts numbered row by row.
    scores_x = torch.tensor([[[0.0, 5.0, 1.0]]])
    scores_y = torch.tensor([[[2.0, 0.0, -9.0]]])
    picked, experts = pick_experts(scores_x, scores_y, 4)
    assert picked.tolist() == [[[7.0, 5.0, 3.0, 2.0]]]
    assert experts.tolist() == [[[3, 4, 6, 0]]]


def test_equal_scores_pick_in_the_order_of_pairs() -> None:
    picked, experts = pick_experts(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), 4)
    assert picked.tolist() == [[[0.0] * 4]]
    assert experts.tolist() == [[[0, 1, 2, 3]]]


@quickly
@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_picks_are_the_best_of_the_whole_grid(n: int, levels: int, data: st.DataObject) -> None:
    # Small whole numbers: sums are exact and equal ones are likely.
    values = st.lists(st.integers(0, levels - 1), min_size=n, max_size=n)
    top_k = data.draw(st.integers(1, n * n))
    x = torch.tensor(data.draw(values), dtype=torch.float32)
    y = torch.tensor(data.draw(values), dtype=torch.float32)
    picked, experts = pick_experts(x[None, None], y[None, None], top_k)
    grid = (x[:, None] + y[None, :]).flatten()
    assert torch.equal(picked[0, 0], grid.sort(descending=True).values[:top_k])
    assert torch.equal(grid[experts[0, 0]], picked[0, 0])
    assert len(set(experts[0, 0].tolist())) == top_k


def test_token_does_not_see_its_neighbours() -> None:
    case = ExpertCase(label="", T=7, n=5, K=6)
    hidden, scores_x, scores_y, down, up = case.inputs()
    together = define(case, (hidden, scores_x, scores_y, down, up))
    alone = torch.cat(
        [
            define(case, (hidden[t : t + 1], scores_x[t : t + 1], scores_y[t : t + 1], down, up))
            for t in range(7)
        ]
    )
    assert_close(together, alone)


@pytest.mark.parametrize("case", EXPERT_CASES[7:11], ids=lambda case: case.label)
def test_torch_op_is_registered_soundly(case: ExpertCase) -> None:
    torch.library.opcheck(
        torch.ops.doge.expert_gather.default,
        (*case.inputs(), case.K, case.weight_inside, case.normalize),
    )


@pytest.mark.parametrize("name", INPUTS)
def test_gradient_reaches_an_input_that_alone_asks_for_it(name: str) -> None:
    case = ExpertCase(label="")
    inputs = case.inputs()
    asking = inputs[INPUTS.index(name)].requires_grad_()
    mixed = apply(case, inputs)
    assert torch.equal(mixed, define(case, inputs))
    mixed.sum().backward()  # type: ignore[no-untyped-call]
    assert asking.grad is not None
    assert asking.grad.abs().max() > 0


@pytest.mark.parametrize("weight_inside", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_are_the_slopes(weight_inside: bool, normalize: bool) -> None:
    case = ExpertCase(
        label="", T=2, P=2, n=3, K=4, H=3, weight_inside=weight_inside, normalize=normalize
    )
    inputs = tuple(tensor.requires_grad_() for tensor in case.inputs(torch.float64))
    assert torch.autograd.gradcheck(lambda *tensors: apply(case, tensors), inputs)
