"""Appending a pass's tokens and attending to them after that, interpreted, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from plugins.dynamic_mask_attention.op import dynamic_mask_attention_definition
from plugins.dynamic_mask_attention.step_launches import StepAppend, make_step_attention
from plugins.kernel_spec import KernelSpec
from tests.interpreter import InterpreterLauncher
from tests.kernel_runs import Guarded, guarded

EPS = 1e-3  # large enough to be missed
POSITIONS = 50


@dataclass(frozen=True, kw_only=True)
class AppendCase:
    """One pass over S tokens of each row; the shapes of a generation."""

    label: str
    Nq: int = 4
    Nkv: int = 2
    N: int = 2
    D: int = 32
    qk_norm: bool = False
    rotate_query: bool = True
    rotate_key: bool = True
    computes_score: bool = True
    starts: tuple[int, ...] = (17, 0)
    S: int = 3
    C: int = 40


CASES = (
    AppendCase(label="scores per key head, norms", qk_norm=True),
    AppendCase(label="scores per query head", N=4, S=1, starts=(17, 0, 9)),
    AppendCase(label="one group of three", Nq=3, Nkv=1, N=3, D=24, qk_norm=True, starts=(39, 35)),
    AppendCase(label="one score for all heads", N=1, starts=(2,), D=128),
    AppendCase(
        label="no scores, keys not rotated", Nkv=4, N=1, rotate_key=False, computes_score=False
    ),
    AppendCase(label="append alone", rotate_query=False, rotate_key=False, computes_score=False),
    AppendCase(label="norms alone", D=9, qk_norm=True, rotate_query=False, rotate_key=False),
    AppendCase(label="no slot at all", Nq=2, Nkv=1, N=1, starts=(40, 39, 45), S=2),
)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rms_normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


class Pass:
    """Random tensors of a case, the kernels' launches on them, and plain formulas of the result."""

    def __init__(
        self, case: AppendCase, dtype: torch.dtype, row_dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(len(case.label))

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.case, self.dtype = case, dtype
        B, S, C, D = len(case.starts), case.S, case.C, case.D
        width = (case.Nq + 2 * case.Nkv) * D + (case.N if case.computes_score else 0)
        key, value = (randn(B, case.Nkv, C, D).to(dtype) for _ in range(2))
        score = 2 * randn(B, case.N, C, 1)
        for row, start in enumerate(case.starts):
            key[row, :, start:] = value[row, :, start:] = score[row, :, start:] = torch.nan
        angle = torch.arange(POSITIONS)[:, None] / 100.0 ** (torch.arange(D // 2) / D)
        # Rows beyond the slots have angles that must not be asked for.
        places = torch.tensor([7 * start % (POSITIONS - S) for start in case.starts])
        self.arrays = {
            "rows": guarded(randn(B * S, width).to(row_dtype)),
            "query": Guarded((B, case.Nq, S, D), dtype),
            "key": guarded(key),
            "value": guarded(value),
            "score": guarded(score),
            "write_index": guarded(torch.tensor(case.starts)),
            "position": guarded(places),
            "query_norm": guarded(1 + 0.2 * randn(D)),
            "key_norm": guarded(1 + 0.2 * randn(D)),
            "cos": guarded(angle.cos()),
            "sin": guarded(angle.sin()),
            "A": guarded(0.5 * randn(case.N)),
        }
        self.before = {name: array.tensor.clone() for name, array in self.arrays.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name].tensor

    @property
    def append(self) -> StepAppend:
        case = self.case
        return StepAppend(
            query_heads=case.Nq,
            key_heads=case.Nkv,
            score_heads=case.N,
            head_size=case.D,
            dtype=name_of(self.dtype),
            row_dtype=name_of(self["rows"].dtype),
            score_dtype="float32",
            qk_norm=case.qk_norm,
            rotate_query=case.rotate_query,
            rotate_key=case.rotate_key,
            computes_score=case.computes_score,
            eps=EPS,
        )

    def run(self, times: int = 2) -> None:
        """Append; a second time writes what is there already."""
        case = self.case
        unused = set()
        if not case.computes_score:
            unused |= {"score", "A"}
        if not case.qk_norm:
            unused |= {"query_norm", "key_norm"}
        if not (case.rotate_query or case.rotate_key):
            unused |= {"position", "cos", "sin"}
        launch = self.append.launch(
            batch=len(case.starts), tokens=case.S, slots=case.C,
            **{name: array.address for name, array in self.arrays.items() if name not in unused},
        )  # fmt: skip
        launcher = InterpreterLauncher([self.append.spec])
        launcher.launch(launch)
        first = {name: array.tensor.clone() for name, array in self.arrays.items()}
        launcher.run([launch] * (times - 1))
        for name, array in self.arrays.items():
            array.check(name)
            assert torch.equal(array.tensor.nan_to_num(7), first[name].nan_to_num(7))
            if name not in ("query", "key", "value", "score"):
                assert torch.equal(array.tensor, self.before[name]), f"{name} was written"

    def heads(self, first: int, count: int, norm: str | None, rotate: bool) -> Tensor:
        """Heads of the rows, normed and rotated where the case says so: float64 [B, count, S, D].

        Rotation is that of the token's own position.
        """
        case = self.case
        B, S, D = len(case.starts), case.S, case.D
        x = self["rows"][:, first * D : (first + count) * D].double().view(B, S, count, D)
        if norm and case.qk_norm:
            x = rms_normed(x, self[norm])
        if rotate:
            place = self["position"][:, None] + torch.arange(S)
            cos, sin = (self[name][place][:, :, None].double() for name in ("cos", "sin"))
            low, high = x.chunk(2, dim=-1)
            x = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
        return x.transpose(1, 2)

    def tokens(self) -> Iterator[tuple[int, int, int]]:
        """Sequence, token and slot of each token that has a slot."""
        for b, start in enumerate(self.case.starts):
            for s in range(self.case.S):
                if start + s < self.case.C:
                    yield b, s, start + s

    def expected(self) -> dict[str, Tensor]:
        """Query (of tokens that have a slot) and caches after the pass, caches in their types."""
        case = self.case
        new_key = self.heads(case.Nq, case.Nkv, "key_norm", case.rotate_key)
        new_value = self.heads(case.Nq + case.Nkv, case.Nkv, None, False)
        caches = {name: self.before[name].clone() for name in ("key", "value", "score")}
        dt = self["rows"].double().view(len(case.starts), case.S, -1)[..., -case.N :]
        new_score = torch.exp(self["A"] * torch.nn.functional.softplus(dt))
        for b, s, slot in self.tokens():
            caches["key"][b, :, slot] = new_key[b, :, s].to(self.dtype)
            caches["value"][b, :, slot] = new_value[b, :, s].to(self.dtype)
            if case.computes_score:
                caches["score"][b, :, slot, 0] = new_score[b, s].float()
        query = self.heads(0, case.Nq, "query_norm", case.rotate_query)
        return {"query": query, **caches}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES),
        *((case, torch.float16) for case in CASES[:2]),
        (CASES[0], torch.bfloat16),
    ],
    ids=lambda value: value.label if isinstance(value, AppendCase) else str(value),
)
def test_tokens_are_appended_where_there_is_a_slot(case: AppendCase, dtype: torch.dtype) -> None:
    step = Pass(case, dtype)
    expected = step.expected()
    step.run()
    # One rounding may go the other way; the interpreter cuts off to bfloat16.
    rtol = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for b, s, _ in step.tokens():
        torch.testing.assert_close(
            step["query"][b, :, s].double(), expected["query"][b, :, s], rtol=rtol, atol=2e-6
        )
    assert step["query"].isfinite().all()
    for name in ("key", "value", "score"):
        torch.testing.assert_close(
            step[name], expected[name], rtol=rtol, atol=2e-6, equal_nan=True
        )  # fmt: skip
        unchanged = step.before[name].isnan() == expected[name].isnan()
        assert torch.equal(
            step[name][unchanged].nan_to_num(7), step.before[name][unchanged].nan_to_num(7)
        ), f"{name} was written where no token belongs"


def test_rows_may_be_of_half_precision() -> None:
    step = Pass(CASES[0], torch.float32, torch.float16)
    expected = step.expected()
    step.run()
    for name in ("key", "value", "score"):
        torch.testing.assert_close(step[name], expected[name], rtol=2e-5, atol=2e-6, equal_nan=True)


def test_positions_of_tokens_without_a_slot_are_not_read() -> None:
    case = replace(CASES[0], starts=(37, 39))
    step = Pass(case, torch.float32)
    step["position"][:] = torch.tensor([POSITIONS - 3, POSITIONS - 1])
    step.before["position"] = step["position"].clone()
    step.run()  # what lies behind the tables makes NaN
    assert step["query"].isfinite().all()
    assert step["key"][0, :, 37:].isfinite().all()
    assert step["key"][1, :, 39].isfinite().all()


@pytest.mark.parametrize(
    ("S", "window", "dtype"),
    [
        (1, 12, torch.float16),
        (2, 12, torch.float32),
        (9, 12, torch.float16),
        (9, 0, torch.float32),
    ],
    ids=str,
)
def test_step_that_selects_appends_first_and_attends_after(
    S: int, window: int, dtype: torch.dtype
) -> None:
    """Append, thresholds and attention, with an output of float32."""
    case = replace(CASES[0], S=S, C=30)
    step = Pass(case, dtype)
    B, D = len(case.starts), case.D
    step.run(times=1)
    attention = make_step_attention(
        query_heads=case.Nq, key_heads=case.Nkv, score_heads=case.N, head_size=D,
        dtype=name_of(dtype), score_dtype="float32", output_dtype="float32", scale=0.3,
        keep_window_size=window,
    )  # fmt: skip
    output = Guarded((B, S, case.Nq * D), torch.float32)
    addresses = {
        name: step.arrays[name].address
        for name in ("query", "key", "value", "score", "write_index")
    }
    shapes = {name: tuple(step[name].shape) for name in addresses}
    addresses["attention_output"] = output.address
    shapes["attention_output"] = tuple(output.tensor.shape)
    workspace = Guarded((attention.workspace_bytes(shapes),), torch.uint8)
    counters = guarded(torch.zeros(attention.counters(shapes), dtype=torch.int32))
    launches = attention.launches(shapes, addresses, workspace.address, counters.address)
    kernels = [launch.kernel.partition("-")[0] for launch in launches]
    attend = "attend_decode" if S <= 8 else "attend_prompt"
    assert kernels == (["keep_threshold", attend] if window else [attend])
    results = []
    for _ in range(2):
        output.tensor.fill_(torch.nan)
        InterpreterLauncher(attention.specs).run(launches)
        output.check("output")
        workspace.check("workspace")
        assert not counters.tensor.any()
        results.append(output.tensor.clone())
    assert torch.equal(results[0], results[1])
    query, key, value = (step[name].double().nan_to_num() for name in ("query", "key", "value"))
    expected = dynamic_mask_attention_definition(
        query, key, value, step["score"].nan_to_num(), step["write_index"], 0.3, window
    )
    error = (results[0].double() - expected).norm() / expected.norm()
    # A tile of queries multiplies by p as a half-precision number.
    assert error <= (1e-6 if dtype == torch.float32 or S <= 8 else 4e-4)


def every_append() -> Iterator[KernelSpec]:
    plain = {
        "query_heads": 4, "key_heads": 2, "score_heads": 2, "head_size": 32, "dtype": "float16",
        "row_dtype": "float32", "score_dtype": "float32", "qk_norm": False, "rotate_query": False,
        "rotate_key": False, "computes_score": False,
    }  # fmt: skip
    yield StepAppend(**plain).spec
    for name in ("qk_norm", "rotate_query", "rotate_key", "computes_score"):
        yield StepAppend(**{**plain, name: True}).spec
    for name in ("dtype", "row_dtype", "score_dtype"):
        yield StepAppend(**{**plain, name: "bfloat16"}).spec
    for name, number in (("query_heads", 8), ("key_heads", 4), ("score_heads", 4)):
        yield StepAppend(**{**plain, name: number}).spec
    yield StepAppend(**{**plain, "head_size": 64}).spec


def test_variants_have_names_of_their_own() -> None:
    specs = list(every_append())
    assert len({spec.name for spec in specs}) == len(specs)


APPEND = Pass(CASES[0], torch.float16).append
ADDRESSES = {
    name: 16 * place
    for place, name in enumerate(Pass(CASES[0], torch.float16).arrays, start=1)
}  # fmt: skip


def test_launch_asks_for_what_it_reads_and_writes_and_no_more() -> None:
    sizes = {"batch": 2, "tokens": 3, "slots": 9}
    launch = APPEND.launch(**sizes, **ADDRESSES)
    assert launch.arguments.keys() == APPEND.spec.arguments.keys()
    assert {name: launch.arguments[name] for name in ADDRESSES} == ADDRESSES
    assert (launch.sizes, launch.arguments["S"], launch.arguments["C"]) == ({"rows": 6}, 3, 9)
    assert (APPEND.workspace_bytes, APPEND.counters) == (0, 0)
    for name in ADDRESSES:
        with pytest.raises(ValueError, match=f"{name} missing"):
            APPEND.launch(**sizes, **{**ADDRESSES, name: 0})
    plain = replace(
        APPEND, qk_norm=False, rotate_query=False, rotate_key=False, computes_score=False
    )
    with pytest.raises(ValueError, match="score unused, position unused, query_norm unused"):
        plain.launch(**sizes, **ADDRESSES)
    with pytest.raises(ValueError, match="2 sequences of 0 tokens and 9 slots"):
        APPEND.launch(**{**sizes, "tokens": 0}, **ADDRESSES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_size": 33}, "D is 33, expected an even number to rotate halves"),
        ({"row_dtype": "int8"}, "row_dtype is int8, expected one of float32"),
        ({"score_heads": 3}, "3 score heads, expected a divisor of the 4 query heads"),
    ],
)
def test_append_that_no_kernel_covers_is_refused(
    changes: dict[str, int | str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(APPEND, **changes)


def test_attention_that_no_kernel_covers_is_refused() -> None:
    arguments = {
        "query_heads": 4, "key_heads": 2, "score_heads": 2, "head_size": 32, "dtype": "float16",
        "score_dtype": "float32", "output_dtype": "float32", "scale": 1.0, "keep_window_size": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="output_dtype is int8, expected one of float32"):
        make_step_attention(**{**arguments, "output_dtype": "int8"})
    with pytest.raises(ValueError, match="keep_window_size is -1, expected 0 or more"):
        make_step_attention(**{**arguments, "keep_window_size": -1})
