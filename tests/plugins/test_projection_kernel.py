"""The kernels of projections and of the head, interpreted, against float64 on the same numbers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from plugins.kernel_spec import grid_of
from plugins.projection.launches import (
    Activation,
    Embedding,
    Epilogue,
    Head,
    Projection,
    TokenType,
)
from plugins.projection.packing import (
    PackedMatrix,
    WeightFormat,
    pack_levels,
    pack_weights,
    unpack_weights,
)
from tests.interpreter import InterpreterLauncher

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# ‖error‖ / ‖expected‖ of a sequence: the rounding of the output. The interpreter cuts a bfloat16
# off where a GPU rounds it, which doubles its error.
TOLERANCES = {"float32": 1e-6, "float16": 4e-4, "bfloat16": 6e-3}
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
BATCHES = (1, 3, 8)
EPS = 1e-3  # large enough to be missed


def label(fmt: WeightFormat) -> str:
    return f"{fmt.kind}{fmt.group or ''}"


@pytest.fixture
def tall_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows in a program as of a large matrix; the interpreter runs programs one by one."""
    for name in ("launches.ENOUGH_PROGRAMS", "launches.ENOUGH_HEAD_PROGRAMS"):
        monkeypatch.setattr(f"plugins.projection.{name}", 1)
    monkeypatch.setattr("plugins.projection.matrix._FEW_PROGRAMS", 1)


@dataclass
class Memory:
    """Tensors with something that must not be read or written before and after each."""

    guards: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def hold(self, values: Tensor) -> Tensor:
        margin = 64
        poison = float("nan") if values.dtype.is_floating_point else torch.iinfo(values.dtype).max
        around = torch.full((values.numel() + 2 * margin,), poison, dtype=values.dtype)
        held = around[margin : margin + values.numel()].view(values.shape)
        held.copy_(values)
        self.guards += [(around[:margin], held), (around[margin + values.numel() :], held)]
        return held

    def unwritten(self, *shape: int, dtype: torch.dtype) -> Tensor:
        if dtype.is_floating_point:
            return self.hold(torch.full(shape, float("nan"), dtype=dtype))
        return self.hold(torch.full(shape, torch.iinfo(dtype).max, dtype=dtype))

    def packed(self, matrix: PackedMatrix) -> tuple[Tensor, Tensor | None]:
        if matrix.format.kind == "bfloat16":
            weights = torch.from_numpy(matrix.weights.view(np.int16)).view(torch.bfloat16)
        else:
            weights = torch.from_numpy(matrix.weights)
        scales = None if matrix.scales is None else self.hold(torch.from_numpy(matrix.scales))
        return self.hold(weights), scales

    def check(self) -> None:
        for guard, held in self.guards:
            if guard.dtype.is_floating_point:
                kept = guard.isnan()
            else:
                kept = guard == torch.iinfo(guard.dtype).max
            assert kept.all(), f"written outside a tensor {list(held.shape)}"


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_packed(rows: int, columns: int, fmt: WeightFormat, seed: int = 7) -> PackedMatrix:
    """Rows and groups of columns differ in size, so that their scales do."""
    numbers = randn(rows, columns, seed=seed) * torch.linspace(1, 2, rows)[:, None]
    numbers *= (1 + torch.arange(columns) // 32 % 3) / columns**0.5
    return pack_weights([numbers.numpy()], fmt)


def matrix_of(packed: PackedMatrix) -> Tensor:
    return torch.from_numpy(unpack_weights(packed)).double()


def normed(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest of any sequence."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected).norm(dim=-1)
    return (difference / expected.norm(dim=-1)).max().item()


def run_projection(
    projection: Projection, batch: int, *, in_place: bool = False, extra_beside: bool = False
) -> float:
    """The largest error of one launch on random numbers.

    Args:
        projection: what is launched.
        batch: sequences.
        in_place: the output is the residual.
        extra_beside: the extra products go into the output's rows.
    """
    dtype = DTYPES[projection.activation]
    memory = Memory()
    packed = random_packed(projection.rows, projection.columns, projection.weights)
    weights, scales = memory.packed(packed)
    x = memory.hold(randn(batch, projection.columns, seed=1).to(DTYPES[projection.input_type]))
    shape = (batch, projection.outputs)
    norm = (
        memory.hold((1 + randn(projection.columns, seed=2)).to(dtype)) if projection.norm else None
    )
    addend = memory.hold(3 * randn(*shape, seed=3).to(dtype)) if projection.addend else None
    has_residual = projection.epilogue in ("residual", "scaled_residual")
    residual = memory.hold((9 * randn(*shape, seed=4)).to(dtype)) if has_residual else None
    scaled = projection.epilogue == "scaled_residual"
    scale = memory.hold(randn(projection.outputs, seed=5).to(dtype)) if scaled else None

    g = x.double() if norm is None else normed(x, norm)
    y = g @ matrix_of(packed).T
    if projection.epilogue == "silu":
        y = torch.nn.functional.silu(y)
    elif projection.epilogue == "silu_product":
        y = torch.nn.functional.silu(y[:, 0::2]) * y[:, 1::2]
    if addend is not None:
        y = y + addend.double()
    if residual is not None:
        y = y + residual.double() * (1 if scale is None else scale.double())

    stride = projection.output_stride or projection.outputs
    output = residual if in_place else memory.unwritten(batch, stride, dtype=dtype)
    extra = extra_output = extra_products = None
    if projection.extra_rows:
        small = random_packed(
            projection.extra_rows, projection.columns, projection.extra_weights, seed=8
        )
        extra, _ = memory.packed(small)
        extra_products = g @ matrix_of(small).T
        extra_stride = projection.extra_stride or projection.extra_rows
        size = projection.extra_offset + batch * extra_stride
        extra_output = output if extra_beside else memory.unwritten(size, dtype=torch.float32)
    launch = projection.launch(
        batch=batch,
        x=address(x),
        weights=address(weights),
        scales=address(scales),
        norm=address(norm),
        addend=address(addend),
        residual=address(residual),
        residual_weight=address(scale),
        output=address(output),
        extra=address(extra),
        extra_output=address(extra_output),
    )
    InterpreterLauncher([projection.spec]).launch(launch)
    memory.check()
    assert output is not None
    result = output[:, : projection.outputs].clone()
    output[:, : projection.outputs] = torch.nan
    if extra_output is None or extra_products is None:
        assert output.isnan().all(), "written between the rows"
        return error(result, y)
    written = extra_output.view(-1)[projection.extra_offset :]
    # The last row may end where the memory does.
    places = [written[row * extra_stride :][: projection.extra_rows] for row in range(batch)]
    extra_result = torch.stack(places)
    for place in places:
        place.fill_(torch.nan)
    assert output.isnan().all() and extra_output.isnan().all(), "written between the rows"
    # Of the two the larger; not a number where one of them is none, which max would hide.
    return torch.tensor([error(result, y), error(extra_result, extra_products)]).max().item()


# Each format with each surrounding, and in turn each batch.
CASES = [
    (fmt, norm, epilogue, BATCHES[index % len(BATCHES)])
    for index, (fmt, norm, epilogue) in enumerate(
        itertools.product(FORMATS, (False, True), EPILOGUES)
    )
]


@pytest.mark.parametrize(
    ("fmt", "norm", "epilogue", "batch"),
    CASES,
    ids=[f"{label(f)}-{'norm' if n else 'bare'}-{e}-b{b}" for f, n, e, b in CASES],
)
def test_projection_equals_float64(
    request: pytest.FixtureRequest, fmt: WeightFormat, norm: bool, epilogue: Epilogue, batch: int
) -> None:
    if batch > 1:
        request.getfixturevalue("tall_tiles")
    projection = Projection(
        rows=22,
        columns=3 * max(fmt.group, 32),
        weights=fmt,
        activation="float32",
        norm=norm,
        eps=EPS,
        epilogue=epilogue,
        batch=batch,
    )
    assert grid_of(projection.spec.grid, {"batch": batch})[1] > 1
    assert run_projection(projection, batch) < TOLERANCES["float32"]


@pytest.mark.parametrize("activation", ["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", FORMATS, ids=label)
def test_half_precision_loses_its_own_rounding(activation: Activation, fmt: WeightFormat) -> None:
    projection = Projection(
        rows=26,
        columns=2 * max(fmt.group, 32),
        weights=fmt,
        activation=activation,
        norm=True,
        eps=EPS,
        epilogue="scaled_residual",
        addend=True,
        batch=2,
    )
    assert run_projection(projection, 2) < TOLERANCES[activation]


@pytest.mark.parametrize("batch", range(1, 9))
def test_every_batch_up_to_the_largest_is_served(batch: int) -> None:
    projection = Projection(
        rows=10, columns=64, weights=FORMATS[5], activation="float32", norm=True, eps=EPS, batch=8
    )
    assert run_projection(projection, batch) < TOLERANCES["float32"]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13, 31, 32, 33])
@pytest.mark.parametrize("fmt", [FORMATS[1], FORMATS[4]], ids=label)
def test_rows_need_not_fill_the_last_block(fmt: WeightFormat, rows: int) -> None:
    projection = Projection(rows=rows, columns=32, weights=fmt, activation="float32")
    assert run_projection(projection, 1) < TOLERANCES["float32"]


@pytest.mark.parametrize(
    ("fmt", "columns"),
    [
        (FORMATS[0], 4),
        (FORMATS[0], 20),
        (FORMATS[1], 8),
        (FORMATS[2], 24),
        (FORMATS[3], 16),
        (FORMATS[3], 112),
        (FORMATS[4], 160),
        (FORMATS[5], 64),
        (FORMATS[6], 640),
    ],
    ids=lambda value: label(value) if isinstance(value, WeightFormat) else str(value),
)
def test_columns_need_not_be_a_power_of_two(fmt: WeightFormat, columns: int) -> None:
    projection = Projection(
        rows=6, columns=columns, weights=fmt, activation="float32", norm=True, eps=EPS
    )
    assert run_projection(projection, 1) < TOLERANCES["float32"]


@pytest.mark.parametrize(
    ("fmt", "columns"),
    [(FORMATS[1], 1032), (FORMATS[3], 2064), (FORMATS[4], 4128), (FORMATS[6], 4224)],
    ids=lambda value: label(value) if isinstance(value, WeightFormat) else str(value),
)
def test_columns_beyond_one_tile_are_added_up(fmt: WeightFormat, columns: int) -> None:
    projection = Projection(
        rows=4, columns=columns, weights=fmt, activation="float32", norm=True, eps=EPS, batch=8
    )
    assert columns > projection.tile.columns
    assert run_projection(projection, 3) < TOLERANCES["float32"]


@pytest.mark.parametrize("input_type", DTYPES)
@pytest.mark.parametrize("fmt", (FORMATS[1], FORMATS[3], FORMATS[5]), ids=label)
def test_input_may_be_of_another_type_than_the_output(
    fmt: WeightFormat, input_type: Activation
) -> None:
    for activation in ("float32", "float16"):
        projection = Projection(
            rows=12, columns=64, weights=fmt, activation=activation, input=input_type, norm=True,
            eps=EPS, epilogue="residual", batch=2,
        )  # fmt: skip
        assert run_projection(projection, 2) < TOLERANCES[activation]


@pytest.mark.parametrize("epilogue", ["plain", "silu_product", "scaled_residual"])
def test_rows_of_the_output_may_lie_apart(epilogue: Epilogue) -> None:
    projection = Projection(
        rows=22, columns=48, weights=FORMATS[1], activation="float32", epilogue=epilogue,
        addend=epilogue == "plain", output_stride=27, batch=3,
    )  # fmt: skip
    assert run_projection(projection, 3) < TOLERANCES["float32"]


@pytest.mark.parametrize(
    ("fmt", "norm", "batch"),
    [(fmt, index % 2 == 0, BATCHES[index % 3]) for index, fmt in enumerate(FORMATS)],
    ids=[label(fmt) for fmt in FORMATS],
)
def test_extra_rows_end_the_rows_of_the_output(fmt: WeightFormat, norm: bool, batch: int) -> None:
    """Rows beside query, key and value: a length that is no multiple of 16 bytes."""
    projection = Projection(
        rows=22, columns=2 * max(fmt.group, 32), weights=fmt, activation="float32", norm=norm,
        eps=EPS, batch=batch, output_stride=27, extra_rows=3, extra_offset=22, extra_stride=27,
    )  # fmt: skip
    assert run_projection(projection, batch, extra_beside=True) < TOLERANCES["float32"]


@pytest.mark.parametrize("extra_rows", [1, 8, 33])
@pytest.mark.parametrize("kind", DTYPES)
def test_extra_rows_have_no_epilogue_and_a_place_of_their_own(
    kind: Activation, extra_rows: int
) -> None:
    for activation, columns in (("float32", 72), ("float16", 1032)):
        projection = Projection(
            rows=6, columns=columns, weights=FORMATS[1], activation=activation, norm=True, eps=EPS,
            epilogue="silu_product", batch=8, extra_rows=extra_rows,
            extra_weights=WeightFormat(kind=kind), extra_offset=5,
        )  # fmt: skip
        assert run_projection(projection, 3) < TOLERANCES[activation]


def test_columns_of_extra_rows_beyond_one_tile_are_added_up() -> None:
    projection = Projection(
        rows=2, columns=1032, weights=FORMATS[1], activation="float32", norm=True, eps=EPS,
        batch=8, extra_rows=3,
    )  # fmt: skip
    assert projection.columns > projection.extra_tile.columns
    assert run_projection(projection, 8) < TOLERANCES["float32"]


def test_residual_may_be_overwritten_by_the_output() -> None:
    projection = Projection(
        rows=22,
        columns=48,
        weights=FORMATS[1],
        activation="float16",
        epilogue="scaled_residual",
        batch=3,
    )
    assert run_projection(projection, 3, in_place=True) < TOLERANCES["float16"]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("gate", [-100.0, 100.0])
def test_silu_of_large_numbers_is_finite(gate: float) -> None:
    projection = Projection(
        rows=2, columns=32, weights=FORMATS[0], activation="float32", epilogue="silu_product"
    )
    weights, x = torch.zeros(2, 32), torch.ones(1, 32)
    weights[:, 0] = torch.tensor([gate, 2.0])
    output = torch.full((1, 1), float("nan"))
    launch = projection.launch(
        batch=1, x=address(x), weights=address(weights), output=address(output)
    )
    InterpreterLauncher([projection.spec]).launch(launch)
    assert output.item() == pytest.approx(max(gate, 0) * 2.0, abs=1e-6)


@dataclass
class HeadRun:
    """What a head has written."""

    logits: Tensor | None
    tokens: Tensor | None
    next_x: Tensor | None


def run_head(
    head: Head, x: Tensor, norm: Tensor, packed: PackedMatrix, table: PackedMatrix | None = None
) -> HeadRun:
    """Launch twice on one workspace and counter; both must write the same."""
    memory = Memory()
    batch = len(x)
    weights, scales = memory.packed(packed)
    x, norm = memory.hold(x), memory.hold(norm)
    embedding, embedding_scales = (None, None) if table is None else memory.packed(table)
    workspace = memory.unwritten(head.workspace_bytes, dtype=torch.uint8)
    counters = memory.hold(torch.zeros(head.counters, dtype=torch.int32))
    runs = []
    for _ in range(2):
        logits = memory.unwritten(batch, head.vocab_size, dtype=torch.float32)
        token_type = torch.int32 if head.token == "int32" else torch.int64
        tokens = memory.unwritten(batch, dtype=token_type)
        next_x = memory.unwritten(batch, head.columns, dtype=x.dtype)
        run = HeadRun(
            logits if head.logits else None,
            tokens if head.token else None,
            next_x if head.embedding else None,
        )
        launch = head.launch(
            batch=batch,
            x=address(x),
            norm=address(norm),
            weights=address(weights),
            scales=address(scales),
            logits=address(run.logits),
            tokens=address(run.tokens),
            embedding=address(embedding),
            embedding_scales=address(embedding_scales),
            next_x=address(run.next_x),
            workspace=address(workspace) if head.counters else 0,
            counters=address(counters) if head.counters else 0,
        )
        InterpreterLauncher([head.spec]).launch(launch)
        assert not counters.any()
        memory.check()
        runs.append(run)
    for first, second in zip(vars(runs[0]).values(), vars(runs[1]).values(), strict=True):
        assert first is second is None or torch.equal(first, second)
    return runs[1]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("fmt", FORMATS, ids=label)
def test_head_gives_logits_their_best_token_and_its_row(
    request: pytest.FixtureRequest, fmt: WeightFormat, batch: int
) -> None:
    if batch > 1:
        request.getfixturevalue("tall_tiles")
    columns = 3 * max(fmt.group, 16)
    head = Head(
        vocab_size=53,
        columns=columns,
        weights=fmt,
        activation="float32",
        eps=EPS,
        logits=True,
        embedding=fmt,
        batch=batch,
    )
    packed = random_packed(53, columns, fmt)
    x, norm = randn(batch, columns, seed=1), 1 + randn(columns, seed=2)
    run = run_head(head, x, norm, packed, packed)
    expected = normed(x, norm) @ matrix_of(packed).T
    assert grid_of(head.spec.grid, {"batch": batch})[1] > 1
    assert run.logits is not None and run.tokens is not None and run.next_x is not None
    assert error(run.logits, expected) < TOLERANCES["float32"]
    assert run.tokens.tolist() == expected.argmax(-1).tolist()
    assert torch.equal(run.next_x.double(), matrix_of(packed)[run.tokens])


@pytest.mark.parametrize("activation", ["float16", "bfloat16"])
def test_head_in_half_precision_writes_logits_of_float32(activation: Activation) -> None:
    fmt = WeightFormat(kind=activation)
    head = Head(
        vocab_size=37, columns=64, weights=fmt, activation=activation, eps=EPS, logits=True,
        token="int32", embedding=fmt, batch=2,
    )  # fmt: skip
    packed = random_packed(37, 64, fmt)
    dtype = DTYPES[activation]
    x, norm = randn(2, 64, seed=1).to(dtype), (1 + randn(64, seed=2)).to(dtype)
    run = run_head(head, x, norm, packed, packed)
    expected = normed(x, norm) @ matrix_of(packed).T
    assert run.logits is not None and run.tokens is not None and run.next_x is not None
    assert error(run.logits, expected) < TOLERANCES["float32"]
    assert run.tokens.dtype == torch.int32
    assert run.tokens.tolist() == expected.argmax(-1).tolist()
    assert torch.equal(run.next_x.double(), matrix_of(packed)[run.tokens])


def test_head_embeds_from_a_table_of_its_own() -> None:
    table = random_packed(37, 64, FORMATS[5], seed=11)
    head = Head(
        vocab_size=37, columns=64, weights=FORMATS[3], activation="float32", eps=EPS,
        embedding=FORMATS[5],
    )  # fmt: skip
    packed = random_packed(37, 64, FORMATS[3])
    run = run_head(head, randn(1, 64, seed=1), torch.ones(64), packed, table)
    assert run.tokens is not None and run.next_x is not None
    assert torch.equal(run.next_x.double(), matrix_of(table)[run.tokens])


def test_head_may_write_logits_alone() -> None:
    head = Head(
        vocab_size=21, columns=32, weights=FORMATS[1], activation="float32", eps=EPS, logits=True,
        token=None, batch=3,
    )  # fmt: skip
    assert (head.counters, head.workspace_bytes) == (0, 0)
    packed = random_packed(21, 32, FORMATS[1])
    x = randn(3, 32, seed=1)
    run = run_head(head, x, torch.ones(32), packed)
    assert run.logits is not None
    expected = normed(x, torch.ones(32)) @ matrix_of(packed).T
    assert error(run.logits, expected) < TOLERANCES["float32"]


def tokens_of(logits: list[list[float]], **options: object) -> list[int]:
    """Greedy tokens of chosen logits: x picks one column, which holds them."""
    vocab = len(logits[0])
    columns = np.zeros((vocab, 32), np.float32)
    columns[:, : len(logits)] = np.array(logits).T
    packed = pack_weights([columns], FORMATS[0])
    # The norm gives the one number of each row of x its length: the root of 32.
    x = torch.eye(len(logits), 32)
    head = Head(
        vocab_size=vocab, columns=32, weights=FORMATS[0], activation="float32", eps=0.0,
        batch=len(logits), **options,
    )  # fmt: skip
    run = run_head(head, x, torch.ones(32), packed)
    assert run.tokens is not None
    return run.tokens.tolist()


@pytest.mark.parametrize(
    "best", [(0, 1), (1, 2), (2, 3), (4, 12), (0, 12), (11, 12), (12,), (3, 5, 7, 11)]
)
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
def test_lowest_of_the_largest_logits_wins(best: tuple[int, ...], sign: float) -> None:
    largest, rest = (2.0, 1.0) if sign > 0 else (-1.0, -2.0)
    logits = [largest if token in best else rest for token in range(13)]
    assert tokens_of([logits]) == [best[0]]


@pytest.mark.parametrize("value", [-1e30, -3.0, -1e-30, 0.0, 1e-30, 5.0])
def test_of_equal_logits_the_first_token_wins(value: float) -> None:
    assert tokens_of([[value] * 13]) == [0]


def test_tokens_order_as_numbers_do() -> None:
    generator = np.random.default_rng(0)
    magnitudes = np.exp2(generator.uniform(-60, 60, (8, 19)))
    logits = generator.choice([-1.0, 1.0], (8, 19), p=[0.8, 0.2]) * magnitudes
    logits[0] = -magnitudes[0]
    assert tokens_of(logits.tolist()) == logits.argmax(-1).tolist()


def test_sequences_of_a_batch_choose_for_themselves() -> None:
    logits = np.full((8, 13), -1.0)
    best = [12, 0, 5, 5, 1, 11, 7, 12]
    logits[np.arange(8), best] = -0.5
    assert tokens_of(logits.tolist()) == best


def test_last_program_reads_keys_and_columns_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plugins.projection.launches._KEYS_AT_ONCE", 16)
    monkeypatch.setattr("plugins.projection.launches._EMBEDDING_AT_ONCE", 64)
    logits = np.random.default_rng(1).standard_normal((8, 41))
    logits[3] = 0.0
    assert tokens_of(logits.tolist()) == logits.argmax(-1).tolist()
    head = Head(
        vocab_size=41, columns=96, weights=FORMATS[4], activation="float32", eps=EPS,
        embedding=FORMATS[4], batch=3,
    )  # fmt: skip
    assert head.spec.constants["BLOCK_KEYS"] == 4
    assert head.spec.constants["BLOCK_EMBEDDING"] == 16
    packed = random_packed(41, 96, FORMATS[4])
    run = run_head(head, randn(3, 96, seed=1), torch.ones(96), packed, packed)
    assert run.tokens is not None and run.next_x is not None
    assert torch.equal(run.next_x.double(), matrix_of(packed)[run.tokens])


def test_last_program_of_all_writes_the_tokens() -> None:
    head = Head(
        vocab_size=13, columns=64, weights=FORMATS[5], activation="float32", embedding=FORMATS[5],
        batch=8,
    )  # fmt: skip
    memory = Memory()
    weights, scales = memory.packed(random_packed(13, 64, FORMATS[5]))
    x, norm = memory.hold(randn(8, 64, seed=1)), memory.hold(torch.ones(64))
    workspace = memory.unwritten(head.workspace_bytes, dtype=torch.uint8)
    tokens = memory.unwritten(8, dtype=torch.int64)
    next_x = memory.unwritten(8, 64, dtype=torch.float32)
    # As if one more program were to come, which never does.
    counters = memory.hold(torch.tensor([-1], dtype=torch.int32))
    launch = head.launch(
        batch=8, x=address(x), norm=address(norm), weights=address(weights),
        scales=address(scales), embedding=address(weights), embedding_scales=address(scales),
        tokens=address(tokens), next_x=address(next_x), workspace=address(workspace),
        counters=address(counters),
    )  # fmt: skip
    InterpreterLauncher([head.spec]).launch(launch)
    sequences, blocks, _ = grid_of(head.spec.grid, {"batch": 8})
    assert sequences > 1
    assert counters.item() == sequences * blocks - 1
    assert (tokens == torch.iinfo(torch.int64).max).all()
    assert next_x.isnan().all()


@pytest.mark.parametrize(
    ("batch", "most", "token"), [(1, 1, "int64"), (3, 3, "int32"), (2, 5, "int64"), (8, 8, "int32")]
)
def test_last_program_prepares_the_next_step(batch: int, most: int, token: TokenType) -> None:
    head = Head(
        vocab_size=53, columns=64, weights=FORMATS[1], activation="float32", token=token,
        embedding=FORMATS[1], batch=most, advance=True, ring=3,
    )  # fmt: skip
    memory = Memory()
    packed = random_packed(53, 64, FORMATS[1])
    weights, _ = memory.packed(packed)
    x, norm = memory.hold(randn(batch, 64, seed=1)), memory.hold(torch.ones(64))
    dtype = torch.int32 if token == "int32" else torch.int64
    tokens, ring = memory.unwritten(batch, dtype=dtype), memory.unwritten(3, most, dtype=dtype)
    positions = memory.hold(torch.tensor([4, 0, 6, 5, 3, 2, 1, 6][:batch]))
    step = memory.hold(torch.tensor([4], dtype=torch.int32))
    workspace = memory.unwritten(head.workspace_bytes, dtype=torch.uint8)
    counters = memory.hold(torch.zeros(1, dtype=torch.int32))
    expected_ring, expected_positions = ring.clone(), positions.clone()
    for number in range(4, 9):
        # What is written is the next step's x, which every program has read.
        expected = (normed(x, norm) @ matrix_of(packed).T).argmax(-1)
        launch = head.launch(
            batch=batch, x=address(x), norm=address(norm), weights=address(weights),
            embedding=address(weights), tokens=address(tokens), next_x=address(x),
            positions=address(positions), ring=address(ring), step=address(step), last_slot=6,
            workspace=address(workspace), counters=address(counters),
        )  # fmt: skip
        InterpreterLauncher([head.spec]).launch(launch)
        memory.check()
        expected_ring[number % 3, :batch] = expected.to(dtype)
        expected_positions = (expected_positions + 1).clamp(max=6)
        assert tokens.tolist() == expected.tolist()
        assert torch.equal(ring, expected_ring)
        assert torch.equal(positions, expected_positions)
        assert (step.item(), counters.item()) == (number + 1, 0)
        assert torch.equal(x.double(), matrix_of(packed)[expected])


def test_negative_zero_equals_zero() -> None:
    levels = -np.ones((5, 32), np.int8)
    levels[1:3] = 0
    scales = np.array([1, -1, 1, 1, 1], np.float32)  # token 1 has the logit -0, token 2 has 0
    head = Head(vocab_size=5, columns=32, weights=FORMATS[3], activation="float32", logits=True)
    run = run_head(head, torch.ones(1, 32), torch.ones(32), pack_levels(levels, scales, FORMATS[3]))
    assert run.logits is not None and run.tokens is not None
    assert torch.signbit(run.logits[0, 1:3]).tolist() == [True, False]
    assert run.tokens.tolist() == [1]


@pytest.mark.parametrize("where", [slice(4, 5), slice(None)], ids=["one", "all"])
@pytest.mark.parametrize(
    ("number", "token"), [(np.nan, -1), (-np.nan, -1), (np.inf, -1), (-np.inf, None)]
)
def test_logits_that_are_no_finite_numbers_give_no_token(
    where: slice, number: float, token: int | None
) -> None:
    columns = np.zeros((13, 32), np.float32)
    columns[:, 0] = 1
    columns[where, 0] = number
    head = Head(vocab_size=13, columns=32, weights=FORMATS[0], activation="float32")
    packed = PackedMatrix(format=FORMATS[0], rows=13, columns=32, weights=columns, scales=None)
    # Only the first number of each row counts: infinity times zero would be no number.
    x = torch.zeros(1, 32)
    x[0, 0] = 1
    run = run_head(head, x, torch.ones(32), packed)
    assert run.tokens is not None
    if token is None:  # one token less to take
        token = 0 if where == slice(4, 5) else -1
    assert run.tokens.tolist() == [token]


@pytest.mark.parametrize("activation", DTYPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=label)
def test_embedding_reads_the_rows_of_its_tokens(fmt: WeightFormat, activation: Activation) -> None:
    columns = 3 * max(fmt.group, 16)
    table = random_packed(11, columns, fmt)
    embedding = Embedding(columns=columns, weights=fmt, activation=activation, token="int32")
    memory = Memory()
    weights, scales = memory.packed(table)
    tokens = memory.hold(torch.tensor([10, 0, 7], dtype=torch.int32))
    output = memory.unwritten(3, columns, dtype=DTYPES[activation])
    launch = embedding.launch(
        batch=3,
        tokens=address(tokens),
        table=address(weights),
        scales=address(scales),
        output=address(output),
    )
    InterpreterLauncher([embedding.spec]).launch(launch)
    memory.check()
    expected = matrix_of(table)[tokens.long()]
    assert error(output, expected) < TOLERANCES[activation]
