"""How many kernels a decode step may have: engines are built for sm_89, nothing is run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from export.engine import EngineConfig, EngineReport, Precision, build_engine
from export.lowerings.engine_weights import weight_format
from export.lowerings.tensorrt import PASSES, lower_for_tensorrt
from export.plan.summary import PlanSummary
from export.progress import BuildProgress
from export.sources import BUNDLED_CHECKPOINT
from model.checkpoint import load_checkpoint
from model.contract import step_contract
from model.random_weights import write_random_checkpoint
from model.released import ReleasedShape, released_shape
from model.seed_rewrites import rewrite_for_export
from tests.shared_exports import export_once


def built(
    checkpoint: Path,
    work: Path,
    *,
    slots: int,
    left_out: frozenset[str] = frozenset(),
    precision: Precision = "fp16",
) -> EngineReport:
    """The report of an engine whose arithmetic is float16."""
    network = load_checkpoint(checkpoint)
    rewritten, _ = rewrite_for_export(network, slots)
    path = export_once(rewritten, work / "model.onnx", max_seq_len=slots)
    weights = weight_format(precision)
    path = lower_for_tensorrt(path, work, "float16", weights=weights, left_out=left_out)
    contract = step_contract(
        network.config, network.generation, max_seq_len=slots, cache_dtype="float16"
    )
    config = EngineConfig(precision=precision, max_input_len=slots, max_seq_len=slots)
    return build_engine(path, config, contract, BuildProgress(quiet=True)).report


def plan_of(report: EngineReport) -> PlanSummary:
    assert report.plan is not None
    return report.plan


def test_plan_of_the_bundled_model_stays_within_its_budget(tmp_path):
    """Experts, and a keep window that selects, which takes 5 kernels more."""
    report = built(BUNDLED_CHECKPOINT, tmp_path, slots=1024)
    decode, prefill = plan_of(report).profiles
    assert (decode.name, prefill.name) == ("decode", "prefill")
    assert decode.entries_per_layer <= 23
    assert decode.fused_attention == prefill.fused_attention == 4
    assert decode.streams == prefill.streams == 1
    assert decode.waits == prefill.waits == 0
    assert "other" not in decode.by_part
    assert set(decode.by_part) <= {"embedding", "attention", "feed_forward", "head"}
    assert decode.activation_bytes < prefill.activation_bytes
    assert decode.weight_bytes < plan_of(report).weights_bytes
    assert report.cache_updates == 3 * 4


@pytest.mark.slow
def test_plan_without_selection_stays_within_its_budget(tmp_path):
    """Up to the keep window nothing is selected: the plan of a released model with experts."""
    report = built(BUNDLED_CHECKPOINT, tmp_path, slots=256)
    decode, _ = plan_of(report).profiles
    assert decode.entries <= 15 * 4 + 4


# Kernels of a layer, as docs/plan.md has them; those outside layers are 3 or 4.
BUDGETS = {"doge-20m": 11, "doge-20m-moe": 15, "doge-20m-g3": 11, "doge-76m": 13}
# All layers and the whole vocabulary take a minute a shape; benchmarks/plan_entries.py counts them.
LAYERS = 3


def shortened(name: str, layers: int = LAYERS) -> ReleasedShape:
    shape = released_shape(name)
    config = dataclasses.replace(shape.config, num_hidden_layers=layers, vocab_size=512)
    return dataclasses.replace(shape, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGETS)
def test_plan_of_a_released_shape_stays_within_its_budget(tmp_path, name):
    write_random_checkpoint(tmp_path, shortened(name), 0)
    report = built(tmp_path, tmp_path, slots=2048)
    decode, _ = plan_of(report).profiles
    assert decode.entries <= BUDGETS[name] * LAYERS + 4
    assert decode.fused_attention == report.attention == LAYERS
    assert decode.waits == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), [("doge-20m", 0), ("doge-20m-moe", 1)])
def test_narrow_weights_cost_no_entry_but_for_routers_beside_int4(tmp_path, name, more):
    write_random_checkpoint(tmp_path, shortened(name, 2), 0)
    entries = {
        precision: plan_of(built(tmp_path, tmp_path, slots=2048, precision=precision))
        .profiles[0]
        .entries
        for precision in ("fp16", "int8", "fp8", "int4")
    }
    assert entries["int8"] == entries["fp8"] == entries["fp16"]
    assert entries["int4"] <= entries["fp16"] + 2 * more


@pytest.mark.slow
def test_plan_of_a_few_layers_of_160m_stays_within_its_budget(tmp_path):
    write_random_checkpoint(tmp_path, shortened("doge-160m"), 0)
    decode, _ = plan_of(built(tmp_path, tmp_path, slots=2048)).profiles
    assert decode.entries <= 11 * LAYERS + 3
    # No kernel but attention and the write reads a cache: 24 MiB of copies would be activations.
    assert decode.activation_bytes < 10 << 20


@pytest.mark.slow
def test_without_the_passes_the_plan_is_far_beyond_the_budget(tmp_path):
    """What the budgets would let through if a pass stopped matching anything."""
    write_random_checkpoint(tmp_path, shortened("doge-20m", 2), 0)
    for name in PASSES[:1] + PASSES[2:]:  # experts: see doge-20m-moe
        report = built(tmp_path, tmp_path, slots=2048, left_out=frozenset({name}))
        assert plan_of(report).profiles[0].entries > BUDGETS["doge-20m"] * 2 + 4
