"""What narrow weights lose, measured on text that the float32 model samples."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from export.quality import BOUNDS, measure_quality, sample_text
from model.checkpoint import load_checkpoint
from runtime.backends.base import Limits
from runtime.backends.torch_backend import TorchBackend

LIMITS = Limits(max_batch_size=2, max_input_len=40, max_seq_len=40)


def backend(folder: Path, noise: float = 0.0) -> TorchBackend:
    """The checkpoint, its head turned by so much noise."""
    network = load_checkpoint(folder)
    generator = np.random.default_rng(0)
    weight = network.model.norm.weight
    weight.copy_(weight * (1 + noise * generator.standard_normal(weight.shape)))
    return TorchBackend(network, limits=LIMITS, variant="fp32")


def test_model_loses_nothing_against_itself(tiny_dense: Path) -> None:
    one = backend(tiny_dense)
    quality = measure_quality(one, one, bits=8, first_token=0)
    assert quality.increase == 0
    assert quality.accepted
    assert quality.tokens == 4 * 39
    assert quality.text == "sampled"


@pytest.mark.parametrize("bits", [8, 4])
def test_increase_grows_with_the_distance_and_is_refused_beyond_its_bound(
    tiny_dense: Path, bits: int
) -> None:
    reference = backend(tiny_dense)
    found = [
        measure_quality(reference, backend(tiny_dense, noise), bits=bits, first_token=0)
        for noise in (0.001, 0.3)
    ]
    assert abs(found[0].increase) < 0.02 < BOUNDS[4] < found[1].increase
    assert [quality.accepted for quality in found] == [True, False]
    for quality in found:
        ratio = quality.perplexity / quality.reference_perplexity
        assert quality.increase == pytest.approx(ratio - 1)
        assert quality.bound == BOUNDS[bits]


def test_sampled_text_is_the_same_for_the_same_model(tiny_dense: Path, tiny_moe: Path) -> None:
    text = sample_text(backend(tiny_dense), 5)
    assert text == sample_text(backend(tiny_dense), 5)
    assert text != sample_text(backend(tiny_moe), 5)
    assert [len(row) for row in text] == [40] * 4
    assert len({tuple(row) for row in text}) == 4
    assert {row[0] for row in text} == {5}


def test_without_a_first_token_every_sequence_begins_with_another(tiny_dense: Path) -> None:
    assert [row[0] for row in sample_text(backend(tiny_dense), None)] == [0, 1, 2, 3]


def test_given_text_is_scored_in_windows_of_unequal_length(tiny_moe: Path) -> None:
    windows = [list(range(20)), list(range(30, 45)), list(range(50, 70))]
    one = backend(tiny_moe)
    quality = measure_quality(one, one, bits=4, first_token=0, windows=windows)
    assert quality.tokens == 19 + 14 + 19
    assert quality.text == "given"
    assert math.isfinite(quality.perplexity)


def test_message_says_how_much_and_of_what(tiny_dense: Path) -> None:
    one = backend(tiny_dense)
    message = str(measure_quality(one, one, bits=4, first_token=0))
    assert "+0.00%, at most +10%" in message
    assert "over 156 tokens of sampled text" in message
