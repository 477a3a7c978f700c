"""Philox4x32-10, the counter-based random numbers that every backend can reproduce.

numpy's own Philox is the 4x64 variant. Source: Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3" (2011); its published known answers are in the tests.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds of Philox.

    Args:
        counter: [B, 4] uint32.
        key: two 32-bit numbers.

    Returns:
        [B, 4] uint32.
    """
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        high0, low0 = product0 >> np.uint64(32), product0 & np.uint64(_MASK)
        high1, low1 = product1 >> np.uint64(32), product1 & np.uint64(_MASK)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniform_numbers(
    seed: int, prompt_indices: npt.NDArray[np.int64], token_indices: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """One number in [0, 1) for each sequence, the same wherever and beside whatever it runs.

    The key is the seed's low and high 32 bits; the counter is the token's index (low, high), then
    the prompt's index (low, high). The upper 24 bits of the first word give the number, exactly
    representable in float32.

    Args:
        seed: 0 to 2^64 - 1.
        prompt_indices: [B] place of each row's prompt in the request.
        token_indices: [B] how many tokens of each row were drawn before.
    """
    halves = [
        half
        for indices in (token_indices, prompt_indices)
        for half in (indices & _MASK, indices >> 32)
    ]
    counter = np.stack(halves, axis=1).astype(np.uint32)
    first = philox4x32(counter, (seed & _MASK, seed >> 32))[:, 0]
    return (first >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
