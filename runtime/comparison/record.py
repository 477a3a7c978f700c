"""A run: one rung over prompts and decode steps, and what it gave at each of them.

A rung is a backend with one of its variants. Logits come from an untapped backend, named values
from a tapped one, which a compiler may have fused differently; both get the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends.base import Backend, Cache, Ids, Logits
from runtime.comparison.taps import CACHED, CHOICES, LOGITS, TOKEN, TapName
from runtime.comparison.text import TextRun, record_text

Values = Mapping[str, npt.NDArray[np.float32]]
# Axis of the new tokens in a value of one row, by kind; 0 for those that are [S, H].
_TOKEN_AXIS = {"value": 1, "score": 1, "query": 1, "key": 1}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was run, without which its numbers mean nothing.

    Attributes:
        rung: `backend:variant`.
        precision: of the variant, a key of the table of tolerances.
        weights_sha256: hash over the checkpoint's weights.
        config: `DogeConfig.as_dict()`.
        generation: of the checkpoint.
        max_input_len: most tokens of one pass.
        max_seq_len: C, cache slots of the bundle.
        router_mode: `mixed` or `per_token`, None for a dense model.
        versions: package to version, where it ran.
        machine: what the machine calls itself.
    """

    rung: str
    precision: str
    weights_sha256: str
    config: Mapping[str, Any]
    generation: str
    max_input_len: int
    max_seq_len: int
    router_mode: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PromptRun:
    """One prompt: its prefill is step 0, each decode step one more.

    Attributes:
        prompt: the prompt's tokens.
        tokens: [steps] int64, what was fed in each decode step.
        logits: [steps + 1, V] float32, untapped.
        tapped_logits: likewise of the tapped backend, None where nothing was tapped.
        values: the named values of each step, without the batch's axis.
        own_tokens: [steps + 1] int64, what the rung generates greedily when it is fed its own; None
            where that is not known.
    """

    prompt: tuple[int, ...]
    tokens: Ids
    logits: Logits
    tapped_logits: Logits | None
    values: tuple[Values, ...]
    own_tokens: Ids | None = None

    def first_slot(self, step: int) -> int:
        """The slot of a step's first token."""
        return 0 if step == 0 else len(self.prompt) + step - 1


@dataclass(frozen=True, kw_only=True)
class Run:
    """One rung over all prompts.

    Attributes:
        subject: what was run.
        steps: decode steps after each prefill.
        taps: names that were asked for and are there, choices that can be derived included.
        missing: names that were asked for and that the rung does not give.
        prompts: one result each.
        text: what it gave for a text, None where there was none.
    """

    subject: Subject
    steps: int
    taps: tuple[str, ...]
    missing: tuple[str, ...]
    prompts: tuple[PromptRun, ...]
    text: TextRun | None = None

    @property
    def tapping_changed(self) -> float | None:
        """Largest difference of a logit with and without taps, None where nothing was tapped."""
        differences = [
            float(np.abs(p.logits.astype(np.float64) - p.tapped_logits).max())
            for p in self.prompts
            if p.tapped_logits is not None
        ]
        return max(differences, default=None)


def record_run(
    subject: Subject,
    untapped: Backend,
    tapped: Backend | None,
    taps: Sequence[TapName],
    prompts: Sequence[Sequence[int]],
    steps: int,
    *,
    tokens: Sequence[Ids] | None = None,
    windows: Sequence[Sequence[int]] = (),
    before_step: Callable[[Backend, Cache, int], None] | None = None,
) -> Run:
    """Run a rung, teacher-forced.

    Args:
        subject: what it is.
        untapped: gives the logits.
        tapped: gives the values, None to record logits alone.
        taps: what is wanted of the values.
        prompts: token ids; each prompt runs alone.
        steps: decode steps after each prefill.
        tokens: [steps] for each prompt, what another run was fed; None for the rung's own greedy
            tokens.
        windows: those of a text (`runtime.scoring.split_windows`), each scored alone.
        before_step: is called before each step (0 is the prefill), for tests that spoil a cache.

    Raises:
        ValueError: an empty prompt, negative steps, or more tokens than the rung takes.
    """
    if steps < 0 or not prompts:
        raise ValueError(f"give at least one prompt and 0 or more steps, got {steps} steps")
    empty = [number for number, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty; it must have at least one token")
    found = []
    for number, prompt in enumerate(prompts):
        teacher = None if tokens is None else tokens[number]
        logits, fed, _ = _run_prompt(untapped, (), prompt, steps, teacher, before_step)
        seen: Logits | None = None
        values: tuple[Values, ...] = ()
        if tapped is not None:
            seen, _, values = _run_prompt(tapped, taps, prompt, steps, fed, before_step)
        found.append(
            PromptRun(
                prompt=tuple(int(i) for i in prompt),
                tokens=fed,
                logits=logits,
                tapped_logits=seen,
                values=values,
                own_tokens=_own_tokens(untapped, prompt, fed, logits),
            )
        )
    given = found[0].values[0].keys() if tapped is not None else ()
    there = {t.name for t in taps if tapped is not None and _source(t) in given}
    return Run(
        subject=subject,
        steps=steps,
        taps=tuple(tap.name for tap in taps if tap.name in there),
        missing=tuple(tap.name for tap in taps if tap.name not in there),
        prompts=tuple(found),
        text=record_text(untapped, windows) if windows else None,
    )


def _own_tokens(backend: Backend, prompt: Sequence[int], fed: Ids, logits: Logits) -> Ids:
    """What the rung generates by itself; it runs again only where it was fed something else."""
    chosen: Ids = logits.argmax(-1).astype(np.int64)
    if (chosen[:-1] == fed).all():
        return chosen
    again, own, _ = _run_prompt(backend, (), prompt, len(fed), None, None)
    last: Ids = again[-1:].argmax(-1).astype(np.int64)
    return np.concatenate([own, last])


def _source(tap: TapName) -> str:
    """The recorded value that a tap is made of; logits are always there under their own name."""
    kind = CHOICES.get(tap.kind, tap.kind)
    if kind == TOKEN:
        return LOGITS
    return kind if tap.layer is None else f"layers.{tap.layer}.{kind}"


def _run_prompt(
    backend: Backend,
    taps: Sequence[TapName],
    prompt: Sequence[int],
    steps: int,
    teacher: Ids | None,
    before_step: Callable[[Backend, Cache, int], None] | None,
) -> tuple[Logits, Ids, tuple[Values, ...]]:
    cache = backend.new_cache(1, len(prompt) + steps)
    rows: list[Logits] = []
    values: list[Values] = []
    fed = np.zeros(steps, np.int64)
    for step in range(steps + 1):
        if before_step is not None:
            before_step(backend, cache, step)
        passes: list[Values] = []
        backend.observer = passes.append if taps else None
        start = int(cache.lengths[0])
        try:
            if step == 0:
                ids = np.array([prompt], np.int64)
                row = backend.prefill(ids, np.array([len(prompt)]), cache)
            else:
                fed[step - 1] = rows[-1].argmax() if teacher is None else teacher[step - 1]
                row = backend.decode(fed[step - 1 : step], cache)
        finally:
            backend.observer = None
        rows.append(row)
        if taps:
            seen = _join(passes) | {LOGITS: row}
            values.append(seen | _from_cache(backend, cache, start, taps, seen))
    return np.concatenate(rows), fed, tuple(values)


def _join(passes: Sequence[Values]) -> dict[str, npt.NDArray[np.float32]]:
    """The values of a step's passes as those of one, without the batch's axis."""
    joined: dict[str, npt.NDArray[np.float32]] = {}
    for name in passes[0] if passes else ():
        parts = [values[name][0] for values in passes]
        if name == "final_norm":  # of the tokens that get logits: those of the last pass
            joined[name] = parts[-1]
        else:
            joined[name] = np.concatenate(parts, _TOKEN_AXIS.get(TapName.parse(name).kind, 0))
    return joined


def _from_cache(
    backend: Backend, cache: Cache, start: int, taps: Sequence[TapName], seen: Values
) -> dict[str, npt.NDArray[np.float32]]:
    """What the cache tells: fingerprints of its slots, and new values that no graph names."""
    held = backend.cached(cache)
    filled = int(cache.lengths[0])
    found: dict[str, npt.NDArray[np.float32]] = {}
    for tap in taps:
        kind = CACHED.get(tap.kind, tap.kind)
        past = held.get(f"past_key_values.{tap.layer}.{kind}")
        if past is None or not np.issubdtype(past.dtype, np.floating):
            continue  # not a layer's, none, or integers whose scales only the graph knows
        if tap.kind in CACHED:
            found[tap.name] = _fingerprints(past[0, :, :filled])
        elif tap.name not in seen:
            found[tap.name] = np.array(past[0, :, start:filled], np.float32)
    return found


def _fingerprints(slots: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """One number for each slot of [heads, T, size] that no edit is likely to keep.

    A weighted sum, and thrice the numbers' size, so that a sum that nearly cancels is not measured
    by itself. Heads weigh the same in scores, of which a lowered model may store copies.
    """
    slots = slots.astype(np.float32)  # whose squares float16 cannot hold
    heads, _, size = slots.shape
    if size == 1:
        return np.asarray(slots.mean((0, 2)), np.float32)
    weights = np.cos(np.arange(heads * size) * 2.4).reshape(heads, 1, size)
    summed = (slots * weights).sum((0, 2)) / np.sqrt(heads * size)
    return np.asarray(summed + 3 * np.sqrt(np.square(slots).mean((0, 2))), np.float32)
