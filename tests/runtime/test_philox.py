"""The random numbers: published known answers, and what a number depends on."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.philox import philox4x32, uniform_numbers

# Counter, key and output of Philox4x32-10 in the known answers of Random123 (kat_vectors).
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def numbers(seed: int, prompts: list[int], tokens: list[int]) -> list[float]:
    drawn = uniform_numbers(seed, np.array(prompts, np.int64), np.array(tokens, np.int64))
    assert drawn.dtype == np.float32
    return [float(x) for x in drawn]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    low, high = words(key)
    result = philox4x32(np.array([words(counter)], np.uint32), (low, high))
    assert result.tolist() == [words(expected)]


def test_rows_of_a_batch_are_independent() -> None:
    counters = np.array([words(counter) for counter, _, _ in KNOWN_ANSWERS], np.uint32)
    together = philox4x32(counters, (1, 2))
    alone = [philox4x32(counters[i : i + 1], (1, 2))[0].tolist() for i in range(3)]
    assert together.tolist() == alone


def test_number_is_the_upper_24_bits_of_the_first_word() -> None:
    assert numbers(0, [0], [0]) == [(0x6627E8D5 >> 8) * 2.0**-24]


def test_words_of_seed_and_indices_stand_where_documented() -> None:
    _, _, expected = KNOWN_ANSWERS[2]
    seed = 0x299F31D0_A4093822
    token, prompt = np.uint64(0x85A308D3_243F6A88), 0x03707344_13198A2E
    drawn = uniform_numbers(
        seed, np.array([prompt], np.int64), np.array([token], np.uint64).view(np.int64)
    )
    assert drawn.tolist() == [(words(expected)[0] >> 8) * 2.0**-24]


def test_every_part_of_the_key_changes_the_number() -> None:
    cases = [(0, 0, 0), (1, 0, 0), (1 << 32, 0, 0), (0, 1, 0), (0, 1 << 32, 0), (0, 0, 1)]
    drawn = {numbers(seed, [prompt], [token])[0] for seed, prompt, token in cases}
    assert len(drawn) == len(cases)


def test_numbers_lie_in_the_unit_interval_and_are_spread_evenly() -> None:
    drawn = np.array(numbers(7, [0] * 20000, list(range(20000))))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts, _ = np.histogram(drawn, bins=10, range=(0, 1))
    assert np.abs(counts - 2000).max() < 6 * np.sqrt(2000)


def test_largest_seed_is_accepted() -> None:
    assert 0 <= numbers(2**64 - 1, [0], [0])[0] < 1
