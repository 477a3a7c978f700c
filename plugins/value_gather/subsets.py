"""The sets of rows that a head of the value gather can pick, in the order of their sums."""

from __future__ import annotations

from itertools import combinations


def value_subsets(num_rows: int, top_k: int) -> list[tuple[int, ...]]:
    """The sets of `top_k` of `num_rows` rows, in the order of a table with `subset_sums`."""
    return list(combinations(range(num_rows), top_k))
