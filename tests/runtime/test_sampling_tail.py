import numpy as np
import pytest

from runtime.sampling import SamplingParams
from runtime.sampling_tail import (
    ALL_RANKS,
    EngineTailInputs,
    TailInputs,
    engine_tail_covers,
    tail_covers,
)


def reason(**values):
    return tail_covers(SamplingParams(**values), vocab_size=1000, width=64)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0, "top_k": 500},
        {"top_k": 64, "top_p": 0.9, "min_p": 0.1, "temperature": 0.3},
        {"top_k": 1000},
        {"top_k": 5000},
        {"stop": ("\n",), "stop_token_ids": (3,), "logprobs": 2, "ignore_eos": True, "seed": 7},
    ],
)
def test_covered_parameters_have_no_reason(values):
    assert reason(**values) is None


def test_reasons_name_the_parameters():
    assert reason(logit_bias={3: 1.0}) == "the graph does not know logit_bias"
    assert reason(temperature=0, min_tokens=2) == "the graph does not know min_tokens"
    assert reason(repetition_penalty=1.1, presence_penalty=1, frequency_penalty=-1) == (
        "the graph does not know repetition_penalty, presence_penalty, frequency_penalty"
    )
    assert reason(top_k=65) == "top_k 65 exceeds the 64 candidates of the graph"
    assert reason(top_k=999) == "top_k 999 exceeds the 64 candidates of the graph"


def test_inputs_hold_the_parameters_of_each_row():
    params = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    feeds = TailInputs.make(params, 3).feeds()
    assert set(feeds) == {"sample", "temperature", "top_k", "top_p", "min_p", "uniform"}
    assert feeds["sample"].shape == ()
    assert feeds["sample"]
    assert all(array.shape == (3,) for name, array in feeds.items() if name != "sample")
    assert feeds["temperature"].dtype == feeds["uniform"].dtype == np.float32
    assert feeds["top_p"].dtype == feeds["min_p"].dtype == np.float64
    assert feeds["top_p"][2] == 0.9
    assert feeds["top_k"].tolist() == [5, 5, 5]


def test_inputs_of_a_greedy_choice_divide_by_nothing():
    feeds = TailInputs.make(SamplingParams(temperature=0), 1).feeds()
    assert not feeds["sample"]
    assert feeds["temperature"] == 1


def test_feeds_are_the_arrays_that_the_caller_writes():
    inputs = TailInputs.make(SamplingParams(), 2)
    feeds = inputs.feeds()
    inputs.uniform[:] = [0.25, 0.5]
    assert feeds["uniform"].tolist() == [0.25, 0.5]
    assert feeds["top_k"].tolist() == [np.iinfo(np.int64).max] * 2


def test_an_engine_covers_what_has_bounds_and_asks_for_no_logits():
    def engine_reason(**values):
        return engine_tail_covers(SamplingParams(**values), vocab_size=1000, width=64)

    assert engine_reason(top_k=64, top_p=0.9, min_p=0.1, temperature=0.3, seed=7) is None
    assert engine_reason(temperature=0, top_k=500) is None
    assert engine_reason(logprobs=0) == ("log-probabilities are of logits, which stay in the graph")
    assert engine_reason(temperature=1e-4) == "temperature 0.0001 is outside 0.001 to 1000"
    assert engine_reason(temperature=2000) == "temperature 2000 is outside 0.001 to 1000"
    assert engine_reason(min_p=1e-31) == "min_p 1e-31 is below 1e-30"
    assert engine_reason(top_k=65) == "top_k 65 exceeds the 64 candidates of the graph"
    assert engine_reason(repetition_penalty=1.1) == "the graph does not know repetition_penalty"


def test_an_engines_inputs_are_numbers_of_each_row():
    params = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    feeds = EngineTailInputs.make(params, 3).feeds()
    assert {name: array.tolist() for name, array in feeds.items()} == {
        "temperature": [np.float32(0.7)] * 3,
        "quotient_rounding": [2.0**-21] * 3,
        "top_k": [5.0] * 3,
        "top_p": [np.float32(0.9)] * 3,
        "min_p": [np.float32(0.1)] * 3,
        "uniform": [0.0] * 3,
    }
    assert {array.dtype for array in feeds.values()} == {np.dtype(np.float32)}


def test_an_engine_is_told_what_keeps_all_and_when_division_is_exact():
    every = EngineTailInputs.make(SamplingParams(temperature=0.5), 1)
    assert (every.top_k, every.top_p, every.quotient_rounding) == (ALL_RANKS, 2, 0)
    greedy = EngineTailInputs.make(SamplingParams(temperature=0, top_k=9, top_p=0.5, min_p=0.5), 1)
    assert (greedy.temperature, greedy.top_k, greedy.top_p, greedy.min_p) == (1, 1, 2, 0)
