"""The decode graph: its model, its real engine for a GPU that is not here, and its bundle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

import export.engine
from export.builder_callbacks import BuildLog, make_logger
from export.decode_graph import SAMPLING, WIDTH, write_decode_graph
from export.engine import EngineBuildError, EngineConfig, build_engine
from export.lowerings.tensorrt import lower_for_tensorrt
from export.plan.entries import CompiledPlan
from export.profiles import step_profiles
from export.progress import BuildProgress
from model.checkpoint import load_checkpoint
from model.contract import cache_kinds, step_contract
from plugins import tensorrt_plugin
from plugins.plugin_host import PluginHost
from plugins.tensorrt_plugin import deregister_plugins
from runtime.bundle import Bundle
from runtime.engines.decode_graph import DecodeGraphContract, decode_graph_of, engine_files
from runtime.engines.header import read_engine_header
from runtime.tensorrt_module import load_tensorrt
from tests.command_calls import Call, build_bundle
from tests.shared_exports import export_once

SLOTS = 80  # no other size of these models
LIMITS = ("--max-batch-size", 2, "--max-input-len", 16, "--max-seq-len", 64)


class Lowered:
    """A tiny model as TensorRT would be given it, its decode graph and that one's contract."""

    def __init__(self, checkpoint: Path, folder: Path, dtype: str = "float16") -> None:
        self.network = load_checkpoint(checkpoint)
        canonical = export_once(self.network, folder / "model.onnx", max_seq_len=SLOTS)
        self.step = step_contract(
            self.network.config, self.network.generation, max_seq_len=SLOTS, cache_dtype=dtype
        )
        self.contract = DecodeGraphContract(self.step)
        (folder / "lowered").mkdir()
        self.path = lower_for_tensorrt(canonical, folder / "lowered", dtype)
        self.decode = write_decode_graph(self.path, 64)


@pytest.fixture
def lowered(tiny_dense: Path, tmp_path: Path) -> Lowered:
    return Lowered(tiny_dense, tmp_path)


def test_the_model_has_the_inputs_and_outputs_of_its_contract_and_no_weights_of_its_own(
    lowered: Lowered,
) -> None:
    graph = ir.load(lowered.decode).graph
    contract = lowered.contract
    assert [value.name for value in graph.inputs] == [spec.name for spec in contract.inputs]
    assert [value.name for value in graph.outputs] == [spec.name for spec in contract.outputs]
    assert "logits" not in {value.name for value in graph.outputs}
    names = [path.name for path in lowered.path.parent.iterdir()]
    assert sorted(names) == ["float16.decode.onnx", "float16.onnx", "float16.onnx.data"]
    stored = {
        tensor.location
        for value in graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }
    assert stored == {"float16.onnx.data"}


def test_nodes_that_choose_are_a_part_of_the_model(lowered: Lowered) -> None:
    before = {node.name for node in ir.load(lowered.path).graph}
    nodes = [node.name or "" for node in ir.load(lowered.decode).graph]
    added = [name for name in nodes if name not in before]
    assert len(added) > 30
    assert all(name.startswith(f"{SAMPLING}/") for name in added)
    assert len(set(nodes)) == len(nodes)


def test_a_model_without_logits_is_refused(lowered: Lowered) -> None:
    with pytest.raises(ValueError, match="has no logits of a fixed vocabulary"):
        write_decode_graph(lowered.decode)


@pytest.mark.slow
def test_the_network_has_no_logits_and_writes_each_cache_tensor_in_place(
    lowered: Lowered,
) -> None:
    """Of what the real parser makes of the model."""
    trt = load_tensorrt("tensorrt_rtx")
    deregister_plugins(trt)  # which an earlier test of this process may have left there
    logger = make_logger(trt, BuildLog())
    builder = trt.Builder(logger)
    network = builder.create_network()
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(lowered.decode))
    outputs = {
        network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)
    }
    assert [*outputs] == [spec.name for spec in lowered.contract.outputs]
    vocabulary = lowered.network.config.vocab_size
    assert all(vocabulary not in tuple(output.shape) for output in outputs.values())

    readers: dict[str, list[str]] = {}
    writers: dict[str, str] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        given = [layer.get_input(i) for i in range(layer.num_inputs)]
        for tensor in given:
            if tensor is not None:
                readers.setdefault(tensor.name, []).append(layer.type.name)
        for i in range(layer.num_outputs):
            writers[layer.get_output(i).name] = layer.type.name
    for past, present in lowered.contract.aliases:
        assert readers[past] == ["KV_CACHE_UPDATE"]
        assert writers[present] == "KV_CACHE_UPDATE"
        # Nothing that moves a tensor reads keys and values: attention alone, into which the scale
        # of the keys belongs. Scores are turned into rows of the mask.
        allowed = {"SHAPE", "ATTENTION_INPUT", "ELEMENTWISE"}
        if present.endswith(".score"):
            allowed |= {"SHUFFLE"}
        assert set(readers[present]) <= allowed, (present, readers[present])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny_dense", "tiny_moe"])
def test_the_real_engine_has_one_profile_and_its_plan_writes_no_second_cache(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = Lowered(request.getfixturevalue(kind), tmp_path)
    plans: list[CompiledPlan] = []
    summarize = export.engine.summarize

    def noting(plan: CompiledPlan, *args: Any, **named: Any) -> Any:
        plans.append(plan)
        return summarize(plan, *args, **named)

    monkeypatch.setattr(export.engine, "summarize", noting)
    config = EngineConfig(max_input_len=SLOTS, max_seq_len=SLOTS, sampling_tail=True)
    profiles = step_profiles(config.limits)[:1]
    built = build_engine(
        lowered.decode, config, lowered.contract, BuildProgress(quiet=True), profiles=profiles
    )
    layers = lowered.network.config.num_hidden_layers
    assert built.report.cache_updates == len(cache_kinds(lowered.network.generation)) * layers
    assert built.report.attention == layers
    assert built.report.layers["TOPK"] >= 1
    assert [profile.name for profile in built.report.profiles] == ["decode"]
    assert built.report.plan is not None
    (profile,) = built.report.plan.profiles
    assert 1 <= profile.by_part[SAMPLING] <= 8
    (plan,) = plans
    size = lowered.network.config.head_dim
    for entry in plan.entries:
        for tensor in entry.outputs:
            if SLOTS in tensor.shape and size in tensor.shape:
                assert re.match(r"present\.\d+\.(key|value)", tensor.name), entry.name
                # In place: the entry reads what it writes.
                assert tensor.name in {given.name for given in entry.inputs}


@pytest.mark.slow
def test_a_bundle_has_both_engines_unless_told_otherwise(tiny_dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    arguments = ("--model", tiny_dense, "--output", path, "--cpu", "none", *LIMITS)
    report = build_bundle(*arguments)
    bundle = Bundle.open(path, verify=True)
    (variant,) = bundle.variants("tensorrt_rtx")
    first, second = engine_files(variant)
    assert second == "engines/tensorrt_rtx-sm89-fp16.decode.engine"
    files = {file.path: file for file in bundle.manifest.files}
    assert (files[first].role, files[second].role) == ("engine", "engine")
    graph = decode_graph_of(variant)
    assert graph is not None
    assert graph.details["width"] == WIDTH
    assert graph.details["targets"] == ["sm89"]
    assert [profile["name"] for profile in graph.details["profiles"]] == ["decode"]
    contract = DecodeGraphContract(bundle.contract_of(variant))
    assert graph.details["contract"] == contract.as_dict()
    blob = bundle.executable_file(graph).read_bytes()
    assert read_engine_header(blob).targets == ("sm89",)
    assert report["engine"]["decode_graph"]["plan"] == graph.details["plan"]
    assert "build decode graph" in report["timings"]

    report = build_bundle(*arguments, "--no-sampling-tail")
    assert report["engine"]["decode_graph"] is None
    (variant,) = Bundle.open(path).variants("tensorrt_rtx")
    assert engine_files(variant) == [first]
    assert [file.name for file in (path / "engines").iterdir()] == [Path(first).name]


@pytest.mark.parametrize(
    ("flags", "has_one"),
    [
        ((), True),
        (("--sampling-tail",), True),
        (("--no-sampling-tail",), False),
        (("--plugin", "doge"), False),
        (("--backend", "none"), False),
    ],
)
def test_an_engine_of_tensorrts_own_layers_gets_one_unless_told_otherwise(
    call: Call, tiny_dense: Path, tmp_path: Path, flags: tuple[str, ...], has_one: bool
) -> None:
    from export.build_engine import main

    outcome = call(main, "--model", tiny_dense, "--output", tmp_path, "--dry-run", "--json", *flags)
    assert ("build decode graph" in outcome.report["steps"]) is has_one


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--plugin", "doge", "--sampling-tail"), "sampling_tail needs plugin none, got 'doge'"),
        (
            ("--backend", "none", "--sampling-tail"),
            "--sampling-tail is for engines, --backend none",
        ),
    ],
)
def test_asking_for_one_where_there_can_be_none_is_an_error(
    call: Call, tiny_dense: Path, tmp_path: Path, flags: tuple[str, ...], text: str
) -> None:
    from export.build_engine import main

    outcome = call(main, "--model", tiny_dense, "--output", tmp_path, "--dry-run", "--json", *flags)
    assert outcome.status != 0
    assert text in outcome.report["error"]["message"]


def test_what_a_plugin_raises_while_an_engine_is_built_reaches_the_error(
    lowered: Lowered, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = PluginHost()
    host.problems.append("of a build before")
    monkeypatch.setitem(tensorrt_plugin._HOSTS, "tensorrt_rtx", (host, []))
    monkeypatch.setattr(export.engine, "register_plugins", lambda trt: host)

    def fail(*_: object) -> None:
        host.problems.append("ExpertGather: no kernel covers these shapes")
        raise EngineBuildError("tensorrt_rtx could not build the engine: no reason was given")

    monkeypatch.setattr(export.engine, "_build", fail)
    config = EngineConfig(max_input_len=SLOTS, max_seq_len=SLOTS, plugin="doge")
    with pytest.raises(EngineBuildError) as error:
        build_engine(lowered.path, config, lowered.step, BuildProgress(quiet=True))
    assert str(error.value) == (
        "tensorrt_rtx could not build the engine: no reason was given; "
        "ExpertGather: no kernel covers these shapes"
    )
