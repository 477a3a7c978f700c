"""What tests of engines share: a bundle to run, and a fake GPU to run it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import pytest

from runtime.backends import open_backend
from runtime.backends.base import Backend
from runtime.bundle import Bundle
from runtime.system_process import describe_opened
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


class HereInstead:
    """Stands for a process: the fake GPU is known in this one alone."""

    def __init__(self, label: str, open_system: Callable[[], Any]) -> None:
        self.system = open_system()
        self.opened = describe_opened(self.system, 0.5)
        self.run = self.system.run

    def peak_rss_mb(self) -> float:
        return 100.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.system.close()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark's systems run in this process."""
    monkeypatch.setattr("runtime.benchmarking.SystemProcess", HereInstead)
    monkeypatch.setattr("runtime.benchmarking.PAUSE_S", 0.0)
    monkeypatch.setattr("runtime.gpu.copy_speed.copy_bytes_per_s.__defaults__", (1 << 20,))
