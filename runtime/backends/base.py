"""What every backend offers: a step over a cache that the backend owns. numpy in, numpy out."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.cpu_threads import CpuThreads
    from runtime.manifest import Variant
    from runtime.token_chooser import TokenChooser

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
# Is handed the named values (docs/contract.md) of a pass of the network, each [B, ...].
Observer = Callable[[Mapping[str, npt.NDArray[Any]]], None]


class BackendUnavailableError(Exception):
    """A backend that was asked for cannot run here; the message says what to install or change."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a bundle was built for, in tokens and sequences.

    Attributes:
        max_batch_size: sequences in one step.
        max_input_len: S, new tokens of one sequence in one step.
        max_seq_len: C, prompt plus generated tokens of one sequence.
    """

    max_batch_size: int
    max_input_len: int
    max_seq_len: int


@dataclass(kw_only=True)
class Cache:
    """The sequences of one batch; a backend's subclass adds the buffers.

    Attributes:
        capacity: C, slots of each row.
        lengths: [B] int64, filled slots of each row.
        prompt_lengths: [B] int64, how many of them came from the row's first prefill. The router
            mode `mixed` needs it: a prompt routed in one pass cannot be entered again.
    """

    capacity: int
    lengths: Ids
    prompt_lengths: Ids = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_lengths = np.zeros_like(self.lengths)

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return len(self.lengths)


class Backend(ABC):
    """One way of running a bundle's step.

    Subclasses implement `new_cache` and `_step`; prefill in chunks, decoding, scoring and rewinding
    follow from them and are the same everywhere.

    Attributes:
        name: key in `BACKENDS`.
        variant: which model of the bundle runs, e.g. `fp32`.
        limits: what the step accepts.
        vocab_size: V.
        router_mode: `mixed` or `per_token` for a mixture of experts, None for a dense model.
        rows_alone: whether steps of several tokens run one row at a time.
        chunk_length: most tokens of one pass of a longer prompt; None for `max_input_len`.
        taps: named values that `observer` is handed at each pass; none unless `open_tapped`.
        observer: who looks inside; None for nobody.
    """

    name: str
    variant: str
    limits: Limits
    vocab_size: int
    router_mode: str | None
    rows_alone: bool = False
    chunk_length: int | None = None
    taps: tuple[str, ...] = ()
    observer: Observer | None = None

    @classmethod
    @abstractmethod
    def open(cls, bundle: Bundle, variant: Variant, threads: CpuThreads) -> Self:
        """Open the backend on one variant of a bundle.

        Raises:
            BackendUnavailableError: it cannot run here; says what to install or change.
        """

    @classmethod
    def open_tapped(
        cls, bundle: Bundle, variant: Variant, threads: CpuThreads, names: Sequence[str]
    ) -> Self:
        """Open like `open`, to hand those of the named values that there are to an `observer`.

        A backend that gives none has no `taps`.

        Raises:
            BackendUnavailableError: as `open`, or a package for looking inside is missing.
        """
        return cls.open(bundle, variant, threads)

    def cached(self, cache: Cache) -> Mapping[str, npt.NDArray[Any]]:
        """What the cache holds, [B, heads, C, size] by the names of the step's inputs.

        Empty where a backend cannot tell.
        """
        return {}

    @abstractmethod
    def new_cache(self, batch_size: int, capacity: int | None = None) -> Cache:
        """Zeroed cache for `batch_size` sequences of up to `capacity` tokens.

        A backend may round `capacity` up to what its model has (`max_seq_len`).

        Raises:
            ValueError: more rows or slots than the bundle was built for.
        """

    @abstractmethod
    def _step(
        self, input_ids: Ids, write_index: Ids, logits_index: Ids, cache: Cache, row: int | None
    ) -> Logits:
        """Run the network once and write the cache in place, without touching `lengths`.

        Args:
            input_ids: [B, S] new tokens, left-aligned.
            write_index: [B] slot of each row's first new token; also its position.
            logits_index: [B, M] which of the S tokens get logits.
            cache: the batch's cache.
            row: run only this row of the cache (then B = 1), or None for all rows.

        Returns:
            [B, M, V] float32, the caller's own.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what the backend holds; a closed backend runs no more steps."""

    def check_cache_size(self, batch_size: int, capacity: int | None) -> int:
        """Check what `new_cache` is asked for.

        Returns:
            The capacity, `max_seq_len` when None.

        Raises:
            ValueError: more rows or slots than the bundle was built for.
        """
        limits = self.limits
        if not 1 <= batch_size <= limits.max_batch_size:
            raise ValueError(
                f"a batch of {batch_size} sequences is outside 1 to {limits.max_batch_size}, what "
                "the bundle was built for (--max-batch-size)"
            )
        if capacity is None:
            return limits.max_seq_len
        if not 1 <= capacity <= limits.max_seq_len:
            raise ValueError(
                f"a cache of {capacity} tokens is outside 1 to {limits.max_seq_len}, what the "
                "bundle was built for (--max-seq-len)"
            )
        return capacity

    def prefill(self, input_ids: Ids, lengths: Ids, cache: Cache) -> Logits:
        """Append each row's first `lengths[b]` tokens to its cache.

        Rows longer than `max_input_len` are fed in several passes. With the router mode `mixed`
        each row runs alone, in one pass.

        Args:
            input_ids: [B, S] int64; what stands behind a row's length is ignored.
            lengths: [B] int64, 1 ≤ length ≤ S.
            cache: the batch's cache.

        Returns:
            [B, V] float32, the logits of each row's last token.

        Raises:
            ValueError: ids outside the vocabulary, a row that does not fit, or, with `mixed`, a
                prompt longer than one pass or a row that already has tokens.
        """
        last = (lengths - 1)[:, None]
        return self._append(input_ids, lengths, last, cache)[:, 0]

    def score(self, input_ids: Ids, lengths: Ids, cache: Cache) -> Logits:
        """Like `prefill`, with the logits of every token.

        Returns:
            [B, S, V] float32; zero behind a row's length.
        """
        every = np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape)
        return self._append(input_ids, lengths, every, cache)

    def decode(
        self, input_ids: Ids, cache: Cache, active: npt.NDArray[np.bool_] | None = None
    ) -> Logits:
        """Append one token to each row.

        Args:
            input_ids: [B] int64.
            cache: the batch's cache.
            active: [B] bool, the rows that take part; all when None. A row that does not keeps its
                length; if it was full, it loses its last token to the step.

        Returns:
            [B, V] float32; meaningless for rows that take no part.

        Raises:
            ValueError: ids outside the vocabulary or an active row that is full.
        """
        taking_part = np.ones(cache.batch_size, bool) if active is None else active
        self.check_decoding(input_ids, cache, taking_part, 1)
        tokens = np.where(taking_part, input_ids, 0)[:, None]
        index = np.zeros((cache.batch_size, 1), np.int64)
        logits = self._step(tokens, cache.lengths, index, cache, None)[:, 0]
        cache.lengths += taking_part
        return logits

    def check_decoding(
        self, input_ids: Ids, cache: Cache, active: npt.NDArray[np.bool_], count: int
    ) -> None:
        """Check what `decode` and `decode_many` are asked for, and make room in other rows.

        Raises:
            ValueError: ids outside the vocabulary, or an active row without room for `count`.
        """
        self._check_rows("ids", input_ids, cache)
        self._check_ids(input_ids[active])
        full = np.flatnonzero(active & (cache.lengths + count > cache.capacity))
        if full.size:
            row = full[0]
            raise ValueError(
                f"row {row} already holds {cache.lengths[row]} tokens, {count} more exceed the "
                f"limit of this cache, {cache.capacity}"
            )
        self._cut(cache, np.minimum(cache.lengths, cache.capacity - 1))

    def decode_many(
        self,
        input_ids: Ids,
        cache: Cache,
        choice: TokenChooser,
        active: npt.NDArray[np.bool_],
    ) -> Iterator[Ids]:
        """Decode and choose, one step for each item that is asked for, until the cache is full.

        Args:
            input_ids: [B] int64, the tokens to begin with; each row has got one token so far.
            cache: the batch's cache.
            choice: how tokens are chosen; its `logits` are those of the last step.
            active: [B] bool, the rows that take part; the caller may take rows out between steps.

        Yields:
            [B] int64, valid until the next step; meaningless for rows that take no part.

        Raises:
            ValueError: as `decode`, or logits from which nothing can be picked.
        """
        tokens = input_ids
        for count in itertools.count(1):
            logits = self.decode(tokens, cache, active)
            logits[~active] = 0  # rows that have ended hold anything, also what is no number
            tokens = choice.choose(logits, count, active)
            yield tokens

    def rewind(self, cache: Cache, lengths: Ids) -> None:
        """Forget the tokens of each row beyond `lengths[b]`.

        Raises:
            ValueError: a row is shorter than asked for or, with `mixed`, the cut falls into its
                prompt.
        """
        self._check_rows("lengths", lengths, cache)
        if ((lengths < 0) | (lengths > cache.lengths)).any():
            raise ValueError(
                f"cannot rewind rows of {cache.lengths.tolist()} tokens to {lengths.tolist()}"
            )
        inside = (lengths > 0) & (lengths < cache.prompt_lengths)
        if self.router_mode == "mixed" and inside.any():
            raise ValueError(
                "cannot rewind into a prompt with the router mode `mixed`, which routes a "
                "prompt as a whole; build with --router per_token"
            )
        self._cut(cache, lengths)

    def _cut(self, cache: Cache, lengths: Ids) -> None:
        cache.lengths[:] = lengths
        np.minimum(cache.prompt_lengths, lengths, out=cache.prompt_lengths)

    def _check_rows(self, what: str, array: Ids, cache: Cache) -> None:
        if len(array) != cache.batch_size:
            raise ValueError(f"{len(array)} {what} for a cache of {cache.batch_size} rows")

    def _check_ids(self, input_ids: Ids) -> None:
        outside = input_ids[(input_ids < 0) | (input_ids >= self.vocab_size)]
        if outside.size:
            raise ValueError(
                f"token id {outside[0]} is outside the vocabulary of {self.vocab_size} tokens"
            )

    def _append(self, input_ids: Ids, lengths: Ids, logits_index: Ids, cache: Cache) -> Logits:
        """Feed rows in as many passes as they need and gather the logits asked for.

        Rows run side by side where the longest fits behind every row; otherwise, and with `mixed`,
        each runs alone, so that no surplus token is written past the end of a cache.
        """
        B, S = input_ids.shape
        self._check_rows("rows of ids", input_ids, cache)
        self._check_rows("lengths", lengths, cache)
        if ((lengths < 1) | (lengths > S)).any():
            raise ValueError(f"lengths must be between 1 and {S}, got {lengths.tolist()}")
        real = np.arange(S) < lengths[:, None]
        self._check_ids(input_ids[real])
        too_long = np.flatnonzero(cache.lengths + lengths > cache.capacity)
        if too_long.size:
            row = too_long[0]
            raise ValueError(
                f"row {row}: {cache.lengths[row]} cached and {lengths[row]} new tokens exceed the "
                f"limit of {cache.capacity}"
            )
        if self.router_mode == "mixed":
            self._check_one_pass(lengths, cache)
        tokens = np.where(real, input_ids, 0)
        wanted = logits_index < lengths[:, None]  # [B, M]
        result = np.zeros((*logits_index.shape, self.vocab_size), np.float32)
        together = (cache.lengths + lengths.max() <= cache.capacity).all()
        alone = self.router_mode == "mixed" or (self.rows_alone and lengths.max() > 1 and B > 1)
        rows: list[int | None] = [None] if together and not alone else [*range(B)]
        for row in rows:
            part = slice(None) if row is None else slice(row, row + 1)
            self._append_rows(
                tokens[part],
                lengths[part],
                logits_index[part],
                wanted[part],
                cache,
                row,
                result[part],
            )
        first = cache.prompt_lengths == 0
        cache.prompt_lengths[first] = cache.lengths[first]
        return result

    def _append_rows(
        self,
        tokens: Ids,
        lengths: Ids,
        logits_index: Ids,
        wanted: npt.NDArray[np.bool_],
        cache: Cache,
        row: int | None,
        result: Logits,
    ) -> None:
        """Feed rows in chunks and fill their part of `result`."""
        part = slice(None) if row is None else slice(row, row + 1)
        start = cache.lengths[part].copy()
        longest = int(lengths.max())
        chunk = self.limits.max_input_len
        if self.chunk_length is not None and self.router_mode != "mixed":
            chunk = min(chunk, self.chunk_length)
        for begin in range(0, longest, chunk):
            end = min(longest, begin + chunk)
            here = wanted & (logits_index >= begin) & (logits_index < end)  # [B, M]
            columns = np.flatnonzero(here.any(axis=0))
            if not columns.size:
                columns = np.array([0])  # a step gives at least one row of logits; dropped below
            index = np.clip(logits_index[:, columns] - begin, 0, end - begin - 1)
            # A row that has ended writes its surplus behind its end, where later tokens overwrite.
            write_index = start + np.minimum(begin, lengths)
            logits = self._step(tokens[:, begin:end], write_index, index, cache, row)
            kept = here[:, columns]
            result[:, columns] = np.where(kept[..., None], logits, result[:, columns])
        cache.lengths[part] = start + lengths

    def _check_one_pass(self, lengths: Ids, cache: Cache) -> None:
        if cache.lengths.any():
            raise ValueError(
                "cannot add a prompt behind cached tokens with the router mode `mixed`, which "
                "routes a prompt as a whole; build with --router per_token"
            )
        if lengths.max() > self.limits.max_input_len:
            raise ValueError(
                f"a prompt of {lengths.max()} tokens exceeds the {self.limits.max_input_len} of "
                "one pass, and the router mode `mixed` cannot split it; raise --max-input-len or "
                "build with --router per_token"
            )
