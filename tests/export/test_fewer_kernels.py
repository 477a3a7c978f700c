"""The passes that cut the compiled plan, each by itself and together, in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export.lowerings.graph_editor import GraphEditor
from export.lowerings.query_heads import repeat_few_query_heads
from export.lowerings.tensorrt import PASSES, lower_for_fewer_kernels, lower_for_tensorrt
from model.checkpoint import load_checkpoint
from model.contract import step_contract
from model.seed_rewrites import rewrite_for_export
from runtime.backends.base import Limits
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend, make_session
from runtime.cpu_threads import CpuThreads
from tests.export.conftest import Exported
from tests.golden_cases import GOLDEN_CASES
from tests.shared_exports import export_once
from tests.tiny_doge import MOE, write_checkpoint

SLOTS = 64  # as other tests export these models


@pytest.fixture(params=GOLDEN_CASES)
def exported(request: pytest.FixtureRequest, exported_case: Callable[[str], Exported]) -> Exported:
    return exported_case(request.param)


def logits(backend: OnnxRuntimeBackend, ids: np.ndarray) -> np.ndarray:
    """A prompt's logits, all but its last 4 tokens in one pass and those one by one."""
    cache = backend.new_cache(len(ids))
    begin = ids.shape[1] - 4
    rows = [backend.score(ids[:, :begin], np.full(len(ids), begin), cache)]
    rows += [backend.decode(ids[:, i], cache)[:, None] for i in range(begin, ids.shape[1])]
    return np.concatenate(rows, axis=1)


def saved(model: ir.Model, path: Path) -> Path:
    ir.save(model, path, external_data=f"{path.name}.data")
    onnx.checker.check_model(str(path), full_check=True)
    return path


@pytest.mark.parametrize(
    "alone", [*(pytest.param(name, marks=pytest.mark.slow) for name in PASSES), None]
)
def test_float32_logits_stay(exported, tmp_path, alone):
    """Every pass alone, and all of them, against the canonical model."""
    left_out = frozenset() if alone is None else frozenset(PASSES) - {alone}
    model = ir.load(exported.path)
    lower_for_fewer_kernels(model, half=True, plugins=False, left_out=left_out)
    lowered = exported.backend_on(saved(model, tmp_path / "lowered.onnx"), exported.contract)
    ids = exported.golden["input_ids"][:1]
    expected, actual = logits(exported.onnxruntime, ids), logits(lowered, ids)
    np.testing.assert_allclose(actual, expected, atol=exported.atol, rtol=0)


def test_half_precision_is_no_worse_than_without_the_passes(exported, tmp_path):
    ids = exported.golden["input_ids"][:1]
    expected = logits(exported.onnxruntime, ids)
    medians = {}
    for name, left_out in (("with", frozenset()), ("without", frozenset(PASSES))):
        (tmp_path / name).mkdir()
        path = lower_for_tensorrt(exported.path, tmp_path / name, "float16", left_out=left_out)
        onnx.checker.check_model(str(path), full_check=True)
        half = exported.backend_on(path, exported.contract_with("float16"))
        # A near tie in expert or key selection may fall the other way at one position.
        medians[name] = np.median(np.abs(logits(half, ids) - expected))
    assert 0 < medians["with"] <= 1.2 * medians["without"]


def canonical(folder: Path, **config: object) -> Path:
    network = load_checkpoint(write_checkpoint(folder, **config))  # type: ignore[arg-type]
    network, _ = rewrite_for_export(network, SLOTS)
    return export_once(network, folder / "model.onnx", max_seq_len=SLOTS)


def operators(graph: ir.Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph)


def test_one_product_makes_what_attention_reads(tmp_path):
    path = canonical(tmp_path)
    before, model = operators(ir.load(path).graph), ir.load(path)
    lower_for_fewer_kernels(model, half=True, plugins=False)
    after = operators(model.graph)
    layers = 3
    # q, k, v and dt become one product; two norms of heads become one, spelled out.
    assert before["MatMul"] - after["MatMul"] == 3 * layers
    assert before["RMSNormalization"] - after["RMSNormalization"] == 2 * layers
    assert before["RotaryEmbedding"] - after["RotaryEmbedding"] == layers
    assert after["TensorScatter"] == before["TensorScatter"] == 3 * layers
    names = {value.name for node in model.graph for value in node.outputs}
    for i in range(layers):
        assert {f"layers.{i}.{kind}" for kind in ("query", "key", "value", "score")} <= names


def test_rows_of_scores_stay_apart_where_keys_are_selected(tmp_path):
    model = ir.load(canonical(tmp_path, keep_window_size=16))
    lower_for_fewer_kernels(model, half=True, plugins=False)
    weights = model.graph.initializers
    assert list(weights["layers.0.attention_inputs.weight"].shape) == [64, (4 + 2 + 2) * 16]
    assert list(weights["layers.0.dt_proj.rows"].shape) == [2, 2 * 16]


@pytest.mark.parametrize("narrow", [None, "int8", "int4", "fp8"])
def test_rows_of_scores_are_a_head_of_the_product_in_every_precision(tmp_path, narrow):
    path = lower_for_tensorrt(canonical(tmp_path), tmp_path, "float16", weights=narrow)
    weights = ir.load(path).graph.initializers
    name = "layers.0.attention_inputs.weight" + ("" if narrow is None else f".{narrow}")
    assert list(weights[name].shape) == [64, (4 + 2 + 2 + 1) * 16]
    assert not [name for name in weights if "dt_proj" in name]


def test_what_attention_of_a_seed_reads_is_multiplied_by_ones_together(tmp_path):
    """Queries and keys are one product; only the rotation changes a number behind it."""
    path = canonical(tmp_path, generation="g1", untrained=True)
    before, model = ir.load(path), ir.load(path)
    lower_for_fewer_kernels(model, half=True, plugins=False)
    counts = [operators(m.graph) for m in (before, model)]
    layers = 3
    assert counts[0]["MatMul"] - counts[1]["MatMul"] == layers
    assert counts[1]["Concat"] - counts[0]["Concat"] == layers
    ones = [v for name, v in model.graph.initializers.items() if name.endswith("heads of ones")]
    assert [np.unique(v.const_value.numpy()).tolist() for v in ones] == [[1.0]]
    names = {value.name for node in model.graph for value in node.outputs}
    for i in range(layers):
        assert {f"layers.{i}.{kind}" for kind in ("query", "key", "value")} <= names


def test_few_experts_of_many_are_the_first_of_more(tmp_path, monkeypatch):
    """TensorRT needs one kernel less for 32 of more than 1024 than for 4."""
    path = canonical(tmp_path, **MOE)
    taken = {}
    for limit in (64, 63):  # a grid of 8 x 8
        monkeypatch.setattr("export.lowerings.expert_sums._FEW_OF", limit)
        model = ir.load(path)
        lower_for_fewer_kernels(model, half=True, plugins=False)
        editor = GraphEditor(model)
        nodes = [node for node in model.graph if node.op_type == "TopK"]
        taken[limit] = {int(editor.array(node.inputs[1])[0]) for node in nodes}
        saved(model, tmp_path / f"{limit}.onnx")
    assert taken[63] == {32}
    assert max(taken[64]) < 32
    network = load_checkpoint(tmp_path)
    contract = step_contract(network.config, network.generation, max_seq_len=SLOTS)
    limits = Limits(max_batch_size=2, max_input_len=SLOTS, max_seq_len=SLOTS)
    ids = np.random.default_rng(0).integers(0, 97, (2, 20))
    few, many = (
        logits(
            OnnxRuntimeBackend(
                make_session(str(tmp_path / f"{limit}.onnx"), CpuThreads(1)),
                contract,
                limits=limits,
                variant="fp32",
                vocab_size=97,
                router_mode=network.config.router_mode,
            ),
            ids,
        )
        for limit in (64, 63)
    )
    np.testing.assert_array_equal(few, many)


@pytest.mark.parametrize(("heads", "times"), [(1, 4), (2, 2), (3, 2), (4, 1), (8, 1)])
def test_few_query_heads_are_repeated_and_the_logits_stay(tmp_path, heads, times):
    shape = {"num_attention_heads": heads, "num_key_value_heads": 1, "hidden_size": 48}
    shape["num_hidden_layers"] = 2
    if heads == 8:
        shape["hidden_size"] = 64
    path = canonical(tmp_path, **shape)
    model = ir.load(path)
    assert repeat_few_query_heads(GraphEditor(model)) == times
    lowered = saved(model, tmp_path / "lowered.onnx")
    network = load_checkpoint(tmp_path)
    backends = [
        OnnxRuntimeBackend(
            make_session(str(file), CpuThreads(1)),
            step_contract(network.config, network.generation, max_seq_len=SLOTS),
            limits=Limits(max_batch_size=2, max_input_len=SLOTS, max_seq_len=SLOTS),
            variant="fp32",
            vocab_size=97,
            router_mode=None,
        )
        for file in (path, lowered)
    ]
    ids = np.random.default_rng(0).integers(0, 97, (2, 20))
    expected, actual = (logits(backend, ids) for backend in backends)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
    attention = next(n for n in model.graph if n.op_type == "DynamicMaskAttention")
    assert attention.inputs[0].shape[1] == heads * times


def test_experts_become_one_choice_among_the_grid(tmp_path):
    model = ir.load(canonical(tmp_path, **MOE))
    lower_for_fewer_kernels(model, half=True, plugins=False)
    found = operators(model.graph)
    assert (found["TopK"], found["ExpertGather"], found["GatherElements"]) == (3, 0, 1)


def test_grid_beyond_the_limit_keeps_the_op(tmp_path, monkeypatch):
    monkeypatch.setattr("export.lowerings.expert_sums.LARGEST_GRID", 63)
    model = ir.load(canonical(tmp_path, **MOE))  # a grid of 8 x 8
    lower_for_fewer_kernels(model, half=True, plugins=False)
    assert operators(model.graph)["ExpertGather"] == 3


def test_plugins_find_the_ops_as_they_were(tmp_path):
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1}
    path = lower_for_tensorrt(
        canonical(tmp_path, **MOE, **shape), tmp_path, "float16", plugins=True
    )
    nodes = [node for node in ir.load(path).graph if node.domain == "doge"]
    assert Counter(n.op_type for n in nodes) == {"DynamicMaskAttention": 3, "ExpertGather": 3}
    assert all(n.inputs[0].shape[1] == 2 for n in nodes if n.op_type == "DynamicMaskAttention")


def test_residual_stream_is_float32_and_caches_are_half(tmp_path):
    graph = ir.load(lower_for_tensorrt(canonical(tmp_path), tmp_path, "float16")).graph
    types = {value.name: value.dtype for node in graph for value in node.outputs}
    types |= {value.name: value.dtype for value in graph.inputs}
    for i in range(3):
        assert types[f"layers.{i}.attention_residual"] == ir.DataType.FLOAT
        assert types[f"layers.{i}.output"] == ir.DataType.FLOAT
        assert types[f"layers.{i}.query"] == ir.DataType.FLOAT16
        assert types[f"past_key_values.{i}.key"] == ir.DataType.FLOAT16
    assert graph.initializers["model.embed_tokens.weight"].dtype == ir.DataType.FLOAT16
    assert all(
        graph.initializers[name].dtype == ir.DataType.FLOAT16
        for name in graph.initializers
        if name.endswith(("_proj.weight", "attention_inputs.weight"))
    )


def test_nodes_are_called_after_their_part_of_the_model(tmp_path):
    graph = ir.load(lower_for_tensorrt(canonical(tmp_path), tmp_path, "float16")).graph
    parts = [node.name.partition("/")[0] for node in graph]
    layers = [f"layers.{i}.{part}" for i in range(3) for part in ("attention", "feed_forward")]
    assert set(parts) == {"embedding", "head", *layers}
    by_operator = {
        (node.op_type, part) for node, part in zip(graph, parts, strict=True) if "layers.1" in part
    }
    assert ("DynamicMaskAttention", "layers.1.attention") in by_operator
    assert ("TensorScatter", "layers.1.attention") in by_operator
    assert ("Sigmoid", "layers.1.feed_forward") in by_operator
    assert ("Sigmoid", "layers.1.attention") not in by_operator
    assert len({node.name for node in graph}) == len(parts)


def test_no_node_of_a_decode_step_copies_the_cache(tmp_path):
    """Caches go from the input into one write each, and from there to attention and out."""
    graph = ir.load(lower_for_tensorrt(canonical(tmp_path), tmp_path, "float16")).graph
    for value in graph.inputs:
        if not (value.name or "").startswith("past_key_values."):
            continue
        (write,) = value.consumers()
        assert write.op_type == "TensorScatter"
        present = write.outputs[0]
        assert present.is_graph_output()
        assert [node.op_type for node in present.consumers()] == ["DynamicMaskAttention"]
