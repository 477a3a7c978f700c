"""The kernel that ends a block with experts, interpreted, against float64 on the same numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from plugins.expert_down.launches import MAX_SPLITS, ExpertDown
from plugins.expert_gather.op import expert_gather_definition
from plugins.kernel_spec import KernelSpec, grid_of
from plugins.projection.packing import PackedMatrix, WeightFormat, pack_weights, unpack_weights
from tests.interpreter import InterpreterLauncher
from tests.kernel_runs import NAN, Guarded, guarded

EPS = 1e-3  # large enough to be missed
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# ‖error‖ / ‖expected‖ of a sequence; the interpreter cuts a bfloat16 off.
TOLERANCES = {"float32": 1e-6, "float16": 4e-4, "bfloat16": 6e-3}
FLOAT32, FLOAT16, BFLOAT16, INT8 = (
    WeightFormat(kind=kind) for kind in ("float32", "float16", "bfloat16", "int8")
)
INT4 = WeightFormat(kind="int4", group=32)
PLAIN = ExpertDown(
    hidden=24, inner=64, weights=FLOAT16, activation="float32", tables=FLOAT32, num_keys=5,
    top_k=3, eps=EPS,
)  # fmt: skip
# Rows so long that a sequence's picks are split.
SPLIT = replace(PLAIN, hidden=520, inner=32, tables=FLOAT16, num_keys=6, top_k=9, batch=2)
CASES = {
    "plain": PLAIN,
    "float32": replace(PLAIN, weights=FLOAT32, epilogue="residual"),
    "bfloat16": replace(PLAIN, weights=BFLOAT16, tables=BFLOAT16, batch=2),
    "int8": replace(PLAIN, weights=INT8, tables=INT8, hidden=32, batch=3),
    "int4": replace(PLAIN, weights=INT4, tables=FLOAT16, batch=4, normalize=True),
    "seed": replace(
        PLAIN, num_keys=4, heads=3, weight_inside=True, epilogue="residual", tables=FLOAT16, batch=2
    ),
    "every expert": replace(PLAIN, num_keys=2, top_k=4, heads=2),
    "one expert": replace(PLAIN, num_keys=1, top_k=1),
    "half precision": replace(PLAIN, activation="float16", input="float32", batch=2),
    "splits": SPLIT,
    "splits, heads": replace(SPLIT, top_k=3, heads=3, weight_inside=True, tables=INT8, hidden=528),
    "steps in a split": replace(
        PLAIN, hidden=1032, inner=32, num_keys=4, top_k=9, tables=FLOAT32
    ),
}  # fmt: skip


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hold(packed: PackedMatrix) -> tuple[Guarded, Guarded | None]:
    weights = torch.from_numpy(
        packed.weights.view(np.int16) if packed.format.kind == "bfloat16" else packed.weights
    )
    if packed.format.kind == "bfloat16":
        weights = weights.view(torch.bfloat16)
    scales = None if packed.scales is None else guarded(torch.from_numpy(packed.scales))
    return guarded(weights), scales


def numbers_of(packed: PackedMatrix) -> Tensor:
    return torch.from_numpy(unpack_weights(packed)).double()


class Block:
    """Random tensors of a block's end, the launch on them, and plain formulas of the result."""

    def __init__(self, kernel: ExpertDown, batch: int, levels: int = 0) -> None:
        self.kernel, self.batch = kernel, batch
        H, n = kernel.hidden, kernel.num_keys
        dtype = DTYPES[kernel.activation]
        experts = n * n + 2  # the last two are out of reach
        self.matrix = pack_weights(
            [(randn(H, kernel.inner, seed=1) / kernel.inner**0.5).numpy()], kernel.weights
        )
        spread = torch.linspace(1, 3, experts)[:, None] / H**0.5
        self.down = pack_weights([(4 * spread * randn(experts, H, seed=2)).numpy()], kernel.tables)
        self.up = pack_weights([(6 * spread * randn(experts, H, seed=3)).numpy()], kernel.tables)
        router = 2 * randn(batch, 2, kernel.heads, n, seed=4)
        if levels:
            router = torch.randint(levels, router.shape, generator=torch.manual_seed(0)) * 0.5
        # To 2^-12: float32 holds such sums exactly.
        self.router = (router * 4096).round() / 4096
        self.x = randn(batch, kernel.inner, seed=5).to(DTYPES[kernel.input_type])
        self.stream = (3 * randn(batch, H, seed=6)).to(dtype)
        self.norm = (1 + 0.3 * randn(H, seed=7)).to(dtype)
        self.residual_weight = randn(H, seed=8).to(dtype)

    def run(self, *, in_place: bool = False, times: int = 1) -> Tensor:
        """Launch on one workspace and counters; every time must write the same."""
        kernel = self.kernel
        weights, scales = hold(self.matrix)
        down, down_scales = hold(self.down)
        up, up_scales = hold(self.up)
        scaled = kernel.epilogue == "scaled_residual"
        arrays = {
            "x": guarded(self.x), "weights": weights, "scales": scales,
            "stream": guarded(self.stream), "norm": guarded(self.norm),
            "residual_weight": guarded(self.residual_weight) if scaled else None,
            "router": guarded(self.router), "down": down, "down_scales": down_scales, "up": up,
            "up_scales": up_scales, "workspace": Guarded((kernel.workspace_bytes,), torch.uint8),
            "counters": guarded(torch.zeros(kernel.counters, dtype=torch.int32)),
        }  # fmt: skip
        held = {name: array for name, array in arrays.items() if array is not None}
        stream = held["stream"]
        output = stream if in_place else Guarded(tuple(self.stream.shape), self.stream.dtype)
        launch = kernel.launch(
            batch=self.batch,
            output=output.address,
            **{name: array.address for name, array in held.items()},
        )
        launcher = InterpreterLauncher([kernel.spec])
        results = []
        for _ in range(times):
            output.tensor.view(torch.uint8).fill_(NAN)
            stream.tensor.copy_(self.stream)
            launcher.launch(launch)
            results.append(output.tensor.clone())
            for name, array in {**held, "output": output}.items():
                array.check(name)
            assert not held["counters"].tensor.any(), "counters are not zero again"
        assert all(torch.equal(result, results[0]) for result in results)
        return results[0]

    def expected(self) -> Tensor:
        """The same in float64."""
        kernel = self.kernel
        stream = self.stream.double()
        u = stream / (stream.square().mean(-1, keepdim=True) + EPS).sqrt() * self.norm.double()
        experts = expert_gather_definition(
            u, self.router[:, 0].double(), self.router[:, 1].double(), numbers_of(self.down),
            numbers_of(self.up), kernel.top_k, kernel.weight_inside, kernel.normalize,
        )  # fmt: skip
        if kernel.epilogue == "scaled_residual":
            stream = stream * self.residual_weight.double()
        return stream + (self.x.double() @ numbers_of(self.matrix).T + experts)


def assert_close(kernel: ExpertDown, actual: Tensor, expected: Tensor) -> None:
    error = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() <= TOLERANCES[kernel.activation], f"errors {error.tolist()}"


@pytest.mark.parametrize("label", CASES)
def test_block_with_experts_equals_float64(label: str) -> None:
    kernel = CASES[label]
    assert (kernel.splits > 1) == ("split" in label)
    block = Block(kernel, kernel.batch)
    assert_close(kernel, block.run(times=2), block.expected())


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_smaller_batches_are_served(batch: int) -> None:
    kernel = replace(PLAIN, weights=INT8, batch=8)  # four sequences together
    assert kernel.tile.batch == 4
    block = Block(kernel, batch)
    assert_close(kernel, block.run(), block.expected())


def test_stream_may_be_overwritten_by_the_output() -> None:
    block = Block(SPLIT, 2)
    assert torch.equal(block.run(in_place=True), block.run())


@pytest.mark.parametrize(
    ("num_keys", "top_k", "heads"),
    [(32, 8, 1), (32, 16, 1), (64, 32, 1), (96, 48, 1), (128, 64, 1), (32, 2, 1), (45, 4, 2),
     (55, 6, 3)],
)  # fmt: skip
def test_grids_of_the_models_pick_as_the_definition_does(
    num_keys: int, top_k: int, heads: int
) -> None:
    kernel = replace(
        PLAIN, hidden=8, inner=32, num_keys=num_keys, top_k=top_k, heads=heads,
        weight_inside=heads > 1, tables=FLOAT32,
    )  # fmt: skip
    for levels in (0, 4) if num_keys < 96 else (4,):
        block = Block(kernel, 1, levels=levels)
        assert_close(kernel, block.run(), block.expected())


def test_equal_scores_pick_the_lower_experts_in_every_share() -> None:
    block = Block(SPLIT, 2, levels=2)
    assert_close(SPLIT, block.run(), block.expected())


def test_experts_that_nobody_picks_are_not_read() -> None:
    kernel = replace(PLAIN, num_keys=3, top_k=9)
    block = Block(kernel, 1)
    expected = block.expected()
    block.down.weights[9:] = np.nan
    block.up.weights[9:] = np.nan
    assert_close(kernel, block.run(), expected)


def test_only_the_last_of_all_programs_writes() -> None:
    """With one arrival too few the output stays as it was."""
    kernel = SPLIT
    block = Block(kernel, 2)
    weights, _ = hold(block.matrix)
    tensors = {
        "x": guarded(block.x), "weights": weights, "stream": guarded(block.stream),
        "norm": guarded(block.norm), "residual_weight": guarded(block.residual_weight),
        "router": guarded(block.router), "down": hold(block.down)[0], "up": hold(block.up)[0],
        "workspace": Guarded((kernel.workspace_bytes,), torch.uint8),
        "counters": guarded(torch.tensor([-1, 0, 0], dtype=torch.int32)),
        "output": Guarded((2, kernel.hidden), torch.float32),
    }  # fmt: skip
    launch = kernel.launch(batch=2, **{name: array.address for name, array in tensors.items()})
    InterpreterLauncher([kernel.spec]).launch(launch)
    blocks = grid_of(kernel.spec.grid, {"batch": 2})[1] - kernel.tile.batch * kernel.splits
    assert tensors["counters"].tensor.tolist() == [blocks + kernel.splits - 1, 0, 0]
    assert tensors["output"].tensor[0].isnan().all()
    assert tensors["output"].tensor[1].isfinite().all()


def every_spec() -> Iterator[KernelSpec]:
    yield from (kernel.spec for kernel in CASES.values())
    for changes in (
        {"inner": 128}, {"hidden": 32}, {"weights": INT8}, {"weights": INT4},
        {"tables": FLOAT16}, {"tables": INT8}, {"activation": "float16"}, {"input": "float16"},
        {"num_keys": 6}, {"top_k": 4}, {"heads": 2}, {"weight_inside": True}, {"normalize": True},
        {"epilogue": "residual"}, {"batch": 8}, {"batch": 2},
    ):  # fmt: skip
        yield replace(PLAIN, **changes).spec


def test_name_is_shared_by_equal_variants_alone() -> None:
    names: dict[str, KernelSpec] = {}
    for spec in every_spec():
        assert names.setdefault(spec.name, spec) == spec
        assert re.fullmatch(r"[a-z0-9_-]+", spec.name)
    assert len(names) > 20


@pytest.mark.parametrize("tables", [FLOAT16, FLOAT32, INT8], ids=lambda fmt: fmt.kind)
def test_splits_cover_the_picks_without_an_idle_one(tables: WeightFormat) -> None:
    for hidden in (8, 256, 512, 1024, 2048):
        for heads in (1, 3):
            for top_k in range(1, 65):
                kernel = replace(
                    PLAIN, hidden=hidden, num_keys=32, top_k=top_k, heads=heads, tables=tables
                )
                share = kernel.spec.constants["PICKS_PER_SPLIT"]
                assert isinstance(share, int)
                picks = heads * top_k
                assert (kernel.splits - 1) * share < picks <= kernel.splits * share
                assert kernel.splits <= MAX_SPLITS


def test_regions_of_the_scratch_memory_do_not_overlap() -> None:
    kernel = replace(SPLIT, heads=2, top_k=5, num_keys=7, batch=5)
    launch = kernel.launch(**LAUNCH, workspace=1 << 20)
    shares, pairs = 5 * kernel.splits, 10  # (i+1)·(j+1) <= 5
    heads = shares * 2
    sizes = {
        "best_scores": heads * 10, "best_keys": heads * 10, "pair_sums": heads * pairs,
        "experts": heads * 5, "expert_weights": heads * 5, "products": 5 * 520,
        "shares": shares * 520,
    }  # fmt: skip
    end = 1 << 20
    for name, count in sizes.items():
        assert launch.arguments[name] >= end
        end = launch.arguments[name] + 4 * count
    assert end <= (1 << 20) + kernel.workspace_bytes
    assert kernel.counters == 5


LAUNCH = {
    "batch": 1, "x": 16, "weights": 32, "stream": 48, "norm": 64, "residual_weight": 80,
    "router": 96, "down": 112, "up": 128, "counters": 144, "output": 48,
}  # fmt: skip


def test_launch_asks_for_what_it_reads_and_writes_and_no_more() -> None:
    whole = {**LAUNCH, "workspace": 1024}
    launch = PLAIN.launch(**whole)
    assert launch.arguments.keys() == PLAIN.spec.arguments.keys()
    for name in whole.keys() - {"batch", "counters", "workspace"}:
        assert launch.arguments[name] == whole[name]
        with pytest.raises(ValueError, match=f"{name} missing"):
            PLAIN.launch(**{**whole, name: 0})
    for name, message in (("counters", "arrivals missing"), ("workspace", "workspace missing")):
        with pytest.raises(ValueError, match=message):
            PLAIN.launch(**{**whole, name: 0})
    with pytest.raises(ValueError, match="scales unused, down_scales unused, up_scales unused"):
        PLAIN.launch(**whole, scales=16, down_scales=16, up_scales=16)
    with pytest.raises(ValueError, match="residual_weight unused"):
        replace(PLAIN, epilogue="residual").launch(**whole)
    with pytest.raises(ValueError, match="scales missing, down_scales missing, up_scales missing"):
        replace(PLAIN, weights=INT8, tables=INT8).launch(**whole)
    with pytest.raises(ValueError, match="a batch of 2, expected 1 to 1"):
        PLAIN.launch(**{**whole, "batch": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 20}, "H is 20, expected a multiple of 8 up to 2048"),
        ({"hidden": 2056}, "H is 2056, expected a multiple of 8 up to 2048"),
        ({"inner": 20}, "20 columns cannot be stored as float16"),
        ({"tables": INT4}, "experts are int4, expected floats or int8"),
        ({"num_keys": 129}, "129 keys per axis, expected 1 to 128"),
        ({"top_k": 26}, "top_k is 26, expected 1 to 25"),
        ({"top_k": 65, "num_keys": 9}, "top_k is 65, expected 1 to 64"),
        ({"top_k": 0}, "top_k is 0, expected 1 to 25"),
        ({"heads": 0}, "0 heads, expected 1 to 8"),
        ({"batch": 9}, "a batch of 9, expected 1 to 8"),
        ({"epilogue": "plain"}, "unknown epilogue 'plain'"),
        ({"activation": "int8"}, "unknown activation 'int8'"),
        ({"input": "int8"}, "unknown input 'int8'"),
    ],
)
def test_block_that_no_kernel_covers_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(PLAIN, **changes)
