from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from runtime.backends.base import Backend, Cache, Limits
from runtime.benchmarking import (
    BackendSystem,
    Contender,
    decode_ratio,
    measure_interleaved,
    prefill_ratio,
    random_ids,
    round_orders,
    summarize,
)
from runtime.system_process import Timing
from tests.fake_system import open_fake, refuse

VOCAB = 50


class CountingBackend(Backend):
    """Each token is followed by the next id; remembers what it was fed."""

    name = "counting"
    variant = "fp32"
    limits = Limits(max_batch_size=4, max_input_len=8, max_seq_len=32)
    vocab_size = VOCAB
    router_mode = None

    def __init__(self):
        self.fed = []
        self.closed = False

    @classmethod
    def open(cls, bundle, variant, threads):
        raise NotImplementedError

    def new_cache(self, batch_size, capacity=None):
        slots = self.check_cache_size(batch_size, capacity)
        return Cache(capacity=slots, lengths=np.zeros(batch_size, np.int64))

    def _step(self, input_ids, write_index, logits_index, cache, row):
        self.fed.append((input_ids.tolist(), write_index.tolist()))
        picked = np.take_along_axis(input_ids, logits_index, axis=1)
        return np.eye(VOCAB, dtype=np.float32)[(picked + 1) % VOCAB]

    def close(self):
        self.closed = True


def contender(label, log, **values):
    fields = {"vocab_size": VOCAB, "batch_size": 1, "input_len": 4, "output_len": 3}
    return Contender(label=label, open_system=partial(open_fake, label, log), **(fields | values))


def test_generation_is_greedy_and_starts_from_an_empty_cache_each_time():
    backend = CountingBackend()
    system = BackendSystem(backend, batch_size=2, capacity=6)
    prompts = np.array([[5, 6, 7], [20, 21, 30]])
    for _ in range(2):
        timing = system.run(prompts, 4)
        assert timing.ttft_s > 0
        assert len(timing.step_s) == 3
        assert backend.fed == [
            (prompts.tolist(), [0, 0]),
            ([[8], [31]], [3, 3]),
            ([[9], [32]], [4, 4]),
            ([[10], [33]], [5, 5]),
        ]
        backend.fed.clear()
    system.close()
    assert backend.closed


def test_every_round_has_every_contender_once_in_an_order_that_the_seed_decides():
    orders = round_orders(5, 20, seed=3)
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len({tuple(order) for order in orders}) > 10
    assert orders == round_orders(5, 20, seed=3)
    assert orders != round_orders(5, 20, seed=4)


def test_prompts_are_seeded_ids_without_repetition_where_the_vocabulary_allows():
    ids = random_ids(VOCAB, 3, 20, seed=1)
    assert ids.shape == (3, 20)
    assert ids.dtype == np.int64
    assert all(len(set(row)) == 20 for row in ids.tolist())
    assert 0 <= ids.min() <= ids.max() < VOCAB
    assert (ids == random_ids(VOCAB, 3, 20, seed=1)).all()
    assert (ids != random_ids(VOCAB, 3, 20, seed=2)).any()
    assert random_ids(VOCAB, 1, 2 * VOCAB, seed=1).max() < VOCAB


def test_contenders_are_interleaved_and_the_warm_up_is_left_out(tmp_path):
    log = tmp_path / "log"
    beside = []
    contenders = [contender(label, log) for label in ("a", "b", "c")]
    found = measure_interleaved(
        contenders, repeats=2, warmup=1, before_round=lambda: beside.append(0), pause_s=0
    )
    lines = log.read_text().splitlines()
    runs = [line.split() for line in lines if "closed" not in line]
    orders = round_orders(3, 3, seed=0)
    assert [name for name, _ in runs] == ["abc"[index] for order in orders for index in order]
    prompts = [ids for _, ids in runs]
    assert [len(set(prompts[start : start + 3])) for start in (0, 3, 6)] == [1, 1, 1]
    assert len(set(prompts)) == 3
    assert sum("closed" in line for line in lines) == 3
    assert len(beside) == 2
    assert [measurement.opened.backend for measurement in found] == ["a", "b", "c"]
    timing = Timing(ttft_s=0.5, step_s=(0.25, 0.25))
    assert all(measurement.timings == (timing, timing) for measurement in found)
    assert all(measurement.peak_rss_mb > 1 for measurement in found)


def test_contender_that_cannot_be_opened_closes_the_others(tmp_path):
    log = tmp_path / "log"
    broken = Contender(
        label="broken", open_system=refuse, vocab_size=VOCAB, batch_size=1, input_len=1,
        output_len=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="broken: nothing to open"):
        measure_interleaved([contender("a", log), broken], repeats=1, warmup=0, pause_s=0)


def test_statistics_of_known_times():
    timings = [
        Timing(ttft_s=0.2, step_s=(0.01, 0.03)),
        Timing(ttft_s=0.1, step_s=(0.02, 0.02)),
        Timing(ttft_s=0.4, step_s=(0.05, 0.05)),
    ]
    figures = summarize(timings, batch_size=2, input_len=16)
    assert figures.ttft_ms == pytest.approx(200)
    assert figures.tpot_ms == pytest.approx(20)  # the rounds' means are 20, 20 and 50
    assert figures.prefill_tokens_per_s == pytest.approx(160)
    assert figures.decode_tokens_per_s == pytest.approx(100)
    assert figures.itl_ms == pytest.approx({"p50": 25, "p95": 50, "p99": 50})


def test_percentiles_are_over_all_tokens():
    timings = [
        Timing(ttft_s=1, step_s=tuple(range(50))),
        Timing(ttft_s=1, step_s=(*range(50, 101),)),
    ]
    itl = summarize(timings, batch_size=1, input_len=1).itl_ms
    assert itl == pytest.approx({"p50": 50e3, "p95": 95e3, "p99": 99e3})


def test_single_token_has_no_time_of_a_later_one():
    figures = summarize([Timing(ttft_s=0.5, step_s=())], batch_size=1, input_len=8)
    assert figures.prefill_tokens_per_s == pytest.approx(16)
    assert (figures.tpot_ms, figures.itl_ms, figures.decode_tokens_per_s) == (None, None, None)
    assert decode_ratio([Timing(ttft_s=1, step_s=())], [Timing(ttft_s=1, step_s=())]) is None


def test_ratios_are_taken_within_a_round():
    # The machine was three times as slow in the last round, for both.
    baseline = [Timing(ttft_s=t, step_s=(t, t)) for t in (1.0, 1.0, 3.0)]
    other = [Timing(ttft_s=t / 2, step_s=(t / 4, t / 4)) for t in (1.0, 1.0, 3.0)]
    assert prefill_ratio(baseline, other) == pytest.approx(2)
    assert decode_ratio(baseline, other) == pytest.approx(4)
    assert decode_ratio(baseline, baseline) == 1
