"""Each way in which an engine can fail to load: what is said, and which command mends it."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.backends import open_backend, tensorrt_backend
from runtime.backends.base import BackendUnavailableError
from runtime.bundle import Bundle
from runtime.manifest import MANIFEST_NAME
from runtime.tensorrt_module import load_tensorrt
from tests.fake_tensorrt import FakeGpu
from tests.fake_tensorrt.engine_file import add_fake_engine
from tests.fake_tensorrt.enums import EngineInvalidityDiagnostics, EngineValidity

BUILD = (
    "python export/build_engine.py --model DIR --router per_token --max-batch-size 3 "
    "--max-input-len 64 --max-seq-len 420 --backend {} --precision fp32 --target {} --output"
)
Prepared = Callable[..., Bundle]


@pytest.fixture
def prepared(engine_source: Path, tmp_path: Path) -> Prepared:
    def make(**how: Any) -> Bundle:
        return add_fake_engine(engine_source, tmp_path / "bundle", **how)

    return make


def refusal(bundle: Bundle, backend: str = "tensorrt_rtx") -> str:
    with pytest.raises((BackendUnavailableError, ValueError)) as error:
        open_backend(backend, bundle)
    text = str(error.value)
    assert "\n" not in text
    return text


def replace_engine(bundle: Bundle, change: Callable[[bytes], bytes]) -> Bundle:
    """Change the engine and what the manifest says of its size and hash."""
    path = bundle.variant("tensorrt_rtx").path
    blob = change((bundle.path / path).read_bytes())
    (bundle.path / path).write_bytes(blob)
    files = tuple(
        dataclasses.replace(file, bytes=len(blob), sha256=hashlib.sha256(blob).hexdigest())
        if file.path == path
        else file
        for file in bundle.manifest.files
    )
    manifest = dataclasses.replace(bundle.manifest, files=files)
    (bundle.path / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(bundle.path)


def test_engine_of_another_version_names_both_and_how_to_get_either(
    prepared: Prepared, gpu: FakeGpu
) -> None:
    gpu.trt.__version__ = "1.8.0.3"
    text = refusal(prepared())
    assert "was built by tensorrt_rtx 1.7.1.116, here is 1.8.0.3" in text
    assert "pip install tensorrt-rtx-cu13==1.7.1.116; or: " in text
    assert BUILD.format("tensorrt_rtx", "sm89") in text


def test_engine_for_another_gpu_names_it_and_how_to_build_for_this_one(
    prepared: Prepared, gpu: FakeGpu
) -> None:
    gpu.cuda.capability, gpu.cuda.name_of_gpu = (12, 0), b"NVIDIA GeForce RTX 5090\0"
    text = refusal(prepared(targets=("sm86", "sm89")))
    assert "was built for sm86, sm89, here is NVIDIA GeForce RTX 5090 (sm120, driver up to" in text
    assert BUILD.format("tensorrt_rtx", "sm120") in text


def test_gpu_that_the_product_knows_no_engines_for_is_said(
    prepared: Prepared, gpu: FakeGpu
) -> None:
    gpu.cuda.capability, gpu.cuda.name_of_gpu = (9, 0), b"NVIDIA H100"
    text = refusal(prepared())
    assert "for which tensorrt_rtx 1.7.1.116 builds none" in text
    assert "--backend tensorrt" in text


def test_engine_of_standard_tensorrt_is_compared_by_what_its_manifest_says(
    prepared: Prepared, gpu: FakeGpu
) -> None:
    trt, bundle = gpu.products["tensorrt"], prepared(backend="tensorrt")
    trt.__version__ = "11.1.0.2"
    text = refusal(bundle, "tensorrt")
    assert "was built by tensorrt 1.7.1.116, here is 11.1.0.2" in text
    assert "pip install tensorrt==1.7.1.116; or: " in text
    trt.__version__ = "1.7.1.116"
    gpu.cuda.capability = (9, 0)
    text = refusal(bundle, "tensorrt")
    assert "was built for sm89, here is NVIDIA GeForce RTX 4090 (sm90, driver" in text
    assert BUILD.format("tensorrt", "sm90") in text


def test_engine_of_several_targets_runs_on_each(prepared: Prepared, gpu: FakeGpu) -> None:
    bundle = prepared(targets=("sm86", "sm89", "sm120"))
    for capability in ((8, 6), (8, 9), (12, 0)):
        gpu.cuda.capability = capability
        open_backend("tensorrt_rtx", bundle).close()


def test_truncated_engine_is_refused_before_the_library_sees_it(
    prepared: Prepared, gpu: FakeGpu
) -> None:
    bundle = prepared()
    path = bundle.path / bundle.variant("tensorrt_rtx").path
    blob = path.read_bytes()
    path.write_bytes(blob[:-1])
    text = refusal(bundle)  # opened while it was whole
    assert f"has {len(blob) - 1} bytes, expected {len(blob)}; copy or build it again" in text
    path.write_bytes(blob)
    text = refusal(replace_engine(bundle, lambda blob: blob[:-1]))
    assert f"has {len(blob) - 1} bytes, its header says {len(blob)}: it is truncated" in text
    assert BUILD.format("tensorrt_rtx", "sm89") in text
    text = refusal(replace_engine(bundle, lambda _: blob + b"\0"))
    assert f"has {len(blob) + 1} bytes, its header says {len(blob)}: it is truncated or" in text


def test_altered_engine_is_refused_by_its_hash(prepared: Prepared, gpu: FakeGpu) -> None:
    bundle = prepared()
    path = bundle.path / bundle.variant("tensorrt_rtx").path
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    text = refusal(bundle)
    assert "refusing to load tensorrt_rtx:fp32-sm89" in text
    assert "sha256" in text
    assert "copy or build it again" in text


@pytest.mark.parametrize(
    "change", [lambda blob: b"", lambda blob: b"\0" + blob[1:]], ids=["empty", "other"]
)
def test_file_that_is_no_engine_is_refused(
    prepared: Prepared, gpu: FakeGpu, change: Callable[[bytes], bytes]
) -> None:
    text = refusal(replace_engine(prepared(), change))
    assert "is no engine of TensorRT-RTX: it" in text
    assert BUILD.format("tensorrt_rtx", "sm89") in text


def test_engine_of_the_other_product_is_refused_both_ways(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu
) -> None:
    rtx = add_fake_engine(engine_source, tmp_path / "one", backend="tensorrt", standard=False)
    text = refusal(rtx, "tensorrt")
    assert "is one of TensorRT-RTX, and the bundle says tensorrt" in text
    assert BUILD.format("tensorrt", "sm89") in text
    standard = add_fake_engine(engine_source, tmp_path / "two", standard=True)
    assert "begins with b'ftrt', an engine of TensorRT-RTX with b'vtrt'" in refusal(standard)


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ({"targets": ["sm86", "sm89"]}, "says targets ['sm89'], the manifest ['sm86', 'sm89']"),
        ({"targets": []}, "says targets ['sm89'], the manifest []"),
        ({"builder_version": "1.7.0.1"}, "says version 1.7.1.116, the manifest 1.7.0.1"),
    ],
    ids=["targets", "none", "version"],
)
def test_header_that_differs_from_the_manifest_is_refused(
    prepared: Prepared, gpu: FakeGpu, details: dict[str, Any], text: str
) -> None:
    assert text in refusal(prepared(details=details))


def test_the_real_library_is_asked_in_its_own_terms_and_says_why_it_refuses(
    prepared: Prepared, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX itself, where there is no GPU: its verdict and its log reach the error."""
    pytest.importorskip("tensorrt_rtx")
    trt = load_tensorrt("tensorrt_rtx")
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    bundle = prepared(version=str(trt.__version__))
    blob = bundle.executable_file(bundle.variant("tensorrt_rtx")).read_bytes()
    if runtime.get_engine_validity(blob[:64])[0] != trt.EngineValidity.INVALID:
        pytest.skip("there is a GPU here for which the header is fine")
    monkeypatch.setattr(tensorrt_backend, "load_tensorrt", lambda _: trt)
    text = refusal(bundle)
    assert f"tensorrt_rtx {trt.__version__} calls engine" in text
    assert "invalid here: Error reading CUDA GPU properties" in text


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        (EngineInvalidityDiagnostics.VERSION_MISMATCH, "built by another version of the library"),
        (EngineInvalidityDiagnostics.UNSUPPORTED_CC, "it was not built for this GPU"),
        (EngineInvalidityDiagnostics.OLD_CUDA_DRIVER, "install a newer NVIDIA driver"),
        (EngineInvalidityDiagnostics.OLD_CUDA_RUNTIME, "too old; run: pip install --upgrade"),
        (EngineInvalidityDiagnostics.INSUFFICIENT_GPU_MEMORY, "the GPU has too little memory"),
        (EngineInvalidityDiagnostics.MALFORMED_ENGINE, "it is damaged"),
        (EngineInvalidityDiagnostics.CUDA_ERROR, "CUDA does not work here"),
        (0, "invalid here: it gives no reason. "),
        (1024, "unknown reason 0x400"),
        (2 | 4, "it was not built for this GPU; the driver is too old"),
    ],
)
def test_librarys_verdict_is_told_in_words(
    prepared: Prepared, gpu: FakeGpu, bits: int, text: str
) -> None:
    gpu.trt.validity = (EngineValidity.INVALID, int(bits))
    said = refusal(prepared())
    assert "tensorrt_rtx 1.7.1.116 calls engine engines/tensorrt_rtx-sm89-fp32.engine inv" in said
    assert text in said
    assert BUILD.format("tensorrt_rtx", "sm89") in said


def test_engine_that_is_merely_not_the_best_is_told_in_a_line_and_runs(
    prepared: Prepared, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.trt.validity = (EngineValidity.SUBOPTIMAL, 0)
    with caplog.at_level(logging.INFO, "runtime"):
        open_backend("tensorrt_rtx", prepared()).close()
    assert any("fp32.engine suboptimal here" in record.message for record in caplog.records)


def test_engine_that_passes_every_check_and_still_does_not_load_gives_the_librarys_reason(
    prepared: Prepared, gpu: FakeGpu
) -> None:
    gpu.trt.refuse.add("deserialize_cuda_engine")
    text = refusal(prepared())
    assert "cannot load engine engines/tensorrt_rtx-sm89-fp32.engine, built with 1.7.1.116" in text
    assert "deserializeCudaEngine: the engine was refused" in text
    assert "plugins" not in text


def test_engine_with_plugins_that_does_not_load_names_their_kernels(
    prepared: Prepared, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_backend, "prepare_plugins", lambda *_: None)
    bundle = prepared(details={"plugin": "doge"})
    gpu.trt.refuse.add("deserialize_cuda_engine")
    text = refusal(bundle)
    command = f"python export/build_kernels.py {bundle.path}"
    assert f"it has plugins, whose kernels this bundle must hold ({command}). " in text
    assert "--plugin doge" in text


def test_engine_with_plugins_names_the_kernels_that_it_needs(
    prepared: Prepared, gpu: FakeGpu
) -> None:
    bundle = prepared(details={"plugin": "doge"})
    assert f"has no kernels; build them with: python export/build_kernels.py {bundle.path}" in (
        refusal(bundle)
    )


def test_another_backend_runs_where_the_engine_cannot_and_the_reason_is_told(
    prepared: Prepared, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.cuda.capability = (12, 0)
    with caplog.at_level(logging.INFO, "runtime"):
        backend = open_backend(None, prepared())
    assert backend.name == "onnxruntime"
    backend.close()
    assert any("was built for sm89, here is" in record.message for record in caplog.records)
