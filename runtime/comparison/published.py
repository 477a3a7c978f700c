"""The rung below ours: what published code computes, run by transformers or read from a file.

transformers has generation G4. Of the others there are recorded results: an .npz with `input_ids`
[B, S], `decode_logits` [1, S, V] (row 0 fed token by token) and, if there are, `prefill_logits`
[B, S, V] (each row at once), without padding.
"""

from __future__ import annotations

import importlib
import logging
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from runtime.backends.base import Backend, BackendUnavailableError, Cache, Ids, Limits, Logits
from runtime.bundle import Bundle
from runtime.comparison.record import PromptRun, Run, Subject
from runtime.comparison.text import TextRun

if TYPE_CHECKING:
    from model.transformers_taps import TappedConversation
    from runtime.cpu_threads import CpuThreads
    from runtime.manifest import Variant

logger = logging.getLogger(__name__)

PUBLISHED = "published"
_RECORDED = ("input_ids", "decode_logits")
_TAPS = "model.transformers_taps"  # needs torch, so it is imported when a rung is opened


@dataclass(kw_only=True)
class PublishedCache(Cache):
    """A cache of transformers, which grows by itself."""

    conversation: TappedConversation


class PublishedBackend(Backend):
    """transformers' `DogeForCausalLM`, one row at a time.

    It mixes the router's numbers of a pass (docs/reference.md); where a bundle routes per token,
    prompts are fed token by token.
    """

    name = PUBLISHED

    def __init__(self, reference: Any, bundle: Bundle, attention: str) -> None:
        self.variant = attention
        self.vocab_size = bundle.config.vocab_size
        self.router_mode = bundle.manifest.router_mode
        slots = bundle.limits.max_seq_len
        self.limits = Limits(max_batch_size=1, max_input_len=slots, max_seq_len=slots)
        # A pass of one token is the one that published code routes by that token alone.
        self.chunk_length = 1 if self.router_mode == "per_token" else None
        self._reference = reference

    @classmethod
    def open(cls, bundle: Bundle, variant: Variant, threads: CpuThreads) -> Self:
        """Published code is no variant of a bundle; use `open_published`."""
        raise TypeError("the published model is opened by open_published")

    def new_cache(self, batch_size: int, capacity: int | None = None) -> PublishedCache:
        """An empty cache."""
        slots = self.check_cache_size(batch_size, capacity)
        return PublishedCache(
            capacity=slots,
            lengths=np.zeros(batch_size, np.int64),
            conversation=self._reference.converse(self.taps),
        )

    def cached(self, cache: Cache) -> Mapping[str, npt.NDArray[Any]]:
        """Keys and values; scores are computed anew in every step and cached nowhere."""
        if not isinstance(cache, PublishedCache):
            raise TypeError(f"a cache of {type(cache).__name__} does not belong to this backend")
        return cache.conversation.cached()

    def tap_values(self, names: Sequence[str]) -> None:
        """Hand these of the network's named values to the observer, of caches made from now on."""
        self.taps = tuple(name for name in names if self._reference.has(name))

    def close(self) -> None:
        """Drop the network."""
        self._reference = None

    def _step(
        self, input_ids: Ids, write_index: Ids, logits_index: Ids, cache: Cache, row: int | None
    ) -> Logits:
        if not isinstance(cache, PublishedCache):
            raise TypeError(f"a cache of {type(cache).__name__} does not belong to this backend")
        logits, values = cache.conversation.append(input_ids[0], logits_index[0])
        if self.observer is not None:
            self.observer(values)
        return logits[None]


def open_published(bundle: Bundle, attention: str = "eager") -> PublishedBackend:
    """The network of transformers on a bundle's checkpoint.

    Args:
        bundle: of generation G4, with its checkpoint.
        attention: which of transformers' implementations.

    Raises:
        BackendUnavailableError: another generation, no checkpoint in the bundle, transformers
            missing, too old, or refusing.
    """
    reason = _why_not(bundle, attention)
    if reason is not None:
        raise BackendUnavailableError(f"the published model cannot run this bundle: {reason}")
    module = importlib.import_module(_TAPS)
    folder = bundle.path / bundle.variant("torch").path
    try:
        reference = module.TappedTransformers.open(folder, attention, bundle.config)
    except module.TransformersUnavailableError as error:
        raise BackendUnavailableError(str(error)) from error
    return PublishedBackend(reference, bundle, attention)


def _why_not(bundle: Bundle, attention: str) -> str | None:
    generation = bundle.generation.name
    if generation != "g4":
        return (
            f"transformers has generation g4, this is {generation}; compare with recorded results "
            "of its published code: --load FILE.npz (docs/compare.md)"
        )
    if attention not in ("eager", "sdpa"):
        return f"there is no attention {attention!r}; there are eager and sdpa"
    if not bundle.variants("torch"):
        return "it was built with --no-checkpoint; build it again without that flag"
    return None


def is_recorded(path: Path) -> bool:
    """Whether a file holds recorded results of published code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as members:
        return {f"{name}.npy" for name in _RECORDED} <= set(members.namelist())


def recorded_run(path: Path, subject: Subject) -> Run:
    """Recorded results as a run: row 0 token by token, and each row at once as a text.

    Args:
        path: a file for which `is_recorded` holds.
        subject: what a rung of ours of the same checkpoint would be; the file does not say.

    Raises:
        ValueError: padding, ids outside the vocabulary, or more tokens than the limits.
    """
    with np.load(path, allow_pickle=False) as arrays:
        ids, logits = arrays["input_ids"].astype(np.int64), arrays["decode_logits"][0]
        mask = arrays.get("attention_mask", np.ones_like(ids))
        at_once = arrays.get("prefill_logits")
    V = subject.config["vocab_size"]
    if logits.shape != (ids.shape[1], V) or not mask.all():
        raise ValueError(
            f"{path} holds logits {list(logits.shape)} for ids {list(ids.shape)}; expected "
            f"[{ids.shape[1]}, {V}] for this checkpoint, and no padding"
        )
    if ids.shape[1] > subject.max_seq_len:
        raise ValueError(
            f"{path} has rows of {ids.shape[1]} tokens, this bundle takes {subject.max_seq_len}; "
            "build one with a larger --max-seq-len"
        )
    prompt = PromptRun(
        prompt=(int(ids[0, 0]),),
        tokens=ids[0, 1:],
        logits=logits.astype(np.float32),
        tapped_logits=None,
        values=(),
    )
    return Run(
        subject=subject,
        steps=ids.shape[1] - 1,
        taps=(),
        missing=(),
        prompts=(prompt,),
        text=None if at_once is None else _rows_at_once(ids, at_once, subject),
    )


def _rows_at_once(ids: Ids, logits: Logits, subject: Subject) -> TextRun | None:
    """Rows that our router modes compute as published code did."""
    mixes = subject.router_mode is not None and subject.generation not in ("g1", "g2")
    if mixes and (len(ids) > 1 or subject.router_mode != "mixed"):
        logger.info(
            "the rows at once are left out: published code mixes the experts of %d rows, and this "
            "bundle routes %s",
            len(ids),
            subject.router_mode,
        )
        return None
    windows = tuple(tuple(int(i) for i in row) for row in ids)
    return TextRun(windows=windows, logits=tuple(logits.astype(np.float32)))
