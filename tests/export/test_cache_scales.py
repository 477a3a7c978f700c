"""Keys and values cached as 8-bit integers: their scales, and models that use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export.cache_scales import MARGIN, calibrate_cache
from export.lowerings.cpu import lower_for_cpu
from tests.export.conftest import Exported

# One with trained value keys and a stored mask, one with experts, one that selects keys.
CASES = ("g1", "g4_moe", "g4_window")


def windows_of(exported: Exported) -> list[list[int]]:
    return [[int(i) for i in row] for row in exported.golden["input_ids"]]


def test_scale_is_the_largest_number_of_a_channel_with_room_above_it(
    exported_case: Callable[[str], Exported],
) -> None:
    exported = exported_case("g3")
    windows = windows_of(exported)
    scales = calibrate_cache(exported.backend_on(exported.path, exported.contract), windows)
    config = exported.network.config
    assert len(scales) == config.num_hidden_layers
    largest = np.zeros((config.num_key_value_heads, config.head_dim))
    for window in windows:
        cache = exported.torch.new_cache(1, len(window))
        exported.torch.prefill(np.array([window]), np.array([len(window)]), cache)
        keys = cache.layers[1][0][0].abs().amax(dim=1).numpy()  # type: ignore[attr-defined]
        largest = np.maximum(largest, keys)
    np.testing.assert_allclose(scales[1].key, largest * MARGIN / 127, rtol=1e-4)
    assert scales[1].value.shape == (config.num_key_value_heads, config.head_dim)
    assert (scales[1].value > 0).all()


@pytest.mark.parametrize("case", CASES)
def test_model_with_a_cache_of_8_bits_follows_the_one_without(
    exported_case: Callable[[str], Exported], tmp_path: Path, case: str
) -> None:
    exported = exported_case(case)
    scales = calibrate_cache(
        exported.backend_on(exported.path, exported.contract), windows_of(exported)
    )
    path = tmp_path / "kv8.onnx"
    lowered = lower_for_cpu(
        exported.path, path, exported.network.config, slots=exported.slots, cache_scales=scales
    )
    assert lowered.as_details()["cache_dtype"] == "int8"
    contract = exported.contract_with("int8", lowered.score_heads)
    backend = exported.backend_on(path, contract, rows_alone=True, chunk_length=8)
    ids = exported.golden["input_ids"][:1]
    cache = backend.new_cache(1)
    logits = [backend.prefill(ids[:, :1], np.array([1]), cache)]
    logits += [backend.decode(ids[:, t], cache) for t in range(1, ids.shape[1])]
    expected = exported.golden["decode_logits"]
    error = np.median(np.abs(np.stack(logits, 1) - expected)) / np.abs(expected).max()
    assert 1e-5 < error < 0.01
    cached = backend.cached(cache)
    assert cached["past_key_values.0.key"].dtype == np.int8
    assert np.abs(cached["past_key_values.0.key"]).max() > 100
    assert not cached["past_key_values.0.key"][:, :, ids.shape[1] :].any()


def test_cache_of_8_bits_is_a_quarter_of_one_of_32(
    exported_case: Callable[[str], Exported],
) -> None:
    exported = exported_case("g1")  # which caches no scores
    wide, narrow = exported.contract_with(), exported.contract_with("int8")
    assert wide.bytes_per_token() == 4 * narrow.bytes_per_token()
