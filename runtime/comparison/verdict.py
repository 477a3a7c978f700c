"""Where two runs part: every tap of every step compared, the first that is over its tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from model.config import DogeConfig
from runtime.comparison.choices import Choice, chosen_experts, kept_keys
from runtime.comparison.consequences import Consequences
from runtime.comparison.metrics import json_number
from runtime.comparison.record import PromptRun, Run
from runtime.comparison.taps import CHOICES, COMPUTED_BY, LOGITS, TOKEN, TapName
from runtime.comparison.tolerances import TOLERANCES, tap_tolerance

Kind = Literal["numeric", "discrete", "not finite"]
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TapDifference:
    """One tap at one step.

    Attributes:
        prompt: which prompt.
        step: 0 is the prefill.
        tap: its name.
        layer: its layer, None outside the layers.
        kind: a number apart, another choice, or a number that is none.
        error: largest absolute difference; of a choice, how many differ.
        relative: the same as a share of the token's largest number; of a choice, of all choices.
        of_tolerance: largest difference over what is tolerated; above 1 is too much. Of a choice,
            the larger margin over what rounding explains: up to 1 is a near tie.
        reference_margin: of a choice that differs, the reference's.
        candidate_margin: likewise.
        where: whose numbers are not finite, empty where all are.
        follows: whether it parts only in tokens that follow from an earlier near tie
            (`runtime.comparison.consequences`).
    """

    prompt: int
    step: int
    tap: str
    layer: int | None
    kind: Kind
    error: float
    relative: float
    of_tolerance: float
    reference_margin: float | None = None
    candidate_margin: float | None = None
    where: tuple[str, ...] = ()
    follows: bool = False

    @property
    def parts(self) -> bool:
        """Whether the runs part here: over tolerance, or another choice, near tie or not."""
        return self.error > 0 if self.kind == "discrete" else self.of_tolerance > 1

    @property
    def near_tie(self) -> bool:
        """Whether rounding explains another choice: both margins are within tolerance."""
        return self.kind == "discrete" and self.of_tolerance <= 1 and not self.follows

    @property
    def explained(self) -> bool:
        """Whether it parts and rounding explains that: a near tie, or what follows from one."""
        return self.parts and (self.near_tie or self.follows)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form; a number that is not finite becomes null."""
        found = asdict(self) | {"near_tie": self.near_tie, "where": list(self.where)}
        return {k: json_number(v) if isinstance(v, float) else v for k, v in found.items()}

    def sentence(self) -> str:
        """What is apart here, in words."""
        place = f"prompt {self.prompt}, step {self.step}, {self.tap}"
        if self.follows:
            place += ", behind a near tie"
        origin = COMPUTED_BY[TapName.parse(self.tap).kind]
        if self.kind == "not finite":
            return (
                f"{place}: numbers that are not finite from {' and '.join(self.where)} ({origin})"
            )
        if self.kind == "numeric":
            return (
                f"{place}: numeric, {self.error:.3g} apart, {self.of_tolerance:.3g} of the "
                f"tolerance ({origin})"
            )
        tie = "a near tie" if self.near_tie else "no near tie"
        return (
            f"{place}: discrete, {self.error:g} choices differ; margins "
            f"{self.reference_margin:.3g} and {self.candidate_margin:.3g}, {tie} ({origin})"
        )


def differences(
    reference: Run, candidate: Run, config: DogeConfig, precision: str
) -> Iterator[TapDifference]:
    """Every tap that both runs have, in the order (step, tap, prompt).

    Args:
        reference: the run that is right by definition.
        candidate: over the same prompts, tokens and steps.
        config: the architecture of both.
        precision: the coarser of theirs, which decides the tolerances.
    """
    both = [TapName.parse(name) for name in reference.taps if name in candidate.taps]
    pairs = list(zip(reference.prompts, candidate.prompts, strict=True))
    names = (reference.subject.rung, candidate.subject.rung)
    scores = [(_Scores(a), _Scores(b)) for a, b in pairs]
    mixes = config.is_moe and not config.is_seed and config.router_mode == "mixed"
    behind = [Consequences(mixes=mixes) for _ in pairs]
    for step in range(reference.steps + 1):
        for tap in both:
            for number, (a, b) in enumerate(pairs):
                place = _Place(number, step, tap, len(a.prompt) + step, behind[number])
                if tap.kind in CHOICES or tap.kind == TOKEN:
                    found = _choices(tap, step, (a, b), scores[number], config)
                    if found is not None:
                        yield _compare_choices(place, found, precision)
                else:
                    values = a.values[step][tap.name], b.values[step][tap.name]
                    yield _compare_values(place, values, names, precision)
        for consequences in behind:
            consequences.next_step()


@dataclass(frozen=True)
class _Place:
    """Where a tap is compared: `filled` slots hold tokens, the step's own last."""

    prompt: int
    step: int
    tap: TapName
    filled: int
    behind: Consequences

    def free(self, tokens: int) -> npt.NDArray[np.bool_]:
        """[tokens], of the last ones: which do not follow from an earlier near tie."""
        slots = np.arange(self.filled - tokens, self.filled)
        found: npt.NDArray[np.bool_] = slots < self.behind.first_slot(self.tap.layer, self.tap.kind)
        return found

    def difference(self, **found: Any) -> TapDifference:
        """A difference here."""
        return TapDifference(
            prompt=self.prompt, step=self.step, tap=self.tap.name, layer=self.tap.layer, **found
        )


class _Scores:
    """The mask scores that a prompt's run has cached, by layer and step."""

    def __init__(self, run: PromptRun) -> None:
        self._run = run
        self._joined: dict[int | None, Array] = {}

    def until(self, layer: int | None, step: int) -> Array:
        """[N, T] of every token up to and with a step's."""
        if layer not in self._joined:
            parts = [values[f"layers.{layer}.score"][..., 0] for values in self._run.values]
            self._joined[layer] = np.concatenate(parts, -1)
        found: Array = self._joined[layer][:, : len(self._run.prompt) + step]
        return found


def _choices(
    tap: TapName,
    step: int,
    pair: tuple[PromptRun, PromptRun],
    scores: tuple[_Scores, _Scores],
    config: DogeConfig,
) -> tuple[Choice, Choice] | None:
    """Both runs' choices; None where nothing can be dropped yet, or scores are not finite."""
    source = f"layers.{tap.layer}.{CHOICES[tap.kind]}" if tap.kind in CHOICES else LOGITS
    if not all(np.isfinite(run.values[step][source]).all() for run in pair):
        return None
    if tap.kind == "experts":
        a, b = (chosen_experts(run.values[step][source], config) for run in pair)
        return a, b
    if tap.kind == TOKEN:
        a, b = (_token(run.values[step][LOGITS][0]) for run in pair)
        return a, b
    found = [side.until(tap.layer, step) for side in scores]
    if found[0].shape[1] <= config.keep_window_size or not all(np.isfinite(f).all() for f in found):
        return None
    heads = max(len(score) for score in found)
    first = pair[0].first_slot(step)
    new = found[0].shape[1] - first
    a, b = (
        kept_keys(np.repeat(s, heads // len(s), 0), first, new, config.keep_window_size)
        for s in found
    )
    return a, b


def _token(logits: Array) -> Choice:
    chosen = np.zeros((1, 1, len(logits)), bool)
    chosen[0, 0, int(logits.argmax())] = True
    two = np.sort(logits)[-2:].astype(np.float64)
    scale = np.full((1, 1), float(np.abs(logits).max()))
    return Choice(chosen, np.full((1, 1), two[-1] - two[0]), scale)


def _compare_choices(place: _Place, pair: tuple[Choice, Choice], precision: str) -> TapDifference:
    """Compare choices; a near tie is noted."""
    a, b = pair
    tap = place.tap
    differs = (a.chosen != b.chosen).any(-1)  # [Q, S]
    free = place.free(differs.shape[1])  # [S]
    follows = bool(differs.any()) and not differs[:, free].any()
    margins: tuple[float | None, float | None] = (None, None)
    of_tolerance = 0.0
    if differs.any():
        # Two scores move, each by up to its tolerance.
        atol, rtol = TOLERANCES[precision] if tap.kind == TOKEN else (0.0, None)
        share = tap_tolerance(tap.kind, precision) if rtol is None else rtol
        limit = 2 * (atol + share * np.maximum(a.scale, b.scale))
        larger = np.maximum(a.margin, b.margin)
        counted = differs if follows else differs & free
        ratio = np.where(counted, larger / np.maximum(limit, np.finfo(np.float64).tiny), -1.0)
        worst = np.unravel_index(int(ratio.argmax()), ratio.shape)
        of_tolerance = float(ratio[worst])
        margins = float(a.margin[worst]), float(b.margin[worst])
        if tap.layer is not None and not follows and of_tolerance <= 1:
            token = int(np.flatnonzero(counted.any(0))[0])
            place.behind.note(tap.layer, place.filled - len(free) + token)
    return place.difference(
        kind="discrete",
        error=float(differs.sum()),
        relative=float(differs.mean()),
        of_tolerance=of_tolerance,
        reference_margin=margins[0],
        candidate_margin=margins[1],
        follows=follows,
    )


def _compare_values(
    place: _Place, pair: tuple[Array, Array], names: tuple[str, str], precision: str
) -> TapDifference:
    """Compare values; where a token is over tolerance by itself, those that follow do not count."""
    where = tuple(n for n, x in zip(names, pair, strict=True) if not np.isfinite(x).all())
    if where:
        infinite: dict[str, Any] = dict.fromkeys(("error", "relative", "of_tolerance"), np.inf)
        return place.difference(kind="not finite", where=where, **infinite)
    kind = place.tap.kind
    a, b = (_by_token(kind, x, max(len(y) for y in pair)) for x in pair)  # [S, numbers]
    difference = np.abs(a - b).max(-1)  # [S]
    size = np.abs(a).max(-1)
    if kind.startswith("cached_"):  # a slot's number is measured by the largest of all slots
        size = np.full_like(size, size.max())
    relative = difference / np.maximum(size, np.finfo(np.float32).tiny)
    if kind == LOGITS:
        atol, rtol = TOLERANCES[precision]
        share = difference / (atol + rtol * size)
    else:
        share = relative / tap_tolerance(kind, precision)
    free = place.free(len(share))
    itself = free & (share > 1)
    counted = free if itself.any() else np.ones_like(free)
    return place.difference(
        kind="numeric",
        error=float(difference[counted].max()),
        relative=float(relative[counted].max()),
        of_tolerance=float(share[counted].max()),
        follows=bool(share.max() > 1) and not itself.any(),
    )


def _by_token(kind: str, value: Array, heads: int) -> npt.NDArray[np.float64]:
    """[S, numbers]; the scores of a rung that stores one for several heads are repeated."""
    if kind in ("value", "query", "key", "score"):
        if kind == "score":
            value = np.repeat(value, heads // len(value), 0)
        value = value.swapaxes(0, 1)
    if kind == LOGITS:  # of the last token alone
        value = value.reshape(1, -1)
    return value.reshape(len(value), -1).astype(np.float64)


def growth(
    found: Mapping[tuple[int, int, str], TapDifference], prompt: int, step: int
) -> list[float | None]:
    """Relative error of the residual stream behind each layer at one step."""
    errors = []
    for index in range(len(found)):
        difference = found.get((prompt, step, f"layers.{index}.output"))
        if difference is None:
            break
        errors.append(json_number(difference.relative))
    return errors
