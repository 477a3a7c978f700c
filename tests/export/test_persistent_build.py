"""A build with a persistent kernel: variants, files and flags. Triton's kernels are stand-ins."""

from __future__ import annotations

import pytest

from export import build_engine, kernel_build
from export.build_setting import BuildSetting
from export.bundle_writer import BundleWriter
from export.cuda_models import CudaModelBuilder, CudaRequest
from export.kernel_compiler import CompiledKernel
from export.progress import BuildProgress
from export.sources import read_checkpoint
from export.step_weights import step_model_of
from model.checkpoint import load_checkpoint
from model.hub import ModelLocation
from runtime.backends.base import Limits
from runtime.bundle import _flags_for
from runtime.command import USAGE
from runtime.kernel_library import KernelLibrary
from runtime.kernel_step.formats import StepFormats
from runtime.kernel_step.step_kernels import StepKernels
from tests.tiny_doge import MOE, write_checkpoint

LIMITS = Limits(max_batch_size=2, max_input_len=12, max_seq_len=32)


def stand_in(specs, targets, **_):
    return [
        CompiledKernel(
            spec=spec, target=target, cubin=f"{spec.name} {target}".encode(), ptx=".version 8.0",
            entry="entry", shared_bytes=0, triton_version="3.9.0",
        )
        for target in targets
        for spec in specs
    ]  # fmt: skip


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Builds a tiny model for our kernels; gives what was built, its kernels and their files."""
    monkeypatch.setattr(kernel_build, "compile_kernels", stand_in)

    def run(persistent, precision="fp16", **overrides):
        folder = write_checkpoint(tmp_path / "c", num_hidden_layers=2, **overrides)
        checkpoint = read_checkpoint(ModelLocation(folder=folder), None)
        with BundleWriter(tmp_path / "bundle") as writer:
            network = load_checkpoint(folder)
            setting = BuildSetting(
                writer=writer, checkpoint=checkpoint, limits=LIMITS,
                progress=BuildProgress(quiet=True), adopted=None, trained=False, eval_text=None,
                load_network=lambda: network,
            )  # fmt: skip
            request = CudaRequest(precision=precision, targets=("sm89",), persistent=persistent)
            built = CudaModelBuilder(setting).build(request, force=False)
            library = KernelLibrary.open(writer.folder)
            # What the backend asks for when it opens the variant.
            model = step_model_of(network, LIMITS.max_seq_len)
            formats = StepFormats.of(precision)
            library.require(StepKernels(model, formats, LIMITS, persistent=persistent).specs)
            files = {e.file: (library.folder / e.file).read_bytes() for e in library.entries}
            return built, library, files

    return run


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_it_is_a_second_variant_of_the_same_weights(build, precision):
    built, library, files = build(True, precision)
    plain, persistent = built.variants
    assert (plain.name, persistent.name) == (precision, f"{precision}-persistent")
    assert plain.path == persistent.path == f"cuda/{precision}.safetensors"
    assert persistent.details["persistent"] is True
    assert "persistent" not in plain.details
    added = set(persistent.details["kernels"]) - set(plain.details["kernels"])
    assert {name.partition("-")[0] for name in added} == {"persistent_step", "grid_barriers"}
    assert library.names == set(persistent.details["kernels"])
    for entry in library.entries:
        assert files[entry.file].startswith(b"\x7fELF") == (entry.name in added)
    more = {name: value for name, value in persistent.details.items() if name != "persistent"}
    assert {**more, "kernels": None} == {**plain.details, "kernels": None}


def test_without_the_flag_there_is_none(build):
    built, library, _ = build(False)
    assert [variant.name for variant in built.variants] == ["fp16"]
    assert not any("persistent" in name for name in library.names)


def test_a_model_that_it_does_not_cover_is_refused_before_anything_is_written(build, tmp_path):
    with pytest.raises(ValueError, match=r"no persistent kernel for this model: it has experts"):
        build(True, **MOE)
    assert not (tmp_path / "bundle").exists()


def test_commands_say_what_it_is_for(tmp_path, call):
    output = ("--cpu", "none", "--output", tmp_path / "b")
    done = call(build_engine.main, "--backend", "none", "--persistent", *output)
    assert done.status == USAGE
    assert "--persistent is for --backend cuda, not none" in done.err
    for flags, persistent in (((), False), (("--persistent",), True)):
        args = build_engine.make_parser().parse_args(["--backend", "cuda", *flags])
        assert build_engine._cuda_request(args).persistent is persistent


def test_the_command_that_adds_it_has_its_flag():
    flags = _flags_for("cuda", "int8-persistent")
    assert flags == {"--backend": "cuda", "--precision": "int8", "--persistent": ""}
    assert "--persistent" not in _flags_for("cuda", "int8")
    assert _flags_for("tensorrt_rtx", "fp16-sm89-doge")["--plugin"] == "doge"
