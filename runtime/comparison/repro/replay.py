"""A run led again to the step where it parts, for the caches that no run keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.base import Backend
from runtime.comparison.record import PromptRun, Run
from runtime.comparison.rungs import Rung

Array = npt.NDArray[Any]
Caches = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two runs that were compared, with what it can be cut and run again by.

    Attributes:
        run: what was recorded.
        open: its backend; None where it cannot run here, as of a run from another machine.
        model: its ONNX model, None where it has none.
    """

    run: Run
    open: Callable[[], Backend] | None = None
    model: Path | None = None


def side_of(run: Run, rung: Rung | None) -> Side:
    """The side that a run is.

    Args:
        run: what was recorded.
        rung: what made it; None where that is not here (`--load`).
    """
    if rung is None:
        return Side(run=run)
    backend, _, variant = rung.subject.rung.partition(":")
    if backend != "onnxruntime":
        return Side(run=run, open=rung.open)
    path = rung.bundle.path / rung.bundle.variant(backend, variant).path
    return Side(run=run, open=rung.open, model=path)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of the network within a step; a long prompt takes several.

    Attributes:
        ids: [1, S] int64.
        first: slot of the first of them.
        begin: which of the step's tokens that is.
        last: whether it is the step's last, which gives its logits.
    """

    ids: Array
    first: int
    begin: int
    last: bool

    @property
    def end(self) -> int:
        """The step's token behind its last."""
        return self.begin + int(self.ids.shape[1])

    def feeds(self) -> dict[str, Array]:
        """The token inputs of the step contract."""
        S = self.ids.shape[1]
        return {
            "input_ids": self.ids,
            "position_ids": self.first + np.arange(S, dtype=np.int64)[None],
            "write_index": np.array([self.first], np.int64),
            "logits_index": np.array([[S - 1]], np.int64),
        }


def passes_of(prompt: PromptRun, step: int, backend: Backend | None) -> tuple[Pass, ...]:
    """The passes that a backend makes of a step; None splits nothing."""
    if step > 0:
        ids = np.array([[prompt.tokens[step - 1]]], np.int64)
        return (Pass(ids=ids, first=prompt.first_slot(step), begin=0, last=True),)
    length = len(prompt.prompt)
    chunk = length
    if backend is not None and backend.router_mode != "mixed":
        chunk = min(backend.limits.max_input_len, backend.chunk_length or length)
    return tuple(
        Pass(
            ids=np.array([prompt.prompt[begin : begin + chunk]], np.int64),
            first=begin,
            begin=begin,
            last=begin + chunk >= length,
        )
        for begin in range(0, length, chunk)
    )


def caches_before(
    backend: Backend, prompt: PromptRun, step: int, passes: tuple[Pass, ...]
) -> list[Caches]:
    """What the cache holds before each pass of a step, by input names; empty if it cannot tell.

    Args:
        backend: is fed the recorded tokens.
        prompt: one prompt of its run, or of the run it is compared with.
        step: which.
        passes: of that step.
    """
    cache = backend.new_cache(1, len(prompt.prompt) + len(prompt.tokens))
    if step > 0:
        _prefill(backend, np.array([prompt.prompt], np.int64), cache)
        for token in prompt.tokens[: step - 1]:
            backend.decode(np.array([token], np.int64), cache)
    found: list[Caches] = []
    for one in passes:
        found.append({name: np.array(held) for name, held in backend.cached(cache).items()})
        if not one.last:
            _prefill(backend, one.ids, cache)
    return found


def _prefill(backend: Backend, ids: Array, cache: Any) -> None:
    backend.prefill(ids, np.array([ids.shape[1]]), cache)
