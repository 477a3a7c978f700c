"""The loop that makes tokens: prefill, sample, decode until every sequence has stopped."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from runtime.backends.base import Backend, Ids
from runtime.sampling import Sampler, SamplingParams, make_sampler, top_logprobs
from runtime.text_stream import TextStream
from runtime.token_chooser import TokenChooser
from runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled"]
ContextPolicy = Literal["stop", "error"]
CONTEXT_POLICIES: tuple[ContextPolicy, ...] = get_args(ContextPolicy)


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's own logits before any sampling rule.

    Attributes:
        logprob: of the token that was taken.
        top: the best (token id, log-probability), largest first, equal ones lower id first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class GenerationEvent:
    """One new token of one sequence.

    Attributes:
        index: the prompt's place in the request.
        token_id: the token, the one that ended the sequence included.
        text: what may now be shown: whole characters, nothing of a stop string. Empty without a
            tokenizer.
        logprobs: where `SamplingParams.logprobs` asks for them.
        finish_reason: set on a sequence's last event.
    """

    index: int
    token_id: int
    text: str
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None


class GenerationSession:
    """Generates from a backend; owns no model and no cache beyond one call."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None = None,
        *,
        eos_token_ids: Sequence[int] = (),
        context_policy: ContextPolicy = "stop",
    ) -> None:
        """Make a session.

        Args:
            backend: what runs the model.
            tokenizer: turns tokens into text; without one, events carry none and stop strings are
                an error.
            eos_token_ids: end-of-text ids.
            context_policy: what happens when prompt and `max_tokens` exceed the context: `stop`
                ends the sequence there with reason `length`, `error` refuses to begin.
        """
        if context_policy not in CONTEXT_POLICIES:
            raise ValueError(
                f"context_policy must be one of {', '.join(CONTEXT_POLICIES)}, "
                f"got {context_policy!r}"
            )
        self.backend = backend
        self.tokenizer = tokenizer
        self.eos_token_ids = tuple(eos_token_ids)
        self.context_policy = context_policy

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> Iterator[GenerationEvent]:
        """Generate from each prompt; one event per token and sequence.

        A prompt's tokens depend on the prompt, its place in the request and `params` alone, not on
        what runs beside it (up to the backend's rounding). At most `max_batch_size` prompts run
        side by side.

        Args:
            prompts: token ids, at least one each.
            params: how to sample and when to stop.

        Raises:
            ValueError: an empty or too long prompt, an id outside the vocabulary, or parameters
                that do not fit the model. Raised before anything runs.
        """
        sampler = make_sampler(params, self.backend.vocab_size)
        if params.stop and self.tokenizer is None:
            raise ValueError(
                "stop strings need a tokenizer and this bundle has none; use --stop-token-ids"
            )
        for index, prompt in enumerate(prompts):
            self._check_prompt(index, prompt, params)
        size = self.backend.limits.max_batch_size
        groups = [prompts[begin : begin + size] for begin in range(0, len(prompts), size)]
        return itertools.chain.from_iterable(
            _Batch(self, group, number * size, params, sampler).run()
            for number, group in enumerate(groups)
        )

    def room(self, prompt_length: int) -> int:
        """Tokens that can follow a prompt of this length."""
        return self.backend.limits.max_seq_len - prompt_length

    def _check_prompt(self, index: int, prompt: Sequence[int], params: SamplingParams) -> None:
        limit = self.backend.limits.max_seq_len
        if not prompt:
            raise ValueError(f"prompt {index} is empty; give at least one token")
        outside = [i for i in prompt if not 0 <= i < self.backend.vocab_size]
        if outside:
            raise ValueError(
                f"prompt {index}: token id {outside[0]} is outside the vocabulary of "
                f"{self.backend.vocab_size} tokens"
            )
        room = self.room(len(prompt))
        if room < 1:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, the limit is {limit} for prompt and "
                "new tokens together; shorten it or build with a larger --max-seq-len"
            )
        if params.max_tokens > room:
            excess = (
                f"prompt {index}: {len(prompt)} tokens and {params.max_tokens} new ones exceed "
                f"the context of {limit}"
            )
            if self.context_policy == "error":
                raise ValueError(f"{excess}; lower --max-tokens or use --context-policy stop")
            logger.info("%s; it ends there after %d", excess, room)


class _Batch:
    """The prompts that run side by side, from prefill to the last one's end."""

    def __init__(
        self,
        session: GenerationSession,
        prompts: Sequence[Sequence[int]],
        first_index: int,
        params: SamplingParams,
        sampler: Sampler,
    ) -> None:
        self._backend = session.backend
        self._params = params
        self._sampler = sampler
        self._lengths: Ids = np.array([len(prompt) for prompt in prompts], np.int64)
        self._prompts: Ids = np.zeros((len(prompts), int(self._lengths.max())), np.int64)
        for row, prompt in enumerate(prompts):
            self._prompts[row, : len(prompt)] = prompt
        self._indices: Ids = np.arange(first_index, first_index + len(prompts))
        self._limits = [min(params.max_tokens, session.room(len(prompt))) for prompt in prompts]
        tokenizer = session.tokenizer
        self._texts = [
            None if tokenizer is None else TextStream(tokenizer, params.stop) for _ in prompts
        ]
        self._stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            self._stop_ids |= set(session.eos_token_ids)

    def run(self) -> Iterator[GenerationEvent]:
        """Prefill, then one round of sampling and decoding per token."""
        backend, sampler = self._backend, self._sampler
        rows = len(self._lengths)
        longest = int((self._lengths + self._limits).max())
        cache = backend.new_cache(rows, longest)
        logits = backend.prefill(self._prompts, self._lengths, cache)
        choice = TokenChooser(
            sampler, self._prompts, self._lengths, self._indices, frozenset(self._stop_ids)
        )
        active = np.ones(rows, bool)
        first = choice.choose(logits, 0, active)
        steps = itertools.chain([first], backend.decode_many(first, cache, choice, active))
        running = list(range(rows))
        for count, tokens in enumerate(steps, 1):
            ids = tokens.tolist()
            for row in tuple(running):
                event = self._event(row, ids[row], count, choice)
                if event.finish_reason is not None:
                    active[row] = False
                    running.remove(row)
                yield event
            if not running:
                return

    def _event(self, row: int, token: int, count: int, choice: TokenChooser) -> GenerationEvent:
        """The event of a row's token number `count`, which may be its last."""
        reason: FinishReason | None = None
        text_stream = self._texts[row]
        text = "" if text_stream is None else text_stream.push(token)
        if token in self._stop_ids or (text_stream is not None and text_stream.stopped):
            reason = "stop"
        elif count >= self._limits[row]:
            reason = "length"
        if reason is not None and text_stream is not None:
            text += text_stream.finish()
        return GenerationEvent(
            index=int(self._indices[row]),
            token_id=token,
            text=text,
            logprobs=None if self._params.logprobs is None else self._logprobs(row, token, choice),
            finish_reason=reason,
        )

    def _logprobs(self, row: int, token: int, choice: TokenChooser) -> TokenLogprobs:
        logprob, top = top_logprobs(choice.logits[row], token, self._params.logprobs or 0)
        return TokenLogprobs(logprob=logprob, top=tuple(top))
