"""Fixtures that several folders of tests share."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command_calls import Built, Call, Main, Outcome
from tests.stand_in_driver import StandInDriver, compile_driver
from tests.tiny_doge import MOE, write_checkpoint

# Kernels run in Triton's interpreter, which is chosen when their modules are imported.
os.environ["TRITON_INTERPRET"] = "1"

GOLDEN = Path(__file__).parent / "data" / "golden"


def pytest_collection_finish() -> None:
    """What modules hold is no garbage: tests that collect theirs need not look at it each time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _messages_as_in_a_fresh_process() -> None:
    """A command that ran before, in a test or in a fixture, has set what its packages log."""
    for package in ("plugins", "model", "runtime", "export"):
        logging.getLogger(package).setLevel(logging.NOTSET)


@pytest.fixture(scope="session", autouse=True)
def _networks_are_exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The build command exports what no test of this run has exported before, copies the rest."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOGE_TESTS_RUN_FOLDER", str(shared))
        if "export.pipeline" in sys.modules:  # else no test module builds a bundle
            from tests.shared_exports import export_once

            patch.setattr("export.pipeline.export_onnx", export_once)
        yield


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """Gives the folder of a case: a checkpoint, and in golden.npz what published code computes."""

    def folder(case: str) -> Path:
        found = GOLDEN / case
        assert (found / "golden.npz").is_file(), f"no golden case {case}"
        return found

    return folder


@pytest.fixture(scope="session")
def tiny_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint with random weights; not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny_dense"))


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with random weights, routed as published; not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny_moe"), seed=1, **MOE)


@pytest.fixture(scope="session")
def stand_in_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a stand-in for the NVIDIA driver."""
    return compile_driver(tmp_path_factory.mktemp("stand_in_driver"))


@pytest.fixture
def stand_in_driver(stand_in_library: Path, tmp_path: Path) -> StandInDriver:
    """A stand-in for the NVIDIA driver that writes down what it is asked."""
    return StandInDriver(library=stand_in_library, folder=tmp_path)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command's `main` with these arguments."""

    def run(main: Main, *arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def moe_bundle(tiny_moe: Path) -> Built:
    """Random experts, no tokenizer, no engine."""
    from tests.shared_exports import bundle_once

    return bundle_once("moe", "--model", tiny_moe, "--backend", "none", "--router", "per_token")


@pytest.fixture(scope="session")
def text_bundle() -> Built:
    """The bundled checkpoint, which has a tokenizer."""
    from tests.shared_exports import bundle_once

    return bundle_once("doge-tiny", "--backend", "none")


@pytest.fixture
def copied(moe_bundle: Built, tmp_path: Path) -> Path:
    """A copy of the bundle of experts, free to be changed."""
    return shutil.copytree(moe_bundle.path, tmp_path / "elsewhere" / "copy")
