"""What the audit asks: a subject that gives logits, prompts, and ways of feeding them.

A `Subject` is numpy in, numpy out, so that whatever runs a model can be one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from runtime.backends.base import Backend, Ids, Logits

# How the router of a mixture of experts is cut; `published` mixes the rows of a batch as well.
Router = Literal["mixed", "per_token", "published"]

# Tokens of a prompt, and the fewest that a model must hold.
PROMPT_LENGTH, LEAST_LENGTH = 32, 8
MOST_ROWS = 4
# Decode steps behind a prefill.
STEPS = 4
_SEED = 0


class Conversation(Protocol):
    """Sequences that grow side by side in a cache."""

    def append(self, rows: Sequence[Ids], *, last_only: bool = False) -> list[Logits]:
        """Feed each row's next tokens.

        Args:
            rows: B arrays [S_b].
            last_only: give the logits of each row's last token alone.

        Returns:
            B arrays [S_b, V], the logits of every token fed; [1, V] with `last_only`.
        """


class Subject(Protocol):
    """One way of running a model."""

    @property
    def name(self) -> str:
        """What the report calls it."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def context(self) -> int:
        """Tokens up to which rotary embedding is plain."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence it takes, at least `context`."""

    @property
    def router(self) -> Router | None:
        """How experts are routed, None for a dense model."""

    @property
    def keep_window_size(self) -> int | None:
        """Keys that a query keeps, None for a generation that keeps all."""

    @property
    def ties_by_slot(self) -> bool:
        """Whether of exactly equal scores the lower slot is kept, always."""

    def one_pass(self, rows: Sequence[Ids], *, last_only: bool = False) -> list[Logits]:
        """Logits with nothing cached before; arguments and result as `Conversation.append`."""

    def start(self, batch_size: int, capacity: int) -> Conversation:
        """Empty sequences with room for `capacity` tokens each."""


class BackendSubject:
    """A backend of this project as a `Subject`."""

    def __init__(self, name: str, backend: Backend, keep_window_size: int | None) -> None:
        self.name = name
        self.vocab_size = backend.vocab_size
        self.context = self.longest = backend.limits.max_seq_len
        self.router: Router | None = None
        if backend.router_mode is not None:
            self.router = "mixed" if backend.router_mode == "mixed" else "per_token"
        self.keep_window_size = keep_window_size
        self.ties_by_slot = True
        self.backend = backend

    def one_pass(self, rows: Sequence[Ids], *, last_only: bool = False) -> list[Logits]:
        """One pass into a cache of exactly the longest row's size."""
        return self.start(len(rows), max(map(len, rows))).append(rows, last_only=last_only)

    def start(self, batch_size: int, capacity: int) -> Conversation:
        """A cache of the backend."""
        return _BackendConversation(self.backend, batch_size, capacity)


class _BackendConversation:
    def __init__(self, backend: Backend, batch_size: int, capacity: int) -> None:
        self._backend = backend
        self._cache = backend.new_cache(batch_size, capacity)

    def append(self, rows: Sequence[Ids], *, last_only: bool = False) -> list[Logits]:
        lengths = np.array([len(row) for row in rows])
        if (lengths == 1).all() and self._cache.lengths.all():
            tokens = np.concatenate(list(rows))
            return list(self._backend.decode(tokens, self._cache)[:, None])
        ids = np.zeros((len(rows), lengths.max()), np.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
        if last_only:
            return list(self._backend.prefill(ids, lengths, self._cache)[:, None])
        logits = self._backend.score(ids, lengths, self._cache)
        return [logits[row, :length] for row, length in enumerate(lengths)]


@dataclass(frozen=True)
class Prompt:
    """Token ids to ask with, and others to put in their place.

    Attributes:
        ids: [S].
        others: [S], different from `ids` at every place; together with `ids` without repetition
            where the vocabulary has that many tokens.
    """

    ids: Ids
    others: Ids

    @property
    def repeats(self) -> int:
        """How many tokens stand there that stood there before."""
        return len(self.ids) - len(np.unique(self.ids))


def make_prompts(vocab_size: int, count: int, length: int) -> list[Prompt]:
    """Prompts of random ids, the same at every call; without repetition where that is possible."""
    generator = np.random.default_rng(_SEED)
    prompts = []
    for _ in range(count):
        order = generator.permutation(vocab_size).astype(np.int64)
        ids = order[np.arange(length) % vocab_size]
        others = order[(np.arange(length) + min(length, vocab_size // 2)) % vocab_size]
        prompts.append(Prompt(ids, others))
    return prompts


def base_prompts(subject: Subject) -> list[Prompt]:
    """The prompts of most checks, as many as a batch has rows.

    Raises:
        ValueError: the model holds too few tokens or knows too few to be audited.
    """
    if subject.context < LEAST_LENGTH or subject.vocab_size < 2:
        raise ValueError(
            f"a context of {subject.context} tokens and a vocabulary of {subject.vocab_size} are "
            f"too small to audit; at least {LEAST_LENGTH} and 2 are needed"
        )
    return make_prompts(subject.vocab_size, MOST_ROWS, min(PROMPT_LENGTH, subject.context))


# --- feeding a subject ---


def feed(subject: Subject, rows: Sequence[Ids], pieces: Sequence[int]) -> list[Logits]:
    """Equally long rows through a cache in pieces of these sizes; logits of every token fed."""
    conversation = subject.start(len(rows), sum(pieces))
    found: list[list[Logits]] = [[] for _ in rows]
    begin = 0
    for size in pieces:
        for row, logits in enumerate(conversation.append([r[begin : begin + size] for r in rows])):
            found[row].append(logits)
        begin += size
    return [np.concatenate(parts) for parts in found]


def prefill_and_decode(subject: Subject, rows: Sequence[Ids]) -> list[Logits]:
    """Rows, also unequal ones, prefilled side by side up to the last STEPS tokens, then decoded."""
    conversation = subject.start(len(rows), max(map(len, rows)))
    found = [[logits] for logits in conversation.append([row[:-STEPS] for row in rows])]
    for step in range(STEPS):
        new = [row[len(row) - STEPS + step :][:1] for row in rows]
        for parts, logits in zip(found, conversation.append(new), strict=True):
            parts.append(logits)
    return [np.concatenate(parts) for parts in found]
