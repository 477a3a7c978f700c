"""The kernels of the expert gather, in Triton's interpreter, against the definition."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from plugins.expert_gather.launches import (
    MAX_SPLIT_TOKENS,
    MAX_SPLITS,
    ExpertGatherKernels,
    make_kernels,
)
from plugins.expert_gather.op import expert_gather_definition, pick_experts
from plugins.kernel_spec import Shapes
from plugins.registry import EXPERT_GATHER
from tests.kernel_runs import KernelRun, assert_close_to_float64, run_kernels
from tests.op_cases import EXPERT_CASES, ExpertCase

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GRIDS = ((2, 2), (4, 3), (32, 8), (32, 16), (64, 32), (96, 48), (128, 64))
# In float32, whose rows are long enough to be shared out.
SPLIT_CASES = (
    ExpertCase(label="two splits", T=3, n=5, K=16, H=256),
    ExpertCase(label="ragged splits, heads", T=3, P=3, n=5, K=7, H=776, weight_inside=True),
    ExpertCase(label="steps in a split", T=2, P=2, n=7, K=40, H=1032, normalize=True),
)
KERNEL_CASES = (
    *(case for case in EXPERT_CASES if case.H % 8 == 0),
    ExpertCase(label="primes", T=13, n=7, K=5, H=24),
    ExpertCase(label="two keys", T=3, n=2, K=2, H=40),
    ExpertCase(label="two keys, every expert", n=2, K=4, H=16),
    ExpertCase(label="four heads", T=3, P=4, n=5, K=3, H=72),
    *SPLIT_CASES,
)


def exact(case: ExpertCase, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The case's inputs with scores whose float32 sums are those of float64, bit by bit."""
    hidden, scores_x, scores_y, down, up = case.inputs(dtype)
    # To 2^-12: float32 holds such sums up to 4096.
    rounded = ((scores.float() * 4096).round() / 4096 for scores in (scores_x, scores_y))
    scores_x, scores_y = (scores.to(dtype) for scores in rounded)
    return hidden, scores_x, scores_y, down, up


def define_in_float64(case: ExpertCase, inputs: tuple[Tensor, ...]) -> Tensor:
    hidden, scores_x, scores_y, down, up = (tensor.double() for tensor in inputs)
    return expert_gather_definition(
        hidden, scores_x, scores_y, down, up, case.K, case.weight_inside, case.normalize
    )


def run(case: ExpertCase, inputs: tuple[Tensor, ...], *, times: int = 1) -> KernelRun:
    hidden = inputs[0]
    return run_kernels(
        EXPERT_GATHER,
        {
            "top_k": case.K,
            "weight_inside": int(case.weight_inside),
            "normalize": int(case.normalize),
        },
        dict(zip(EXPERT_GATHER.inputs, inputs, strict=True)),
        {"expert_output": (tuple(hidden.shape), hidden.dtype)},
        times=times,
    )


def route(
    scores_x: Tensor, scores_y: Tensor, K: int, *, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """The kernels' picks [T, P, K] and their weights, of experts that have hardly any rows."""
    T, P, n = scores_x.shape
    case = ExpertCase(label="", T=T, P=P, n=n, K=K, H=8, normalize=normalize)
    rows = torch.zeros(n * n, 8)
    ran = run(case, (torch.zeros(T, 8), scores_x, scores_y, rows, rows))
    return (
        ran.scratch("experts", (T, P, K), torch.int32).long(),
        ran.scratch("weights", (T, P, K), torch.float32),
    )


def random_scores(T: int, P: int, n: int, *, levels: int = 0) -> tuple[Tensor, Tensor]:
    """scores_x, scores_y [T, P, n] float32; with `levels` of that few values, so many are equal."""
    generator = torch.Generator().manual_seed(T * 10_000 + P * 1000 + n + levels)
    size = (2, T, P, n)
    if levels:
        scores = torch.randint(levels, size, generator=generator) * 0.5 - 0.5
    else:
        scores = 2 * torch.randn(size, generator=generator)
    return scores[0], scores[1]


def assert_picks(scores_x: Tensor, scores_y: Tensor, K: int, *, normalize: bool = False) -> None:
    """The kernels' picks are the definition's, one by one, and weights are the softmax of sums."""
    experts, weights = route(scores_x, scores_y, K, normalize=normalize)
    sums, expected = pick_experts(scores_x.float(), scores_y.float(), K)
    assert torch.equal(experts, expected)
    torch.testing.assert_close(
        weights.double(), torch.softmax(sums.double(), -1), atol=1e-7, rtol=2e-6
    )


@pytest.mark.parametrize("P", [1, 2, 4])
@pytest.mark.parametrize(("n", "K"), GRIDS)
def test_picks_are_those_of_the_definition(n: int, K: int, P: int) -> None:
    assert_picks(*random_scores(2, P, n), K, normalize=P == 2)


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize(("n", "K"), (*GRIDS, (3, 7), (45, 4), (55, 6), (7, 49), (8, 64)))
def test_equal_scores_pick_in_the_definitions_order(n: int, K: int, levels: int) -> None:
    assert_picks(*random_scores(2, 1, n, levels=levels), K)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_every_number_of_picks(n: int) -> None:
    for K in range(1, min(n * n, 64) + 1):
        assert_picks(*random_scores(1, 1, n, levels=3), K)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("levels", [0, 3])
def test_half_precision_scores_are_added_in_float32(dtype: torch.dtype, levels: int) -> None:
    x, y = random_scores(3, 2, 32, levels=levels)
    assert_picks(x.to(dtype), y.to(dtype), 16)


@pytest.mark.parametrize(("dtype", "n"), [(torch.float16, 45), (torch.bfloat16, 16)])
def test_picks_of_half_precision_sums_without_ties_are_the_definitions(
    dtype: torch.dtype, n: int
) -> None:
    # All n² sums are different whole numbers that the type holds exactly.
    generator = torch.Generator().manual_seed(n)
    x = torch.randperm(n, generator=generator)[None, None].to(dtype)
    y = n * torch.randperm(n, generator=generator)[None, None].to(dtype)
    experts, _ = route(x, y, 16)
    assert torch.equal(experts, pick_experts(x, y, 16)[1])


def test_negative_zero_equals_zero() -> None:
    x = torch.tensor([[[-0.0, 0.0, -0.0, 0.0, -1.0]]])
    y = torch.tensor([[[0.0, -0.0, 0.0, -0.0, 0.0]]])
    for K in (1, 3, 8, 25):
        assert_picks(x, y, K)


def test_extreme_scores() -> None:
    lowest = float("-inf")
    x = torch.tensor([[[1e30, -1e38, 3e37, lowest, 1e-40]], [[lowest, lowest, lowest, 1.0, 2.0]]])
    y = torch.tensor([[[-1e30, 1e38, lowest, 1e-45, 0.0]], [[0.0, lowest, 88.0, -3e38, 1.0]]])
    for K in (1, 4, 7, 25):
        assert_picks(x, y, K)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.label)
def test_kernels_equal_the_definition(case: ExpertCase, dtype: torch.dtype) -> None:
    inputs = exact(case, dtype)
    ran = run(case, inputs)
    assert_close_to_float64(
        EXPERT_GATHER, ran.outputs["expert_output"], define_in_float64(case, inputs)
    )


@pytest.mark.parametrize("case", SPLIT_CASES, ids=lambda case: case.label)
def test_launches_can_be_repeated(case: ExpertCase) -> None:
    run(case, case.inputs(), times=3)


@pytest.mark.parametrize("T", [1, 3, 5])
@pytest.mark.parametrize("P", [1, 2, 4])
@pytest.mark.parametrize("weight_inside", [False, True])
def test_tokens_and_heads(T: int, P: int, weight_inside: bool) -> None:
    case = ExpertCase(label="", T=T, P=P, n=9, K=11, H=264, weight_inside=weight_inside)
    inputs = exact(case, torch.float32)
    ran = run(case, inputs)
    assert_close_to_float64(
        EXPERT_GATHER, ran.outputs["expert_output"], define_in_float64(case, inputs)
    )


@pytest.mark.parametrize("T", [MAX_SPLIT_TOKENS, MAX_SPLIT_TOKENS + 1])
def test_many_tokens_are_not_split(T: int) -> None:
    case = ExpertCase(label="", T=T, n=4, K=9, H=264)
    inputs = exact(case, torch.float32)
    ran = run(case, inputs)
    assert_close_to_float64(
        EXPERT_GATHER, ran.outputs["expert_output"], define_in_float64(case, inputs)
    )
    split = not ran.launches[1].kernel.endswith("-splits1")
    assert split == (T <= MAX_SPLIT_TOKENS)


def test_scores_tokens_and_rows_of_different_types() -> None:
    case = ExpertCase(label="", n=5, K=7, P=2)
    hidden, scores_x, scores_y, down, up = exact(case, torch.float32)
    inputs = (hidden.half(), scores_x, scores_y, down.bfloat16(), up.bfloat16())
    ran = run(case, inputs)
    assert_close_to_float64(
        EXPERT_GATHER, ran.outputs["expert_output"], define_in_float64(case, inputs)
    )


def test_experts_beyond_the_grid_are_never_read() -> None:
    case = ExpertCase(label="", n=3, K=9, unreachable=5)
    hidden, scores_x, scores_y, down, up = case.inputs()
    before = run(case, (hidden, scores_x, scores_y, down, up)).outputs["expert_output"]
    down[9:], up[9:] = 1e30, 1e30
    after = run(case, (hidden, scores_x, scores_y, down, up)).outputs["expert_output"]
    assert torch.equal(before, after)


def shapes_of(T: int, *, P: int = 1, n: int = 32, H: int = 256, E: int = 1024) -> Shapes:
    return {
        "hidden": (T, H),
        "scores_x": (T, P, n),
        "scores_y": (T, P, n),
        "down": (E, H),
        "up": (E, H),
        "expert_output": (T, H),
    }


ATTRIBUTES = {"top_k": 16, "weight_inside": 0, "normalize": 1}
HALF = dict.fromkeys((*EXPERT_GATHER.inputs, *EXPERT_GATHER.outputs), "float16")


def kernels_of(shapes: Shapes, K: int = 16, **dtypes: str) -> ExpertGatherKernels:
    return make_kernels({**ATTRIBUTES, "top_k": K}, shapes, HALF | dtypes)


def test_prompt_needs_room_for_every_shorter_one() -> None:
    kernels = kernels_of(shapes_of(-1, n=128, H=1024, E=16384), 64)
    assert kernels.splits > 1
    counts = (1, 2, MAX_SPLIT_TOKENS, MAX_SPLIT_TOKENS + 1, 4096)
    shapes = [shapes_of(T, n=128, H=1024, E=16384) for T in counts]
    assert all(one <= two for one, two in pairwise(kernels.workspace_bytes(s) for s in shapes))
    assert [kernels.counters(s) for s in shapes] == [
        1, 2, MAX_SPLIT_TOKENS, MAX_SPLIT_TOKENS, MAX_SPLIT_TOKENS
    ]  # fmt: skip


@pytest.mark.parametrize("H", [8, 256, 1024, 4096, 8192])
@pytest.mark.parametrize("P", [1, 4])
def test_splits_cover_the_picks_without_an_idle_one(H: int, P: int) -> None:
    for K in range(1, 65):
        kernels = kernels_of(shapes_of(-1, P=P, H=H), K)
        share = kernels.specs[-1].constants["PICKS_PER_SPLIT"]
        assert isinstance(share, int)
        assert (kernels.splits - 1) * share < kernels.picks <= kernels.splits * share
        assert kernels.splits <= MAX_SPLITS


def test_names_tell_all_variants_apart() -> None:
    made = [
        kernels_of(shapes_of(-1, P=P, n=n, H=H), K)
        for P in (1, 2)
        for n in (16, 32)
        for H in (64, 512, 1024)
        for K in (8, 16)
    ]
    made += [make_kernels(ATTRIBUTES | {name: 1 - ATTRIBUTES[name]}, shapes_of(-1), HALF)
             for name in ("weight_inside", "normalize")]  # fmt: skip
    made += [kernels_of(shapes_of(-1), scores_x="float32", scores_y="float32")]
    made += [kernels_of(shapes_of(-1), down="float32", up="float32")]
    specs = [spec for kernels in made for spec in kernels.specs]
    by_name = {spec.name: spec for spec in specs}
    assert all(spec == by_name[spec.name] for spec in specs)


@pytest.mark.parametrize(
    ("shapes", "K", "message"),
    [
        (shapes_of(-1), 0, r"top_k is 0, expected 1 to 64 of 32² experts"),
        (shapes_of(-1), 65, r"top_k is 65, expected 1 to 64"),
        (shapes_of(-1, n=3, E=9), 10, r"top_k is 10, expected 1 to 9 of 3² experts"),
        (shapes_of(-1, n=129, E=20000), 16, r"129 keys per axis, expected 1 to 128"),
        (shapes_of(-1, H=36), 16, r"H is 36, expected a multiple of 8 up to 8192"),
        (shapes_of(-1, H=8200), 16, r"H is 8200, expected a multiple of 8 up to 8192"),
        (shapes_of(-1, E=1023), 16, r"down has 1023 rows, expected at least 32²"),
        (
            {**shapes_of(-1), "up": (9, 256)},
            16,
            r"up is \[9, 256\], expected \[1024, 256\].*ONNX function computes the same",
        ),
    ],
)
def test_what_no_kernel_covers_is_refused(shapes: Shapes, K: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels_of(shapes, K)


def test_types_that_no_kernel_covers_are_refused() -> None:
    with pytest.raises(ValueError, match="down is int8, expected one of float32, float16, bfloat1"):
        kernels_of(shapes_of(-1), down="int8", up="int8")
    with pytest.raises(ValueError, match="scores_y is float32, expected float16 like scores_x"):
        kernels_of(shapes_of(-1), scores_y="float32")


def test_launch_at_other_shapes_is_refused() -> None:
    kernels = kernels_of(shapes_of(-1))
    with pytest.raises(ValueError, match=r"scores_x is \[5, 2, 32\], expected \[5, 1, 32\]"):
        kernels.launches(shapes_of(5, P=2), {}, 0, 0)
