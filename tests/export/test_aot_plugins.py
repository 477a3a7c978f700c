"""Custom ops as plugins that an engine holds: the graph, and that it computes the same."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from export.aot_build import model_kernels, register_aot
from export.functions import doge_nodes
from export.lowerings.aot_plugins import use_aot_plugins
from export.lowerings.tensorrt import lower_for_tensorrt
from model.checkpoint import load_checkpoint
from model.seed_rewrites import rewrite_for_export
from plugins import tensorrt_aot
from plugins.aot_plugin import AotPlugin
from plugins.aot_registry import AOT_PLUGINS
from plugins.custom_op import DOMAIN
from runtime.backends.base import BackendUnavailableError
from runtime.tensorrt_module import load_plugin_module, load_tensorrt
from tests.aot_runs import run_plugin
from tests.fake_tensorrt_plugin import FakeTensorRt
from tests.shared_exports import export_once
from tests.tiny_doge import MOE, write_checkpoint

SLOTS = 64
PLUGINS = {plugin.name: plugin for plugin in AOT_PLUGINS}
# One layer each of attention and experts, and of the seed's attention, values and experts.
MODELS: dict[str, dict[str, Any]] = {
    "moe": {"num_hidden_layers": 1, **MOE},
    "seed": {"num_hidden_layers": 1, "generation": "g1"},
}
ATTENTION = ["AttendShares", "JoinShares"]
NODES = {
    "moe": [*ATTENTION, "RouteExperts", "GatherExperts"],
    "seed": ["GatherValues", *ATTENTION, "RouteExperts", "GatherExperts"],
}


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = write_checkpoint(tmp_path_factory.mktemp(name), **MODELS[name])
            network, _ = rewrite_for_export(load_checkpoint(folder), SLOTS)
            made[name] = export_once(network, folder / "model.onnx", max_seq_len=SLOTS)
        return made[name]

    return get


def by_name(node: ir.Node) -> dict[str, ir.Value]:
    plugin = PLUGINS[node.op_type]
    names, values = (*plugin.inputs, *plugin.outputs), (*node.inputs, *node.outputs)
    return {n: v for n, v in zip(names, values, strict=True) if v is not None}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_custom_op_becomes_plugins(canonical, tmp_path, name, dtype):
    path = lower_for_tensorrt(canonical(name), tmp_path, dtype, aot_plugins=True)
    onnx.checker.check_model(str(path))
    model = ir.load(path)
    nodes = list(doge_nodes(model))
    assert [node.op_type for node in nodes] == NODES[name]
    assert not model.functions, "a parser would expand them where it finds no plugin"
    for node in nodes:
        plugin = PLUGINS[node.op_type]
        values = by_name(node)
        assert set(values) == {*plugin.inputs, *plugin.outputs}
        assert set(node.attributes) == {
            *plugin.attributes, "aot", "plugin_namespace", "plugin_version"
        }  # fmt: skip
        assert node.attributes["aot"].as_int() == 1
        assert node.attributes["plugin_namespace"].as_string() == "doge"
        assert node.attributes["plugin_version"].as_string() == "1"
        dtypes = {n: str(values[n].dtype.numpy()) for n in plugin.inputs}
        for output in plugin.outputs:
            assert str(values[output].dtype.numpy()) == plugin.output_type(output, dtypes)
            assert len(values[output].shape) == len(plugin.output_shapes[output])
    assert len(list(model_kernels(model))) == len(nodes)


def test_attributes_carry_what_the_custom_op_said(canonical, tmp_path):
    nodes = {
        node.op_type: node
        for node in doge_nodes(
            ir.load(lower_for_tensorrt(canonical("moe"), tmp_path, "float16", aot_plugins=True))
        )
    }
    shares, join = nodes["AttendShares"].attributes, nodes["JoinShares"].attributes
    assert shares["scale"].as_float() == 0.25  # D = 16
    assert shares["max_splits"].as_int() == join["max_splits"].as_int() == 1  # few slots
    assert shares["one_score_row"].as_int() == 0
    route = nodes["RouteExperts"].attributes
    assert route["top_k"].as_int() == MOE["num_experts_per_tok"] == 5
    assert route["scratch_size"].as_int() == 4 * 5 + 10
    values = by_name(nodes["GatherExperts"])
    assert list(values["experts"].shape)[1:] == [1, 5]
    assert values["experts"].producer() is nodes["RouteExperts"]
    assert values["experts"].dtype == ir.DataType.INT32


def test_join_takes_over_the_name_of_the_attention(canonical, tmp_path):
    model = ir.load(lower_for_tensorrt(canonical("moe"), tmp_path, "float16", plugins=True))
    before = next(n for n in doge_nodes(model) if n.op_type == "DynamicMaskAttention").outputs[0]
    name, shape, readers = before.name, before.shape, list(before.consumers())
    assert use_aot_plugins(model) == 4
    after = next(n for n in doge_nodes(model) if n.op_type == "JoinShares").outputs[0]
    assert (after.name, after.shape) == (name, shape)
    assert after.dtype == ir.DataType.FLOAT16
    assert list(after.consumers()) == readers


def test_one_bias_for_the_batch_is_an_attribute(canonical, tmp_path):
    path = lower_for_tensorrt(canonical("seed"), tmp_path, "float16", aot_plugins=True)
    shares = next(n for n in doge_nodes(ir.load(path)) if n.op_type == "AttendShares")
    assert shares.attributes["one_score_row"].as_int() == 1


def test_window_that_drops_keys_is_not_covered(tmp_path):
    folder = write_checkpoint(tmp_path, num_hidden_layers=1, keep_window_size=16)
    path = export_once(load_checkpoint(folder), folder / "model.onnx", max_seq_len=SLOTS)
    message = r"DynamicMaskAttention \(.*\) cannot .*: queries keep 16 of 64 keys"
    with pytest.raises(ValueError, match=message):
        lower_for_tensorrt(path, tmp_path, "float16", aot_plugins=True)


def interpreted(plugin: AotPlugin, tactic: int) -> type[OpRun]:
    """The plugin's node for onnx's evaluator, run by its kernel in Triton's interpreter."""

    def run(self: OpRun, *inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
        tensors = [torch.from_numpy(np.array(value)) for value in inputs]
        outputs = run_plugin(
            plugin,
            {name: attributes[name] for name in plugin.attributes},
            dict(zip(plugin.inputs, tensors, strict=True)),
            tactic if plugin.tactics > 1 else 1,
        )
        return tuple(tensor.numpy() for tensor in outputs.values())

    return type(plugin.name, (OpRun,), {"op_domain": DOMAIN, "_run": run})


def step_inputs(session: onnxruntime.InferenceSession, slots: tuple[int, ...], tokens: int) -> Any:
    """Tokens behind caches that are filled to different lengths."""
    random = np.random.default_rng(0)
    sizes = {"B": len(slots), "S": tokens, "M": 1}
    given: dict[str, np.ndarray] = {}
    for spec in session.get_inputs():
        shape = [sizes.get(size, size) for size in spec.shape]
        given[spec.name] = random.normal(size=shape).astype(np.float32)
    start = np.array(slots)
    given["input_ids"] = random.integers(3, 97, (len(slots), tokens))
    given["position_ids"] = start[:, None] + np.arange(tokens)
    given["write_index"] = start
    given["logits_index"] = np.full((len(slots), 1), tokens - 1)
    return given


@pytest.mark.parametrize("tactic", [1, 2], ids=["few queries", "many queries"])
@pytest.mark.parametrize("name", MODELS)
def test_lowered_model_computes_the_same(canonical, tmp_path, name, tactic):
    for folder in ("plain", "aot"):
        (tmp_path / folder).mkdir()
    plain = lower_for_tensorrt(canonical(name), tmp_path / "plain", "float32")
    lowered = lower_for_tensorrt(canonical(name), tmp_path / "aot", "float32", aot_plugins=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that caches are copied
    session = onnxruntime.InferenceSession(str(plain), options)
    given = step_inputs(session, (3, 20), 4)
    plugins = [interpreted(plugin, tactic) for plugin in AOT_PLUGINS]
    actual = ReferenceEvaluator(str(lowered), new_ops=plugins).run(None, given)
    for output, expected in zip(actual, session.run(None, given), strict=True):
        np.testing.assert_allclose(output, expected, atol=1e-4, rtol=0)


def test_registering_for_a_model_compiles_what_its_layers_ask_for(canonical, tmp_path, monkeypatch):
    path = lower_for_tensorrt(canonical("moe"), tmp_path, "float16", aot_plugins=True)
    trt = FakeTensorRt()
    monkeypatch.setitem(sys.modules, trt.__name__, trt)
    monkeypatch.setitem(sys.modules, trt.plugin.__name__, trt.plugin)
    monkeypatch.setattr(tensorrt_aot, "_HOSTS", {})
    registered = register_aot(trt, path, ["sm90"])
    assert registered.layers == len(NODES["moe"])
    names = {spec.name for specs in model_kernels(ir.load(path)) for spec in specs}
    assert set(registered.host.codes) == names
    assert set(trt.registered) == set(PLUGINS)
    functions = Counter(name.split("-")[0] for name in names)
    assert functions["attend_shares_aot"] == functions["attend_prompt_aot"] == 1


def test_several_targets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="name one target, got sm89, sm90"):
        register_aot(FakeTensorRt(), tmp_path, ["sm89", "sm90"])


def test_model_that_was_not_lowered_so_is_refused(canonical, tmp_path):
    model = ir.load(lower_for_tensorrt(canonical("moe"), tmp_path, "float16", plugins=True))
    with pytest.raises(ValueError, match=r"DynamicMaskAttention .* lower the model with aot_plug"):
        list(model_kernels(model))


def test_tensorrt_rtx_says_that_it_has_no_such_plugins(tmp_path):
    trt = load_tensorrt("tensorrt_rtx")
    with pytest.raises(BackendUnavailableError, match="no plugins whose kernels an engine holds"):
        load_plugin_module(trt)
