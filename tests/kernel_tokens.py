"""Tokens of the backend of our kernels against the network in torch on the numbers it stores.

Two runs whose logits differ by rounding choose the same tokens unless a choice is a near tie. So
each choice has a margin: how far every logit may be off without another token being chosen. Texts
are looked for whose margins are clear; that the logits lie within them is then to be shown.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from export.cuda_models import with_stored_weights
from runtime.backends.base import Backend, Limits
from runtime.backends.torch_backend import TorchBackend
from runtime.kernel_step.formats import StepFormats
from runtime.sampling import SamplingParams, make_sampler
from runtime.token_chooser import TokenChooser

GREEDY = SamplingParams(temperature=0.0)
_CACHE_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Of what a step multiplies: several times what rounding it changes.
_NOISE = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}


class RoundedCache:
    """A network that keeps keys and values in a cache's type, and computes in float32.

    Attributes:
        noise: changes what each block reads by so large a share; 0 for none.
    """

    def __init__(self, network, kind: str, noise: float = 0.0) -> None:
        self._network, self._kind, self.noise = network, kind, noise
        self._generator = torch.Generator().manual_seed(1)

    def __getattr__(self, name):
        return getattr(self._network, name)

    def __call__(self, *arguments):
        return self._network(*arguments[:-1], self._changed)

    def _changed(self, value, name):
        if name.endswith((".key", ".value")) and self._kind in _CACHE_TYPES:
            return value.to(_CACHE_TYPES[self._kind]).float()
        if name.endswith("_norm") and self.noise:
            return value * (1 + self.noise * torch.randn(value.shape, generator=self._generator))
        return value


def stored_reference(network, precision: str, limits: Limits) -> TorchBackend:
    """The network in torch, in float32, on weights, keys and values as a precision keeps them."""
    formats = StepFormats.of(precision)
    rounded = RoundedCache(with_stored_weights(network, formats), formats.float_kind)
    return TorchBackend(rounded, limits=limits, variant=precision)


@dataclasses.dataclass(frozen=True)
class Choice:
    """How the tokens of all rows were chosen in one step.

    Attributes:
        logits: [B, V] float32; None where they are not known.
        uniforms: [B], the number of each row.
        tokens: [B].
        active: [B], the rows that took part.
    """

    logits: np.ndarray | None
    uniforms: np.ndarray
    tokens: np.ndarray
    active: np.ndarray


class Text:
    """Rows of prompts in a backend's cache, from which tokens are chosen more than once.

    Attributes:
        rows: the prompts.
    """

    def __init__(self, backend: Backend, rows: Sequence[Sequence[int]], new_tokens: int) -> None:
        """Run the prompts; the longest has room for `new_tokens`, others for as much more."""
        self.rows = rows
        self._backend = backend
        self._lengths = np.array([len(row) for row in rows])
        self._ids = np.zeros((len(rows), self._lengths.max()), np.int64)
        for number, row in enumerate(rows):
            self._ids[number, : len(row)] = row
        self._cache = backend.new_cache(len(rows), int(self._lengths.max()) + new_tokens)
        self._logits = backend.prefill(self._ids, self._lengths, self._cache)

    def choices(self, params: SamplingParams) -> Iterator[Choice]:
        """Generate until the cache is full, beginning behind the prompts.

        Our kernels leave their logits on the device, but for a step that ends with the token of
        the largest one: then there are none.
        """
        backend, cache, rows = self._backend, self._cache, len(self._lengths)
        backend.rewind(cache, self._lengths)
        choice = TokenChooser(
            make_sampler(params, backend.vocab_size), self._ids, self._lengths, np.arange(rows)
        )
        active = np.ones(rows, bool)
        tokens = choice.choose(self._logits, 0, active)
        yield Choice(self._logits, choice.uniform(0).copy(), tokens.copy(), active.copy())
        steps = backend.decode_many(tokens, cache, choice, active)
        for count in range(1, cache.capacity - int(self._lengths.min()) + 1):
            active[:] = cache.lengths < cache.capacity
            ran = active.copy()
            tokens = next(steps)
            logits = None
            if backend.name == "torch":
                logits = choice.logits.copy()
            elif params.temperature:
                logits = logits_on_device(cache)
            yield Choice(logits, choice.uniform(count).copy(), tokens.copy(), ran)

    def forced(self, choices: Sequence[Choice]) -> list[Choice]:
        """The choices with this backend's logits."""
        backend, cache = self._backend, self._cache
        backend.rewind(cache, self._lengths)
        logits = [self._logits]
        for before, after in itertools.pairwise(choices):
            logits.append(backend.decode(before.tokens, cache, after.active))
        pairs = zip(choices, logits, strict=True)
        return [dataclasses.replace(choice, logits=numbers) for choice, numbers in pairs]


def logits_on_device(cache) -> np.ndarray:
    """[B, V] that the last step left."""
    lane = cache.lane
    shape = (lane.rows, lane._kernels.model.vocab_size)
    numbers = (ctypes.c_float * (shape[0] * shape[1])).from_address(lane._areas.address("logits"))
    return np.array(numbers, np.float32).reshape(shape)


@dataclasses.dataclass(frozen=True)
class ClearText:
    """A text whose tokens do not change where logits are off by a tolerance.

    Attributes:
        text: the reference's.
        params: with a seed.
        drawn: the reference's choices by them. Behind the first, which the host makes, some are
            not the largest logit's, and some would be others by the uniform number before.
        greedy: those of the largest logits.
    """

    text: Text
    params: SamplingParams
    drawn: list[Choice]
    greedy: list[Choice]

    @classmethod
    def find(
        cls,
        network,
        precision: str,
        limits: Limits,
        lengths: Sequence[int],
        new_tokens: int,
        params: SamplingParams,
        error: float,
    ) -> ClearText:
        """The first text and seed that serve.

        Experts and kept keys are choices too, which only a changed input shows to be near ties: so
        noise on what each block reads may not move logits by more than ten times `error`.

        Args:
            network: whose numbers a precision stores.
            precision: its name.
            limits: of the reference.
            lengths: of the prompts.
            new_tokens: as of `Text`.
            params: temperature, and the seed where the search begins.
            error: of a logit, as a share of the largest.
        """
        reference = stored_reference(network, precision, limits)
        kind = StepFormats.of(precision).float_kind
        stored = reference._network._network
        noisy = TorchBackend(
            RoundedCache(stored, kind, _NOISE[kind]), limits=limits, variant=precision
        )
        for prompt_seed in range(100):
            rng = np.random.default_rng(prompt_seed)
            rows = [rng.integers(3, reference.vocab_size, n).tolist() for n in lengths]
            text, other = (Text(used, rows, new_tokens) for used in (reference, noisy))
            greedy = _clear(text, GREEDY, error)
            if greedy is None or largest_error(other.forced(greedy), greedy) > 10 * error:
                continue
            for seed in range(params.seed, params.seed + 300):
                tried = dataclasses.replace(params, seed=seed)
                drawn = _clear(text, tried, error)
                if (
                    drawn is not None
                    and smallest_margin(drawn[1:], 0.0) < 0
                    and _tells_uniforms_apart(drawn, params.temperature)
                    and largest_error(other.forced(drawn), drawn) <= 10 * error
                ):
                    return cls(text, tried, drawn, greedy)
        raise AssertionError(f"no text stays the same where logits are off by {error}")


def _clear(text: Text, params: SamplingParams, error: float) -> list[Choice] | None:
    choices = []
    for choice in text.choices(params):
        if smallest_margin([choice], params.temperature) <= error * largest([choice]):
            return None
        choices.append(choice)
    return choices


def _tells_uniforms_apart(choices: Sequence[Choice], temperature: float) -> bool:
    moved = [
        dataclasses.replace(after, uniforms=before.uniforms)
        for before, after in itertools.pairwise(choices)
    ]
    return smallest_margin(moved, temperature) < 0


def margin(logits: np.ndarray, token: int, uniform: float, temperature: float) -> float:
    """How far all logits [V] may be off, each in its own direction, and the token be the same.

    Temperature is the only rule. Found by halving, a few thousandths too small; -1 for a token
    that these logits do not give.
    """
    low, high = 0.0, 8.0
    if not _certain(logits, token, uniform, temperature, low):
        return -1.0
    while high - low > 1e-5 and high > 1.001 * low:
        middle = (low + high) / 2
        if _certain(logits, token, uniform, temperature, middle):
            low = middle
        else:
            high = middle
    return low


def _certain(logits, token, uniform, temperature, error) -> bool:
    """Whether no logits within `error` of these give another token."""
    numbers = np.asarray(logits, np.float64)
    own = np.arange(len(numbers)) == token
    lead = numbers - numbers[token]
    if temperature == 0:
        return bool((lead[~own] <= -2 * error).all())
    # Tokens are in the order of their logits: those whose place is not certain count for both.
    before = (lead > 2 * error) & ~own
    perhaps = (lead >= -2 * error) & ~own
    scaled = (numbers - numbers.max()) / temperature
    most, least = np.exp(scaled + error / temperature), np.exp(scaled - error / temperature)
    begin = most[perhaps].sum() / (most[perhaps].sum() + least[~perhaps].sum())
    up_to = before | own
    end = least[up_to].sum() / (least[up_to].sum() + most[~up_to].sum())
    return bool(begin <= uniform < end)


def tokens_of(choices: Sequence[Choice]) -> list[list[int]]:
    """Of each step, those of the rows that took part."""
    return [choice.tokens[choice.active].tolist() for choice in choices]


def smallest_margin(choices: Sequence[Choice], temperature: float) -> float:
    """Of every row in every step."""
    return min(
        margin(choice.logits[row], int(choice.tokens[row]), choice.uniforms[row], temperature)
        for choice in choices
        for row in np.flatnonzero(choice.active)
    )


def largest(choices: Sequence[Choice]) -> float:
    """The largest logit of all, in size."""
    return max(float(np.abs(choice.logits[choice.active]).max()) for choice in choices)


def largest_error(found: Sequence[Choice], expected: Sequence[Choice]) -> float:
    """Of the logits, as a share of the largest."""
    errors = [
        np.abs(ours.logits - theirs.logits)[theirs.active].max()
        for ours, theirs in zip(found, expected, strict=True)
    ]
    return float(max(errors)) / largest(expected)
