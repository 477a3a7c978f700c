"""What tests of engines share: a bundle to run, and a fake GPU to run it on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from runtime.backends import open_backend
from runtime.backends.base import Backend
from runtime.bundle import Bundle
from tests.command_calls import build_bundle
from tests.fake_tensorrt import FakeGpu
from tests.fake_tensorrt.engine_file import add_fake_engine


@pytest.fixture(scope="session")
def engine_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint's canonical model, for 3 rows, passes of 64 tokens and 420 slots.

    Its keep window of 256 is smaller than its cache. A row of 420 scores is no multiple of 256
    bytes, the alignment that TensorRT asks for.
    """
    path = tmp_path_factory.mktemp("engines") / "source"
    limits = ("--max-batch-size", 3, "--max-input-len", 64, "--max-seq-len", 420)
    build_bundle("--output", path, "--backend", "none", "--cpu", "none", *limits)
    return path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A machine with a fake RTX 4090; when the test ends, it must be as it was."""
    fake = FakeGpu.install(monkeypatch)
    yield fake
    fake.check_clean()


@pytest.fixture
def engine_bundle(engine_source: Path, tmp_path: Path) -> Bundle:
    """With an engine of TensorRT-RTX."""
    return add_fake_engine(engine_source, tmp_path / "bundle")


@pytest.fixture
def engine(engine_bundle: Bundle, gpu: FakeGpu) -> Iterator[Backend]:
    with closing(open_backend("tensorrt_rtx", engine_bundle)) as opened:
        yield opened


@pytest.fixture
def ahead_bundle(engine_source: Path, tmp_path: Path) -> Bundle:
    """Whose engine has a decode graph."""
    return add_fake_engine(engine_source, tmp_path / "ahead", decode_width=64)


@pytest.fixture
def ahead(ahead_bundle: Bundle, gpu: FakeGpu) -> Iterator[Backend]:
    """On an engine with a decode graph."""
    with closing(open_backend("tensorrt_rtx", ahead_bundle)) as opened:
        yield opened


@pytest.fixture
def reference(engine_bundle: Bundle) -> Iterator[Backend]:
    with closing(open_backend("onnxruntime", engine_bundle)) as opened:
        yield opened
