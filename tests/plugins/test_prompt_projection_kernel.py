"""The kernels of a prompt's projections, interpreted, against float64 on the same numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from plugins.projection.launches import Activation, Epilogue
from plugins.projection.packing import WeightFormat, pack_weights, unpack_weights
from plugins.prompt_projection.launches import GatherRows, PromptProjection
from tests.interpreter import InterpreterLauncher
from tests.kernel_runs import Guarded, guarded

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# ‖error‖ of a token by ‖expected‖, by the type of the product: x is rounded to it, of weights only
# float32 ones are. The interpreter's dot is wrong for bfloat16.
TOLERANCES: dict[Activation, float] = {"float32": 1e-6, "float16": 5e-4}
FORMATS = (
    WeightFormat(kind="float32"),
    WeightFormat(kind="float16"),
    WeightFormat(kind="bfloat16"),
    WeightFormat(kind="int8"),
    WeightFormat(kind="int4", group=32),
    WeightFormat(kind="int4", group=64),
    WeightFormat(kind="int4", group=128),
)
EPILOGUES = ("plain", "silu", "silu_product", "residual", "scaled_residual")
TOKENS = (1, 7, 16, 17, 70)
EPS = 1e-3  # large enough to be missed


def label(fmt: WeightFormat) -> str:
    return f"{fmt.kind}{fmt.group or ''}"


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest of any token, as a share of what a token has on average."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected).norm(dim=-1)
    return (difference.max() / expected.norm(dim=-1).mean()).item()


def run(
    projection: PromptProjection, tokens: int, *, in_place: bool = False, size: float = 1.0
) -> float:
    """The error on random numbers; a second launch must write the same bits."""
    dtype = DTYPES[projection.input]
    rows, columns, outputs = projection.rows, projection.columns, projection.outputs
    numbers = randn(rows, columns, seed=7) * torch.linspace(1, 2, rows)[:, None]
    numbers *= (1 + torch.arange(columns) // 32 % 3) / columns**0.5
    packed = pack_weights([numbers.numpy()], projection.weights)
    stored = packed.weights
    if projection.weights.kind == "bfloat16":
        stored = stored.view(np.int16)
    arrays = {
        "x": guarded((size * randn(tokens, columns, seed=1)).to(dtype)),
        "weights": guarded(torch.from_numpy(stored)),
    }
    if packed.scales is not None:
        arrays["scales"] = guarded(torch.from_numpy(packed.scales))
    if projection.norm:
        arrays["norm"] = guarded(1 + randn(columns, seed=2))
    if projection.addend:
        arrays["addend"] = guarded(3 * randn(tokens, outputs, seed=3))
    if projection.epilogue in ("residual", "scaled_residual"):
        arrays["residual"] = guarded(9 * randn(tokens, outputs, seed=4))
    if projection.epilogue == "scaled_residual":
        arrays["residual_weight"] = guarded(randn(outputs, seed=5))
    before = {name: array.tensor.clone() for name, array in arrays.items()}
    expected = definition(projection, before, torch.from_numpy(unpack_weights(packed)).double())

    stride = projection.output_stride or outputs
    results = []
    for _ in range(2):
        wide = Guarded((tokens, stride), DTYPES[projection.output])
        if in_place:
            wide = arrays["residual"]
            wide.tensor.copy_(before["residual"])
        addresses = {name: array.address for name, array in arrays.items()}
        launch = projection.launch(tokens=tokens, output=wide.address, **addresses)
        InterpreterLauncher(projection.specs).launch(launch)
        for name, array in {**arrays, "output": wide}.items():
            array.check(name)
            if array is not wide:
                assert torch.equal(array.tensor, before[name]), name
        first = projection.output_offset
        written = (torch.arange(stride) >= first) & (torch.arange(stride) < first + outputs)
        assert wide.tensor[:, ~written].isnan().all()
        results.append(wide.tensor[:, written].clone())
    assert torch.equal(*results)
    return error(results[0], expected)


def definition(projection: PromptProjection, arrays: dict[str, Tensor], matrix: Tensor) -> Tensor:
    """What the projection is, in float64."""
    x = arrays["x"].double()
    if projection.norm:
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * arrays["norm"].double()
    y = x @ matrix.T
    if projection.epilogue == "silu":
        y = torch.nn.functional.silu(y)
    elif projection.epilogue == "silu_product":
        y = torch.nn.functional.silu(y[:, 0::2]) * y[:, 1::2]
    if projection.addend:
        y = y + arrays["addend"].double()
    if "residual" in arrays:
        weight = arrays["residual_weight"].double() if "residual_weight" in arrays else 1
        y = y + weight * arrays["residual"].double()
    return y


# Each format with each surrounding, and in turn each number of tokens.
CASES = [
    (fmt, norm, epilogue, TOKENS[index % len(TOKENS)])
    for index, (fmt, norm, epilogue) in enumerate(
        itertools.product(FORMATS, (False, True), EPILOGUES)
    )
]


@pytest.mark.parametrize(
    ("fmt", "norm", "epilogue", "tokens"),
    CASES,
    ids=[f"{label(f)}-{'norm' if n else 'bare'}-{e}-t{t}" for f, n, e, t in CASES],
)
def test_prompt_projection_equals_float64(
    fmt: WeightFormat, norm: bool, epilogue: Epilogue, tokens: int
) -> None:
    projection = PromptProjection(
        rows=38,
        columns=3 * max(fmt.group, 32),
        weights=fmt,
        input="float32",
        norm=norm,
        eps=EPS,
        epilogue=epilogue,
        dot="float32",
    )
    assert run(projection, tokens) < TOLERANCES["float32"]


@pytest.mark.parametrize("tokens", [5, 33])
@pytest.mark.parametrize(
    "fmt", [fmt for fmt in FORMATS if fmt.kind not in ("float32", "bfloat16")], ids=label
)
def test_product_of_float16_loses_the_rounding_of_x(fmt: WeightFormat, tokens: int) -> None:
    projection = PromptProjection(
        rows=38,
        columns=2 * max(fmt.group, 32),
        weights=fmt,
        input="float32",
        norm=True,
        eps=EPS,
        epilogue="scaled_residual",
        addend=True,
    )
    assert projection.dot_type == "float16"
    assert run(projection, tokens) < TOLERANCES["float16"]


def test_x_beyond_float16_is_normed_before_it_is_rounded() -> None:
    projection = PromptProjection(
        rows=18, columns=96, weights=FORMATS[1], input="float32", norm=True, eps=EPS
    )
    assert run(projection, 3, size=1e6) < TOLERANCES["float16"]


@pytest.mark.parametrize("type_", ["float16", "bfloat16"])
def test_half_precision_is_read_and_written(type_: Activation) -> None:
    projection = PromptProjection(
        rows=18, columns=64, weights=FORMATS[0], input=type_, output=type_, norm=True, eps=EPS
    )
    # The interpreter cuts a bfloat16 off where a GPU rounds it.
    assert run(projection, 3) < (4e-4 if type_ == "float16" else 6e-3)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("tokens", [1, 65])
def test_rows_and_tokens_need_not_fill_the_last_block(rows: int, tokens: int) -> None:
    projection = PromptProjection(rows=rows, columns=32, weights=FORMATS[0], input="float32")
    assert run(projection, tokens) < TOLERANCES["float32"]


@pytest.mark.parametrize(
    ("fmt", "columns"),
    [(FORMATS[0], 4), (FORMATS[1], 8), (FORMATS[1], 104), (FORMATS[3], 16), (FORMATS[3], 112)],
    ids=lambda value: label(value) if isinstance(value, WeightFormat) else str(value),
)
def test_columns_need_not_be_a_power_of_two(fmt: WeightFormat, columns: int) -> None:
    projection = PromptProjection(
        rows=6, columns=columns, weights=fmt, input="float32", norm=True, eps=EPS, dot="float32"
    )
    assert run(projection, 3) < TOLERANCES["float32"]


@pytest.mark.parametrize("tokens", [3, 20])
def test_rows_taller_than_a_block_stand_in_their_place(tokens: int) -> None:
    projection = PromptProjection(
        rows=1100, columns=32, weights=FORMATS[1], input="float32", dot="float32"
    )
    assert run(projection, tokens) < TOLERANCES["float32"]


@pytest.mark.parametrize("tokens", [2, 20])
def test_outputs_may_stand_apart_in_a_wider_buffer(tokens: int) -> None:
    projection = PromptProjection(
        rows=5, columns=32, weights=FORMATS[0], input="float32", output_offset=9, output_stride=23
    )
    assert run(projection, tokens) < TOLERANCES["float32"]


@pytest.mark.parametrize("epilogue", ["residual", "scaled_residual"])
def test_residual_may_be_overwritten_by_the_output(epilogue: Epilogue) -> None:
    projection = PromptProjection(
        rows=38, columns=48, weights=FORMATS[0], input="float32", epilogue=epilogue
    )
    assert run(projection, 19, in_place=True) < TOLERANCES["float32"]


def test_silu_of_large_numbers_is_finite() -> None:
    projection = PromptProjection(
        rows=4, columns=32, weights=FORMATS[0], input="float32", epilogue="silu_product"
    )
    weights, x, output = torch.zeros(4, 32), torch.ones(1, 32), torch.full((1, 2), float("nan"))
    weights[:, 0] = torch.tensor([-100.0, 2.0, 100.0, 2.0])
    launch = projection.launch(
        tokens=1, x=x.data_ptr(), weights=weights.data_ptr(), output=output.data_ptr()
    )
    with np.errstate(over="ignore"):
        InterpreterLauncher(projection.specs).launch(launch)
    assert output[0].tolist() == pytest.approx([0.0, 200.0], abs=1e-6)


@pytest.mark.parametrize("index", ["int32", "int64"])
@pytest.mark.parametrize(("type_", "columns"), [("float32", 24), ("float16", 1032)])
def test_rows_are_gathered_by_their_numbers(type_: Activation, columns: int, index: str) -> None:
    gather = GatherRows(columns=columns, type=type_, index_type=index)  # type: ignore[arg-type]
    x = guarded(randn(9, columns, seed=1).to(DTYPES[type_]))
    indices = guarded(torch.tensor([8, 0, 3, 3], dtype=getattr(torch, index)))
    for _ in range(2):
        output = Guarded((4, columns), DTYPES[type_])
        launch = gather.launch(rows=4, x=x.address, index=indices.address, output=output.address)
        InterpreterLauncher([gather.spec]).launch(launch)
        output.check("output")
        assert torch.equal(output.tensor, x.tensor[indices.tensor.long()])
