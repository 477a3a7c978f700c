"""The Triton kernels of dynamic mask attention, in Triton's interpreter, against the definition.

In bfloat16 the interpreter computes `tl.dot` from bit patterns and casts by truncation: here
bfloat16 runs in decode alone, which has no `tl.dot`, and its bound allows for the casts.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from plugins.custom_op import Tolerance
from plugins.dynamic_mask_attention.launches import (
    MAX_DECODE_TOKENS,
    AttentionKernels,
    make_kernels,
    plan_decode,
)
from plugins.dynamic_mask_attention.op import (
    dynamic_mask_attention_definition,
    keep_largest_scores,
)
from plugins.dynamic_mask_attention.step_launches import (
    make_step_attention,
    make_step_attention_spec,
)
from plugins.kernel_spec import KernelSpec, Launch
from plugins.registry import DYNAMIC_MASK_ATTENTION
from tests.interpreter import InterpreterLauncher
from tests.op_cases import ATTENTION_CASES, WIDE_WINDOW_CASES, AttentionCase

NAMES = (*DYNAMIC_MASK_ATTENTION.inputs, *DYNAMIC_MASK_ATTENTION.outputs)
# ‖actual - expected‖ / ‖expected‖. Half precision: one rounding of the result, 2^-12 on average
# below; bfloat16 is truncated, with an error of up to 2^-8.
NORM_ERROR = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 5e-3}
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Run:
    """What the kernels made of some inputs."""

    output: Tensor
    workspace: Tensor
    launched: tuple[Launch, ...]

    @property
    def kernels(self) -> list[str]:
        return [launch.kernel.partition("-")[0] for launch in self.launched]


def zeros_at(alignment: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` zeros whose address is a multiple of `alignment`."""
    spare = alignment // dtype.itemsize
    memory = torch.zeros(count + spare, dtype=dtype)
    start = -memory.data_ptr() % alignment // dtype.itemsize
    return memory[start : start + count]


def aligned(tensor: Tensor) -> Tensor:
    memory = zeros_at(16, tensor.numel(), tensor.dtype).view(tensor.shape)
    return memory.copy_(tensor)


def kernels_for(tensors: Mapping[str, Tensor], scale: float, window: int) -> AttentionKernels:
    return make_kernels(
        {"scale": scale, "keep_window_size": window},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
    )


def run_kernels(
    inputs: Sequence[Tensor],
    scale: float,
    window: int,
    change: Callable[[Launch], Launch] = lambda launch: launch,
    runs: int = 1,
) -> Run:
    """Run the kernels on inputs whose slots beyond a row's last token hold NaN.

    The output and the scratch memory hold NaN before. Where the run is repeated, they hold what
    the run before left; each must give the same bits. Every run puts the counters back to zero.
    """
    query, key, value, score, write_index = inputs
    B, Nq, S, D = query.shape
    key, value, score = key.clone(), value.clone(), score.clone()
    for row, start in enumerate(write_index.tolist()):
        key[row, :, start + S :] = value[row, :, start + S :] = torch.nan
        if score.shape[0] > 1:
            score[row, :, start + S :] = torch.nan
    score[:, :, int(write_index.max()) + S :] = torch.nan
    output = torch.full((B, S, Nq * D), torch.nan, dtype=query.dtype)
    everything = (query, key, value, score, write_index, output)
    tensors = {name: aligned(t) for name, t in zip(NAMES, everything, strict=True)}
    kernels = kernels_for(tensors, scale, window)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    workspace = zeros_at(16, kernels.workspace_bytes(shapes) // 4, torch.float32).fill_(torch.nan)
    counters = zeros_at(16, kernels.counters(shapes), torch.int32)
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    launches = kernels.launches(shapes, addresses, workspace.data_ptr(), counters.data_ptr())
    launches = tuple(change(launch) for launch in launches)
    launcher = InterpreterLauncher(kernels.specs)
    outputs = []
    for _ in range(runs):
        launcher.run(launches)
        assert not counters.any()
        outputs.append(tensors["attention_output"].clone())
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    return Run(output=outputs[0], workspace=workspace, launched=launches)


def expected_output(inputs: Sequence[Tensor], scale: float, window: int) -> Tensor:
    """The definition in float64 (its softmax in float32), on the same rounded inputs."""
    query, key, value, score, write_index = inputs
    return dynamic_mask_attention_definition(
        query.double(), key.double(), value.double(), score.float(), write_index, scale, window
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    actual64 = actual.double()
    assert (actual64 - expected).norm() <= NORM_ERROR[actual.dtype] * expected.norm()
    tolerances: Mapping[str, Tolerance] = DYNAMIC_MASK_ATTENTION.tolerances
    if tolerance := tolerances.get(str(actual.dtype).removeprefix("torch.")):
        torch.testing.assert_close(actual64, expected, **tolerance.as_kwargs())


def check(case: AttentionCase, inputs: Sequence[Tensor]) -> Run:
    run = run_kernels(inputs, case.scale, case.W)
    assert_close(run.output, expected_output(inputs, case.scale, case.W))
    return run


def with_splits(splits: int) -> Callable[[Launch], Launch]:
    """Has an attention launch split its keys that many times."""

    def change(launch: Launch) -> Launch:
        if "splits" not in launch.arguments:
            return launch
        assert splits <= launch.arguments["splits"], "more than the workspace was made for"
        return replace(
            launch,
            sizes={**launch.sizes, "splits": splits},
            arguments={**launch.arguments, "splits": splits},
        )

    return change


@pytest.mark.parametrize(
    "case", (*ATTENTION_CASES, *WIDE_WINDOW_CASES), ids=lambda case: case.label
)
def test_kernels_equal_the_definition(case: AttentionCase) -> None:
    run = check(case, case.inputs())
    attend = "attend_decode" if case.S <= MAX_DECODE_TOKENS else "attend_prompt"
    assert run.kernels == (["keep_threshold", attend] if 0 < case.W < case.C else [attend])


# Of head size 64 a block has 32 keys, and a share a multiple of 64.
DECODE = AttentionCase(label="", S=1, C=530, W=0, write_index=(517,), D=64, Nkv=1, N=1, Nq=2)


@pytest.mark.parametrize("splits", range(1, 9))
def test_any_number_of_splits_gives_the_definition(splits: int) -> None:
    case = replace(DECODE, write_index=(517, 63, 64))
    inputs = case.inputs()
    actual = run_kernels(inputs, case.scale, case.W, with_splits(splits)).output
    assert_close(actual, expected_output(inputs, case.scale, case.W))


@pytest.mark.parametrize(("S", "dtype"), [(2, torch.float32), (9, torch.float16)], ids=str)
def test_launches_give_the_same_again(S: int, dtype: torch.dtype) -> None:
    case = replace(DECODE, S=S, C=300, W=40, write_index=(280,), score_levels=3)
    inputs = case.inputs(dtype)
    actual = run_kernels(inputs, case.scale, case.W, runs=3).output
    assert_close(actual, expected_output(inputs, case.scale, case.W))


def test_many_keys_are_split_among_programs() -> None:
    run = check(DECODE, DECODE.inputs())
    assert run.launched[0].sizes["splits"] == 9


def test_every_length_of_a_row_is_attended_by_the_same_launch() -> None:
    """A CUDA graph holds the launches and is replayed while the rows grow."""
    case = replace(DECODE, C=200, write_index=(0,), D=16, Nq=2, Nkv=1, N=1)
    query, key, value, score, _ = case.inputs()
    tensors = dict(zip(NAMES, map(aligned, case.inputs()), strict=False))
    tensors["attention_output"] = zeros_at(16, query.numel(), query.dtype).view(1, 1, -1)
    kernels = kernels_for(tensors, case.scale, 0)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    workspace = zeros_at(16, kernels.workspace_bytes(shapes) // 4, torch.float32)
    counters = zeros_at(16, kernels.counters(shapes), torch.int32)
    launches = kernels.launches(
        shapes,
        {name: tensor.data_ptr() for name, tensor in tensors.items()},
        workspace.data_ptr(),
        counters.data_ptr(),
    )
    launcher = InterpreterLauncher(kernels.specs)
    for start in (0, 1, 62, 127, 128, 129, 199):
        tensors["write_index"][:] = start
        tensors["attention_output"].fill_(torch.nan)
        launcher.run(launches)
        inputs = (query, key, value, score, tensors["write_index"])
        assert_close(tensors["attention_output"], expected_output(inputs, case.scale, 0))


def label(value: AttentionCase | torch.dtype) -> str:
    if isinstance(value, torch.dtype):
        return str(value)
    case = value
    rows = ",".join(map(str, case.write_index))
    return f"S{case.S}-at{rows}-D{case.D}-q{case.Nq}kv{case.Nkv}n{case.N}-shared{case.shared}"


DECODE_SHAPES = [
    AttentionCase(label="", S=S, C=150, W=0, write_index=rows, Nq=Nq, Nkv=Nkv, N=N, D=D, shared=one)
    for S, rows, (Nq, Nkv, N), D, one in (
        (1, (149,), (2, 1, 1), 128, False),
        (1, (0, 148), (4, 2, 4), 32, False),
        (1, (3, 149, 77), (4, 2, 1), 16, True),
        (1, (3, 149), (4, 4, 1), 64, True),
        (1, (31, 140), (4, 4, 4), 64, True),
        (2, (96, 1), (6, 2, 2), 48, False),
        (2, (11, 120), (6, 2, 6), 24, False),
        (3, (80,), (6, 3, 2), 40, False),  # two scores meet in the second group
        (4, (100,), (5, 1, 5), 80, False),
        (1, (100,), (8, 1, 8), 16, False),
        (8, (60,), (2, 2, 2), 8, False),
        (1, (140,), (1, 1, 1), 256, False),
    )
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in DECODE_SHAPES),
        *((case, torch.float16) for case in DECODE_SHAPES[::2]),
        *((case, torch.bfloat16) for case in DECODE_SHAPES[::3]),
    ],
    ids=label,
)
def test_decode_of_any_heads_and_batch_equals_the_definition(
    case: AttentionCase, dtype: torch.dtype
) -> None:
    assert check(case, case.inputs(dtype)).kernels == ["attend_decode"]


PROMPT_SHAPES = [
    AttentionCase(label="", S=S, C=150, W=0, write_index=rows, Nq=Nq, Nkv=Nkv, N=N, D=D, shared=one)
    for S, rows, (Nq, Nkv, N), D, one in (
        (37, (0,), (2, 1, 1), 128, False),
        (33, (0, 117), (4, 2, 4), 32, False),
        (9, (140,), (4, 2, 2), 16, False),
        (150, (0,), (2, 2, 2), 64, False),
        (50, (77, 0, 100), (3, 1, 1), 24, False),
        (21, (129,), (6, 2, 6), 48, False),
        (21, (64,), (6, 3, 2), 40, False),
        (40, (11, 32), (4, 2, 1), 80, True),
        (40, (11, 32), (4, 4, 4), 64, True),
        (12, (100,), (8, 1, 1), 8, False),
        (17, (31,), (1, 1, 1), 256, False),
    )
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in PROMPT_SHAPES),
        *((case, torch.float16) for case in PROMPT_SHAPES[::2]),
    ],
    ids=label,
)
def test_prompt_of_any_heads_and_batch_equals_the_definition(
    case: AttentionCase, dtype: torch.dtype
) -> None:
    assert check(case, case.inputs(dtype)).kernels == ["attend_prompt"]


def test_chunks_of_a_prompt_give_what_one_pass_gives() -> None:
    case = AttentionCase(label="", S=37, C=37, W=9, score_levels=5)
    query, *cache, _ = case.inputs()
    whole = expected_output(case.inputs(), case.scale, case.W)
    begin = 0
    for end in (12, 13, 17, 37):
        inputs = (query[:, :, begin:end], *cache, torch.tensor([begin]))
        actual = run_kernels(inputs, case.scale, case.W).output
        assert_close(actual, whole[:, begin:end])
        begin = end


@pytest.mark.parametrize("S", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_may_be_stored_in_half_precision(S: int, dtype: torch.dtype) -> None:
    case = AttentionCase(label="", S=S, C=40, W=9, write_index=(20,), D=16)
    query, key, value, score, write_index = case.inputs()
    check(case, (query, key, value, score.to(dtype), write_index))


def kept_keys(
    score: Tensor, write_index: Tensor, S: int, window: int, batch: int
) -> tuple[Tensor, Tensor]:
    """Which keys the thresholds keep and which the definition keeps, [B, N, S, C]."""
    N, C = score.shape[1], score.shape[2]
    query = torch.zeros(batch, N, S, 8)
    cache = torch.zeros(batch, N, C, 8)
    run = run_kernels((query, cache, cache, score, write_index), 1.0, window)
    assert run.kernels[0] == "keep_threshold"
    size = batch * N * S
    threshold = run.workspace[:size].view(batch, N, S, 1)
    behind = (run.launched[0].arguments["limit"] - run.launched[0].arguments["threshold"]) // 4
    limit = run.workspace.view(torch.int32)[behind : behind + size].view(batch, N, S, 1)
    slot = torch.arange(C)
    visible = slot <= (write_index[:, None] + torch.arange(S))[:, None, :, None]  # [B, 1, S, C]
    score = score[..., 0].float().expand(batch, -1, -1)
    row = score[:, :, None, :]
    kept = visible & ((row > threshold) | ((row == threshold) & (slot <= limit)))
    return kept, keep_largest_scores(score, visible, window)


def with_ties(levels: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Scores of few distinct values, both signs and both zeros among them."""
    generator = torch.Generator().manual_seed(levels)
    score = torch.randint(levels, size, generator=generator) - levels // 2
    score = (score * 0.37).to(dtype)
    score[..., ::2, :] = torch.where(score[..., ::2, :] == 0, -0.0, score[..., ::2, :])
    return score


@pytest.mark.parametrize("window", [1, 2, 31, 64, 119, 120, 121, 122, 129])
def test_thresholds_keep_what_the_definition_keeps(window: int) -> None:
    score = with_ties(9, (1, 2, 130, 1), torch.float32)
    kept, expected = kept_keys(score, torch.tensor([120]), S=3, window=window, batch=1)
    assert torch.equal(kept, expected)


def test_a_row_up_to_the_window_keeps_every_key() -> None:
    score = with_ties(5, (4, 1, 70, 1), torch.float32)
    index = torch.tensor([38, 39, 40, 0])
    kept, expected = kept_keys(score, index, S=1, window=40, batch=4)
    assert torch.equal(kept, expected)
    assert kept.sum(-1).flatten().tolist() == [39, 40, 40, 1]


@pytest.mark.parametrize("levels", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("dtype", NORM_ERROR, ids=str)
def test_ties_at_the_window_keep_the_lower_slots(levels: int, dtype: torch.dtype) -> None:
    score = with_ties(levels, (2, 1, 1100, 1), dtype)
    index = torch.tensor([1099, 700])
    kept, expected = kept_keys(score, index, S=1, window=333, batch=2)
    assert torch.equal(kept, expected)


def test_queries_of_a_prompt_select_each_for_itself() -> None:
    score = with_ties(4, (2, 1, 300, 1), torch.float32)
    kept, expected = kept_keys(score, torch.tensor([285, 0]), S=13, window=11, batch=2)
    assert torch.equal(kept, expected)


def test_scores_that_rows_share_are_selected_for_each_row() -> None:
    score = with_ties(4, (1, 2, 90, 1), torch.float32)
    kept, expected = kept_keys(score, torch.tensor([80, 3]), S=2, window=7, batch=2)
    assert torch.equal(kept, expected)


def test_scores_of_any_size_are_selected_among() -> None:
    extremes = (LOWEST, LOWEST / 2, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1.0, 1e30)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    score = torch.tensor(extremes).repeat(7)[order].view(1, 1, 70, 1)
    for window in (1, 7, 8, 16, 30, 42, 57, 69):
        kept, expected = kept_keys(score, torch.tensor([69]), S=1, window=window, batch=1)
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("hidden", [LOWEST, LOWEST / 2])
@pytest.mark.parametrize("S", [1, 24])
def test_query_whose_keys_are_all_hidden_averages_the_visible_values(S: int, hidden: float) -> None:
    case = AttentionCase(label="", S=S, C=230, W=0, write_index=(200, 3), N=4, D=64, shared=True)
    query, key, value, score, write_index = case.inputs()
    score[:, 1] = hidden
    actual = run_kernels((query, key, value, score, write_index), case.scale, 0).output
    for row, start in enumerate(case.write_index):
        for token in range(S):
            mean = value[row, 0, : start + token + 1].mean(0)  # head 1 belongs to group 0
            torch.testing.assert_close(actual[row, token, 64:128], mean)
    if hidden != LOWEST:  # the definition gives that number to keys that are not there as well
        expected = expected_output((query, key, value, score, write_index), case.scale, 0)
        assert_close(actual, expected)


@pytest.mark.parametrize("S", [1, 24])
def test_hidden_keys_weigh_nothing_beside_others(S: int) -> None:
    case = AttentionCase(label="", S=S, C=230, W=0, write_index=(200,), N=1, D=16, shared=True)
    query, key, value, score, write_index = case.inputs()
    score[:, :, 1:] = torch.where(score[:, :, 1:] > 0, score[:, :, 1:], LOWEST / 2)
    check(case, (query, key, value, score, write_index))


def untouched_memory(*shape: int) -> Tensor:
    """float32 zeros that take no memory where nothing is read or written."""
    size = 4 * torch.Size(shape).numel()
    no_reserve = 0x4000  # MAP_NORESERVE of Linux, which mmap names from Python 3.13 on
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


@pytest.mark.parametrize("S", [1, 9])
def test_cache_of_more_than_two_billion_numbers_is_addressed(S: int) -> None:
    Nkv, C, D, filled = 10, 2**21, 128, 12
    heads = untouched_memory(2, Nkv, C, D)
    assert heads[:, 1:].numel() > 2**31
    small = AttentionCase(
        label="", S=S, C=filled, W=0, write_index=(filled - S,) * 2, Nq=Nkv, Nkv=Nkv, N=1, D=D
    ).inputs()
    query, key, _, score, write_index = map(aligned, small)
    tall_score = untouched_memory(2, 1, C, 1)
    heads[:, :, :filled] = key
    tall_score[:, :, :filled] = score
    output = zeros_at(16, query.numel(), torch.float32).view(2, S, Nkv * D)
    # Keys stand for values as well: one such tensor is enough.
    tensors = dict(zip(NAMES, (query, heads, heads, tall_score, write_index, output), strict=True))
    kernels = kernels_for(tensors, 0.1, 0)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    workspace = zeros_at(16, kernels.workspace_bytes(shapes) // 4, torch.float32)
    counters = zeros_at(16, kernels.counters(shapes), torch.int32)
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    launches = kernels.launches(shapes, addresses, workspace.data_ptr(), counters.data_ptr())
    InterpreterLauncher(kernels.specs).run(launches)
    assert_close(output, expected_output((query, key, key, score, write_index), 0.1, 0))


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """One step of attention with what comes before it; the shapes of a generation."""

    label: str
    Nq: int = 4
    Nkv: int = 2
    N: int = 2
    D: int = 32
    qk_norm: bool = False
    rotate_query: bool = True
    rotate_key: bool = True
    computes_score: bool = True
    shared: bool = False
    starts: tuple[int, ...] = (150, 0, 63)
    C: int = 200


STEP_CASES = (
    StepCase(label="scores per key head, norms", qk_norm=True),
    StepCase(label="scores per query head", N=4, starts=(128, 64)),
    StepCase(label="one group of three", Nq=3, Nkv=1, N=3, D=24, qk_norm=True),
    StepCase(label="one score for all heads", N=1, starts=(199,)),
    StepCase(
        label="stored mask, keys not rotated",
        Nkv=4, N=4, rotate_key=False, computes_score=False, shared=True,
    ),
    StepCase(
        label="no mask", Nkv=4, N=1, rotate_key=False, computes_score=False, shared=True,
    ),
    StepCase(label="append alone", rotate_query=False, rotate_key=False, computes_score=False),
    StepCase(label="norms alone", qk_norm=True, rotate_query=False, rotate_key=False),
)  # fmt: skip


class Step:
    """Random tensors of a case, the kernel's launch on them, and plain formulas of the result."""

    def __init__(
        self,
        case: StepCase,
        dtype: torch.dtype,
        row_dtype: torch.dtype = torch.float32,
        score_dtype: torch.dtype = torch.float32,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(len(case.label))

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.case = case
        self.dtype = dtype
        B, C, D = len(case.starts), case.C, case.D
        width = (case.Nq + 2 * case.Nkv) * D + (case.N if case.computes_score else 0)
        self.rows = aligned(randn(B, width).to(row_dtype))
        self.key = aligned(randn(B, case.Nkv, C, D).to(dtype))
        self.value = aligned(randn(B, case.Nkv, C, D).to(dtype))
        self.score = aligned(2 * randn(1 if case.shared else B, case.N, C).to(score_dtype))
        self.write_index = aligned(torch.tensor(case.starts))
        self.position = aligned(torch.tensor([7 * start % 100 for start in case.starts]))
        self.norms = [aligned(1 + 0.2 * randn(D)) for _ in range(2)]
        angle = torch.arange(100)[:, None] / 100.0 ** (torch.arange(D // 2) / D)
        self.cos, self.sin = aligned(angle.cos()), aligned(angle.sin())
        self.A = aligned(0.5 * randn(case.N))
        self.output = aligned(torch.full((B, case.Nq * D), torch.nan, dtype=output_dtype or dtype))
        for row, start in enumerate(case.starts):
            # What the slot of the new token held before must not matter.
            self.key[row, :, start:] = self.value[row, :, start:] = torch.nan
            if case.computes_score:
                self.score[row, :, start:] = torch.nan

    def spec(self) -> KernelSpec:
        case = self.case
        return make_step_attention_spec(
            query_heads=case.Nq,
            key_heads=case.Nkv,
            score_heads=case.N,
            head_size=case.D,
            dtype=str(self.dtype).removeprefix("torch."),
            row_dtype=str(self.rows.dtype).removeprefix("torch."),
            score_dtype=str(self.score.dtype).removeprefix("torch."),
            qk_norm=case.qk_norm,
            rotate_query=case.rotate_query,
            rotate_key=case.rotate_key,
            computes_score=case.computes_score,
            output_dtype=str(self.output.dtype).removeprefix("torch."),
        )

    def run(self, programs: int | None = None) -> None:
        """Run the launch, or only that many programs of each split."""
        case, spec = self.case, self.spec()
        B = len(case.starts)
        plan = plan_decode(spec, case.C, B)
        values = zeros_at(16, plan.value_bytes // 4, torch.float32).fill_(torch.nan)
        masses = zeros_at(16, plan.mass_bytes // 4, torch.float32).fill_(torch.nan)
        counters = zeros_at(16, plan.counters, torch.int32)
        tensors = {
            "query": self.rows, "key": self.key, "value": self.value, "score": self.score,
            "write_index": self.write_index, "partial_values": values, "partial_masses": masses,
            "counters": counters, "output": self.output, "position": self.position,
            "query_norm": self.norms[0], "key_norm": self.norms[1], "cos": self.cos,
            "sin": self.sin, "A": self.A,
        }  # fmt: skip
        launch = Launch(
            kernel=spec.name,
            sizes={"splits": plan.splits if programs is None else programs, "rows": B},
            arguments={
                **{name: tensor.data_ptr() for name, tensor in tensors.items()},
                "threshold": 0,
                "limit": 0,
                "S": 1,
                "C": case.C,
                "splits": plan.splits,
                "score_row_stride": 0 if case.shared else case.N * case.C,
                "scale": 0.3,
                "eps": 1e-6,
            },
        )
        InterpreterLauncher([spec]).launch(launch)
        if programs is None:
            assert not counters.any()

    def head(self, first: int, count: int, norm: Tensor, rotate: bool) -> Tensor:
        """Heads of the rows, normed and rotated where the case says so: float64 [B, count, D]."""
        D = self.case.D
        x = self.rows[:, first * D : (first + count) * D].double().view(-1, count, D)
        if self.case.qk_norm:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm
        if rotate:
            cos, sin = (table[self.position][:, None].double() for table in (self.cos, self.sin))
            low, high = x.chunk(2, dim=-1)
            x = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
        return x

    def expected(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, and key, value and score caches after the step."""
        case = self.case
        new_key = self.head(case.Nq, case.Nkv, self.norms[1], case.rotate_key)
        D, first_value = case.D, case.Nq + case.Nkv
        new_value = self.rows[:, first_value * D : (first_value + case.Nkv) * D]
        key, value, score = self.key.clone(), self.value.clone(), self.score.clone()
        for row, start in enumerate(case.starts):
            key[row, :, start] = new_key[row].to(self.dtype)
            value[row, :, start] = new_value[row].view(case.Nkv, D).to(self.dtype)
            if case.computes_score:
                dt = self.rows[row, -case.N :].double()
                new_score = torch.exp(self.A * torch.nn.functional.softplus(dt))
                score[row, :, start] = new_score.to(score.dtype)
        query = self.head(0, case.Nq, self.norms[0], case.rotate_query)[:, :, None]
        finite = [tensor.nan_to_num() for tensor in (key.double(), value.double(), score.float())]
        output = dynamic_mask_attention_definition(
            query, finite[0], finite[1], finite[2][..., None], self.write_index, 0.3, 0
        )
        return output[:, 0], key, value, score


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in STEP_CASES),
        *((case, torch.float16) for case in STEP_CASES[::2]),
    ],
    ids=lambda value: value.label if isinstance(value, StepCase) else str(value),
)
def test_step_norms_rotates_scores_and_appends(case: StepCase, dtype: torch.dtype) -> None:
    step = Step(case, dtype)
    output, key, value, score = step.expected()
    step.run()
    assert_close(step.output, output)
    # A float16 key may round the other way where the sum before it differs in its last bit.
    bounds = {"rtol": 2e-3 if dtype == torch.float16 else 2e-5, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(step.key, key, **bounds)
    torch.testing.assert_close(step.score, score, rtol=1e-6, atol=0, equal_nan=True)
    assert torch.equal(step.value.nan_to_num(), value.nan_to_num())
    for row, start in enumerate(case.starts):  # nothing else is written
        others = torch.arange(case.C) != start
        for now, then in ((step.key, key), (step.value, value)):
            assert torch.equal(now[row][:, others].nan_to_num(), then[row][:, others].nan_to_num())


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (STEP_CASES[0], torch.bfloat16),
        *((STEP_CASES[index], torch.float16) for index in (0, 1, 4, 5)),
    ],
    ids=lambda value: value.label if isinstance(value, StepCase) else str(value),
)
def test_output_of_a_step_may_be_float32_beside_caches_of_half_precision(
    case: StepCase, dtype: torch.dtype
) -> None:
    step = Step(case, dtype, output_dtype=torch.float32)
    output, *_ = step.expected()
    step.run()
    # What is left is the new key's and value's rounding, which may go the other way.
    error = (step.output.double() - output).norm() / output.norm()
    assert error <= (1e-4 if dtype == torch.float16 else 5e-3)


def test_step_takes_rows_in_half_precision() -> None:
    step = Step(STEP_CASES[0], torch.float16, torch.float16)
    output, *_ = step.expected()
    step.run()
    assert_close(step.output, output)


def test_step_attends_by_the_score_as_it_is_stored() -> None:
    step = Step(STEP_CASES[0], torch.float32, score_dtype=torch.float16)
    step.A.fill_(1.0)
    step.rows[:, -2:] = 3.0  # a score of some 21.09, which float16 holds in steps of 1/64
    step.score.copy_(torch.where(step.score.isnan(), step.score, 21.0))
    output, _, _, score = step.expected()
    step.run()
    torch.testing.assert_close(step.score, score, rtol=0, atol=0, equal_nan=True)
    assert_close(step.output, output)


def test_step_attends_by_key_and_value_as_they_are_stored() -> None:
    case = StepCase(label="", rotate_query=False, rotate_key=False, computes_score=False)
    step = Step(replace(case, starts=(1,)), torch.float16)
    number = 1000.3  # which float16 holds in steps of 1/2
    step.rows.fill_(number)
    step.rows[:, : case.Nq * case.D] = 0.0
    step.rows[:, : case.Nq * case.D : case.D] = 2.0
    # An equal key of the opposite value: together they give zero, if the new ones are rounded.
    step.key[:, :, 0] = number
    step.value[:, :, 0] = -number
    step.score.zero_()
    step.run()
    assert not step.output.any()


def test_extreme_scores_of_a_step_are_finite() -> None:
    """softplus of a large number is that number, of a small one 0."""
    step = Step(STEP_CASES[0], torch.float32)
    step.A.fill_(0.5)
    step.rows[:, -2:] = torch.tensor([90.0, -200.0])
    *_, score = step.expected()
    step.run()
    torch.testing.assert_close(step.score, score, rtol=1e-5, atol=0, equal_nan=True)
    assert step.output.isfinite().all()


def test_only_the_program_of_the_last_share_appends() -> None:
    case = replace(STEP_CASES[0], starts=(150,), D=64)
    step = Step(case, torch.float32)
    before = step.key.clone(), step.value.clone(), step.score.clone()
    step.run(programs=2)  # of three that have a share of 151 keys
    for now, then in zip((step.key, step.value, step.score), before, strict=True):
        assert torch.equal(now.nan_to_num(), then.nan_to_num())
    step.run(programs=3)
    assert step.key[0, :, 150].isfinite().all()
    assert step.score[0, :, 150].isfinite().all()


def shapes_of(B: int, S: int, C: int, *, Nq: int = 4, Nkv: int = 2, N: int = 2, D: int = 8):
    return {
        "query": (B, Nq, S, D),
        "key": (B, Nkv, C, D),
        "value": (B, Nkv, C, D),
        "score": (B, N, C, 1),
        "write_index": (B,),
        "attention_output": (B, S, Nq * D),
    }


TYPES = {**dict.fromkeys(NAMES, "float16"), "score": "float32", "write_index": "int64"}
ADDRESSES = dict.fromkeys(NAMES, 16)


def test_scratch_memory_for_the_largest_shapes_serves_smaller_ones() -> None:
    kernels = make_kernels({"scale": 1.0, "keep_window_size": 64}, shapes_of(-1, -1, -1), TYPES)
    largest = shapes_of(17, 40, 3000)
    for B in (1, 2, 3, 5, 16, 17):
        for S in (1, 2, 5, 8, 9, 40):
            for C in (1, 64, 65, 700, 3000):
                shapes = shapes_of(B, S, C)
                assert kernels.counters(shapes) <= kernels.counters(largest)
                launches = kernels.launches(shapes, ADDRESSES, 0, 16)
                arguments = launches[-1].arguments
                assert (len(launches) == 2) == (C > 64)
                if S > MAX_DECODE_TOKENS:
                    continue
                attend = next(spec for spec in kernels.specs if spec.name == launches[-1].kernel)
                plan = plan_decode(attend, C, B * S)
                assert 1 <= plan.splits <= 64
                end = arguments["partial_masses"] + plan.mass_bytes
                assert end <= kernels.workspace_bytes(shapes) <= kernels.workspace_bytes(largest)
                assert plan.counters <= kernels.counters(shapes)


def test_regions_of_the_scratch_memory_do_not_overlap() -> None:
    kernels = make_kernels({"scale": 1.0, "keep_window_size": 64}, shapes_of(-1, -1, -1), TYPES)
    threshold, attend = kernels.launches(shapes_of(3, 5, 700), ADDRESSES, 0, 16)
    places = {**threshold.arguments, **attend.arguments}
    sizes = {
        "threshold": 4 * 3 * 2 * 5,
        "limit": 4 * 3 * 2 * 5,
        "partial_values": 4 * 15 * 4 * attend.arguments["splits"] * 8,
        "partial_masses": 4 * 15 * 4 * attend.arguments["splits"] * 2,
    }
    end = 0
    for name, size in sizes.items():
        assert places[name] >= end
        end = places[name] + size
    assert end <= kernels.workspace_bytes(shapes_of(3, 5, 700))


def test_variants_have_names_of_their_own() -> None:
    names: dict[str, KernelSpec] = {}
    for heads in ((4, 2, 2), (4, 2, 4), (4, 4, 4), (2, 2, 1)):
        for dtype in ("float16", "float32", "bfloat16"):
            for score in ("float16", "float32"):
                for D in (32, 64):
                    Nq, Nkv, N = heads
                    shapes = shapes_of(-1, -1, -1, Nq=Nq, Nkv=Nkv, N=N, D=D)
                    types = {**dict.fromkeys(NAMES, dtype), "score": score, "write_index": "int64"}
                    made = make_kernels({"scale": 1.0, "keep_window_size": 5}, shapes, types)
                    for spec in made.specs:
                        assert names.setdefault(spec.name, spec) == spec
    options = [
        make_step_attention_spec(
            query_heads=4, key_heads=2, score_heads=2, head_size=32, dtype="float16",
            row_dtype="float32", score_dtype="float32", qk_norm=bool(bits & 1),
            rotate_query=bool(bits & 2), rotate_key=bool(bits & 4), computes_score=bool(bits & 8),
        )
        for bits in range(16)
    ]  # fmt: skip
    options += [
        make_step_attention_spec(
            query_heads=4, key_heads=2, score_heads=2, head_size=32, dtype=dtype,
            row_dtype="float32", score_dtype="float32", qk_norm=True, rotate_query=True,
            rotate_key=True, computes_score=True, output_dtype=output_dtype,
        )
        for dtype in ("float16", "float32")
        for output_dtype in (None, "bfloat16", "float32")
    ]  # fmt: skip
    for output_dtype in ("float16", "float32"):
        options += make_step_attention(
            query_heads=4, key_heads=2, score_heads=2, head_size=32, dtype="float16",
            score_dtype="float32", output_dtype=output_dtype, scale=1.0, keep_window_size=5,
        ).specs  # fmt: skip
    for spec in options:
        assert names.setdefault(spec.name, spec) == spec


def test_without_a_window_nothing_selects() -> None:
    kernels = make_kernels({"scale": 1.0, "keep_window_size": 0}, shapes_of(-1, -1, -1), TYPES)
    assert len(kernels.specs) == 2
    assert all(not spec.constants["SELECT"] for spec in kernels.specs)


@pytest.mark.parametrize(
    ("changes", "types", "message"),
    [
        ({"Nq": 3, "Nkv": 2, "N": 3}, {}, "3 query heads, expected 1 to 8 for each of 2"),
        ({"Nq": 18}, {}, "18 query heads, expected 1 to 8 for each of 2"),
        ({"N": 3}, {}, "3 score heads, expected a divisor of the 4 query heads"),
        ({"D": 257}, {}, "D is 257, expected at most 256"),
        ({"D": -1}, {}, "D are 4, 2, 2 and -1, expected positive numbers"),
        ({}, {"query": "float64"}, "query is float64, expected one of float32, float16, bfloat16"),
        ({}, {"key": "float32"}, "key is float32, expected float16 like query"),
        ({}, {"score": "int8"}, "score is int8, expected one of float32"),
        ({}, {"write_index": "int32"}, "write_index is int32, expected int64"),
    ],
)
def test_what_no_kernel_covers_is_an_error_that_says_so(
    changes: dict[str, int], types: dict[str, str], message: str
) -> None:
    shapes = shapes_of(-1, -1, -1, **changes)
    with pytest.raises(ValueError, match=re.escape(message) + ".* Build without plugins"):
        make_kernels({"scale": 1.0, "keep_window_size": 0}, shapes, {**TYPES, **types})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": (2, 2, 99, 8)}, r"value is \[2, 2, 100, 8\], expected \[2, 2, 99, 8\]"),
        ({"score": (3, 2, 100, 1)}, r"score is \[3, 2, 100, 1\], expected \[2, 2, 100, 1\]"),
        (shapes_of(1, 1, 2**28), "C is 268435456, expected at most 268435455 slots of 8 numbers"),
        (shapes_of(8192, 8, 10), "65536 queries of a decode step, expected at most 65535"),
    ],
)
def test_shape_beyond_the_kernels_is_an_error_that_says_so(
    changes: dict[str, tuple[int, ...]], message: str
) -> None:
    kernels = make_kernels({"scale": 1.0, "keep_window_size": 0}, shapes_of(-1, -1, -1), TYPES)
    with pytest.raises(ValueError, match=f"made for other shapes: .*{message}"):
        kernels.launches({**shapes_of(2, 1, 100), **changes}, ADDRESSES, 0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_size": 33}, "D is 33, expected an even number to rotate halves"),
        ({"row_dtype": "int8"}, "row_dtype is int8, expected one of float32"),
        ({"output_dtype": "int8"}, "output_dtype is int8, expected one of float32"),
        ({"score_heads": 3}, "3 score heads, expected a divisor of the 4 query heads"),
    ],
)
def test_step_that_no_kernel_covers_is_an_error_that_says_so(
    changes: dict[str, int | str], message: str
) -> None:
    arguments = {
        "query_heads": 4, "key_heads": 2, "score_heads": 2, "head_size": 32, "dtype": "float16",
        "row_dtype": "float32", "score_dtype": "float32", "qk_norm": True, "rotate_query": True,
        "rotate_key": True, "computes_score": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        make_step_attention_spec(**{**arguments, **changes})
