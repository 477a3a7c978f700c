"""Plugins that an engine holds: their rules, and their kernels against the ops' definitions."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from plugins.aot_plugin import Sizes
from plugins.aot_registry import AOT_PLUGINS
from plugins.dynamic_mask_attention.aot import ATTEND_SHARES, JOIN_SHARES, max_splits
from plugins.dynamic_mask_attention.launches import make_kernels as attention_kernels
from plugins.expert_gather.aot import GATHER_EXPERTS, ROUTE_EXPERTS, router_scratch
from plugins.expert_gather.launches import make_kernels as expert_kernels
from plugins.registry import DYNAMIC_MASK_ATTENTION, EXPERT_GATHER, OPS, VALUE_GATHER
from plugins.value_gather.aot import GATHER_VALUES
from tests.aot_runs import attend, dtype_name, gather_experts, run_plugin
from tests.kernel_gate import USES
from tests.kernel_runs import assert_close_to_float64
from tests.op_cases import ATTENTION_CASES, EXPERT_CASES, VALUE_CASES, AttentionCase

# Windows are not covered; rows of 16 bytes are what every kernel reads.
COVERED = [case for case in ATTENTION_CASES if case.W == 0 and case.D % 8 == 0]
# More keys than a share has at least, so that shares are several and the last ones empty.
LONG = (
    AttentionCase(label="long", S=1, C=700, W=0, write_index=(650, 3), D=64),
    AttentionCase(label="long, one bias", S=2, C=300, W=0, write_index=(260,), N=1, shared=True),
    AttentionCase(label="long, per query head", S=1, C=400, W=0, write_index=(399,), N=4, D=64),
)


def attention_inputs(case, dtype):
    return dict(zip(DYNAMIC_MASK_ATTENTION.inputs, case.inputs(dtype), strict=True))


def expected(op, inputs, **attributes):
    """The definition in float64 on the same numbers."""
    doubled = [t.double() if t.is_floating_point() else t for t in inputs]
    return op.load_definition()(*doubled, **attributes)


def close(op, actual, reference):
    tolerance = op.tolerances[dtype_name(actual)]
    torch.testing.assert_close(actual.double(), reference, **tolerance.as_kwargs())


@pytest.mark.parametrize("tactic", [1, 2], ids=["few queries", "many queries"])
@pytest.mark.parametrize("case", (*COVERED, *LONG), ids=lambda case: case.label)
def test_attention_by_shares_and_join_is_the_definition(case, tactic):
    dtype = torch.float16 if case.S == 1 or case.shared else torch.float32
    inputs = attention_inputs(case, dtype)
    reference = expected(
        DYNAMIC_MASK_ATTENTION, inputs.values(), scale=case.scale, keep_window_size=0
    )
    attended = attend(inputs, scale=case.scale, max_splits=5, tactic=tactic)
    assert attended.dtype == dtype
    assert_close_to_float64(DYNAMIC_MASK_ATTENTION, attended, reference)


def test_shares_without_keys_say_so():
    case = LONG[0]
    inputs = attention_inputs(case, torch.float16)
    attributes = {"scale": case.scale, "max_splits": 6, "one_score_row": 0}
    shares = run_plugin(ATTEND_SHARES, attributes, inputs, tactic=1)
    assert shares["values"].shape == (3, 2, 1, 4, 64)  # 6 shares for 2 queries
    masses = shares["masses"][..., 1]
    assert (masses[:, 0] > 0).all()  # 651 keys
    assert (masses[1:, 1] == 0).all()  # 4 keys
    assert torch.isfinite(shares["values"]).all()


@pytest.mark.parametrize(
    "case", [case for case in EXPERT_CASES if case.H % 8 == 0], ids=lambda case: case.label
)
def test_experts_by_route_and_gather_are_the_definition(case):
    inputs = dict(zip(EXPERT_GATHER.inputs, case.inputs(), strict=True))
    attributes = {
        "top_k": case.K,
        "weight_inside": int(case.weight_inside),
        "normalize": int(case.normalize),
    }
    reference = expected(EXPERT_GATHER, inputs.values(), **attributes)
    close(EXPERT_GATHER, gather_experts(inputs, **attributes), reference)


@pytest.mark.parametrize("case", VALUE_CASES, ids=lambda case: case.label)
def test_values_are_the_definition(case):
    inputs = dict(zip(VALUE_GATHER.inputs, case.inputs(), strict=True))
    attributes = {"top_k": case.K, "subset_sums": int(case.subset_sums)}
    reference = expected(VALUE_GATHER, inputs.values(), **attributes)
    gathered = run_plugin(GATHER_VALUES, attributes, inputs)["inner_values"]
    close(VALUE_GATHER, gathered, reference)


def test_programs_beyond_the_tokens_write_nothing():
    """The grid may be larger than what the extra argument says."""
    case = VALUE_CASES[0]
    inputs = dict(zip(VALUE_GATHER.inputs, case.inputs(), strict=True))
    attributes = {"top_k": case.K, "subset_sums": 0}
    larger = dataclasses.replace(
        GATHER_VALUES,
        kernels=lambda *given: [
            dataclasses.replace(spec, grid=("8", spec.grid[1], "1"))
            for spec in GATHER_VALUES.kernels(*given)
        ],
    )
    run = [run_plugin(plugin, attributes, inputs) for plugin in (GATHER_VALUES, larger)]
    assert torch.equal(run[0]["inner_values"], run[1]["inner_values"])


# What every layer computes from dimensions: B = 2, S = 3, C = 2048, Nq = 6, Nkv = 3, D = 128.
QUERY, KEY = (2, 6, 3, 128), (2, 3, 2048, 128)
ATTENTION_SHAPES = {
    "query": QUERY, "key": KEY, "value": KEY, "score": (2, 3, 2048, 1), "write_index": (2,)
}  # fmt: skip
ATTENTION_TYPES = {
    **dict.fromkeys(("query", "key", "value"), "float16"),
    "score": "float32",
    "write_index": "int64",
}
SHARES = {"scale": 0.125, "max_splits": 32, "one_score_row": 0}


def test_grid_extras_and_shapes_of_attention():
    few, many = ATTEND_SHARES.make_kernels(SHARES, ATTENTION_SHAPES, ATTENTION_TYPES)
    sizes = Sizes(ATTEND_SHARES, SHARES, ATTENTION_SHAPES, spec=few)
    assert sizes.extras() == (3, 2048, 6)  # 32 shares for 6 queries
    assert sizes.grid(few) == (6, 3, 6)
    assert sizes.output_shape("values") == (6, 2, 3, 6, 128)
    assert sizes.output_shape("masses") == (6, 2, 3, 6, 2)
    prompt = {**ATTENTION_SHAPES, "query": (2, 6, 100, 128)}
    sizes = Sizes(ATTEND_SHARES, SHARES, prompt, spec=many)
    assert sizes.extras() == (100, 2048, 1)
    assert sizes.grid(many) == (-(-100 * 2 // int(many.constants["BLOCK_M"])), 3, 2)
    joined = {"query": QUERY, "values": (6, 2, 3, 6, 128), "masses": (6, 2, 3, 6, 2)}
    types = {"query": "bfloat16", "values": "float32", "masses": "float32"}
    (join,) = JOIN_SHARES.make_kernels({"max_splits": 32}, joined, types)
    sizes = Sizes(JOIN_SHARES, {"max_splits": 32}, joined, spec=join)
    assert (sizes.extras(), sizes.grid(join)) == ((6,), (36, 1, 1))
    assert sizes.output_shape("attention_output") == (2, 3, 768)
    assert JOIN_SHARES.output_type("attention_output", types) == "bfloat16"


def test_grid_extras_and_shapes_of_the_gathers():
    routing = {"top_k": 8, "normalize": 0, "scratch_size": router_scratch(8, 32)}
    scores = dict.fromkeys(ROUTE_EXPERTS.inputs, (5, 2, 32))
    types = dict.fromkeys(scores, "float16")
    (route,) = ROUTE_EXPERTS.make_kernels(routing, scores, types)
    sizes = Sizes(ROUTE_EXPERTS, routing, scores, spec=route)
    assert (sizes.extras(), sizes.grid(route)) == ((10,), (10, 1, 1))
    assert sizes.output_shape("experts") == sizes.output_shape("weights") == (5, 2, 8)
    assert sizes.output_shape("scratch") == (5, 2, 4 * 8 + 20)
    rows = {"hidden": (5, 256), "down": (1024, 256), "up": (1024, 256)}
    picks = dict.fromkeys(("experts", "weights"), (5, 2, 8))
    types = {**dict.fromkeys(rows, "float16"), "experts": "int32", "weights": "float32"}
    (gather,) = GATHER_EXPERTS.make_kernels({"weight_inside": 0}, {**rows, **picks}, types)
    sizes = Sizes(GATHER_EXPERTS, {"weight_inside": 0}, {**rows, **picks}, spec=gather)
    assert (sizes.extras(), sizes.grid(gather)) == ((5,), (5, 1, 1))
    assert sizes.output_shape("expert_output") == (5, 256)
    values = {"scores": (5, 2, 4), "table": (4, 600)}
    picking = {"top_k": 2, "subset_sums": 0}
    (gather,) = GATHER_VALUES.make_kernels(picking, values, dict.fromkeys(values, "float32"))
    sizes = Sizes(GATHER_VALUES, picking, values, spec=gather)
    assert (sizes.extras(), sizes.grid(gather)) == ((5,), (5, 3, 1))
    assert sizes.output_shape("inner_values") == (5, 600)


@pytest.mark.parametrize(
    ("slots", "key_heads", "splits"), [(64, 3, 1), (2048, 3, 32), (2048, 16, 16), (300, 1, 5)]
)
def test_a_lone_query_is_split_as_far_as_its_keys_and_the_gpu_allow(slots, key_heads, splits):
    shapes = {
        **ATTENTION_SHAPES,
        "query": (-1, key_heads, -1, 128),
        **dict.fromkeys(("key", "value"), (-1, key_heads, slots, 128)),
        "score": (-1, key_heads, slots, 1),
    }
    few, _ = ATTEND_SHARES.make_kernels({**SHARES, "max_splits": 1}, shapes, ATTENTION_TYPES)
    assert few.constants["SHARE_STEP"] == 64
    assert max_splits(few, slots) == splits


def test_dimensions_that_vary_have_no_influence_on_kernels():
    """Whatever TensorRT knows of them: a batch of one does not become a row that all share."""
    varying = {
        **ATTENTION_SHAPES,
        "query": (-1, 6, -1, 128),
        **dict.fromkeys(("key", "value"), (-1, 3, 2048, 128)),
        "score": (-1, 3, 2048, 1),
        "write_index": (-1,),
    }
    made = [
        ATTEND_SHARES.make_kernels(SHARES, shapes, ATTENTION_TYPES)
        for shapes in (varying, ATTENTION_SHAPES, {**varying, "score": (1, 3, 2048, 1)})
    ]
    assert made[0] == made[1] == made[2]


def test_scale_has_one_kernel_whether_read_before_or_after_it_was_stored():
    stored = float(torch.tensor(128**-0.5))
    assert stored != 128**-0.5
    made = [
        ATTEND_SHARES.make_kernels({**SHARES, "scale": scale}, ATTENTION_SHAPES, ATTENTION_TYPES)
        for scale in (stored, 128**-0.5)
    ]
    assert made[0] == made[1]


def test_kernels_are_those_of_the_other_form_otherwise():
    """Tiles and constants are tuned once; so is what is refused."""
    decode, _ = attention_kernels(
        {"scale": 0.125, "keep_window_size": 0},
        {**ATTENTION_SHAPES, "attention_output": (2, 3, 768)},
        {**ATTENTION_TYPES, "attention_output": "float16"},
    ).specs
    few, _ = ATTEND_SHARES.make_kernels(SHARES, ATTENTION_SHAPES, ATTENTION_TYPES)
    for name in ("BLOCK_N", "BLOCK_D", "SHARE_STEP"):
        assert few.constants[name] == decode.constants[name]
    use = USES["doge-120m-moe, experts"]
    route, gather, *_ = expert_kernels(use.attributes, use.shapes, use.dtypes).specs
    top_k = int(use.attributes["top_k"])
    shapes = {**use.shapes, "experts": (-1, 1, top_k), "weights": (-1, 1, top_k)}
    types = {**use.dtypes, "experts": "int32", "weights": "float32"}
    routing = {"top_k": top_k, "normalize": 0, "scratch_size": router_scratch(top_k, 64)}
    (own_route,) = ROUTE_EXPERTS.make_kernels(routing, shapes, types)
    (own_gather,) = GATHER_EXPERTS.make_kernels({"weight_inside": 0}, shapes, types)
    assert own_route.constants == route.constants
    assert own_gather.constants.items() <= gather.constants.items()
    with pytest.raises(ValueError, match="scratch_size is 7, expected 247"):
        ROUTE_EXPERTS.make_kernels({**routing, "scratch_size": 7}, shapes, types)
    with pytest.raises(ValueError, match="H is 12"):
        rows = {"hidden": (-1, 12), "down": (4096, 12), "up": (4096, 12)}
        GATHER_EXPERTS.make_kernels({"weight_inside": 0}, {**shapes, **rows}, types)


def test_cache_beyond_32_bit_addresses_is_refused():
    shapes = {**ATTENTION_SHAPES, "key": (2, 3, 2**24, 128)}
    with pytest.raises(ValueError, match="at most 16777215 slots of 128"):
        ATTEND_SHARES.make_kernels(SHARES, shapes, ATTENTION_TYPES)


def test_names_are_distinct_and_no_custom_ops():
    names = [plugin.name for plugin in AOT_PLUGINS]
    assert len(set(names)) == len(names)
    assert not set(names) & {op.name for op in OPS}


@pytest.mark.parametrize("plugin", AOT_PLUGINS, ids=lambda plugin: plugin.name)
def test_every_plugin_passes_a_size(plugin):
    assert plugin.extras
    assert set(plugin.extras) <= set(plugin.sizes)
    assert set(plugin.output_shapes) == set(plugin.output_types) == set(plugin.outputs)


def test_rules_name_what_they_cannot_read():
    sizes = Sizes(GATHER_VALUES, {"top_k": 2}, {"scores": (5, 2, 4)})
    assert sizes.evaluate("scores.0 * ceil(tokens / 2) * top_k * 3") == 5 * 3 * 2 * 3
    for rule in ("rows", "scores.x", "ceil(5 / rows)", "scores.0 + 1"):
        with pytest.raises(ValueError, match="stands for nothing"):
            sizes.evaluate(rule)
