"""The engines section: what a process of its own finds, says, or dies of."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import json

import numpy as np
import pytest

from export import build_engine
from runtime.backends.base import Backend, Cache
from runtime.bundle import Bundle
from runtime.gpu_checks import engine_comparison, engines
from runtime.gpu_checks.engines import EnginesSection
from runtime.gpu_checks.section import CheckedBundle, Deadline
from runtime.manifest import Variant
from tests.fake_bundle import fake_manifest, write_fake_bundle
from tests.gpu_check_subject import checked_bundle, subject_of, value_use
from tests.host_device import HostDevice

ENGINE = "engines/tensorrt_rtx-sm89-fp16.engine"


def variant(name, **details):
    return Variant(
        backend="tensorrt_rtx", name=name, path=ENGINE, precision="fp16",
        details={"targets": ["sm89"], **details},
    )  # fmt: skip


def with_variants(folder, *variants):
    manifest = dataclasses.replace(fake_manifest(), variants=variants)
    bundle = Bundle.open(write_fake_bundle(folder, manifest))
    return CheckedBundle(name="tiny", bundle=bundle, library=None)


@pytest.fixture
def subject(tmp_path):
    return subject_of(HostDevice(), checked_bundle(tmp_path, [value_use()]))


@pytest.fixture
def dying(subject, monkeypatch):
    """Runs the section with a worker that does what the seed says."""
    monkeypatch.setattr(engines, "_WORKER", "tests.dying_worker")

    def run(seed, seconds=600.0):
        changed = dataclasses.replace(subject, seed=seed, deadline=Deadline(seconds))
        return EnginesSection().run(changed, {})

    return run


def no_driver():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


@pytest.mark.skipif(not no_driver(), reason="this machine has a driver")
def test_what_tensorrt_says_of_a_machine_that_it_cannot_run_on_is_kept(subject):
    report = EnginesSection().run(subject, {})
    (case,) = report["cases"]
    assert report["verdict"] == case["verdict"] == "skipped"
    assert case["candidate"] == "tensorrt_rtx:fp16"
    assert case["targets"] == ["sm89"]
    assert case["opened"] is False
    assert "BackendUnavailableError: " in case["said"]
    assert report["left_out"] == []


def test_what_a_library_prints_is_kept_without_folders_of_the_machine(dying):
    (case,) = dying(seed=0)["cases"]
    assert case["verdict"] == "skipped"
    assert case["said"] == (
        "[TRT] [E] what a library prints, CURRENT-FOLDER\nRefusal: not this GPU"
    )


@pytest.mark.parametrize(
    ("seed", "ended"),
    [(1, "the process was ended by SIGKILL"), (2, "the process ended with status 5")],
)
def test_a_process_that_dies_is_a_failure(dying, seed, ended):
    report = dying(seed)
    (case,) = report["cases"]
    assert report["verdict"] == case["verdict"] == "fail"
    assert case["said"].splitlines()[-1] == ended
    assert case["report"] is None


def test_a_process_that_takes_too_long_is_left_out(dying):
    report = dying(seed=3, seconds=1.5)
    assert report["cases"] == []
    assert report["left_out"] == [
        "tiny, tensorrt_rtx:fp16 against torch:fp32: the time was up before it ended"
    ]


def test_nothing_starts_after_the_deadline(dying):
    report = dying(seed=0, seconds=0)
    assert report["verdict"] == "skipped"
    assert report["left_out"] == ["tiny, tensorrt_rtx:fp16 against torch:fp32: the time was up"]


def test_engines_with_plugins_are_compared_with_those_without(tmp_path):
    torch = Variant(backend="torch", name="fp32", path="checkpoint", precision="fp32")
    checked = with_variants(
        tmp_path, torch, variant("fp16-doge", plugin="doge"), variant("fp16", plugin="none")
    )
    assert EnginesSection().plan([checked]) == [
        "compare tiny, tensorrt_rtx:fp16-doge against torch:fp32",
        "compare tiny, tensorrt_rtx:fp16 against torch:fp32",
        "compare tiny, tensorrt_rtx:fp16-doge against tensorrt_rtx:fp16",
    ]


def test_steps_of_our_kernels_are_compared_too(tmp_path):
    torch = Variant(backend="torch", name="fp32", path="checkpoint", precision="fp32")
    ours = [
        dataclasses.replace(variant(name), backend="cuda", precision=name, details={})
        for name in ("fp16", "int4")
    ]
    assert EnginesSection().plan([with_variants(tmp_path, torch, *ours)]) == [
        "compare tiny, cuda:fp16 against torch:fp32",
        "compare tiny, cuda:int4 against torch:fp32",
    ]


def test_an_engine_without_a_reference_is_named(tmp_path):
    checked = with_variants(tmp_path, variant("fp16"))
    subject = subject_of(HostDevice())
    report = EnginesSection().run(dataclasses.replace(subject, bundles=(checked,)), {})
    assert report["left_out"] == [f"tiny: {engines._NO_REFERENCE}"]
    assert EnginesSection().plan([checked]) == [
        "compare no engine: no bundle has one that could be"
    ]


@pytest.mark.slow
def test_what_runs_is_compared_and_timed(tiny_dense, tmp_path, subject):
    """The canonical model in ONNX Runtime stands in for an engine."""
    arguments = ["--model", tiny_dense, "--backend", "none", "--cpu", "none", "--output", tmp_path]
    with contextlib.redirect_stdout(io.StringIO()):
        assert build_engine.main([*map(str, arguments), "--quiet", "--json"]) == 0
    checked = CheckedBundle(name="dense", bundle=Bundle.open(tmp_path), library=None)
    section = EnginesSection(backends=("onnxruntime",))
    report = section.run(dataclasses.replace(subject, bundles=(checked,)), {})
    (case,) = report["cases"]
    assert report["verdict"] == case["verdict"] == "pass", case["said"]
    assert case["report"]["logits"]["max_abs"] < 1e-3
    assert case["step_ms"]["median"] > 0
    assert case["load_s"] > 0
    json.dumps(report, allow_nan=False)


class NextToken(Backend):
    """Prefers the token after the last one; an engine that is wrong adds to its logits."""

    router_mode = None

    def __init__(self, name, bundle, error=0.0, failing=False):
        self.name = name
        self.variant = bundle.variant(name).name
        self.limits = bundle.limits
        self.vocab_size = bundle.config.vocab_size
        self._error = error
        self._failing = failing
        self.closed = False

    @classmethod
    def open(cls, bundle, variant, threads):
        raise NotImplementedError

    def new_cache(self, batch_size, capacity=None):
        return Cache(
            capacity=self.check_cache_size(batch_size, capacity),
            lengths=np.zeros(batch_size, np.int64),
        )

    def _step(self, input_ids, write_index, logits_index, cache, row):
        if self._failing:
            raise RuntimeError("the engine's step could not be enqueued")
        token = np.take_along_axis(input_ids, logits_index, 1)
        logits = np.eye(self.vocab_size, dtype=np.float32)[(token + 1) % self.vocab_size]
        return 9 * logits + self._error

    def close(self):
        self.closed = True


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """Compares with an engine of such a kind; gives the result and the backends."""
    bundle = Bundle.open(write_fake_bundle(tmp_path))

    def run(**engine):
        opened = []

        def open_backend(name, bundle, variant):
            opened.append(NextToken(name, bundle, **(engine if name == "tensorrt_rtx" else {})))
            return opened[-1]

        monkeypatch.setattr(engine_comparison, "open_backend", open_backend)
        variants = (bundle.variant("torch"), bundle.variant("tensorrt_rtx"))
        found = engine_comparison.compare(bundle, *variants, 0)
        times = 3 if found["verdict"] == "pass" else 2  # what passes is opened again
        assert [backend.closed for backend in opened] == [True] * times
        return found

    return run


def test_an_engine_that_agrees_passes_and_is_timed(compared):
    found = compared(error=0.001)
    assert found["opened"] is True
    assert found["verdict"] == found["report"]["verdict"] == "pass"
    assert found["step_ms"]["steps"] > 20
    assert "error" not in found
    assert [start["device"] for start in found["starts"]] == [None, None]
    assert {speed["batch_size"] for speed in found["speeds"]} == {1, 2}


def test_an_engine_that_is_wrong_has_failed(compared):
    found = compared(error=1.0)
    assert found["verdict"] == found["report"]["verdict"] == "fail"


def test_an_engine_that_opens_and_then_fails_has_failed(compared):
    found = compared(failing=True)
    assert found["opened"] is True
    assert found["verdict"] == "fail"
    assert found["error"] == "RuntimeError: the engine's step could not be enqueued"


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (OSError("libnvinfer.so.11: cannot open"), "skipped"),
        (RuntimeError("unsupported GPU"), "skipped"),
        (ValueError("refusing to load the engine: its sha256 is"), "fail"),
    ],
)
def test_what_does_not_open_is_skipped_unless_the_bundle_is_at_fault(
    tmp_path, monkeypatch, error, verdict
):
    def refuse(name, bundle, variant):
        raise error

    monkeypatch.setattr(engine_comparison, "open_backend", refuse)
    bundle = Bundle.open(write_fake_bundle(tmp_path))
    variants = (bundle.variant("torch"), bundle.variant("tensorrt_rtx"))
    assert engine_comparison.compare(bundle, *variants, 0) == {
        "verdict": verdict, "opened": False, "error": f"{type(error).__name__}: {error}",
    }  # fmt: skip
