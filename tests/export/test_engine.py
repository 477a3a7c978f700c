"""Engine settings, profiles, and real engine builds for a GPU that is not here."""

from __future__ import annotations

import errno
import importlib.util
import signal
from pathlib import Path
from types import SimpleNamespace

import onnx_ir as ir
import pytest

from export.builder_callbacks import BuildLog
from export.engine import (
    EngineBuildError,
    EngineConfig,
    build_engine,
    check_builder,
    read_plan_of_build,
)
from export.estimate import estimate
from export.lowerings.tensorrt import lower_for_tensorrt
from export.plan.entries import READ_VERSION
from export.profiles import step_profiles
from export.progress import BuildProgress
from model.checkpoint import load_checkpoint
from model.contract import cache_kinds, step_contract
from model.released import RELEASED_SHAPES
from model.seed_rewrites import rewrite_for_export
from runtime.backends.base import BackendUnavailableError, Limits
from runtime.tensorrt_module import load_tensorrt
from tests.golden_cases import GOLDEN_CASES
from tests.shared_exports import export_once
from tests.tiny_doge import write_checkpoint


def test_all_problems_of_a_config_are_named_at_once():
    with pytest.raises(ValueError, match="invalid EngineConfig") as caught:
        EngineConfig(
            targets=("4090", "sm89", "sm89"), max_batch_size=0, max_input_len=9, max_seq_len=8
        )
    for part in ("'4090'", "must differ", "max_batch_size", "must cover max_input_len"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"plugin": "other"}, "plugin must be one of none, doge, doge-aot"),
        ({"plugin": "doge-aot"}, "TensorRT-RTX has no plugins whose kernels an engine holds"),
        (
            {"plugin": "doge-aot", "backend": "tensorrt", "targets": ("sm89", "sm90")},
            "name one target",
        ),
    ],
)
def test_plugins_that_a_product_cannot_have_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(max_input_len=8, max_seq_len=8, **values)


def test_unknown_target_is_refused_before_any_work():
    config = EngineConfig(targets=("sm90",), max_input_len=8, max_seq_len=8)
    with pytest.raises(EngineBuildError, match="does not build for sm90; it builds for"):
        check_builder(config)


def test_standard_tensorrt_says_what_to_install():
    with pytest.raises(BackendUnavailableError, match=r"doge-tensorrt\[tensorrt\]"):
        load_tensorrt("tensorrt")


def test_profiles_cover_decode_and_prefill():
    decode, prefill = step_profiles(Limits(max_batch_size=4, max_input_len=64, max_seq_len=128))
    assert (decode.sizes["S"].min, decode.sizes["S"].max) == (1, 1)
    assert (prefill.sizes["S"].min, prefill.sizes["S"].max) == (1, 64)
    assert decode.sizes["B"].max == prefill.sizes["B"].max == 4


@pytest.mark.parametrize("name", RELEASED_SHAPES)
def test_released_shapes_have_the_published_parameter_counts(name):
    shape = RELEASED_SHAPES[name]
    engine = EngineConfig(max_input_len=2048, max_seq_len=2048)
    found = estimate(shape.config, shape.generation, engine)
    assert found.parameters == shape.parameters
    assert found.read_bytes_per_token <= found.engine_bytes


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("kind", ["tiny_dense", "tiny_moe"])
def test_engine_for_sm89_builds_without_a_gpu(request, kind, precision, tmp_path):
    network = load_checkpoint(request.getfixturevalue(kind))
    dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[precision]
    path = export_once(network, tmp_path / "model.onnx", max_seq_len=64)
    path = lower_for_tensorrt(path, tmp_path, dtype)
    contract = step_contract(network.config, network.generation, max_seq_len=64, cache_dtype=dtype)
    config = EngineConfig(precision=precision, max_input_len=64, max_seq_len=64)
    built = build_engine(path, config, contract, BuildProgress(quiet=True))
    layers = network.config.num_hidden_layers
    assert built.blob[:4] in {b"vtrt", b"trtv"}  # the magic of an engine file, either way round
    assert built.report.attention == layers
    assert built.report.cache_updates == 3 * layers
    assert built.report.plugin_layers == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_engine_for_sm89_builds_for_every_golden_case(exported_case, case, tmp_path):
    exported = exported_case(case)
    network = exported.network
    path = lower_for_tensorrt(exported.path, tmp_path, "float16")
    config = EngineConfig(
        precision="fp16", max_input_len=exported.slots, max_seq_len=exported.slots
    )
    contract = exported.contract_with("float16")
    built = build_engine(path, config, contract, BuildProgress(quiet=True))
    layers = network.config.num_hidden_layers
    assert built.report.attention == layers
    assert built.report.cache_updates == len(cache_kinds(network.generation)) * layers
    # Both profiles run every attention as one fused kernel.
    assert built.report.fused_attention == 2 * layers


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_engine_builds_for_a_seed_whose_retrieval_is_a_constant(tmp_path, dtype):
    """As published checkpoints are expected to be: mask all one, value keys all zero."""
    network = load_checkpoint(write_checkpoint(tmp_path, generation="g1", untrained=True))
    rewritten, _ = rewrite_for_export(network, 64)
    path = export_once(rewritten, tmp_path / "model.onnx", max_seq_len=64)
    path = lower_for_tensorrt(path, tmp_path, dtype)
    contract = step_contract(network.config, network.generation, max_seq_len=64, cache_dtype=dtype)
    precision = {"float16": "fp16", "float32": "fp32"}[dtype]
    config = EngineConfig(precision=precision, max_input_len=64, max_seq_len=64)
    built = build_engine(path, config, contract, BuildProgress(quiet=True))
    assert built.report.attention == network.config.num_hidden_layers


@pytest.mark.slow
def test_model_that_breaks_the_contract_builds_no_engine(tiny_dense, tmp_path):
    network = load_checkpoint(tiny_dense)
    path = export_once(network, tmp_path / "model.onnx", max_seq_len=64)
    model = ir.load(path)
    model.graph.outputs[0].name = "scores"
    broken = tmp_path / "broken.onnx"
    ir.save(model, broken, external_data="broken.onnx.data")
    contract = step_contract(network.config, network.generation, max_seq_len=64)
    config = EngineConfig(precision="fp32", max_input_len=64, max_seq_len=64)
    with pytest.raises(EngineBuildError, match="scores"):
        build_engine(broken, config, contract, BuildProgress(quiet=True))


@pytest.mark.slow
def test_ctrl_c_during_the_build_stops_it(tiny_dense, tmp_path):
    network = load_checkpoint(tiny_dense)
    path = export_once(network, tmp_path / "model.onnx", max_seq_len=64)
    contract = step_contract(network.config, network.generation, max_seq_len=64)
    config = EngineConfig(precision="fp32", max_input_len=64, max_seq_len=64)

    class Interrupting(BuildProgress):
        def start(self, phase: str, steps: int) -> None:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_engine(path, config, contract, Interrupting(quiet=True))
    assert signal.getsignal(signal.SIGINT) is before


def test_read_only_installation_gets_the_link_to_make(tmp_path, monkeypatch):
    (tmp_path / "libtensorrt_rtx.so.1").write_bytes(b"")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)

    def refuse(self: Path, target: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(BackendUnavailableError, match=r"Read-only.*ln -s libtensorrt_rtx\.so\.1"):
        load_tensorrt("tensorrt_rtx")


@pytest.mark.parametrize(
    ("product", "version", "refused"),
    [
        ("tensorrt_rtx", READ_VERSION, True),
        ("tensorrt_rtx", "1.8.0.1", False),
        ("tensorrt", "11.4", False),
    ],
)
def test_log_without_a_plan_is_an_error_where_its_form_is_known(caplog, product, version, refused):
    network = SimpleNamespace(__name__=product, __version__=version)
    contract = SimpleNamespace()
    profiles = step_profiles(Limits(max_batch_size=1, max_input_len=8, max_seq_len=8))
    if refused:
        with pytest.raises(EngineBuildError, match=r"not its report: .* 0 sections `Layers:`"):
            read_plan_of_build(network, BuildLog(), profiles, contract)
        return
    assert read_plan_of_build(network, BuildLog(), profiles, contract) is None
    assert f"no plan in the report of {product} {version}" in caplog.text
