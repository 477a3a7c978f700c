from __future__ import annotations

import dataclasses

import pytest

from export.engine import EngineConfig
from export.estimate import estimate
from model.released import released_shape
from runtime.bundle import Bundle, Variant
from runtime.roofline import BandwidthMeter, step_bytes, weight_numbers_per_step
from tests.fake_bundle import CONFIG, write_fake_bundle

# Cached numbers of a token of the fake bundle: 2 layers of a key and a value of 8, and a score.
KEYS_AND_VALUES, SCORES = 2 * 2 * 8, 2


@pytest.fixture
def bundle(tmp_path):
    return Bundle.open(write_fake_bundle(tmp_path / "bundle"))


def variant(precision="fp32", **details):
    return Variant(
        backend="onnxruntime", name="x", path="model.onnx", precision=precision, details=details
    )


@pytest.mark.parametrize("name", ["doge-20m", "doge-20m-moe", "doge-20m-g2", "doge-22m"])
def test_weights_of_one_row_are_those_of_the_estimate(name):
    shape = released_shape(name)
    engine = EngineConfig(backend="tensorrt_rtx", precision="fp16", max_input_len=8, max_seq_len=8)
    expected = estimate(shape.config, shape.generation, engine).read_bytes_per_token / 2
    assert weight_numbers_per_step(shape.config, shape.generation, 1) == expected


def test_rows_of_a_batch_pick_other_experts_up_to_all_of_them():
    shape = released_shape("doge-20m-moe")
    config = shape.config
    numbers = [weight_numbers_per_step(config, shape.generation, b) for b in (1, 2, 64, 65)]
    rows = 2 * config.num_hidden_layers * config.hidden_size
    assert numbers[1] - numbers[0] == rows * config.num_experts_per_tok
    assert numbers[2] - numbers[0] == rows * (config.num_experts - config.num_experts_per_tok)
    assert numbers[3] == numbers[2] == shape.parameters


@pytest.mark.parametrize(("precision", "bits"), [("fp32", 32), ("int8", 8), ("int4", 4)])
def test_bytes_are_weights_in_their_width_and_the_cache_of_every_row(bundle, precision, bits):
    weights = weight_numbers_per_step(CONFIG, bundle.generation, 3) * bits / 8
    cache = 3 * 10.5 * 4 * (KEYS_AND_VALUES + SCORES)
    assert step_bytes(bundle, variant(precision), 3, 10.5) == weights + cache


def test_cache_beyond_the_keep_window_is_not_counted(bundle):
    at_window = step_bytes(bundle, variant(), 1, CONFIG.keep_window_size)
    assert step_bytes(bundle, variant(), 1, 60) == at_window


def test_details_of_the_variant_win(bundle):
    found = step_bytes(bundle, variant("int4", read_bytes_per_token=1000, cache_dtype="int8"), 1, 8)
    assert found == 1000 + 8 * (KEYS_AND_VALUES + 4 * SCORES)


def test_unknown_width_gives_no_number(bundle):
    assert step_bytes(bundle, variant("int3"), 1, 8) is None
    with pytest.raises(ValueError, match="no build writes that"):
        step_bytes(bundle, variant(cache_dtype="int3"), 1, 8)


def test_seed_without_scores_has_a_cache_of_keys_and_values():
    shape = released_shape("doge-22m")
    assert dataclasses.asdict(shape.config)["num_cdmmoe_experts"] > 0
    assert weight_numbers_per_step(shape.config, shape.generation, 1000) < shape.parameters * 1.01


def test_meter_gives_the_median_of_its_measurements():
    meter = BandwidthMeter(threads=2)
    meter.measure()
    first = meter.bytes_per_s
    meter.measure()
    meter.measure()
    assert meter.threads == 2
    assert 0 < first < 1e13
    assert 0 < meter.bytes_per_s < 1e13
