"""What a graph that chooses tokens by itself is fed, and for which parameters it may.

The nodes are those of export/lowerings/sampling_tail.py; docs/sampling.md ("In the graph") has the
reasons.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from runtime.sampling import SamplingParams

# Stands for a `top_k` of 0: no token has so high a rank.
_EVERY_TOKEN = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class TailInputs:
    """The inputs of a sampling tail; a field's name is that of the graph's input.

    The arrays may be bound once: `uniform` is written in place before each step, the others hold
    for all steps.

    Attributes:
        sample: [] bool, whether to draw; the largest logit wins where false.
        temperature: [B] float32, above 0; divides the logits.
        top_k: [B] int64; the largest int64 keeps all.
        top_p: [B] float64.
        min_p: [B] float64.
        uniform: [B] float32 numbers in [0, 1).
    """

    sample: npt.NDArray[np.bool_]
    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float64]
    min_p: npt.NDArray[np.float64]
    uniform: npt.NDArray[np.float32]

    @classmethod
    def make(cls, params: SamplingParams, rows: int) -> Self:
        """The inputs for `rows` sequences that share their parameters; `uniform` is 0."""
        return cls(
            sample=np.array(params.temperature > 0),
            temperature=np.full(rows, params.temperature or 1, np.float32),
            top_k=np.full(rows, params.top_k or _EVERY_TOKEN, np.int64),
            top_p=np.full(rows, params.top_p, np.float64),
            min_p=np.full(rows, params.min_p, np.float64),
            uniform=np.zeros(rows, np.float32),
        )

    def feeds(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays themselves by input name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def tail_covers(params: SamplingParams, *, vocab_size: int, width: int) -> str | None:
    """Why a graph's tail cannot choose tokens by these parameters; None if it can.

    Args:
        params: of the request.
        vocab_size: V.
        width: candidates of the sampling tail; a temperature of 0 goes to the greedy one and asks
            for none.
    """
    outside = {
        "logit_bias": bool(params.logit_bias),
        "repetition_penalty": params.repetition_penalty != 1,
        "presence_penalty": params.presence_penalty != 0,
        "frequency_penalty": params.frequency_penalty != 0,
        "min_tokens": params.min_tokens > 0,
    }
    if names := [name for name, is_set in outside.items() if is_set]:
        return f"the graph does not know {', '.join(names)}"
    if params.temperature > 0 and width < params.top_k < vocab_size:
        return f"top_k {params.top_k} exceeds the {width} candidates of the graph"
    return None
