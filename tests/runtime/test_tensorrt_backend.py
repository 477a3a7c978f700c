"""The engine backend, whole, over the stand-in of TensorRT and CUDA, against ONNX Runtime.

Each test of engines ends with a look at the stand-in: no rule broken, nothing leaked (fixture
`gpu`).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.lowerings.tensorrt import lower_for_tensorrt
from runtime import generate as generate_command
from runtime.backends import open_backend
from runtime.backends.base import Backend
from runtime.benchmarking import open_backend_system
from runtime.bundle import Bundle
from runtime.cpu_threads import CpuThreads
from runtime.gpu_checks.engine_comparison import compare
from runtime.sampling import SamplingParams
from runtime.sampling_tail import EngineTailInputs
from tests.command_calls import build_bundle
from tests.engine_runs import generate, prefill, prompts
from tests.fake_tensorrt import FakeGpu
from tests.fake_tensorrt.engine_file import add_fake_engine

BACKENDS = ("tensorrt_rtx", "onnxruntime")
PRODUCTS = ("tensorrt_rtx", "tensorrt")
GREEDY = SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=300, temperature=0.9, top_k=50, seed=11, ignore_eos=True)


@pytest.mark.slow
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_300_tokens_of_three_rows_beyond_the_keep_window_equal_those_of_onnxruntime(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu, product: str, params: SamplingParams
) -> None:
    bundle = add_fake_engine(engine_source, tmp_path / "bundle", backend=product)
    keep_window = bundle.config.keep_window_size
    rows = prompts(5, 100, 33)  # the second takes two passes, beside the others
    assert keep_window < min(len(row) + 300 for row in rows)
    with closing(open_backend("onnxruntime", bundle)) as reference:
        expected = generate(reference, rows, params)
    with closing(open_backend(product, bundle)) as backend:
        assert generate(backend, rows, params) == expected
    assert [len(tokens) for tokens in expected] == [300] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SAMPLED,
        dataclasses.replace(SAMPLED, top_k=0, top_p=0.9, seed=5),
        dataclasses.replace(SAMPLED, temperature=1.3, top_k=20, min_p=0.05, seed=6),
        dataclasses.replace(SAMPLED, temperature=1.0, top_k=0, max_tokens=120, seed=7),
    ],
    ids=["greedy", "top_k", "top_p", "min_p", "everything"],
)
@pytest.mark.parametrize("product", PRODUCTS)
def test_300_tokens_that_the_decode_graph_chooses_equal_those_of_onnxruntime(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu, product: str, params: SamplingParams
) -> None:
    bundle = add_fake_engine(engine_source, tmp_path / "bundle", backend=product, decode_width=64)
    rows = prompts(5, 100, 33)
    with closing(open_backend("onnxruntime", bundle)) as reference:
        expected = generate(reference, rows, params)
    with closing(open_backend(product, bundle)) as backend:
        assert generate(backend, rows, params) == expected
        taken = sum(len(tokens) for tokens in expected)
        assert backend.host_choices < 0.3 * taken  # type: ignore[attr-defined]
        assert gpu.cuda.calls["cudaEventSynchronize"] >= params.max_tokens - 1


def test_logits_agree_across_passes_profiles_rewinds_and_rows_of_different_lengths(
    engine: Backend, reference: Backend
) -> None:
    def run(backend: Backend) -> list[np.ndarray]:
        cache = backend.new_cache(3)
        first, second, third = prompts(150, 7, 64)
        found = [prefill(backend, cache, first, second, third)]  # three passes
        found += [backend.decode(np.array([9, 8, 7]), cache) for _ in range(3)]
        backend.rewind(cache, np.array([70, 10, 1]))
        found.append(backend.decode(np.array([4, 5, 6]), cache))
        found.append(prefill(backend, cache, second, first, third))
        active = np.array([True, False, True])
        found.append(backend.decode(np.array([1, 0, 3]), cache, active)[active])
        return found

    for ours, expected in zip(run(engine), run(reference), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_rows_that_run_alone_are_read_and_written_where_they_are(
    engine: Backend, reference: Backend
) -> None:
    """A row's scores begin at an address that TensorRT does not take: they are copied."""

    def run(backend: Backend) -> list[np.ndarray]:
        cache = backend.new_cache(3)
        long, *_ = prompts(400)
        prefill(backend, cache, long, long[:20], long[:30])
        # 400 + 60 tokens exceed the cache, so that each row runs by itself; two steps are alike.
        found = [prefill(backend, cache, long[:5], long[60:120], long[:60])]
        return [*found, backend.decode(np.array([4, 5, 6]), cache)]

    for ours, expected in zip(run(engine), run(reference), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.slow
def test_the_half_precision_model_that_engines_are_built_from_agrees_with_the_canonical_one(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu
) -> None:
    """Keys and values are cached as float16, scores as float32."""
    for name in ("model.onnx", "model.onnx.data"):  # onnx_ir takes no file with several links
        shutil.copyfile(engine_source / name, tmp_path / name)
    lowered = lower_for_tensorrt(tmp_path / "model.onnx", tmp_path, "float16")
    bundle = add_fake_engine(engine_source, tmp_path / "bundle", lowered=lowered)
    engine, reference = (bundle.variant(b) for b in ("tensorrt_rtx", "onnxruntime"))
    found = compare(bundle, reference, engine, seed=3)
    assert found["opened"]
    assert found["verdict"] == "pass", found
    assert found["report"]["logits"]["max_abs"] > 0


@pytest.mark.slow
def test_prompts_are_routed_as_a_whole_with_mixed_and_its_errors_are_those_of_every_backend(
    tmp_path: Path, gpu: FakeGpu
) -> None:
    limits = ("--max-batch-size", 2, "--max-input-len", 64, "--max-seq-len", 100)
    source = ("--backend", "none", "--cpu", "none", "--router", "mixed")
    build_bundle("--output", tmp_path / "source", *source, *limits)
    bundle = add_fake_engine(tmp_path / "source", tmp_path / "bundle")
    rows = prompts(20, 33)
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    with closing(open_backend("onnxruntime", bundle)) as reference:
        expected = generate(reference, rows, params)
    with closing(open_backend("tensorrt_rtx", bundle)) as backend:
        assert generate(backend, rows, params) == expected
        cache = backend.new_cache(1)
        with pytest.raises(ValueError, match="`mixed` cannot split it"):
            prefill(backend, cache, prompts(65)[0])
        prefill(backend, cache, rows[0])
        with pytest.raises(ValueError, match="cannot add a prompt behind cached tokens"):
            prefill(backend, cache, rows[0])
        with pytest.raises(ValueError, match="cannot rewind into a prompt"):
            backend.rewind(cache, np.array([5]))


def test_the_gpu_check_compares_an_engine_with_the_reference(
    ahead_bundle: Bundle, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, reference = (ahead_bundle.variant(b) for b in ("tensorrt_rtx", "onnxruntime"))
    found = compare(ahead_bundle, reference, engine, seed=3)
    assert found["opened"]
    assert found["verdict"] == "pass", found
    cold, warm = found["starts"]
    assert [s["device"]["runtime_cache"] for s in (cold, warm)] == ["cold", "warm"]
    assert cold["device"]["verdicts"] == ["VALID", "VALID"]
    assert [rule["equal"] for rule in found["chosen"]["rules"]] == [64, 64, 64]
    assert all(s[key] > 0 for s in (cold, warm) for key in ("load_s", "first_step_ms"))
    sizes = [(speed["batch_size"], speed["prompt_tokens"]) for speed in found["speeds"]]
    assert sizes == [(1, 16), (3, 16)]  # prompts of up to 64 tokens
    for speed in found["speeds"]:
        expected = 1e3 * speed["batch_size"] / speed["step_ms"]
        assert speed["tokens_per_s"] == pytest.approx(expected, rel=0.01)
        assert speed["prefill_ms"] > 0
    json.dumps(found, allow_nan=False)
    # A decode graph that chooses by other rules than it is told.
    make = EngineTailInputs.make

    def hotter(params: SamplingParams, rows: int) -> EngineTailInputs:
        return make(dataclasses.replace(params, temperature=3 * params.temperature), rows)

    with monkeypatch.context() as patch:
        patch.setattr(EngineTailInputs, "make", hotter)
        found = compare(ahead_bundle, reference, engine, seed=3)
    assert found["report"]["verdict"] == "pass"
    assert found["verdict"] == "fail"
    verdicts = {rule["rule"]: rule["verdict"] for rule in found["chosen"]["rules"]}
    assert verdicts == {"greedy": "pass", "drawn": "fail", "every rule": "pass"}  # the host's
    gpu.cuda.capability = (12, 0)
    found = compare(ahead_bundle, reference, engine, seed=3)
    assert found["verdict"] == "skipped"
    assert "was built for sm89, here is" in found["error"]


def test_scoring_gives_the_logits_of_every_token(engine: Backend, reference: Backend) -> None:
    """They are more than the pinned memory holds, and come through it in pieces."""
    ids = np.array(prompts(150, 150))
    scores = [
        backend.score(ids, np.array([150, 90]), backend.new_cache(2))
        for backend in (engine, reference)
    ]
    np.testing.assert_allclose(*scores, atol=1e-4)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_whatever_order_calls_come_in_no_rule_is_broken_and_logits_agree(
    engine_source: Path, tmp_path: Path, gpu: FakeGpu, product: str, seed: int
) -> None:
    """Prompts, steps, rewinds and ends of several batches, drawn at random."""
    bundle = add_fake_engine(engine_source, tmp_path / "bundle", backend=product)
    rng = np.random.default_rng(seed)
    with (
        closing(open_backend(product, bundle)) as ours,
        closing(open_backend("onnxruntime", bundle)) as reference,
    ):
        caches: list[tuple[Any, Any]] = []
        for _ in range(60):
            action = rng.choice(["begin", "prompt", "step", "step", "rewind", "end"])
            if action == "begin" or not caches:
                rows = int(rng.integers(1, 4))
                caches.append((ours.new_cache(rows), reference.new_cache(rows)))
                continue
            number = int(rng.integers(len(caches)))
            pair = caches[number]
            rows, lengths = pair[0].batch_size, pair[0].lengths.copy()
            if action == "end":
                del caches[number], pair
            elif action == "rewind":
                for backend, cache in zip((ours, reference), pair, strict=True):
                    backend.rewind(cache, lengths // 2)
            elif action == "prompt" and lengths.max() < 300:
                ids = [rng.integers(3, 2048, n).tolist() for n in rng.integers(1, 100, rows)]
                _same(prefill(ours, pair[0], *ids), prefill(reference, pair[1], *ids))
            elif lengths.min() > 0 and lengths.max() < 420:
                tokens = rng.integers(3, 2048, rows)
                _same(ours.decode(tokens, pair[0]), reference.decode(tokens, pair[1]))


def _same(ours: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_benchmark_measures_an_engine_whose_cache_is_emptied_between_runs(
    engine_bundle: Bundle, gpu: FakeGpu
) -> None:
    names, threads = ("tensorrt_rtx", None), CpuThreads(1)
    sizes = {"batch_size": 2, "capacity": 80}
    system = open_backend_system(engine_bundle.path, *names, threads=threads, **sizes)
    with closing(system):
        for _ in range(2):
            timing = system.run(np.array(prompts(70, 70)), 3)
    assert timing.ttft_s > 0


def test_generate_runs_on_an_engine_and_says_why_it_cannot(
    engine_bundle: Bundle, gpu: FakeGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(main: Callable[[list[str]], int], *arguments: str) -> tuple[int, Any]:
        status = main([str(engine_bundle.path), *arguments, "--json", "--quiet"])
        return status, json.loads(capsys.readouterr().out)

    asked = ("--prompt-ids", "5,6,7", "--max-tokens", "8", "--ignore-eos", "--seed", "4")
    answers = [said(generate_command.main, *asked, "--backend", b) for b in BACKENDS]
    assert [status for status, _ in answers] == [0, 0]
    ids = [report["outputs"][0]["ids"] for _, report in answers]
    assert ids[0] == ids[1]
    gpu.cuda.total_bytes = 1000
    status, report = said(generate_command.main, *asked, "--backend", "tensorrt_rtx")
    assert status == 1
    assert report["error"]["message"].startswith("too little GPU memory: ")
