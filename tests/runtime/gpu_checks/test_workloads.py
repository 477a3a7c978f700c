"""What ops are checked on: shapes, what random inputs promise, and bytes counted by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from plugins.registry import OPS
from runtime.backends.base import Limits
from runtime.gpu_checks.number_formats import from_storage, to_storage
from runtime.gpu_checks.workloads import WORKLOADS
from runtime.gpu_checks.workloads.workload import on_a_grid
from tests.gpu_check_subject import LIMITS, SLOTS, attention_use, expert_use, value_use

USES = (attention_use, expert_use, value_use)
DTYPES = ("float32", "float16", "bfloat16")
SMALLEST = Limits(max_batch_size=1, max_input_len=1, max_seq_len=1)


def case_of(use, label, limits=LIMITS):
    (case,) = (c for c in WORKLOADS[use.op].cases(use, limits) if c.label == label)
    return case


def inputs_of(use, case, seed=0):
    return WORKLOADS[use.op].inputs(use, case, np.random.default_rng(seed))


def smallest(use):
    shapes = {
        name: tuple(1 if size == SLOTS else size for size in shape)
        for name, shape in use.shapes.items()
    }
    return dataclasses.replace(use, shapes=shapes)


def test_every_op_has_a_workload():
    assert WORKLOADS.keys() == {op.name for op in OPS}


@pytest.mark.parametrize("make_use", USES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("limits", [LIMITS, SMALLEST], ids=["usual", "smallest"])
def test_cases_are_different_and_their_kernels_take_them(make_use, limits):
    use = make_use() if limits is LIMITS else smallest(make_use())
    cases = WORKLOADS[use.op].cases(use, limits)
    assert len({case.label for case in cases}) == len(cases)
    assert len({repr((case.shapes, case.filled)) for case in cases}) == len(cases)
    for case in cases:
        inputs = inputs_of(use, case)
        assert {name: array.shape for name, array in inputs.items()} == {
            name: case.shapes[name] for name in inputs
        }
        kernels = use.make_kernels()
        assert kernels.launches(case.shapes, dict.fromkeys(case.shapes, 0), 0, 0)
    assert len(cases) > 1 or limits is SMALLEST


@pytest.mark.parametrize("make_use", USES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_finite_in_their_type(make_use, dtype):
    use = make_use(dtype)
    for case in WORKLOADS[use.op].cases(use, LIMITS):
        for name, array in inputs_of(use, case).items():
            kind = use.dtypes[name]
            assert np.isfinite(from_storage(to_storage(array, kind), kind)).all()


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("decode, cache full", [SLOTS - 1]),
        ("decode, cache empty", [0]),
        ("decode, batch of 2", [0, SLOTS - 1]),
        ("prompt of 12", [0]),
        ("prompt of 12 behind a cache, batch of 2", [0, SLOTS - 12]),
    ],
)
def test_the_cache_is_filled_as_the_label_says(label, expected):
    use = attention_use()
    assert inputs_of(use, case_of(use, label))["write_index"].tolist() == expected


def test_a_part_full_cache_is_neither_empty_nor_full():
    use = attention_use()
    case = case_of(use, "decode, cache part full")
    found = {int(inputs_of(use, case, seed)["write_index"][0]) for seed in range(200)}
    assert found == set(range(1, SLOTS - 1))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("slots", [1, 2, 23, 1024, 4096])
def test_scores_are_distinct_in_their_type(dtype, slots):
    use = attention_use()
    shapes = dict(use.shapes) | {"score": (-1, 2, slots, 1), "key": (-1, 2, slots, 16)}
    use = dataclasses.replace(use, shapes=shapes)
    limits = dataclasses.replace(LIMITS, max_seq_len=slots, max_input_len=1)
    case = WORKLOADS[use.op].cases(use, limits)[0]
    score = inputs_of(use, case)["score"]
    stored = to_storage(score, dtype)
    assert np.array_equal(from_storage(stored, dtype), score)
    assert all(len(set(head.ravel().tolist())) == slots for head in stored[0])


def test_what_no_query_sees_stands_out():
    use = attention_use()
    inputs = inputs_of(use, case_of(use, "decode, batch of 2"))
    empty, full = 0, 1
    assert np.abs(inputs["value"][empty, :, 1:]).mean() > 20
    assert np.abs(inputs["value"][full]).mean() < 2
    assert inputs["score"][empty, :, 1:].min() > inputs["score"][full].max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_scores_are_exact(dtype):
    random = np.random.default_rng(0)
    x, y = (on_a_grid(random, (4000,), dtype) for _ in range(2))
    for values in (x, y, x + y):
        assert np.array_equal(from_storage(to_storage(values, dtype), dtype), values)
    assert len(set(x.tolist())) > 50


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 8, 63, 64])
def test_the_last_expert_picked_never_ties(dtype, top_k):
    use = expert_use(dtype, n=8, top_k=top_k)
    inputs = inputs_of(use, case_of(use, "prompt of 24"))
    sums = inputs["scores_x"][..., :, None] + inputs["scores_y"][..., None, :]
    ordered = np.sort(sums.reshape(24, -1))[:, ::-1]
    if top_k < 64:
        assert (ordered[:, top_k - 1] > ordered[:, top_k]).all()


def test_other_picks_pick_other_experts():
    use = expert_use()
    case = case_of(use, "prompt of 24")
    random = np.random.default_rng(0)
    picks = [WORKLOADS[use.op].other_picks(use, case, random) for _ in range(2)]
    assert picks[0].keys() == {"scores_x", "scores_y"}
    assert not np.array_equal(picks[0]["scores_x"], picks[1]["scores_x"])


@pytest.mark.parametrize(
    ("use", "label", "window", "expected"),
    [
        # Nkv 2, D 16, float16 keys and values: 128 bytes a slot; N 2, float32 scores: 8 a slot.
        # Query and result: 128 bytes each for every token; a write index: 8.
        (attention_use, "decode, cache full", 0, 24 * 128 + 24 * 8 + 2 * 128 + 8),
        (attention_use, "decode, cache full", 8, 8 * 128 + 24 * 8 + 2 * 128 + 8),
        (attention_use, "decode, cache empty", 8, 128 + 8 + 2 * 128 + 8),
        (attention_use, "prompt of 12", 8, 12 * 128 + 12 * 8 + 12 * 2 * 128 + 8),
        (attention_use, "decode, batch of 2", 0, 25 * 128 + 25 * 8 + 2 * 2 * 128 + 2 * 8),
    ],
)
def test_bytes_of_attention(use, label, window, expected):
    use = use(window=window)
    case = case_of(use, label)
    assert WORKLOADS[use.op].moved_bytes(use, case, inputs_of(use, case)) == expected


def test_shared_scores_are_read_once_for_the_batch():
    use, other = attention_use(window=0, shared=True), attention_use(window=0)
    moved = []
    for item in (use, other):
        case = case_of(item, "decode, batch of 2")
        moved.append(WORKLOADS[item.op].moved_bytes(item, case, inputs_of(item, case)))
    assert moved[1] - moved[0] == 1 * 8, "the row that sees one slot"


def test_bytes_of_experts_count_each_row_that_is_picked_once():
    use = expert_use(top_k=2)
    case = case_of(use, "decode, batch of 2")
    inputs = inputs_of(use, case)
    # Both tokens pick experts 0 and 1 of a grid of 4 x 4: pairs (0, 0) and (0, 1).
    inputs["scores_x"][:] = [3.0, 0.0, 0.0, 0.0]
    inputs["scores_y"][:] = [2.0, 1.0, 0.0, 0.0]
    tokens = 2 * (16 + 4 + 4 + 16) * 2
    rows = 2 * 2 * 16 * 2
    assert WORKLOADS[use.op].moved_bytes(use, case, inputs) == tokens + rows


def test_bytes_of_values():
    use = value_use()
    decode, prompt = case_of(use, "decode"), case_of(use, "prompt of 24")
    count = WORKLOADS[use.op].moved_bytes
    assert count(use, decode, {}) == (2 * 5 + 16) * 2 + 4 * 16 * 2
    assert count(use, prompt, {}) == 24 * (2 * 5 + 16) * 2 + 5 * 16 * 2
