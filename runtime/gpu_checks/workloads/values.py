"""The value gather of the seed generation: one token, a batch, a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from runtime.backends.base import Limits
from runtime.gpu_checks.number_formats import Array
from runtime.gpu_checks.workloads.workload import Case, item_bytes, stored_bytes, token_counts
from runtime.kernel_library import OpUse


class ValueWorkload:
    """Scores of a head are distinct whole numbers in random order.

    Attributes:
        tables: none: the table is small.
    """

    tables = ()

    def cases(self, use: OpUse, limits: Limits) -> list[Case]:
        """As many tokens as a decode step and a prompt have."""
        R, N = use.shapes["scores"][1:]
        return [
            Case(
                label=label,
                shapes={
                    "scores": (T, R, N),
                    "table": use.shapes["table"],
                    "inner_values": (T, use.shapes["table"][1]),
                },
            )
            for label, T in token_counts(limits)
        ]

    def inputs(self, use: OpUse, case: Case, random: np.random.Generator) -> dict[str, Array]:
        """Random scores [T, R, N] and table."""
        T, R, N = case.shapes["scores"]
        levels = np.broadcast_to(np.arange(N), (T, R, N))
        return {
            "scores": (random.permuted(levels, axis=-1) - N // 2).astype(np.float64),
            "table": random.standard_normal(case.shapes["table"]),
        }

    def other_picks(self, use: OpUse, case: Case, random: np.random.Generator) -> dict[str, Array]:
        """Nothing: there are no tables that are read in part."""
        return {}

    def moved_bytes(self, use: OpUse, case: Case, inputs: Mapping[str, Array]) -> int:
        """Scores and results, and as many rows of the table as can be picked."""
        T, R, _ = case.shapes["scores"]
        rows, H = case.shapes["table"]
        picks = 1 if use.attributes["subset_sums"] else int(use.attributes["top_k"])
        read = min(rows, prod((T, R, picks))) * H * item_bytes(use.dtypes["table"])
        return read + stored_bytes(use, case, ("scores", "inner_values"))
