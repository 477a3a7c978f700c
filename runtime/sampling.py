"""From logits to the next token, by rules that every backend follows.

Order: logit bias, repetition, presence and frequency penalties, temperature, top-k, top-p, min-p;
then one uniform number and the inverse of the cumulative distribution over the remaining tokens,
ordered by (logit descending, id ascending). Logits stay float32; probabilities are summed in
float64, since a float32 sum over a large vocabulary drifts further than one uniform number's step.
docs/sampling.md has the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]

# Below it, logits divided by the temperature no longer fit float32; such a temperature is greedy in
# all but name.
_LOWEST_TEMPERATURE = 1e-6


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to pick tokens and when to stop; all problems are named at once.

    Attributes:
        max_tokens: new tokens at most.
        min_tokens: end-of-text and stop ids cannot be picked before that many tokens.
        temperature: divides the logits; 0 picks the largest, the lower id among equals.
        top_k: how many tokens stay eligible; 0 keeps all.
        top_p: the smallest set of likeliest tokens whose probability reaches this stays.
        min_p: tokens at least this share as likely as the likeliest stay.
        repetition_penalty: above 1 makes tokens of prompt and text less likely: positive logits
            are divided by it, negative ones multiplied.
        presence_penalty: taken from the logit of every token generated so far.
        frequency_penalty: taken once for each time a token was generated.
        seed: of the random numbers, 0 to 2^64 - 1.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: ids that end the text, besides end-of-text.
        logit_bias: added to the logits of these ids.
        logprobs: how many of the best tokens to report at each step beside the one taken; None
            reports nothing.
        ignore_eos: go on after end-of-text.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        conditions = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "min_tokens": (
                0 <= self.min_tokens <= self.max_tokens,
                f"between 0 and max_tokens ({self.max_tokens})",
            ),
            "temperature": (
                self.temperature == 0 or _LOWEST_TEMPERATURE <= self.temperature < math.inf,
                f"0 (greedy) or a finite number of at least {_LOWEST_TEMPERATURE}",
            ),
            "top_k": (self.top_k >= 0, "at least 0 (0 keeps all)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (
                0 < self.repetition_penalty < math.inf,
                "a finite number above 0",
            ),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "between -2 and 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            "seed": (0 <= self.seed < 2**64, "between 0 and 2^64 - 1"),
            "stop": (
                isinstance(self.stop, tuple) and all(self.stop),
                "a tuple without empty strings",
            ),
            "stop_token_ids": (all(i >= 0 for i in self.stop_token_ids), "ids of at least 0"),
            "logit_bias": (
                all(i >= 0 and math.isfinite(b) for i, b in self.logit_bias.items()),
                "finite numbers for ids of at least 0",
            ),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "at least 0"),
        }
        problems = [
            f"{name} must be {expected}, got {getattr(self, name)!r}"
            for name, (holds, expected) in conditions.items()
            if not holds
        ]
        if problems:
            raise ValueError("invalid sampling parameters: " + "; ".join(problems))


class TokenHistory:
    """Which tokens each row has seen, kept up to date token by token.

    Attributes:
        seen: [B, V] bool, in prompt or text; None when no rule asks for it.
        counts: [B, V] int32, times generated; None when no rule asks for it.
    """

    def __init__(
        self, prompts: Ids, lengths: Ids, vocab_size: int, *, seen: bool, counts: bool
    ) -> None:
        rows = len(prompts)
        self.seen = np.zeros((rows, vocab_size), bool) if seen else None
        self.counts = np.zeros((rows, vocab_size), np.int32) if counts else None
        if self.seen is not None:
            for row, length in enumerate(lengths):
                self.seen[row, prompts[row, :length]] = True

    def append(self, tokens: Ids, active: npt.NDArray[np.bool_]) -> None:
        """Note the tokens [B] that the active rows [B] have taken."""
        rows = np.flatnonzero(active)
        if self.seen is not None:
            self.seen[rows, tokens[rows]] = True
        if self.counts is not None:
            self.counts[rows, tokens[rows]] += 1


class Sampler:
    """Picks the next token of each row; holds no state between steps.

    Attributes:
        params: the rules.
        bias: [V] float32 that is added to logits; None where nothing is.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self.params = params
        self._vocab_size = vocab_size
        self.bias: Logits | None = None
        if params.logit_bias:
            self.bias = np.zeros(vocab_size, np.float32)
            self.bias[list(params.logit_bias)] = list(params.logit_bias.values())

    @property
    def greedy(self) -> bool:
        """Whether no random number is needed."""
        return self.params.temperature == 0

    def start_history(self, prompts: Ids, lengths: Ids) -> TokenHistory:
        """A history of prompts [B, S] with `lengths` [B], of what this sampler's rules ask for."""
        params = self.params
        return TokenHistory(
            prompts,
            lengths,
            self._vocab_size,
            seen=params.repetition_penalty != 1,
            counts=params.presence_penalty != 0 or params.frequency_penalty != 0,
        )

    def __call__(
        self,
        logits: Logits,
        history: TokenHistory,
        uniform: npt.NDArray[np.float32],
        forbidden: Sequence[int] = (),
    ) -> Ids:
        """The next token of each row.

        Args:
            logits: [B, V] float32; not changed.
            history: of these rows.
            uniform: [B] numbers in [0, 1); ignored when greedy.
            forbidden: ids that cannot be picked in this step.

        Returns:
            [B] int64.

        Raises:
            ValueError: a row has no largest logit: NaN, infinity, or every id forbidden.
        """
        adjusted = self.adjust(logits, history, forbidden)
        broken = np.flatnonzero(~np.isfinite(adjusted.max(axis=-1)))  # max passes NaN on
        if broken.size:
            raise ValueError(no_token_to_pick(int(broken[0])))
        if self.greedy:
            best: Ids = adjusted.argmax(axis=-1)
            return best
        picks = [pick(row, u, self.params) for row, u in zip(adjusted, uniform, strict=True)]
        return np.array(picks, np.int64)

    def adjust(
        self, logits: Logits, history: TokenHistory, forbidden: Sequence[int] = ()
    ) -> Logits:
        """Logits after bias, penalties and forbidden ids: what temperature then divides."""
        params = self.params
        if self.bias is not None:
            logits = logits + self.bias
        if history.seen is not None:
            logits = apply_repetition_penalty(logits, history.seen, params.repetition_penalty)
        if history.counts is not None:
            logits = apply_count_penalties(
                logits, history.counts, params.presence_penalty, params.frequency_penalty
            )
        if forbidden:
            logits = logits.copy()
            logits[:, list(forbidden)] = -np.inf
        return logits


def no_token_to_pick(row: int) -> str:
    """What is said of a row whose logits have no largest number."""
    return (
        f"row {row} has no token to pick: its logits hold NaN or infinity, or every token is "
        "forbidden; check the model's precision (compare.py) and --min-tokens"
    )


def make_sampler(params: SamplingParams, vocab_size: int) -> Sampler:
    """A sampler for a model of `vocab_size` tokens.

    Raises:
        ValueError: a stop id or biased id is outside the vocabulary.
    """
    outside = [
        f"{name}: {token}"
        for name, ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        )
        for token in ids
        if token >= vocab_size
    ]
    if outside:
        raise ValueError(f"ids outside the vocabulary of {vocab_size} tokens: {'; '.join(outside)}")
    return Sampler(params, vocab_size)


def apply_repetition_penalty(
    logits: Logits, seen: npt.NDArray[np.bool_], repetition_penalty: float
) -> Logits:
    """Make the seen tokens of [B, V] less likely: positive logits divided, negative multiplied."""
    penalty = np.float32(repetition_penalty)
    penalized = np.where(logits > 0, logits / penalty, logits * penalty)
    result: Logits = np.where(seen, penalized, logits)
    return result


def apply_count_penalties(
    logits: Logits,
    counts: npt.NDArray[np.int32],
    presence_penalty: float,
    frequency_penalty: float,
) -> Logits:
    """Take the presence penalty once and the frequency penalty per occurrence, [B, V]."""
    frequency = np.float32(frequency_penalty) * counts.astype(np.float32)
    presence = np.float32(presence_penalty) * (counts > 0).astype(np.float32)
    result: Logits = logits - frequency - presence
    return result


def eligible(logits: Logits, params: SamplingParams) -> tuple[Ids, Probabilities]:
    """The tokens that may be drawn, likeliest first, and their probabilities.

    Args:
        logits: [V] after bias and penalties.
        params: temperature above 0, top_k, top_p, min_p.

    Returns:
        [n] ids by (logit descending, id ascending), and [n] float64 probabilities of sum 1.
    """
    scaled = logits / np.float32(params.temperature)
    order = _order(scaled, params.top_k)
    order = order[np.isfinite(scaled[order])]
    probabilities = _softmax(scaled[order])
    if params.top_p < 1:
        # The token whose probability reaches the bound stays.
        count = int(np.searchsorted(np.cumsum(probabilities), params.top_p)) + 1
        order, probabilities = order[:count], _renormalized(probabilities[:count])
    if params.min_p > 0:
        likely = probabilities >= params.min_p * probabilities[0]
        order, probabilities = order[likely], _renormalized(probabilities[likely])
    return order, probabilities


def pick(logits: Logits, uniform: np.float32 | float, params: SamplingParams) -> int:
    """Draw one token: the first whose cumulative probability exceeds the uniform number."""
    order, probabilities = eligible(logits, params)
    position = np.searchsorted(np.cumsum(probabilities), uniform, side="right")
    return int(order[min(int(position), len(order) - 1)])


def boundary_distance(logits: Logits, uniform: float, params: SamplingParams) -> float:
    """How far the uniform number is from where the drawn token would change.

    Two backends whose logits differ by rounding may draw different tokens below about 1e-6.
    """
    _, probabilities = eligible(logits, params)
    inner = np.cumsum(probabilities)[:-1]
    return float(np.abs(inner - uniform).min()) if inner.size else math.inf


def log_probabilities(logits: Logits) -> Logits:
    """Log-softmax over the last axis, float32, summed in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normalizer = np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64))
    logprobs: Logits = (shifted - normalizer).astype(np.float32)
    return logprobs


def top_logprobs(logits: Logits, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probabilities of a token and of the best ones, of the model's own logits [V].

    Returns:
        The token's, and `count` pairs (id, log-probability), largest first, equal ones lower id
        first.
    """
    logprobs = log_probabilities(logits)
    best = _order(logits, count) if count else np.empty(0, np.int64)
    return float(logprobs[token]), [(int(i), float(logprobs[i])) for i in best]


def _order(values: Logits, count: int) -> Ids:
    """Ids of the `count` largest of [V] (0: of all), larger first, equal ones lower id first."""
    if 0 < count < values.size:
        threshold = np.partition(values, values.size - count)[values.size - count]
        candidates = np.flatnonzero(values >= threshold)
        order = candidates[np.argsort(-values[candidates], kind="stable")]
        return order[:count].astype(np.int64)
    return _order_all(values)


def _order_all(values: Logits) -> Ids:
    """A stable argsort of the negated values; over a vocabulary, several times faster than numpy's.

    One whole number holds a value and its id: the bits of a float32 sort like the value when read
    as a whole number, those of a negative one the other way round.
    """
    bits = (values + np.float32(0)).view(np.uint32)  # adding 0 turns -0 into 0
    descending = np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF)).astype(np.uint64)
    keys = np.sort(descending << np.uint64(32) | np.arange(values.size, dtype=np.uint64))
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _softmax(values: Logits) -> Probabilities:
    """Softmax of values in descending order."""
    return _renormalized(np.exp(values.astype(np.float64) - float(values[0])))


def _renormalized(weights: Probabilities) -> Probabilities:
    normalized: Probabilities = weights / weights.sum()
    return normalized
