"""Which token comes next in each row of a batch: a request's rules, and where each row stands."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from runtime.backends.base import Ids, Logits
from runtime.philox import uniform_numbers
from runtime.sampling import Sampler

# Uniform numbers are made for that many tokens at once: one at a time costs more than a step of the
# smallest models.
_BLOCK = 64


class TokenChooser:
    """Chooses the tokens of one batch, on the host or by telling a graph what to choose by.

    Attributes:
        sampler: the rules.
        history: which tokens each row has seen, as far as the rules ask for it.
        stop_ids: ids that no row can take before `min_tokens`, ascending.
        logits: [B, V] float32 of the last choice; rows that have ended hold anything.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompts: Ids,
        lengths: Ids,
        indices: Ids,
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Begin a batch.

        Args:
            sampler: the rules.
            prompts: [B, S] token ids, left-aligned.
            lengths: [B] of the prompts.
            indices: [B] place of each prompt in its request.
            stop_ids: ids that no row can take before `min_tokens`.
        """
        self.sampler = sampler
        self.logits: Logits = np.zeros((len(prompts), 0), np.float32)
        self.history = sampler.start_history(prompts, lengths)
        self._indices = indices
        self.stop_ids = tuple(sorted(stop_ids))
        self._block: npt.NDArray[np.float32] = np.zeros((_BLOCK, len(prompts)), np.float32)
        self._block_start = -_BLOCK

    def choose(self, logits: Logits, count: int, active: npt.NDArray[np.bool_]) -> Ids:
        """The token of each row that has got `count` tokens so far, and note it.

        Args:
            logits: [B, V] float32.
            count: tokens so far.
            active: [B] bool, the rows whose token is noted.

        Returns:
            [B] int64.
        """
        self.logits = logits
        early = count < self.sampler.params.min_tokens
        forbidden = self.stop_ids if early else ()
        tokens = self.sampler(logits, self.history, self.uniform(count), forbidden)
        self.history.append(tokens, active)
        return tokens

    def choose_rows(self, logits: Logits, count: int, rows: npt.NDArray[np.int64]) -> Ids:
        """Likewise for some rows [n], by rules that look at no history; logits [n, V]."""
        return self.sampler(logits, self.history, self.uniform(count)[rows])

    def uniform(self, count: int) -> npt.NDArray[np.float32]:
        """[B] float32, the number of each row's token behind `count`; 0 where none is needed."""
        if self.sampler.greedy:
            return self._row(0)
        if not 0 <= count - self._block_start < _BLOCK:
            rows = len(self._indices)
            counts = np.repeat(np.arange(count, count + _BLOCK), rows)
            indices = np.tile(self._indices, _BLOCK)
            numbers = uniform_numbers(self.sampler.params.seed, indices, counts)
            self._block, self._block_start = numbers.reshape(_BLOCK, rows), count
        return self._row(count - self._block_start)

    def _row(self, step: int) -> npt.NDArray[np.float32]:
        numbers: npt.NDArray[np.float32] = self._block[step]
        return numbers
