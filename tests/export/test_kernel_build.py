"""Compiling a bundle's kernels and building its engine with them, as people run it; no GPU."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

from export import build_engine, build_kernels
from export import engine as engine_module
from export.kernel_build import kernels_of, op_uses, toolkit_of
from export.kernel_compiler import KernelCompileError, compile_kernels
from plugins.kernel_spec import KernelSpec
from plugins.launcher import Device
from plugins.registry import OPS
from plugins.tensorrt_plugin import PluginHost
from runtime.backends.base import BackendUnavailableError
from runtime.bundle import Bundle
from runtime.command import FAILURE, SUCCESS, USAGE
from runtime.engines.plugins import prepare_plugins
from runtime.kernel_library import KERNEL_FOLDER, KERNEL_MANIFEST
from tests.kernel_gate import USES

pytestmark = pytest.mark.slow

# Custom ops of each golden checkpoint's model: attentions, experts, values.
NODES = {"g4": 3, "g4_moe": 6, "g1": 9, "g4h_window": 3}


def build(golden, case, output, *flags):
    arguments = ["--model", str(golden(case)), "--cpu", "none", "--output", str(output), *flags]
    return build_engine.main([*arguments, "--quiet", "--json"])


@pytest.fixture(scope="module")
def moe(golden, tmp_path_factory):
    """A bundle with an engine that has plugins, and its build report."""
    output = tmp_path_factory.mktemp("bundles") / "moe"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert build(golden, "g4_moe", output, "--plugin", "doge") == SUCCESS
    return Bundle.open(output), json.loads(printed.getvalue())


def test_every_custom_op_is_a_plugin_layer(moe):
    bundle, report = moe
    assert report["engine"]["plugin_layers"] == NODES["g4_moe"]
    assert report["engine"]["attention"] == 0
    variant = bundle.variant("tensorrt_rtx")
    assert variant.name == "fp16-sm89-doge"
    assert variant.details["plugin"] == "doge"
    library = bundle.kernel_library()
    assert set(variant.details["kernels"]) == library.names
    assert library.targets == ("sm89",)
    ada = Device(name="", compute_capability=(8, 9), driver_version=(13, 0))
    assert {binary.name for binary in library.binaries_for(ada)} == library.names


@pytest.mark.parametrize("case", ["g1", "g4h_window"])
def test_generations_with_other_ops_build_with_plugins(golden, tmp_path, capsys, case):
    assert build(golden, case, tmp_path / "b", "--plugin", "doge") == SUCCESS
    report = json.loads(capsys.readouterr().out)
    assert report["engine"]["plugin_layers"] == NODES[case]


def test_engine_without_plugins_beside_one_with_them(moe, golden, capsys):
    bundle, _ = moe
    assert build(golden, "g4_moe", bundle.path) == SUCCESS
    assert json.loads(capsys.readouterr().out)["engine"]["plugin_layers"] == 0
    again = Bundle.open(bundle.path)
    names = [variant.name for variant in again.variants("tensorrt_rtx")]
    assert names == ["fp16-sm89", "fp16-sm89-doge"]
    assert again.kernel_library() == bundle.kernel_library()


def test_plugin_that_the_parser_does_not_find_fails_the_build(
    golden, tmp_path, capsys, monkeypatch
):
    def register_nothing(trt):
        engine_module.deregister_plugins(trt)
        return PluginHost()

    monkeypatch.setattr(engine_module, "register_plugins", register_nothing)
    assert build(golden, "g4_moe", tmp_path / "b", "--plugin", "doge") == FAILURE
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert "3 DynamicMaskAttention, 3 ExpertGather" in message
    assert "asks for 6 plugin layers; the parsed network has 0" in message


def test_kernels_for_more_targets_are_added_and_the_same_bytes_come_again(golden, tmp_path, capsys):
    assert build(golden, "g4_moe", tmp_path / "b", "--backend", "none") == SUCCESS
    command = [str(tmp_path / "b"), "--quiet", "--json", "--target"]
    assert build_kernels.main([*command, "sm86"]) == SUCCESS
    first = {path.name: path.read_bytes() for path in (tmp_path / "b" / KERNEL_FOLDER).iterdir()}
    assert build_kernels.main([*command, "sm86,sm90"]) == SUCCESS
    capsys.readouterr()
    bundle = Bundle.open(tmp_path / "b", verify=True)
    assert bundle.kernel_library().targets == ("sm86", "sm90")
    for name, content in first.items():
        if name.endswith(".cubin"):
            assert (bundle.path / KERNEL_FOLDER / name).read_bytes() == content, name
    uses = op_uses(bundle.file("model.onnx"), "float16")
    assert bundle.kernel_library().names == {spec.name for spec in kernels_of(uses)}
    assert {use.op for use in uses} == {"DynamicMaskAttention", "ExpertGather"}
    for path in (bundle.path / KERNEL_FOLDER).iterdir():
        assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()


def test_unknown_precision_is_wrong_usage(moe, capsys):
    assert build_kernels.main([str(moe[0].path), "--precision", "fp12", "--json"]) == USAGE
    assert "fp12 is unknown" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_target_that_is_no_architecture_is_an_error(moe, capsys):
    assert build_kernels.main([str(moe[0].path), "--target", "ada", "--json", "--quiet"]) == FAILURE
    assert "looks like sm89, got ada" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_engine_whose_kernels_are_gone_is_refused(moe, tmp_path):
    bundle, _ = moe
    shutil.copytree(bundle.path, tmp_path / "b")
    manifest = tmp_path / "b" / KERNEL_MANIFEST
    data = json.loads(manifest.read_text())
    manifest.write_text(manifest.read_text().replace(data["kernels"][0]["sha256"], "0" * 64))
    copy = Bundle.open(tmp_path / "b")
    with pytest.raises(ValueError, match="refusing to load the kernels of bundle"):
        prepare_plugins(None, copy, copy.variant("tensorrt_rtx", "fp16-sm89-doge"))


def test_altered_kernels_are_not_taken_over(moe, tmp_path, capsys):
    shutil.copytree(moe[0].path, tmp_path / "b")
    cubin = next((tmp_path / "b" / KERNEL_FOLDER).glob("*.cubin"))
    code = bytearray(cubin.read_bytes())
    code[-1] ^= 1
    cubin.write_bytes(code)
    command = [str(tmp_path / "b"), "--target", "sm86", "--json", "--quiet"]
    assert build_kernels.main(command) == FAILURE
    assert "refusing to load the kernels" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_kernels_that_the_manifest_does_not_list_are_not_loaded(moe, golden, tmp_path, capsys):
    assert build(golden, "g4_moe", tmp_path / "b", "--backend", "none") == SUCCESS
    capsys.readouterr()
    shutil.copytree(moe[0].path / KERNEL_FOLDER, tmp_path / "b" / KERNEL_FOLDER)
    with pytest.raises(BackendUnavailableError, match="has no kernels"):
        Bundle.open(tmp_path / "b").kernel_library()


def test_setting_of_the_users_environment_does_not_change_the_code(monkeypatch):
    specs = kernels_of([USES["values"]])
    (plain,) = compile_kernels(specs, ["sm89"])
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    (other,) = compile_kernels(specs, ["sm89"])
    assert other.cubin == plain.cubin


def test_target_that_triton_does_not_know_is_an_error():
    with pytest.raises(KernelCompileError, match="sm999"):
        compile_kernels(kernels_of([USES["values"]]), ["sm999"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arguments": {"scores": "*fp16"}}, "the kernel takes"),
        ({"constants": {}}, "the kernel takes"),
    ],
)
def test_specification_that_is_not_the_kernels_is_refused(changes, message):
    (spec,) = (
        OPS[2]
        .make_kernels(
            {"top_k": 2, "subset_sums": 0},
            {"scores": (-1, 2, 4), "table": (4, 64), "inner_values": (-1, 64)},
            dict.fromkeys(("scores", "table", "inner_values"), "float16"),
        )
        .specs
    )
    values = {name: getattr(spec, name) for name in spec.__dataclass_fields__} | changes
    with pytest.raises(KernelCompileError, match=message):
        compile_kernels([KernelSpec(**values)], ["sm89"])


@pytest.mark.parametrize(
    ("ptx", "toolkit"),
    [(".version 8.8", "12.9"), (".version 9.4", "13.4"), (".version 8.4", "12.4")],
)
def test_toolkit_is_that_of_the_ptx_version(ptx, toolkit):
    assert toolkit_of(f"//\n{ptx}\n.target sm_89") == toolkit


def test_ptx_of_an_unknown_toolkit_is_an_error():
    with pytest.raises(ValueError, match=r"PTX version 11\.0"):
        toolkit_of(".version 11.0")
