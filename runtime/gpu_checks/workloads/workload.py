"""What a workload is, and what several of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np

from runtime.backends.base import Limits
from runtime.gpu_checks.number_formats import SIGNIFICANT_BITS, STORAGE, Array
from runtime.kernel_library import OpUse

# Tokens of a long prompt; more would only take longer.
PROMPT_TOKENS = 512
# A number of tokens that no tile divides.
AWKWARD_TOKENS = 37
# Fineness of random numbers that are added in pairs, where their type has more bits.
_GRID_BITS = 18


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of an op.

    Attributes:
        label: in words, unique for an op's use.
        shapes: every dimension of every input and output.
        filled: how much of a cache was filled before, where the op has one.
    """

    label: str
    shapes: Mapping[str, tuple[int, ...]]
    filled: str = ""


class Workload(Protocol):
    """How one op is checked."""

    @property
    def tables(self) -> tuple[str, ...]:
        """Inputs of which an execution reads a small part, picked by the others."""

    def cases(self, use: OpUse, limits: Limits) -> list[Case]:
        """What is run for a use, within the limits of its bundle."""

    def inputs(self, use: OpUse, case: Case, random: np.random.Generator) -> dict[str, Array]:
        """New random inputs: numbers that the use's types hold after rounding."""

    def other_picks(self, use: OpUse, case: Case, random: np.random.Generator) -> dict[str, Array]:
        """New values of the inputs that pick from the tables; empty where there are none."""

    def moved_bytes(self, use: OpUse, case: Case, inputs: Mapping[str, Array]) -> int:
        """Bytes that an execution must read and write, each counted once."""


def token_counts(limits: Limits) -> list[tuple[str, int]]:
    """Labels and numbers of tokens, for ops that take the tokens of all rows as one list."""
    batch = limits.max_batch_size
    longest = min(batch * limits.max_input_len, PROMPT_TOKENS)
    awkward = min(AWKWARD_TOKENS, longest)
    labels: dict[int, str] = {}
    for label, count in (
        ("decode", 1),
        (f"decode, batch of {batch}", batch),
        (f"prompt of {awkward}", awkward),
        (f"prompt of {longest}", longest),
    ):
        labels.setdefault(count, label)
    return [(label, count) for count, label in labels.items()]


def stored_bytes(use: OpUse, case: Case, names: Sequence[str]) -> int:
    """Bytes of whole inputs or outputs."""
    return sum(prod(case.shapes[name]) * item_bytes(use.dtypes[name]) for name in names)


def item_bytes(dtype: str) -> int:
    """Bytes of one number, by numpy's name of its type."""
    return np.dtype(STORAGE[dtype]).itemsize


def on_a_grid(
    random: np.random.Generator, shape: Sequence[int], dtype: str, *, limit: int = 4
) -> Array:
    """Normal numbers between ±limit, rounded so that their sums in pairs are exact in the type.

    So a kernel that adds in any precision sees the sums that the definition sees.
    """
    # A sum is at most 2·limit: what is left of the significant bits is the grid.
    steps = 2 ** min(SIGNIFICANT_BITS[dtype], _GRID_BITS) / (2 * limit)
    values = np.clip(random.standard_normal(shape), -limit, limit)
    rounded: Array = np.round(values * steps) / steps
    return rounded
