"""Timing of one system: the tokens are the reference's, and the right ones are counted."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext

import numpy as np
import pytest

import plugins.projection.launches as projection_launches
import plugins.projection.matrix as projection_matrix
from runtime.backends.base import BackendUnavailableError, Limits
from runtime.gpu_checks import decode_timing
from runtime.gpu_checks.decode_pace import Pace, time_decoding
from runtime.gpu_checks.decode_timing import measure
from tests.speed_bundle import speed_bundle

PACE = Pace(warmup=1, tokens=2, repeats=2)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs programs one by one: fewer and larger ones compute the same."""
    monkeypatch.setattr(projection_launches, "ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(projection_launches, "ENOUGH_HEAD_PROGRAMS", 1)
    monkeypatch.setattr(projection_matrix, "_FEW_PROGRAMS", 1)


def greedy_tokens(backend, prompts, steps):
    cache = backend.new_cache(len(prompts))
    logits = backend.prefill(prompts, np.full(len(prompts), prompts.shape[1]), cache)
    found = [logits.argmax(-1)]
    for _ in range(steps):
        found.append(backend.decode(found[-1], cache).argmax(-1))
    return np.stack(found, axis=1)


def test_steps_of_our_kernels_are_timed_and_are_the_references(tmp_path, monkeypatch):
    # Room for no more steps than are asked for behind the longer prompt.
    limits = Limits(max_batch_size=2, max_input_len=7, max_seq_len=7)
    checked, packed = speed_bundle(tmp_path, precisions=("fp32",), limits=limits)
    backend, cuda, _ = packed.open()
    monkeypatch.setattr(decode_timing, "open_backend", lambda name, bundle, variant: backend)
    decodings = []
    pace = Pace(warmup=1, tokens=1, repeats=1)
    timed = decode_timing.time_decoding

    def watched(decoding, prompts, pace):
        found = timed(decoding, prompts, pace)
        decodings.append((np.stack(decoding.chosen, axis=1), prompts))
        return found

    monkeypatch.setattr(decode_timing, "time_decoding", watched)
    found = measure(
        checked.bundle, "cuda:fp32", batch_size=2, lengths=[4, 5], pace=pace, seed=3, device="cpu"
    )
    assert found["verdict"] == "pass"
    assert "compiler" not in found
    assert [part["prompt_tokens"] for part in found["measured"]] == [4, 5]
    for part in found["measured"]:
        assert 0 < part["fastest_ms"] <= part["step_ms"] <= part["slowest_ms"]
        assert part["tokens_per_s"] == pytest.approx(2e3 / part["step_ms"], abs=0.06)
    for tokens, prompts in decodings:
        np.testing.assert_array_equal(tokens, greedy_tokens(packed.torch(), prompts, 2))
    assert cuda.calls["cudaStreamBeginCapture"] == 1, "one graph for all continuations"
    assert (cuda.ledger.violations, cuda.ledger.live) == ([], {}), "closed"


@pytest.mark.parametrize("router_mode", [None, "mixed", "per_token"])
def test_pytorch_is_timed_on_the_checkpoint_of_the_bundle(tmp_path, router_mode):
    experts = {"is_moe": True, "num_experts": 69, "num_experts_per_tok": 5}
    checked, _ = speed_bundle(tmp_path, router_mode=router_mode, **(experts if router_mode else {}))
    _, decoding = decode_timing._open(checked.bundle, "torch:float32:eager", 2, "cpu")
    assert router_mode in (None, decoding._network.config.router_mode)
    output = tmp_path / "found.json"
    arguments = [
        checked.bundle.path, "torch:float32:eager", "--batch-size", 2, "--lengths", "5,7",
        "--pace", "1,2,2", "--seed", 3, "--device", "cpu", "--output", output,
    ]  # fmt: skip
    assert decode_timing.main([*map(str, arguments)]) == 0
    found = json.loads(output.read_text())
    assert found["verdict"] == "pass", found
    assert [part["prompt_tokens"] for part in found["measured"]] == [5, 7]
    assert all(part["step_ms"] > 0 for part in found["measured"])
    assert found["compiler"] is None


class Clockwork:
    """A system whose tokens take a millisecond, and 20 of them when it is warm no more."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.calls = []
        self._cold = True
        self._pending = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def prefill(self, prompts):
        self.calls.append(("prefill", prompts.shape))
        self.now += 7.0  # what the host does
        self._pending = 0.001 * len(self.calls)

    def rewind(self):
        self.calls.append(("rewind",))
        self.now += 3.0
        self._cold = True

    def decode(self, count):
        self.calls.append(("decode", count))
        self._pending = count * (0.020 if self._cold else 0.001 * len(self.calls))
        self._cold = False

    def wait(self):
        self.calls.append(("wait",))
        self.now += self._pending
        self._pending = 0.0


def test_only_tokens_behind_the_warm_up_count(monkeypatch):
    clock = Clockwork(monkeypatch)
    found = time_decoding(clock, np.zeros((3, 6), np.int64), Pace(warmup=4, tokens=8, repeats=3))
    round_of = [("rewind",), ("decode", 4), ("wait",), ("decode", 8), ("wait",)]
    assert clock.calls == [*[("prefill", (3, 6)), ("wait",)] * 4, *round_of * 4]
    # A prompt takes 7 s and a millisecond for each call so far; the first does not count. The timed
    # call of round r is number 12 + 5·r; the first round does not count.
    assert found == {
        "prompt_tokens": 6, "prompt_ms": 7005.0,
        "step_ms": 22.0, "fastest_ms": 17.0, "slowest_ms": 27.0,
        "tokens_per_s": round(3000 / 22, 1),
    }  # fmt: skip


def test_the_cache_is_as_long_as_its_steps_find_it():
    pace = Pace(warmup=2, tokens=3, repeats=1)
    # Behind a prompt of 10 the steps that count find 13, 14 and 15 tokens.
    assert pace.context(10) == 14
    assert pace.needed == 5


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (BackendUnavailableError("no NVIDIA driver"), "skipped"),
        (RuntimeError("cudaMalloc failed"), "skipped"),
        (ValueError("refusing to load"), "fail"),
    ],
)
def test_what_does_not_open_is_skipped_unless_the_bundle_is_at_fault(
    tmp_path, monkeypatch, error, verdict
):
    def refuse(name, bundle, variant):
        raise error

    monkeypatch.setattr(decode_timing, "open_backend", refuse)
    checked, _ = speed_bundle(tmp_path)
    found = measure(
        checked.bundle, "cuda:fp16", batch_size=1, lengths=[5], pace=PACE, seed=0, device="cuda"
    )
    said = f"{type(error).__name__}: {error}"
    assert found == {"verdict": verdict, "error": said, "measured": []}


class FailsBehindLongPrompts(Clockwork):
    def prefill(self, prompts):
        if prompts.shape[1] > 5:
            raise RuntimeError("step 3 of this batch: attend: CUDA_ERROR_TEST")
        super().prefill(prompts)


def test_what_fails_later_has_failed_and_what_was_measured_stays(tmp_path, monkeypatch):
    checked, _ = speed_bundle(tmp_path)
    decoding = FailsBehindLongPrompts(monkeypatch)
    monkeypatch.setattr(decode_timing, "_open", lambda *arguments: (nullcontext(), decoding))
    found = measure(
        checked.bundle, "cuda:fp16", batch_size=1, lengths=[5, 6], pace=PACE, seed=0, device="cuda"
    )
    assert found["verdict"] == "fail"
    assert found["error"] == "RuntimeError: step 3 of this batch: attend: CUDA_ERROR_TEST"
    assert [part["prompt_tokens"] for part in found["measured"]] == [5]


def test_without_cuda_pytorch_is_skipped(tmp_path):
    checked, _ = speed_bundle(tmp_path)
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    found = measure(
        checked.bundle, "torch:float16:eager", batch_size=1, lengths=[5], pace=PACE, seed=0,
        device="cuda",
    )  # fmt: skip
    assert found["verdict"] == "skipped"
    assert found["error"].endswith("sees no CUDA device")
