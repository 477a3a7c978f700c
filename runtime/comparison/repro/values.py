"""What a piece is fed and what is expected of it, in the shapes of its model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.comparison.record import PromptRun
from runtime.comparison.repro.cut import InputSpec
from runtime.comparison.repro.replay import Caches, Pass
from runtime.comparison.taps import LOGITS, TapName

Array = npt.NDArray[Any]
_PAST, _PRESENT = "past_key_values.", "present."
HEADS_FIRST = ("value", "score", "query", "key")  # kinds that are [heads, S, size], others [S, H]


class NoValueError(ValueError):
    """Neither side can tell a value that a piece needs."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One pass of one prompt on both sides.

    Attributes:
        runs: the prompt as the reference ran it and as the candidate did.
        step: which.
        at: the pass within the step.
        caches: of each side before the pass; empty where it cannot tell.
    """

    runs: tuple[PromptRun, PromptRun]
    step: int
    at: Pass
    caches: tuple[Caches, Caches]

    def recorded(self, side: int, name: str) -> Array | None:
        """A value of the pass's tokens as a side recorded it, with the batch's axis."""
        run = self.runs[side]
        if name == LOGITS:
            return np.asarray(run.logits[None, self.step : self.step + 1])
        found = run.values[self.step].get(name) if run.values else None
        if found is None:
            return None
        if name == "final_norm":
            return np.asarray(found[None])
        axis = 1 if TapName.parse(name).kind in HEADS_FIRST else 0
        tokens = range(self.at.begin, self.at.end)
        return np.asarray(np.take(found, tokens, axis)[None])


@dataclass(kw_only=True)
class Fed:
    """Inputs of a piece.

    Attributes:
        arrays: by name.
        origins: where each comes from, in words.
    """

    arrays: dict[str, Array] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def feed(specs: tuple[InputSpec, ...], moment: Moment) -> Fed:
    """Values for the inputs of a piece: the reference's where it gives them, else the candidate's.

    Raises:
        NoValueError: neither gives one.
    """
    fed = Fed()
    tokens = moment.at.feeds()
    for spec in specs:
        if spec.name in tokens:
            fed.arrays[spec.name] = tokens[spec.name]
            fed.origins[spec.name] = "the prompt and the tokens that both rungs were fed"
            continue
        for side, word in enumerate(("reference", "candidate")):
            found = (
                _past(spec, moment, side)
                if spec.name.startswith(_PAST)
                else (moment.recorded(side, spec.name))
            )
            fitted = None if found is None else fit(found, spec)
            if fitted is not None:
                fed.arrays[spec.name] = fitted
                how = ", run again to this step" if spec.name.startswith(_PAST) else ""
                fed.origins[spec.name] = f"the {word}{how}"
                break
        else:
            raise NoValueError(
                f"neither rung can tell {spec.name} before prompt step {moment.step}"
            )
    return fed


def _past(spec: InputSpec, moment: Moment, side: int) -> Array | None:
    """A cache tensor before the pass; zeros before the first one."""
    found = moment.caches[side].get(spec.name)
    if found is None and moment.at.first == 0 and None not in (spec.shape or (None,))[1:]:
        return np.zeros((1, *(size or 0 for size in (spec.shape or ())[1:])), spec.dtype)
    return found


def fit(array: Array, spec: InputSpec) -> Array | None:
    """An array in the type and shape of a model's value: heads shared, slots added.

    Returns:
        None where it cannot be: integers of other scales, or sizes that do not fit.
    """
    floats = np.issubdtype(array.dtype, np.floating)
    if floats != np.issubdtype(np.dtype(spec.dtype), np.floating):
        return None
    shape = spec.shape
    if shape is not None and len(shape) == 4 and array.ndim == 4:
        array = match_heads(array, shape[1])
        slots = shape[2]
        if slots is not None and slots > array.shape[2]:
            array = np.pad(array, ((0, 0), (0, 0), (0, slots - array.shape[2]), (0, 0)))
        elif slots is not None:
            array = array[:, :, :slots]  # behind them nothing is filled
    if shape is not None and any(
        wanted is not None and wanted != there
        for wanted, there in zip(shape, array.shape, strict=True)
    ):
        return None
    return np.ascontiguousarray(array, spec.dtype)


def match_heads(array: Array, heads: int | None) -> Array:
    """[B, heads, ...]: mask scores that a rung stores once for several heads, or several times."""
    there = array.shape[1]
    if heads is None or heads == there:
        return array
    if heads % there == 0:
        return np.repeat(array, heads // there, 1)
    return array[:, :: there // heads] if there % heads == 0 else array


def cache_after(spec: InputSpec, moment: Moment, side: int) -> Array:
    """[1, heads, C, size] a cache tensor as a side has it after the pass.

    Args:
        spec: of the cache before the pass.
        moment: when.
        side: whose new slots are written into it.

    Raises:
        NoValueError: that side did not record what was new.
    """
    layer, kind = spec.name.removeprefix(_PAST).split(".")
    name = f"layers.{layer}.{kind}"
    new = moment.recorded(side, name)
    if new is None:
        raise NoValueError(f"{name} was not recorded; compare with --taps all")
    for before in (_past(spec, moment, side), _past(spec, moment, 1 - side)):
        fitted = None if before is None else fit(before, spec)
        if fitted is not None:
            after = fitted.copy()
            after[:, :, moment.at.first : moment.at.first + new.shape[2]] = match_heads(
                new, after.shape[1]
            )
            return after
    raise NoValueError(f"neither rung can tell {spec.name}")


def past_of(present: str) -> str:
    """The input that an output of the step continues."""
    return _PAST + present.removeprefix(_PRESENT)
