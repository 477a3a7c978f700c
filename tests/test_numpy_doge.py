"""The numpy transcription against stored results of the published code; no torch here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.numpy_checkpoints import random_checkpoint
from tests.numpy_doge import Array, Generation, Ids, logits

Golden = Callable[[str], Path]
CASES: dict[str, Generation] = {
    "g1": "g1",
    "g3": "g3",
    "g3_moe": "g3",
    "g4": "g4",
    "g4_untied_mha": "g4",
    "g4_moe": "g4",
    "g4_window": "g4",
    "g4h": "g4h",
    "g4h_window": "g4h",
}
# On logits of size 8 to 38. The results were stored in float32, whose rounding alone moves them by
# up to 1e-4; with the transcription in float32 as well, both sides round.
ATOL: dict[type[np.floating[Any]], float] = {np.float64: 1e-4, np.float32: 4e-4}


def checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, load_file(folder / "model.safetensors")


def stored(folder: Path) -> tuple[Ids, Array, Array]:
    """ids [B, S], logits of one pass [B, S, V], logits of row 0 token by token [1, S, V]."""
    with np.load(folder / "golden.npz") as data:
        return data["input_ids"], data["prefill_logits"], data["decode_logits"]


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("case", CASES)
def test_one_pass_equals_published_code(
    golden: Golden, case: str, dtype: type[np.floating[Any]]
) -> None:
    ids, expected, _ = stored(golden(case))
    config, tensors = checkpoint(golden(case))
    # The published router also mixes the rows of a batch, so experts were stored of one row.
    assert len(ids) == 1 or not config.get("is_moe")
    assert np.abs(expected).max() > 5
    actual = logits(config, tensors, ids, CASES[case], "mixed", dtype=dtype)
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, expected, atol=ATOL[dtype], rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_token_by_token_equals_published_code(golden: Golden, case: str) -> None:
    ids, _, expected = stored(golden(case))
    config, tensors = checkpoint(golden(case))
    for token_by_token in (False, True):  # no query has all of its keys hidden
        actual = logits(
            config, tensors, ids[:1], CASES[case], "per_token", token_by_token=token_by_token
        )
        np.testing.assert_allclose(actual, expected, atol=ATOL[np.float64], rtol=0)


def test_router_modes_differ_by_far_more_than_the_tolerance(golden: Golden) -> None:
    for case in ("g3_moe", "g4_moe"):
        _, mixed, per_token = stored(golden(case))
        assert np.abs(mixed - per_token).max() > 1, case


@pytest.mark.parametrize("generation", get_args(Generation))
def test_every_tensor_of_a_checkpoint_moves_the_logits(generation: Generation) -> None:
    """Save those that are published without effect: the threshold of G2, choices among equals."""
    for seed in range(4):
        case = random_checkpoint(generation, seed)
        ids = case.distinct_ids(1, 14)
        before = logits(case.config, case.tensors, ids, generation)
        for name, tensor in case.tensors.items():
            if name in case.inert:
                continue
            changed = {**case.tensors, name: np.flip(tensor) * 1.5 + 0.1}
            after = logits(case.config, changed, ids, generation)
            assert np.abs(after - before).max() > 1e-3, (seed, name)


@pytest.mark.parametrize("generation", ["g2_first", "g2"])
def test_threshold_of_g2_hides_keys_only_where_a_is_negative(generation: Generation) -> None:
    case = random_checkpoint(generation, 2)
    ids = case.distinct_ids(1, 14)
    expected = logits(case.config, case.tensors, ids, generation)
    changed = {
        name: -3 * tensor if name.endswith("dt_proj.weight") else tensor
        for name, tensor in case.tensors.items()
    }
    np.testing.assert_array_equal(logits(case.config, changed, ids, generation), expected)
    for name, tensor in case.tensors.items():
        if name.endswith(".A"):
            changed[name] = np.full_like(tensor, -1)
    assert np.abs(logits(case.config, changed, ids, generation) - expected).max() > 1
