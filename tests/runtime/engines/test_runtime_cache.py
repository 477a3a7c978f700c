"""The runtime cache beside the bundle: reloaded, refused, unwritable, and cut off by a kill."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from runtime.backends import open_backend
from runtime.bundle import Bundle
from runtime.engines.runtime_cache import CACHE_FOLDER, CacheKey, RuntimeCacheFile
from tests.fake_tensorrt import FakeGpu, library
from tests.fake_tensorrt.engine_file import add_fake_engine

ROOT = Path(__file__).parents[3]
KEY = CacheKey(
    product="tensorrt_rtx",
    version="1.7.1.116",
    gpu="nvidia-geforce-rtx-4090",
    target="sm89",
    driver="13.0",
    engine="ab" * 32,
)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "runtime")
    return caplog


def lines(told: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in told.records if "runtime cache" in r.getMessage()]


def run_once(bundle: Bundle) -> None:
    with closing(open_backend("tensorrt_rtx", bundle)) as backend:
        cache = backend.new_cache(1)
        backend.prefill(np.array([[3, 4, 5]]), np.array([3]), cache)
        backend.decode(np.array([7]), cache)


# --- the file ------------------------------------------------------------------------------------


def test_a_cache_is_read_as_it_was_written(tmp_path: Path) -> None:
    RuntimeCacheFile(tmp_path, KEY).write(b"kernels\nand more")
    assert RuntimeCacheFile(tmp_path, KEY).read() == b"kernels\nand more"
    (file,) = (tmp_path / CACHE_FOLDER).iterdir()
    assert file.name == (
        "tensorrt_rtx-1.7.1.116-nvidia-geforce-rtx-4090-sm89-cuda13.0-abababababababab.cache"
    )


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CacheKey)])
def test_a_cache_of_another_machine_version_or_engine_is_another_file(
    tmp_path: Path, field: str
) -> None:
    RuntimeCacheFile(tmp_path, KEY).write(b"kernels")
    other = dataclasses.replace(KEY, **{field: "other"})
    assert RuntimeCacheFile(tmp_path, other).read() is None


@pytest.mark.parametrize(
    "content",
    [b"", b"kernels", b"{}\nkernels", b"[1]\n", b"\xff\xfe\n", None],
    ids=["empty", "no head", "empty head", "list", "no text", "cut"],
)
def test_a_damaged_cache_is_told_in_one_line_and_not_used(
    tmp_path: Path, told: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    file = RuntimeCacheFile(tmp_path, KEY)
    file.write(b"kernels")
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-1] if content is None else content)
    told.clear()
    assert RuntimeCacheFile(tmp_path, KEY).read() is None
    (line,) = lines(told)
    assert "is not used, the first run compiles: it" in line


def test_a_cache_of_another_key_under_this_name_is_not_used(
    tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    other = RuntimeCacheFile(tmp_path, dataclasses.replace(KEY, engine="ab" * 8 + "cd" * 24))
    other.write(b"kernels")
    told.clear()
    assert RuntimeCacheFile(tmp_path, KEY).read() is None
    (line,) = lines(told)
    assert "it belongs to something else" in line


def test_a_write_that_fails_leaves_nothing_unfinished(
    tmp_path: Path, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "replace", full)
    RuntimeCacheFile(tmp_path, KEY).write(b"kernels")
    (line,) = lines(told)
    assert line.endswith("no space left on device")
    assert [*(tmp_path / CACHE_FOLDER).iterdir()] == []


def test_what_was_read_is_not_written_again(tmp_path: Path) -> None:
    RuntimeCacheFile(tmp_path, KEY).write(b"kernels")
    file = RuntimeCacheFile(tmp_path, KEY)
    payload = file.read()
    assert payload is not None
    os.utime(file.path, (1, 1))
    file.write(payload)
    assert file.path.stat().st_mtime == 1
    file.write(payload + b" more")
    assert file.read() == b"kernels more"


WRITE_AND_STOP = """
import os, sys, time
from pathlib import Path
from runtime.engines.runtime_cache import CacheKey, RuntimeCacheFile
def stop(*arguments):
    print("stopped", flush=True)
    time.sleep(60)
os.{call} = stop
RuntimeCacheFile(Path(sys.argv[1]), CacheKey(**eval(sys.argv[2]))).write(b"new" * 100_000)
"""


@pytest.mark.parametrize("old", [None, b"old"], ids=["none before", "one before"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_process_killed_while_it_writes_leaves_the_old_cache_or_none(
    tmp_path: Path, told: pytest.LogCaptureFixture, call: str, old: bytes | None
) -> None:
    file = RuntimeCacheFile(tmp_path, KEY)
    if old is not None:
        file.write(old)
    code = WRITE_AND_STOP.format(call=call)
    command = [sys.executable, "-c", code, str(tmp_path), repr(dataclasses.asdict(KEY))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    told.clear()
    assert RuntimeCacheFile(tmp_path, KEY).read() == old
    assert lines(told) == []
    (left,) = (tmp_path / CACHE_FOLDER).glob("*.unfinished")
    file.write(b"new")
    assert left.exists(), "another process may write it now"
    os.utime(left, (time.time() - 7200,) * 2)
    file.write(b"newer")
    assert RuntimeCacheFile(tmp_path, KEY).read() == b"newer"
    assert not left.exists(), "what the killed process left is removed once it is old"


# --- with an engine ------------------------------------------------------------------------------


@pytest.fixture
def bundle(engine_source: Path, tmp_path: Path) -> Bundle:
    return add_fake_engine(engine_source, tmp_path / "bundle")


def test_the_second_start_compiles_nothing(
    bundle: Bundle, gpu: FakeGpu, told: pytest.LogCaptureFixture
) -> None:
    run_once(bundle)
    assert len(gpu.trt.compiled) == 2  # a prompt's kernels and a step's
    (line,) = lines(told)
    assert line.startswith("runtime cache of 0.1 MB saved: ")
    gpu.trt.compiled.clear()
    run_once(Bundle.open(bundle.path, verify=True))
    assert gpu.trt.compiled == []
    assert len(lines(told)) == 1, "nothing new is saved"


def test_it_is_saved_while_contexts_that_compiled_live(
    bundle: Bundle, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []

    def note(file: RuntimeCacheFile, payload: bytes) -> None:
        found.append(gpu.cuda.ledger.live["execution context"])

    monkeypatch.setattr(RuntimeCacheFile, "write", note)
    run_once(bundle)
    assert found == [1]


@pytest.mark.parametrize("what", ["driver", "name_of_gpu"])
def test_another_driver_or_gpu_begins_with_a_cache_of_its_own(
    bundle: Bundle, gpu: FakeGpu, what: str
) -> None:
    run_once(bundle)
    gpu.trt.compiled.clear()
    setattr(gpu.cuda, what, {"driver": 13010, "name_of_gpu": b"RTX 4080"}[what])
    run_once(bundle)
    assert len(gpu.trt.compiled) == 2
    assert len([*(bundle.path / CACHE_FOLDER).iterdir()]) == 2


def test_a_cache_that_the_library_refuses_is_told_and_replaced(
    bundle: Bundle, gpu: FakeGpu, told: pytest.LogCaptureFixture
) -> None:
    run_once(bundle)
    gpu.trt.compiled.clear()
    gpu.trt.refuse.add("deserialize")
    told.clear()
    run_once(bundle)
    assert len(gpu.trt.compiled) == 2
    refused, saved = lines(told)
    assert "is not used, the first run compiles: the library does not take it" in refused
    assert "saved" in saved


def test_a_folder_that_cannot_be_written_to_is_no_error(
    bundle: Bundle, gpu: FakeGpu, told: pytest.LogCaptureFixture
) -> None:
    (bundle.path / CACHE_FOLDER).write_text("in the way, also for root")
    run_once(bundle)
    refused, unsaved = lines(told)
    assert "cannot be read" in refused
    assert "is not saved, the next start compiles again" in unsaved


def test_a_cache_that_cannot_be_serialized_is_no_error(
    bundle: Bundle, gpu: FakeGpu, told: pytest.LogCaptureFixture
) -> None:
    gpu.trt.refuse.add("serialize")
    run_once(bundle)
    (line,) = lines(told)
    assert "is not saved, the next start compiles again: the cache could not be serial" in line


def test_a_library_that_takes_no_cache_is_told_and_nothing_is_saved(
    bundle: Bundle,
    gpu: FakeGpu,
    told: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library._RtxConfig, "set_runtime_cache", lambda self, cache: False)
    run_once(bundle)
    (line,) = lines(told)
    assert line.startswith("no runtime cache is used, every start compiles: ")
    assert not (bundle.path / CACHE_FOLDER).exists()


def test_standard_tensorrt_keeps_no_cache(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu
) -> None:
    bundle = add_fake_engine(engine_source, tmp_path / "standard", backend="tensorrt")
    open_backend("tensorrt", bundle).close()
    assert not (bundle.path / CACHE_FOLDER).exists()
