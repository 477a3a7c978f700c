"""The expert gather: one token, a batch, a prompt; which experts are picked is never a tie."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from runtime.backends.base import Limits
from runtime.gpu_checks.number_formats import Array
from runtime.gpu_checks.workloads.workload import (
    Case,
    item_bytes,
    on_a_grid,
    stored_bytes,
    token_counts,
)
from runtime.kernel_library import OpUse

# How often a token's scores are drawn again where the last expert that is picked ties with the
# next. What still ties after that has a fixed order, too.
_DRAWS = 200


class ExpertWorkload:
    """Sums of scores are exact, so that the picks do not depend on how they are rounded.

    Attributes:
        tables: one row of each for every expert.
    """

    tables = ("down", "up")

    def cases(self, use: OpUse, limits: Limits) -> list[Case]:
        """As many tokens as a decode step and a prompt have."""
        P, n = use.shapes["scores_x"][1:]
        E, H = use.shapes["down"]
        return [
            Case(
                label=label,
                shapes={
                    "hidden": (T, H),
                    "scores_x": (T, P, n),
                    "scores_y": (T, P, n),
                    "down": (E, H),
                    "up": (E, H),
                    "expert_output": (T, H),
                },
            )
            for label, T in token_counts(limits)
        ]

    def inputs(self, use: OpUse, case: Case, random: np.random.Generator) -> dict[str, Array]:
        """Random hidden [T, H], scores_x and scores_y [T, P, n], down and up [E, H]."""
        H = case.shapes["hidden"][1]
        return {
            "hidden": random.standard_normal(case.shapes["hidden"]),
            # Products with a token are of the size of 1, where SiLU bends.
            "down": random.standard_normal(case.shapes["down"]) / np.sqrt(H),
            "up": random.standard_normal(case.shapes["up"]),
            **self.other_picks(use, case, random),
        }

    def other_picks(self, use: OpUse, case: Case, random: np.random.Generator) -> dict[str, Array]:
        """New scores."""
        shape, dtype = case.shapes["scores_x"], use.dtypes["scores_x"]
        top_k = int(use.attributes["top_k"])
        x, y = (on_a_grid(random, shape, dtype) for _ in range(2))
        for _ in range(_DRAWS):
            tied = _ties(x, y, top_k)
            if not tied.any():
                break
            again = (int(tied.sum()), shape[2])
            x[tied], y[tied] = (on_a_grid(random, again, dtype) for _ in range(2))
        return {"scores_x": x, "scores_y": y}

    def moved_bytes(self, use: OpUse, case: Case, inputs: Mapping[str, Array]) -> int:
        """Tokens, scores and results, and the rows of the experts that any token picks."""
        sums = _sums(np.asarray(inputs["scores_x"]), np.asarray(inputs["scores_y"]))
        top_k = int(use.attributes["top_k"])
        picked = np.unique(np.argpartition(-sums, top_k - 1, axis=-1)[..., :top_k])
        row = case.shapes["down"][1] * item_bytes(use.dtypes["down"])
        whole = stored_bytes(use, case, ("hidden", "scores_x", "scores_y", "expert_output"))
        return whole + 2 * row * len(picked)


def _sums(x: Array, y: Array) -> Array:
    """[T, P, n²] scores of all experts on the grid."""
    return (x[..., :, None] + y[..., None, :]).reshape(*x.shape[:-1], -1)


def _ties(x: Array, y: Array, top_k: int) -> Array:
    """[T, P] where the last expert that is picked has the score of the first that is not."""
    sums = _sums(x, y)
    if top_k == sums.shape[-1]:
        return np.zeros(sums.shape[:-1], bool)
    ordered = -np.partition(-sums, (top_k - 1, top_k), axis=-1)
    return np.asarray(ordered[..., top_k - 1] == ordered[..., top_k])
