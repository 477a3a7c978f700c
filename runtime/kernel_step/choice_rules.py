"""What the device chooses tokens by, from what a request asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from plugins.token_choice.launches import GENERATED, IN_PROMPT, PARAMETERS
from runtime.kernel_step.decode_step import STOP_IDS, Ending
from runtime.token_chooser import TokenChooser

Array = npt.NDArray[Any]
_NO_ID = -1


@dataclass(frozen=True, kw_only=True)
class ChoiceRules:
    """The memory that a step's end reads, by area, and which end it is.

    Attributes:
        ending: of every step.
        areas: content of `parameters`, `uniforms` and, for every rule, `bias`, `counts` and
            `stop_ids`; none for the largest logit.
    """

    ending: Ending
    areas: dict[str, Array]

    @classmethod
    def of(
        cls, choice: TokenChooser, vocab_size: int, rows: int, width: int, steps: int
    ) -> ChoiceRules:
        """The rules of a request whose rows have got one token each.

        Args:
            choice: the request's.
            vocab_size: V.
            rows: B sequences.
            width: rows of the areas, the most sequences that steps were made for.
            steps: how many tokens may follow.
        """
        sampler, params = choice.sampler, choice.sampler.params
        history = choice.history
        ruled = bool(
            params.logit_bias
            or history.seen is not None
            or history.counts is not None
            or params.min_tokens > 1
        )
        if sampler.greedy and not ruled:
            return cls(ending="greedy", areas={})
        block = np.zeros((width, len(PARAMETERS)), np.float32)
        block[:] = [float(getattr(params, name)) for name in PARAMETERS]
        uniforms = np.zeros((steps + 1, width), np.float32)
        for count in range(1, steps + 1):
            uniforms[count, :rows] = choice.uniform(count)
        areas: dict[str, Array] = {"parameters": block, "uniforms": uniforms}
        if not ruled:
            return cls(ending="drawn", areas=areas)
        counts = np.zeros((width, vocab_size), np.int32)
        if history.seen is not None:
            counts[:rows] += IN_PROMPT * history.seen
        if history.counts is not None:
            counts[:rows] += GENERATED * history.counts
        stop_ids = np.full(STOP_IDS, _NO_ID, np.int32)
        if params.min_tokens > 1:  # else none is looked at, and there may be more than have room
            stop_ids[: len(choice.stop_ids)] = choice.stop_ids
        bias = np.zeros(vocab_size, np.float32)
        if sampler.bias is not None:
            bias[:] = sampler.bias
        return cls(
            ending="ruled", areas={**areas, "bias": bias, "counts": counts, "stop_ids": stop_ids}
        )


def why_host_chooses(choice: TokenChooser) -> str | None:
    """Why the device cannot choose a request's tokens; None if it can."""
    params = choice.sampler.params
    if params.logprobs is not None:
        return "log-probabilities are asked for, which the host computes from the logits"
    if params.min_tokens > 1 and len(choice.stop_ids) > STOP_IDS:
        return f"{len(choice.stop_ids)} ids end the text, the device keeps {STOP_IDS} from doing so"
    return None
