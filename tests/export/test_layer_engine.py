"""Engines whose decoder layers are one plugin each, built for sm_89; nothing is run."""

from __future__ import annotations

import contextlib
import io
import json
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from export import build_engine as build_command
from export import build_kernels
from export.engine import EngineBuildError, EngineConfig, build_engine
from export.layer_engine import LayerEngine
from export.progress import BuildProgress
from model.checkpoint import load_checkpoint
from model.contract import step_contract
from model.random_weights import write_random_checkpoint
from model.released import released_shape
from runtime import inspect_bundle
from runtime.bundle import Bundle
from runtime.command import FAILURE, SUCCESS
from runtime.engines import plugins as engine_plugins
from runtime.engines.plugins import prepare_plugins
from runtime.kernel_step.layer_plugin import layer_inputs
from runtime.kernel_step.variant import layers_of_variant
from runtime.tensorrt_module import load_tensorrt
from tests.tiny_doge import MOE, write_checkpoint

WINDOW = {"keep_window_size": 8}


def config_of(precision="fp16", slots=64, **changes):
    limits = {"max_batch_size": 2, "max_input_len": slots, "max_seq_len": slots}
    return EngineConfig(precision=precision, plugin="layer", **{**limits, **changes})


def built(network, config, folder, kernels=None):
    """A report, the model that it is of, and what made that."""
    layers = LayerEngine(network, config)
    path = layers.write(folder)
    contract = step_contract(
        network.config,
        network.generation,
        max_seq_len=config.max_seq_len,
        cache_dtype=layers.spec.formats.float_kind,
    )
    names = {spec.name for spec in layers.kernels} if kernels is None else kernels
    engine = build_engine(
        path,
        config,
        contract,
        BuildProgress(quiet=True),
        kernels=frozenset(names),
        plugin_launches=layers.decode_launches,
    )
    return engine.report, ir.load(path), layers


def check_plan(report, layers):
    """At most two entries a layer are outside the plugins; in truth, five in all."""
    assert report.plan is not None
    decode, prefill = report.plan.profiles
    count = layers.spec.model.layers
    for profile in (decode, prefill):
        assert profile.by_kind["PluginV3"] == profile.plugins == profile.by_part["layer"] == count
        assert profile.entries - profile.plugins <= min(2 * count, 5)
        assert set(profile.by_part) == {"embedding", "layer", "head"}
        assert (profile.streams, profile.waits, profile.fused_attention) == (1, 0, 0)
    assert report.plan.unknown_kinds == ()
    assert report.plugin_layers == count
    assert (report.attention, report.cache_updates) == (0, 0)
    launches = decode.entries + count * (layers.decode_launches - 1)
    assert report.plan.decode_estimate["launches"] == launches
    # The cache is nowhere copied: it would be an activation.
    assert prefill.activation_bytes > decode.activation_bytes


MODELS = {
    "g4-window-fp16": ("g4", WINDOW, "fp16"),
    "g3-untied-bf16": ("g3", {"tie_word_embeddings": False}, "bf16"),
    "g4h-fp32": ("g4h", {}, "fp32"),
    "g1-fp16": ("g1", {}, "fp16"),
    "g4-moe-int8": ("g4", MOE, "int8"),
    "g4h-moe-int4": ("g4h", MOE, "int4"),
}


@pytest.mark.parametrize("name", MODELS)
def test_engine_has_one_plugin_a_layer_and_little_else(tmp_path, name):
    generation, overrides, precision = MODELS[name]
    folder = write_checkpoint(tmp_path / "checkpoint", generation=generation, **overrides)
    network = load_checkpoint(folder)
    report, model, layers = built(network, config_of(precision), tmp_path)
    check_plan(report, layers)
    assert report.kernels == tuple(spec.name for spec in layers.kernels)
    nodes = [node for node in model.graph if node.domain == "doge"]
    for number, node in enumerate(nodes):
        assert [value.name for value in node.outputs[1:]] == [
            f"present.{number}.{kind}" for kind in layers.spec.cache_kinds
        ]
        names = [value.name.removeprefix(f"layers.{number}.") for value in node.inputs]
        weights = len(layers.spec.weights)
        assert tuple(names[-weights:]) == layer_inputs(layers.spec)[-weights:]
    if precision == "bf16":
        weights = model.graph.initializers["layers.1.down.weights"].const_value.numpy()
        expected = network.model.layers[1].mlp.down_proj.weight.detach().numpy()
        assert weights.dtype == ml_dtypes.bfloat16
        assert np.abs(weights.astype(np.float32) - expected).max() < 2**-8 * abs(expected).max()
    if precision == "int4":
        assert model.graph.initializers["layers.1.o.weights"].dtype == ir.DataType.INT8
    # Weights are stored once, whatever the profiles.
    stored = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    assert report.plan.weights_bytes < stored + 32_000


def test_kernel_that_was_not_compiled_stops_the_build(tmp_path):
    network = load_checkpoint(write_checkpoint(tmp_path / "checkpoint", generation="g3"))
    with pytest.raises(EngineBuildError, match="was compiled; there are other"):
        built(network, config_of(), tmp_path, kernels={"other"})


def test_number_that_the_precision_cannot_hold_is_named(tmp_path):
    network = load_checkpoint(write_checkpoint(tmp_path / "checkpoint", generation="g3"))
    network.model.layers[1].self_attn.o_proj.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"layers.1.o: .*float16"):
        LayerEngine(network, config_of()).write(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp8"}, "plugin layer takes precision fp16, bf16, fp32, int8, int4, got"),
        ({"max_seq_len": 70}, "a max_seq_len that is a multiple of 8, got 70; take 64"),
        ({"max_seq_len": 6, "max_input_len": 6}, "got 6; take 8"),
        ({"max_batch_size": 9}, "a max_batch_size of up to 8, got 9"),
        ({"targets": ("sm75", "sm89")}, "plugin layer needs GPUs from sm80 on, got 'sm75'"),
        ({"sampling_tail": True}, "sampling_tail needs plugin none"),
    ],
)
def test_what_our_kernels_do_not_take_is_refused_before_anything_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


@pytest.fixture(scope="module")
def bundle_and_report(tmp_path_factory):
    """A bundle with such an engine beside one without plugins, as people build them."""
    work = tmp_path_factory.mktemp("layer")
    checkpoint = write_checkpoint(work / "checkpoint", generation="g3", num_hidden_layers=2)
    output = work / "bundle"
    limits = ["--max-seq-len", "64", "--max-batch-size", "2"]
    arguments = ["--model", str(checkpoint), "--cpu", "none", "--output", str(output), *limits]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert build_command.main([*arguments, "--plugin", "layer", "--quiet", "--json"]) == SUCCESS
    return Bundle.open(output), json.loads(printed.getvalue()), arguments


@pytest.mark.slow
def test_bundle_holds_engine_kernels_and_what_they_are_made_of(bundle_and_report):
    bundle, report, _ = bundle_and_report
    variant = bundle.variant("tensorrt_rtx")
    assert (variant.name, variant.details["plugin"]) == ("fp16-sm89-layer", "layer")
    assert report["engine"]["plugin_layers"] == 2
    assert variant.details["layer_launches"] == 5
    assert report["quality"]["variant"] == "tensorrt_rtx:fp16-sm89-layer"
    assert abs(report["quality"]["increase"]) < 0.01
    assert bundle.manifest.checks["engine_fp16-sm89-layer_quality"]["passed"]
    specs = layers_of_variant(bundle, variant).specs
    assert variant.details["kernels"] == [spec.name for spec in specs]
    assert bundle.kernel_library().names == {spec.name for spec in specs}
    bundle.kernel_library().require(specs)


class Registry:
    """Stands for what opening an engine does with plugins and kernels."""

    def __init__(self, monkeypatch):
        self.host = SimpleNamespace(launchers=[])
        self.makers = None
        monkeypatch.setattr(engine_plugins, "register_plugins", self.register)
        monkeypatch.setattr(
            "runtime.kernel_library.KernelLibrary.open_launcher", lambda self, names: sorted(names)
        )

    def register(self, trt, *makers):
        self.makers = makers
        return self.host


@pytest.mark.slow
def test_engine_is_opened_with_its_kernels_and_the_layers_plugin(bundle_and_report, monkeypatch):
    bundle, _, _ = bundle_and_report
    variant = bundle.variant("tensorrt_rtx")
    registry = Registry(monkeypatch)
    prepare_plugins(None, bundle, variant)
    ((names, launcher),) = registry.host.launchers
    assert sorted(names) == launcher == variant.details["kernels"]
    trt = load_tensorrt("tensorrt_rtx")
    (maker,) = registry.makers
    assert maker(trt, host=registry.host).name == "DecoderLayer"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: [*names, "other"], "needs kernels that bundle .* lacks: other; build it"),
        (lambda names: names[1:], "launches other kernels than this version of the project"),
    ],
)
def test_engine_of_other_kernels_is_refused(bundle_and_report, monkeypatch, change, message):
    bundle, _, _ = bundle_and_report
    variant = bundle.variant("tensorrt_rtx")
    details = {**variant.details, "kernels": change(variant.details["kernels"])}
    Registry(monkeypatch)
    with pytest.raises(ValueError, match=message):
        prepare_plugins(None, bundle, SimpleNamespace(**{**vars(variant), "details": details}))


@pytest.mark.slow
def test_engine_is_inspected_and_asked_for_by_its_name(bundle_and_report, call):
    bundle, _, _ = bundle_and_report
    printed = call(inspect_bundle.main, bundle.path).out
    assert "plugins layer" in printed
    assert "each a plugin of our kernels, 5 launches of them in a decode step" in printed
    assert "2 PluginV3" in printed
    command = bundle.how_to_add("tensorrt_rtx", "int8-sm86-layer")
    assert "--precision int8" in command
    assert "--plugin layer" in command
    assert "--target sm86" in command


@pytest.mark.slow
def test_later_builds_keep_the_kernels_of_layers(bundle_and_report, capsys):
    bundle, _, arguments = bundle_and_report
    names = bundle.kernel_library().names
    command = [str(bundle.path), "--target", "sm86", "--quiet", "--json"]
    assert build_kernels.main(command) == SUCCESS
    again = Bundle.open(bundle.path)
    assert again.kernel_library().targets == ("sm86", "sm89")
    library = again.kernel_library()
    assert {entry.name for entry in library.entries if entry.target == "sm86"} >= names
    assert build_command.main([*arguments, "--plugin", "doge", "--quiet", "--json"]) == SUCCESS
    again = Bundle.open(bundle.path)
    assert {
        entry.name for entry in again.kernel_library().entries if entry.target == "sm89"
    } > names
    prepared = [variant.name for variant in again.variants("tensorrt_rtx")]
    assert sorted(prepared) == ["fp16-sm89-doge", "fp16-sm89-layer"]
    again.kernel_library().require(layers_of_variant(again, again.variant("tensorrt_rtx")).specs)


@pytest.mark.slow
def test_odd_number_of_slots_is_refused_with_what_to_take(bundle_and_report, capsys):
    arguments = [*bundle_and_report[2], "--plugin", "layer", "--max-seq-len", "60", "--json"]
    assert build_command.main(arguments) == FAILURE
    assert (
        "multiple of 8, got 60; take 56" in json.loads(capsys.readouterr().out)["error"]["message"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["doge-20m", "doge-76m", "doge-20m-moe"])
def test_plan_of_a_released_shape(tmp_path, name):
    write_random_checkpoint(tmp_path, released_shape(name), 0)
    network = load_checkpoint(tmp_path)
    report, _, layers = built(network, config_of(slots=2048, max_batch_size=4), tmp_path)
    check_plan(report, layers)
