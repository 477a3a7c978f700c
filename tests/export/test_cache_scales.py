"""Keys and values cached as 8-bit integers: their scales, and models that use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export.cache_scales import MARGIN, calibrate_cache
from export.lowerings.cpu import lower_for_cpu
from runtime.backends.narrow_cache import PromptModel, load_scales, save_scales
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


class WithPromptModel:
    """A golden case with a cache of 8 bits, with and without the model for long prompts."""

    def __init__(self, exported: Exported, folder: Path) -> None:
        self.exported = exported
        config = exported.network.config
        scales = calibrate_cache(
            exported.backend_on(exported.path, exported.contract), windows_of(exported)
        )
        narrow, prompt = folder / "kv8.onnx", folder / "kv8.prompt.onnx"
        lowered = lower_for_cpu(
            exported.path, narrow, config, slots=exported.slots, cache_scales=scales
        )
        lower_for_cpu(exported.path, prompt, config, slots=exported.slots, weights_of=narrow)
        options = {"rows_alone": True, "chunk_length": 8}
        self.float_backend = exported.backend_on(
            prompt, exported.contract_with(score_heads=lowered.score_heads), **options
        )
        contract = exported.contract_with("int8", lowered.score_heads)
        self.plain = exported.backend_on(narrow, contract, **options)
        self.scales = np.stack([np.stack([s.key, s.value]) for s in scales])
        self.backend = exported.backend_on(
            narrow,
            contract,
            prompt_model=PromptModel(lambda: self.float_backend, self.scales, from_tokens=6),
            **options,
        )


@pytest.mark.parametrize("case", CASES)
def test_long_prompt_is_computed_in_float32_and_rounded_once(
    exported_case: Callable[[str], Exported], tmp_path: Path, case: str
) -> None:
    """In two parts where the router allows it, so that the second finds a cache of 8 bits."""
    case_of = WithPromptModel(exported_case(case), tmp_path)
    ids = np.resize(case_of.exported.golden["input_ids"], (1, 20))
    caches = [b.new_cache(1) for b in (case_of.backend, case_of.float_backend, case_of.plain)]
    cache, floats, plain = caches
    length = np.array([20])
    logits = case_of.backend.score(ids, length, cache)
    expected = case_of.float_backend.score(ids, length, floats)
    np.testing.assert_array_equal(logits, expected)
    assert cache.lengths.tolist() == [20]
    case_of.plain.score(ids, length, plain)
    narrow, direct = case_of.backend.cached(cache), case_of.plain.cached(plain)
    wide = case_of.float_backend.cached(floats)
    for name, levels in narrow.items():
        assert not levels[:, :, 20:].any()
        if name.endswith(".score"):
            np.testing.assert_array_equal(levels, wide[name])
            continue
        layer, kind = int(name.split(".")[1]), name.split(".")[2]
        scale = case_of.scales[layer, ("key", "value").index(kind), :, None]
        kept = np.abs(wide[name]) <= 127 * scale
        np.testing.assert_array_less(
            np.abs(levels * scale - wide[name])[kept],
            (0.501 * scale + 0 * wide[name][0])[None][kept],
        )
        if layer == 0:  # which is the same whatever the cache holds
            np.testing.assert_array_equal(levels, direct[name])


def test_prompt_behind_a_filled_cache_starts_from_what_the_cache_stands_for(
    exported_case: Callable[[str], Exported], tmp_path: Path
) -> None:
    case_of = WithPromptModel(exported_case("g3"), tmp_path)
    ids = np.resize(case_of.exported.golden["input_ids"], (1, 20))
    logits = []
    for backend in (case_of.backend, case_of.plain):
        cache = backend.new_cache(2)
        backend.prefill(np.repeat(ids[:, :4], 2, 0), np.array([4, 3]), cache)
        before = {name: array.copy() for name, array in backend.cached(cache).items()}
        logits.append(backend.prefill(ids[:, 4:].repeat(2, 0), np.array([16, 9]), cache))
        assert cache.lengths.tolist() == [20, 12]
        for name, array in backend.cached(cache).items():
            np.testing.assert_array_equal(array[1, :, :3], before[name][1, :, :3])
    size = np.abs(logits[1]).max()
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.02 * size


def test_weights_are_shared_by_models_of_one_precision_only(
    exported_case: Callable[[str], Exported], tmp_path: Path
) -> None:
    exported = exported_case("g3")
    config = exported.network.config
    first, second = tmp_path / "int8.onnx", tmp_path / "prompt.onnx"
    lower_for_cpu(exported.path, first, config, slots=exported.slots, precision="int8")
    lower_for_cpu(
        exported.path, second, config, slots=exported.slots, precision="int8", weights_of=first
    )
    assert second.stat().st_size < 2 * first.stat().st_size
    assert not second.with_name("prompt.onnx.data").exists()
    other = exported_case("g1")  # whose tables of cosines are shorter
    with pytest.raises(ValueError, match="models of one checkpoint and precision"):
        lower_for_cpu(other.path, second, other.network.config, slots=other.slots, weights_of=first)


def test_cache_of_8_bits_is_a_quarter_of_one_of_32(
    exported_case: Callable[[str], Exported],
) -> None:
    exported = exported_case("g1")  # which caches no scores
    wide, narrow = exported.contract_with(), exported.contract_with("int8")
    assert wide.bytes_per_token() == 4 * narrow.bytes_per_token()


def test_scales_are_read_as_they_were_written_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "scales.npy"
    scales = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    save_scales(path, scales)
    np.testing.assert_array_equal(load_scales(path), scales)
    np.save(path, scales[0])
    with pytest.raises(ValueError, match=r"expected float32 \[layers, 2, heads, size\]"):
        load_scales(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        load_scales(path)
