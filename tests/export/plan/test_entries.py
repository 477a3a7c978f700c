"""Reading the compiled plan from a recorded piece of the builder's log.

`tests/data/plan/builder.log` holds lines of two builds by TensorRT-RTX 1.7.1.116: sizes, one entry
of each kind and the heading of the next section.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from export.plan.entries import CompiledPlan, PlanError, read_plan
from export.plan.summary import LAUNCH_US, part_of, summarize

LOG = Path(__file__).parents[2] / "data" / "plan" / "builder.log"
# Of one build of a seed of one layer, which is a plugin; of its stored tensors there are three.
LAYER_LOG = LOG.with_name("layer_plugins.log")


def messages(old: str = "", new: str = "", log: Path = LOG) -> list[str]:
    """The recorded messages, one text in them replaced."""
    text = log.read_text(encoding="utf-8")
    assert old in text
    text = text.replace(old, new) if old else text
    sizes, _, section = text.partition("Layers:\n")
    return [*sizes.splitlines(), f"Layers:\n{section}"]


@pytest.fixture
def plan() -> CompiledPlan:
    return read_plan(messages(), 2)


def test_every_line_is_an_entry_of_its_kind_and_profile(plan):
    kinds = [(entry.kind, entry.profile) for entry in plan.entries]
    assert kinds == [
        ("shape_call", 0),
        ("kgen", 0),
        ("gemm", 0),
        ("kgen", 0),
        ("signal", 0),
        ("wait", 0),
        ("gemm", 1),
    ]
    assert [entry.starts_kernel for entry in plan.entries] == [
        False, True, True, True, False, False, True,
    ]  # fmt: skip


def test_tensors_have_types_and_shapes(plan):
    product = plan.entries[2]
    assert product.inputs[0].shape == (-1, 64)
    assert product.inputs[0].dtype == "Half"
    assert product.inputs[0].bytes is None
    assert product.constants[0].shape == (64, 144)  # 4 + 2 + 2 heads of 16, and one for scores
    assert product.constants[0].bytes == 64 * 144 * 2
    assert product.outputs[0].shape == (-1, 144)


def test_entries_know_their_nodes_and_parts(plan):
    assert plan.entries[2].nodes == ("layers.0.attention/MatMul_4",)
    assert [part_of(plan.entries[i]) for i in (1, 2, 3, 6)] == [
        "layers.0.attention",
        "layers.0.attention",
        "layers.0.attention",
        "head",
    ]
    # A node inside a function is known by the function's node in the main graph.
    (node,) = plan.entries[3].nodes
    assert node.startswith("layers.0.attention/DynamicMaskAttention_")
    assert part_of(plan.entries[0]) == "other"


def test_fused_attention_streams_and_memory_are_read(plan):
    assert [entry.is_fused_attention for entry in plan.entries].count(True) == 1
    assert plan.entries[5].stream == 1
    assert plan.activation_bytes == (8197120, 8517632)
    assert plan.weights_bytes == 164480


def test_summary_counts_what_starts_a_kernel(plan):
    summary = summarize(plan, ["decode", "prefill"], layers=2, cache_bytes=1008)
    decode, prefill = summary.profiles
    assert (decode.entries, decode.entries_per_layer) == (3, 1.5)
    assert decode.by_kind == {"gemm": 1, "kgen": 2}
    assert decode.by_part == {"attention": 3}
    assert prefill.by_part == {"head": 1}
    assert (decode.fused_attention, prefill.fused_attention, summary.fused_attention) == (1, 0, 1)
    assert (decode.waits, decode.streams) == (1, 2)
    # The table of the embedding and the norm beside it are not read as a whole.
    assert decode.weight_bytes == 64 * 144 * 2 + 4 + 4
    estimate = summary.decode_estimate
    assert estimate["launches_us"] == 3 * LAUNCH_US
    assert estimate["reading_us"] == round((decode.weight_bytes + 1008) / 1008e9 * 1e6, 1)
    assert summary.unknown_kinds == ()


def test_kind_that_was_never_seen_counts_as_a_kernel_and_is_named():
    plan = read_plan(messages("LayerType: wait", "LayerType: reformat"), 2)
    summary = summarize(plan, ["decode", "prefill"], layers=2, cache_bytes=0)
    assert summary.profiles[0].entries == 4
    assert summary.unknown_kinds == ("reformat",)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("LayerType: gemm", "Kind: gemm", "cannot read an entry of the plan"),
        ("StrideOrder: [1,0]", "Order: 10", "cannot read the tensors of entry"),
        ("Datatype: Half", "Datatype: Nibble", "Nibble, whose size is not known"),
        ("Total Weights Memory", "Total Weights", "0 of weights, expected 2 and 1"),
        ("Total Activation Memory", "Total Activations", "gives 0 sizes of activation memory"),
        ("_myl1", "_myl7", "belongs to profile 7, there are 2"),
        ("_myl1", "", "does not say which of 2 profiles"),
    ],
)
def test_log_in_another_form_is_an_error(old, new, message):
    with pytest.raises(PlanError, match=message):
        plan = read_plan(messages(old, new), 2)
        summarize(plan, ["decode", "prefill"], layers=2, cache_bytes=0)


def test_missing_or_second_section_is_an_error():
    with pytest.raises(PlanError, match="0 sections `Layers:`, expected one"):
        read_plan(messages()[:-1], 2)
    with pytest.raises(PlanError, match="2 sections"):
        read_plan([*messages(), "Layers:\n\n"], 2)


def test_profile_without_entries_is_an_error():
    with pytest.raises(PlanError, match="no entries for profile 2 of 3"):
        read_plan(messages(), 3)


def test_plan_that_is_cut_at_plugins_has_its_pieces_in_their_profiles():
    plan = read_plan(messages(log=LAYER_LOG), 2)
    kinds = ["shape_call", "kgen", "kgen", *["Constant"] * 3, "PluginV3", "shape_call"]
    kinds += ["kgen", "gemm", "kgen"]
    found = [(entry.kind, entry.profile) for entry in plan.entries]
    assert found == [("NoOp", 0), *((kind, 0) for kind in kinds), *((kind, 1) for kind in kinds)]
    # Numbers of pieces go far beyond those of profiles, and not every entry names its profile.
    assert "[profile" not in plan.entries[12].name + plan.entries[-1].inputs[0].name
    assert {entry.name.rpartition("_myl")[2] for entry in plan.entries} >= {"0_0", "16_3", "33_3"}


def test_plugin_has_its_node_and_its_stored_tensors_by_their_names():
    plan = read_plan(messages(log=LAYER_LOG), 2)
    for plugin in (entry for entry in plan.entries if entry.kind == "PluginV3"):
        assert part_of(plugin) == "layers.0.layer"
        stored = {tensor.name: tensor for tensor in plugin.constants}
        assert set(stored) == {"cos", "layers.0.down.weights", "layers.0.expert_up"}
        assert stored["layers.0.down.weights"].shape == (64, 96)
        assert stored["layers.0.down.weights"].dtype == "Half"
        names = [tensor.name.removesuffix(" [profile 1]") for tensor in plugin.inputs]
        assert names[:3] == ["embedding/Cast_1", "write_index", "embedding/Gather_2"]
        assert plugin.outputs[0].shape[2] == 64
        assert plugin.stream == 0


def test_summary_counts_a_plugin_as_the_kernels_that_it_starts():
    plan = read_plan(messages(log=LAYER_LOG), 2)
    summary = summarize(plan, ["decode", "prefill"], layers=1, cache_bytes=0, plugin_launches=6)
    for profile in summary.profiles:
        assert (profile.entries, profile.plugins) == (6, 1)
        assert profile.by_kind == {"PluginV3": 1, "gemm": 1, "kgen": 4}
        assert profile.by_part == {"embedding": 2, "head": 3, "layer": 1}
    assert summary.unknown_kinds == ()
    estimate = summary.decode_estimate
    assert (estimate["launches"], estimate["launches_us"]) == (11, 11 * LAUNCH_US)
    # Of tables a step reads rows: the rotary tables' and the experts' are not counted.
    head = 64 * 98 * 2
    assert 0 <= summary.profiles[0].weight_bytes - 64 * 96 * 2 - head < 1024


def test_copy_beside_a_plugin_counts_as_a_kernel_and_is_named():
    plan = read_plan(messages("LayerType: NoOp", "LayerType: Reformat", LAYER_LOG), 2)
    summary = summarize(plan, ["decode", "prefill"], layers=1, cache_bytes=0)
    assert summary.unknown_kinds == ("Reformat",)
    assert [profile.entries for profile in summary.profiles] == [7, 6]
