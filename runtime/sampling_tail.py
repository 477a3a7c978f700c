"""What a graph that chooses tokens by itself is fed, and for which parameters it may.

The nodes are those of export/lowerings/sampling_tail.py for ONNX Runtime and of
export/lowerings/engine_tail.py for engines; docs/sampling.md ("In the graph", "In an engine") has
the reasons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from runtime.sampling import SamplingParams

# Stands for a `top_k` of 0: no token has so high a rank.
_EVERY_TOKEN = np.iinfo(np.int64).max
# The same for an engine, which counts ranks in float32.
ALL_RANKS = 2.0**24
# What an engine's quotients of logit and temperature may be off by, as a share of them: one and a
# half units in the last place for each of the two that are subtracted, and what first order omits.
_QUOTIENT_ROUNDING = 2.0**-21
# Outside, quotients leave the range in which an engine's arithmetic has a bound.
_ENGINE_TEMPERATURES = (1e-3, 1e3)
# Smaller shares are none in float32.
_LEAST_MIN_P = 1e-30


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


@dataclass(frozen=True, kw_only=True)
class EngineTailInputs:
    """The inputs of an engine's tail, all [B] float32; a field's name is that of the input.

    Greedy choice is a `top_k` of 1 and a `uniform` of 0.

    Attributes:
        temperature: above 0; divides the logits.
        quotient_rounding: what that division may be off by, as a share of the quotient; 0 where it
            is exact.
        top_k: how many tokens stay, `ALL_RANKS` for all.
        top_p: 2 keeps all.
        min_p: share of the likeliest token's probability.
        uniform: numbers in [0, 1), new for each step.
    """

    temperature: npt.NDArray[np.float32]
    quotient_rounding: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.float32]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    uniform: npt.NDArray[np.float32]

    @classmethod
    def make(cls, params: SamplingParams, rows: int) -> Self:
        """The inputs for `rows` sequences that share their parameters; `uniform` is 0."""
        greedy = params.temperature == 0
        temperature = 1.0 if greedy else params.temperature
        exact = math.frexp(float(np.float32(temperature)))[0] == 0.5  # a power of two
        numbers = {
            "temperature": temperature,
            "quotient_rounding": 0.0 if exact else _QUOTIENT_ROUNDING,
            "top_k": 1.0 if greedy else params.top_k or ALL_RANKS,
            "top_p": 2.0 if greedy or params.top_p == 1 else params.top_p,
            "min_p": 0.0 if greedy else params.min_p,
            "uniform": 0.0,
        }
        return cls(**{name: np.full(rows, n, np.float32) for name, n in numbers.items()})

    def feeds(self) -> dict[str, npt.NDArray[np.float32]]:
        """The arrays themselves by input name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


ENGINE_TAIL_INPUTS = tuple(field.name for field in fields(EngineTailInputs))


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


def engine_tail_covers(params: SamplingParams, *, vocab_size: int, width: int) -> str | None:
    """Likewise for an engine's tail, which has no logits to report either."""
    if params.logprobs is not None:
        return "log-probabilities are of logits, which stay in the graph"
    lowest, highest = _ENGINE_TEMPERATURES
    if params.temperature > 0 and not lowest <= params.temperature <= highest:
        return f"temperature {params.temperature} is outside {lowest:g} to {highest:g}"
    if 0 < params.min_p < _LEAST_MIN_P:
        return f"min_p {params.min_p} is below {_LEAST_MIN_P:g}"
    return tail_covers(params, vocab_size=vocab_size, width=width)
