"""A step's launches as a driver gets them, at released shapes: order, grids, arguments."""

from __future__ import annotations

import struct
from functools import partial

import pytest

from model.released import released_shape
from plugins.kernel_spec import grid_of
from runtime.backends.base import Limits
from runtime.kernel_step.formats import StepFormats
from runtime.kernel_step.packed_weights import stored_tensors
from runtime.kernel_step.places import Places
from runtime.kernel_step.step_kernels import StepKernels
from runtime.kernel_step.step_model import InnerValues, StepModel

PRELUDE = """
from tests.runtime.kernel_step.test_launch_list import kernels_of, launches_of
from plugins.launcher import CudaLauncher, KernelBinary, open_driver
name, precision, batch, ending = {arguments!r}
kernels = kernels_of(name, precision)
binaries = [
    KernelBinary(
        name=spec.name, entry=f"entry_{{number}}", cubin=b"\\177ELF" + bytes(60),
        threads=32 * spec.num_warps, shared_bytes=0, arguments=spec.arguments, grid=spec.grid,
    )
    for number, spec in enumerate(kernels.specs)
]
launcher = CudaLauncher(open_driver(), binaries)
for launch in launches_of(kernels, batch, ending):
    launcher.launch(launch, 0xABC)
"""
LIMITS = Limits(max_batch_size=4, max_input_len=2048, max_seq_len=2048)
SEED_VALUES = InnerValues(heads=1, count=1, picks=1, mask_heads=1)
LAYER = ("project", "attend_decode", "project", "project", "project")
EXPERT_LAYER = (*LAYER[:4], "expert_down")
SEED_LAYER = ("project", "seed_values", *EXPERT_LAYER[1:])


def kernels_of(name, precision):
    shape = released_shape(name)
    values = SEED_VALUES if shape.config.is_seed else None
    model = StepModel.make(shape.config, shape.generation, LIMITS.max_seq_len, values)
    return StepKernels(model, StepFormats.of(precision), LIMITS)


def places_of(kernels):
    """An address of its own for every tensor, area and cache tensor; 0 for what is not there."""
    names = [*stored_tensors(kernels.model, kernels.formats), *kernels.areas]
    names += kernels.cache_areas(LIMITS.max_batch_size)
    numbers = {name: 0x10000 * (number + 1) for number, name in enumerate(names)}
    in_place = {"x_between": "x", "x_out": "x"}
    return Places(
        weight=lambda name: numbers.get(name, 0),
        area=lambda name: numbers[in_place.get(name, name)],
        cache=lambda layer, kind: numbers[f"layers.{layer}.{kind}"],
    )


def launches_of(kernels, batch, ending):
    return kernels.step_for(batch).launches(places_of(kernels), batch, ending)


def kind_of(kernel):
    return kernel.split("-")[0]


@pytest.mark.parametrize(
    ("name", "precision", "layer"),
    [
        ("doge-20m", "fp16", LAYER),
        ("doge-160m", "int4", LAYER),
        ("doge-20m-moe", "int8", EXPERT_LAYER),
        ("doge-120m-moe", "fp16", EXPERT_LAYER),
        ("doge-76m", "fp16", SEED_LAYER),
    ],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_driver_gets_five_launches_a_layer(stand_in_driver, name, precision, layer, batch):
    kernels = kernels_of(name, precision)
    launches = launches_of(kernels, batch, "greedy")
    expected = [*layer * kernels.model.layers, "head"]
    assert [kind_of(launch.kernel) for launch in launches] == expected
    types = {f"entry_{n}": spec.arguments for n, spec in enumerate(kernels.specs)}
    done = stand_in_driver.run(
        PRELUDE.format(arguments=(name, precision, batch, "greedy")),
        kernels={
            entry: (*arguments.values(), "*scratch", "*scratch")
            for entry, arguments in types.items()
        },
    )
    assert done.returncode == 0, done.stderr
    calls = stand_in_driver.calls()
    # Code is loaded first, and then nothing but launches: none waits, copies or allocates.
    begin = next(n for n, line in enumerate(calls) if line.startswith("launch"))
    sent = [line.split() for line in calls[begin:]]
    assert len(sent) == len(launches)
    specs = {spec.name: (f"entry_{n}", spec) for n, spec in enumerate(kernels.specs)}
    for words, launch in zip(sent, launches, strict=True):
        entry, spec = specs[launch.kernel]
        grid = [str(size) for size in grid_of(spec.grid, launch.sizes)]
        assert words[:2] == ["launch", entry]
        assert words[2:6] == ["grid", *grid]
        assert words[6:10] == ["block", str(32 * spec.num_warps), "1", "1"]
        assert words[13] == "0xabc"
        values = [
            struct.pack({"i32": "<i", "fp32": "<f"}.get(kind, "<q"), launch.arguments[argument])
            for argument, kind in spec.arguments.items()
        ]
        assert words[14:] == [value.hex() for value in (*values, bytes(8), bytes(8))]


@pytest.mark.parametrize("batch", [1, 3])
def test_grids_are_those_of_the_shape(batch):
    kernels = kernels_of("doge-160m", "fp16")
    qkv, attend, o, gate_up, down = launches_of(kernels, batch, "logits")[:5]
    specs = {spec.name: spec for spec in kernels.specs}

    def grid(launch):
        return grid_of(specs[launch.kernel].grid, launch.sizes)

    def blocks(rows, launch):
        return -(-rows // specs[launch.kernel].constants["BLOCK_ROWS"])

    sequences = -(-batch // specs[qkv.kernel].constants["BATCH"])
    # 6 query and 3 key/value heads of 128; 3 rows for mask scores in blocks of their own.
    extra = -(-3 // specs[qkv.kernel].constants["EXTRA_BLOCK_ROWS"])
    assert grid(qkv) == (sequences, blocks(12 * 128, qkv) + extra, 1)
    assert grid(attend)[1:] == (3, batch)
    assert 1 < grid(attend)[0] <= 32
    assert grid(o) == (sequences, blocks(768, o), 1)
    assert grid(gate_up) == (sequences, blocks(2 * 1536, gate_up), 1)
    assert grid(down) == (sequences, blocks(768, down), 1)


def test_launches_of_a_layer_hand_on_what_they_wrote():
    kernels = kernels_of("doge-20m", "int8")
    places = places_of(kernels)
    step = partial(launches_of, kernels, 1)
    first, second = step("greedy")[:5], step("greedy")[5:10]
    qkv, attend, o, gate_up, down = (launch.arguments for launch in second)
    weight, area = partial(places.of_layer, 1), places.area
    assert (qkv["x"], qkv["norm"]) == (area("x"), weight("input_norm"))
    assert (qkv["weights"], qkv["scales"]) == (weight("qkv.weights"), weight("qkv.scales"))
    assert qkv["output"] == qkv["extra_output"] == attend["query"] == area("rows")
    assert qkv["extra"] == weight("score.weights")
    assert [attend[kind] for kind in ("key", "value", "score")] == [
        places.cache(1, kind) for kind in ("key", "value", "score")
    ]
    assert attend["write_index"] == attend["position"] == area("positions")
    assert attend["A"] == weight("A")
    assert attend["query_norm"] == weight("query_norm")
    assert attend["output"] == o["x"] == area("attended")
    assert (o["residual"], o["output"]) == (area("x"), area("x"))
    assert o["residual_weight"] == weight("input_residual")
    assert gate_up["norm"] == weight("mlp_norm")
    assert gate_up["output"] == down["x"] == area("inner")
    assert down["residual_weight"] == weight("mlp_residual")
    own = {launch.arguments.get("weights", launch.arguments.get("key")) for launch in second}
    others = {launch.arguments.get("weights", launch.arguments.get("key")) for launch in first}
    assert len(own) == len(others) == 5
    assert not own & others


def test_steps_end_differs_and_its_layers_do_not():
    kernels = kernels_of("doge-20m", "fp16")
    steps = {
        ending: launches_of(kernels, 1, ending) for ending in ("greedy", "drawn", "ruled", "logits")
    }
    layers = {launches[: 5 * kernels.model.layers].__repr__() for launches in steps.values()}
    assert len(layers) == 1
    ends = {
        ending: [kind_of(launch.kernel) for launch in launches[5 * kernels.model.layers :]]
        for ending, launches in steps.items()
    }
    assert ends == {
        "greedy": ["head"],
        "drawn": ["head", "choose"],
        "ruled": ["head", "choose"],
        "logits": ["head"],
    }
    places = places_of(kernels)
    assert steps["greedy"][-1].arguments["logits"] == 0
    assert steps["logits"][-1].arguments["tokens"] == 0
    assert steps["drawn"][-1].arguments["bias"] == 0
    assert steps["ruled"][-1].arguments["counts"] == places.area("counts")
    assert steps["greedy"][-1].arguments["next_x"] == places.area("x")
    assert steps["greedy"][-1].arguments["last_slot"] == LIMITS.max_seq_len - 1


@pytest.mark.parametrize("name", ["doge-160m", "doge-20m-moe", "doge-76m"])
def test_scratch_memory_and_counters_are_those_of_the_launch_that_needs_most(name):
    kernels = kernels_of(name, "fp16")
    for batch in (1, 4):
        step = kernels.step_for(batch)
        parts = [step._heads["greedy"], *step._choices.values()]
        if kernels.model.experts is not None:
            parts.append(step._down)
        assert step.workspace_bytes >= step._attention.workspace_bytes(batch, 1) > 0
        assert step.counters >= step._attention.counters(batch, 1) > 0
        for part in parts:
            assert step.workspace_bytes >= part.workspace_bytes > 0
            assert step.counters >= part.counters > 0
    prompt = kernels.prompt
    for rows in range(1, 5):
        sizes = (rows, prompt.max_tokens // rows)
        assert prompt.workspace_bytes >= prompt._attention.workspace_bytes(*sizes)
        assert prompt.counters >= prompt._attention.counters(*sizes)
    for part in (step, prompt):
        assert kernels.areas["workspace"] >= part.workspace_bytes
        assert kernels.areas["counters"] >= 4 * part.counters


def test_products_that_decide_what_counts_are_not_rounded_before():
    """In prompts; all others go through tensor cores in the weights' type."""
    prompt = kernels_of("doge-20m-moe", "fp16").prompt
    small = (prompt._score, prompt._router)
    wide = (prompt._qkv, prompt._o, prompt._gate_up, prompt._down, prompt._head)
    assert {spec.constants["DOT"] for part in small for spec in part.specs} == {"float32"}
    assert {spec.constants["DOT"] for part in wide for spec in part.specs} == {"float16"}
