from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plugins.dynamic_mask_attention.op import (
    dynamic_mask_attention,
    dynamic_mask_attention_definition,
    keep_largest_scores,
)
from plugins.registry import DYNAMIC_MASK_ATTENTION
from tests.op_cases import ATTENTION_CASES, WIDE_WINDOW_CASES, AttentionCase

CASES = (*ATTENTION_CASES, *WIDE_WINDOW_CASES)
INPUTS = ("query", "key", "value", "score")
quickly = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def attend_slowly(case: AttentionCase, inputs: tuple[Tensor, ...]) -> list[float]:
    """One query after the other, in plain Python floats: [B, S, Nq·D], flattened."""
    query, key, value, score, write_index = (tensor.tolist() for tensor in inputs)
    result: list[float] = []
    for row, start in enumerate(write_index):
        for token in range(case.S):
            for head in range(case.Nq):
                key_head = head * case.Nkv // case.Nq
                keys, values = key[row][key_head], value[row][key_head]
                bonus = [s[0] for s in score[row % len(score)][head * case.N // case.Nq]]
                seen = sorted(range(start + token + 1), key=lambda slot: (-bonus[slot], slot))
                attended = seen[: case.W] if case.W else seen
                energy = {
                    slot: case.scale * dot(query[row][head][token], keys[slot]) + bonus[slot]
                    for slot in attended
                }
                top = max(energy.values())
                mass = {slot: math.exp(e - top) for slot, e in energy.items()}
                whole = sum(mass.values())
                result += [
                    sum(mass[slot] / whole * values[slot][channel] for slot in attended)
                    for channel in range(case.D)
                ]
    return result


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Within the op's tolerance for the actual dtype; the expected values may be wider."""
    tolerance = DYNAMIC_MASK_ATTENTION.tolerances[str(actual.dtype).removeprefix("torch.")]
    torch.testing.assert_close(actual.float(), expected, atol=tolerance.atol, rtol=tolerance.rtol)


def define(case: AttentionCase, inputs: tuple[Tensor, ...]) -> Tensor:
    query, key, value, score, write_index = inputs
    return dynamic_mask_attention_definition(
        query, key, value, score, write_index, case.scale, case.W
    )


def apply(case: AttentionCase, inputs: tuple[Tensor, ...]) -> Tensor:
    query, key, value, score, write_index = inputs
    return dynamic_mask_attention(
        query, key, value, score, write_index, scale=case.scale, keep_window_size=case.W
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_definition_equals_one_query_after_the_other(
    case: AttentionCase, dtype: torch.dtype
) -> None:
    inputs = case.inputs(dtype)
    actual = define(case, inputs)
    assert actual.shape == (len(case.write_index), case.S, case.Nq * case.D)
    assert actual.dtype == dtype
    expected = torch.tensor(attend_slowly(case, inputs)).reshape(actual.shape)
    assert_close(actual, expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_op_without_gradients_equals_the_definition(case: AttentionCase) -> None:
    inputs = case.inputs()
    assert torch.equal(apply(case, inputs), define(case, inputs))


def test_scores_in_half_precision_stay_finite() -> None:
    case = AttentionCase(label="", S=4, C=12, W=3, write_index=(2, 8))
    query, key, value, score, write_index = case.inputs(torch.float16)
    attended = define(case, (10 * query, 10 * key, value, score.half(), write_index))
    assert attended.isfinite().all()


def test_wide_window_is_no_window() -> None:
    for case in WIDE_WINDOW_CASES:
        query, key, value, score, write_index = case.inputs()
        never = dynamic_mask_attention_definition(
            query, key, value, score, write_index, case.scale, 0
        )
        assert torch.equal(define(case, case.inputs()), never)


def test_kept_keys_by_hand() -> None:
    # Scores 5 4 3 2 1: from the fourth row on, a query does not attend to its own key.
    score = torch.tensor([[[5.0, 4.0, 3.0, 2.0, 1.0]]])
    kept = keep_largest_scores(score, causal(5), 3)
    assert kept[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
    ]


def test_equal_scores_keep_the_lower_slots() -> None:
    score = torch.tensor([[[1.0, 2.0, 1.0, 1.0, 2.0, 1.0]]])
    kept = keep_largest_scores(score, causal(6), 3)
    assert kept[0, 0].int().tolist()[-2:] == [[1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 0]]
    assert kept[0, 0, 3].int().tolist() == [1, 1, 1, 0, 0, 0]


def causal(slots: int) -> Tensor:
    """visible [1, 1, C, C]: one query in every slot."""
    return torch.ones(slots, slots, dtype=torch.bool).tril()[None, None]


@st.composite
def scores(draw: st.DrawFn) -> Tensor:
    """score [1, 2, C], equal ones likely."""
    slots = draw(st.integers(1, 24))
    levels = draw(st.integers(1, 30))
    values = st.integers(0, levels - 1)
    drawn = draw(st.lists(values, min_size=2 * slots, max_size=2 * slots))
    return torch.tensor(drawn, dtype=torch.float32).reshape(1, 2, slots)


@quickly
@given(scores(), st.integers(1, 26))
def test_every_query_keeps_its_window(score: Tensor, window: int) -> None:
    slots = score.shape[-1]
    kept = keep_largest_scores(score, causal(slots), window)
    expected = torch.arange(1, slots + 1).clamp(max=window)
    assert torch.equal(kept.sum(-1), expected.expand(1, 2, slots))
    assert not (kept & ~causal(slots)).any()


@quickly
@given(scores(), st.integers(1, 26))
def test_dropped_key_never_returns(score: Tensor, window: int) -> None:
    visible = causal(score.shape[-1])
    dropped = visible & ~keep_largest_scores(score, visible, window)  # [1, 2, S, C]
    assert torch.equal(dropped, dropped.cumsum(2) > 0)


@quickly
@given(scores(), st.integers(1, 26), st.data())
def test_selection_does_not_depend_on_chunks(
    score: Tensor, window: int, data: st.DataObject
) -> None:
    slots = score.shape[-1]
    cut = data.draw(st.integers(0, slots))
    visible = causal(slots)
    whole = keep_largest_scores(score, visible, window)
    parts = [keep_largest_scores(score, visible[:, :, part], window) for part in cut_at(cut)]
    assert torch.equal(torch.cat(parts, dim=2), whole)
    # While the first chunk runs, the slots of the second hold whatever was there before.
    stale = score.clone()
    stale[..., cut:] = 1000.0
    early = keep_largest_scores(stale, visible[:, :, :cut], window)
    assert torch.equal(early, whole[:, :, :cut])


def cut_at(cut: int) -> tuple[slice, slice]:
    return slice(None, cut), slice(cut, None)


@quickly
@given(st.integers(1, 18), st.integers(0, 8), st.integers(0, 4), st.data())
def test_later_key_changes_no_earlier_query(
    slots: int, window: int, levels: int, data: st.DataObject
) -> None:
    case = AttentionCase(label="", S=slots, C=slots, W=window, score_levels=levels)
    query, key, value, score, write_index = case.inputs()
    changed = data.draw(st.integers(0, slots - 1))
    before = define(case, (query, key, value, score, write_index))
    key[:, :, changed:] += 3.0
    value[:, :, changed:] -= 5.0
    boost = data.draw(st.sampled_from([-50.0, 0.0, 50.0]))
    score[:, :, changed:] += boost
    after = define(case, (query, key, value, score, write_index))
    assert torch.equal(before[:, :changed], after[:, :changed])
    if boost > 0:  # then the changed keys are the best of later queries, in any window
        assert not torch.equal(before[:, changed:], after[:, changed:])


@pytest.mark.parametrize("window", [0, 3, 7])
def test_chunks_give_what_one_pass_gives(window: int) -> None:
    case = AttentionCase(label="", S=17, C=17, W=window, score_levels=4)
    query, *cache, _ = case.inputs()
    whole = define(case, case.inputs())
    parts = [
        define(case, (query[:, :, begin:end], *cache, torch.tensor([begin])))
        for begin, end in ((0, 1), (1, 11), (11, 17))
    ]
    assert_close(torch.cat(parts, dim=1), whole)


def test_row_does_not_see_its_neighbours() -> None:
    case = AttentionCase(label="", S=4, C=19, W=5, write_index=(2, 15, 0))
    inputs = case.inputs()
    together = define(case, inputs)
    for row in range(3):
        alone = define(case, tuple(tensor[row : row + 1] for tensor in inputs))
        assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("window", [0, 4])
def test_torch_op_is_registered_soundly(window: int) -> None:
    case = AttentionCase(label="", S=3, C=11, W=window, write_index=(2, 8, 0))
    torch.library.opcheck(
        torch.ops.doge.dynamic_mask_attention.default, (*case.inputs(), case.scale, window)
    )


@pytest.mark.parametrize("name", INPUTS)
def test_gradient_reaches_an_input_that_alone_asks_for_it(name: str) -> None:
    case = AttentionCase(label="", S=5, C=9, W=4, write_index=(3,))
    inputs = case.inputs()
    asking = inputs[INPUTS.index(name)].requires_grad_()
    attended = apply(case, inputs)
    assert torch.equal(attended, define(case, inputs))
    attended.sum().backward()  # type: ignore[no-untyped-call]
    assert asking.grad is not None
    assert asking.grad.abs().max() > 0


@pytest.mark.parametrize("window", [0, 3])
def test_gradients_are_the_slopes(window: int) -> None:
    case = AttentionCase(label="", S=3, C=5, W=window, write_index=(1,), D=2, Nq=2, Nkv=1, N=1)
    query, key, value, _, write_index = case.inputs(torch.float64)
    score = torch.tensor([0.5, -1.0, 1.5, 0.0, 2.0], dtype=torch.float64).reshape(1, 1, 5, 1)
    tensors = tuple(t.requires_grad_() for t in (query, key, value, score))
    # The softmax runs in float32, so the steps are wide and the bounds loose.
    assert torch.autograd.gradcheck(
        lambda *tensors: apply(case, (*tensors, write_index)), tensors, eps=1e-2, atol=2e-3
    )
