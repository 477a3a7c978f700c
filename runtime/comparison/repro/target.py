"""What a piece must give for a difference to show, and the rule by which run.py judges it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.config import DogeConfig
from runtime.comparison.record import Run
from runtime.comparison.repro.cut import Graph, InputSpec
from runtime.comparison.repro.values import (
    HEADS_FIRST,
    Moment,
    NoValueError,
    cache_after,
    fit,
    match_heads,
)
from runtime.comparison.taps import CACHED, CHOICES, LOGITS, TOKEN, TapName
from runtime.comparison.tolerances import TOLERANCES, coarser, tap_tolerance
from runtime.comparison.verdict import TapDifference, differences

Array = npt.NDArray[Any]
# What the rule of experts reads of a configuration.
_ROUTER = (
    "is_seed",
    "num_keys",
    "num_cdmmoe_heads",
    "num_cdmmoe_experts_per_head",
    "num_experts_per_tok",
    "router_mode",
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A difference to show.

    Attributes:
        found: the difference.
        tap: its name in parts.
        precision: the coarser of both rungs, which decides what is tolerated.
        tolerance: atol and rtol instead of the table's, for logits without taps.
        nearest_only: look for it in the smallest piece alone.
    """

    found: TapDifference
    tap: TapName
    precision: str
    tolerance: tuple[float, float] | None = None
    nearest_only: bool = False

    def output(self, graph: Graph) -> str:
        """The value of the graph that shows it.

        Raises:
            NoValueError: the graph has none.
        """
        kind, layer = self.tap.kind, self.tap.layer
        if kind in (LOGITS, TOKEN):
            wanted = [LOGITS]
        elif kind in CACHED:
            wanted = [f"present.{layer}.{CACHED[kind]}"]
        elif kind == "kept_keys":
            wanted = [f"present.{layer}.score"]
        elif kind in CHOICES:
            wanted = [f"layers.{layer}.{CHOICES[kind]}"]
        else:  # a lowered model names keys and values in its cache alone
            wanted = [self.tap.name, f"present.{layer}.{kind}"]
        for name in wanted:
            if name in graph.names:
                return name
        raise NoValueError(f"the model names no {' or '.join(wanted)}")

    def expected(self, output: str, spec: InputSpec, moment: Moment, side: int) -> Array:
        """What a side gave for the output, with the batch's axis and the model's heads.

        Args:
            output: as `output` names it.
            spec: of the output; of a cache, of the input that it continues.
            moment: when.
            side: 0 for the reference, 1 for the candidate.

        Raises:
            NoValueError: it was not recorded.
        """
        if output.startswith("present."):
            if self.tap.kind == "kept_keys":  # margins are those of the run's own scores
                return self._all_scores(spec, moment, side)
            return cache_after(spec, moment, side)
        found = moment.recorded(side, output)
        if found is None:
            raise NoValueError(f"{output} was not recorded; compare with --taps all")
        fitted = fit(found, spec)
        if fitted is None:
            raise NoValueError(f"{output} has other sizes in the model than in the run")
        return fitted

    def _all_scores(self, spec: InputSpec, moment: Moment, side: int) -> Array:
        name = f"layers.{self.tap.layer}.score"
        values = moment.runs[side].values[: moment.step + 1]
        scores = np.concatenate([step[name] for step in values], 1)[None, :, : _filled(moment)]
        after = np.zeros((1, *(size or 0 for size in (spec.shape or ())[1:])), np.float32)
        after[:, :, : scores.shape[2]] = match_heads(scores, after.shape[1])
        return after

    def check(self, output: str, moment: Moment, config: DogeConfig) -> dict[str, Any]:
        """The rule, as check.json has it."""
        kind = self.tap.kind
        rule = kind if kind in CHOICES or kind == TOKEN else "numeric"
        atol, rtol = self._tolerance()
        slots: tuple[int, int] | None = None
        token_axis: int | None = 1
        if output.startswith("present."):
            begin = moment.at.first if rule == "numeric" and kind not in CACHED else 0
            slots, token_axis = (begin, _filled(moment)), 2
            if kind in CACHED:  # a slot is measured by the largest of all
                token_axis = None
        elif kind in HEADS_FIRST:
            token_axis = 2
        settings: dict[str, Any] = {}
        if kind == "kept_keys":
            settings = {
                "first_slot": moment.at.first,
                "new": moment.at.ids.shape[1],
                "window": config.keep_window_size,
            }
        if kind == "experts":
            settings = {name: getattr(config, name, None) for name in _ROUTER}
        return {
            "tap": self.tap.name,
            "output": output,
            "rule": rule,
            "atol": atol,
            "rtol": rtol,
            "token_axis": token_axis,
            "slots": slots,
            "settings": settings,
        }

    def _tolerance(self) -> tuple[float, float]:
        if self.tolerance is not None:
            return self.tolerance
        if self.tap.kind in (LOGITS, TOKEN):
            return TOLERANCES[self.precision]
        return 0.0, tap_tolerance(self.tap.kind, self.precision)


def _filled(moment: Moment) -> int:
    return moment.at.first + int(moment.at.ids.shape[1])


def targets_of(
    first: TapDifference | None,
    runs: tuple[Run, Run],
    config: DogeConfig,
    tolerance: tuple[float, float],
) -> list[Target]:
    """What to show, the best first.

    A near tie may come first and be no fault: then what is over tolerance is tried before it, in
    the smallest piece, which no choice before it can have spoilt.

    Args:
        first: the first difference of the report.
        runs: reference and candidate.
        config: their architecture.
        tolerance: atol and rtol of the untapped logits.
    """
    precision = coarser((runs[0].subject.precision, runs[1].subject.precision))
    if first is None:
        found = _worst_logits(runs, tolerance)
        tap = TapName.parse(LOGITS)
        return [Target(found=found, tap=tap, precision=precision, tolerance=tolerance)]
    main = Target(found=first, tap=TapName.parse(first.tap), precision=precision)
    if not first.explained:
        return [main]
    over = next(
        (d for d in differences(*runs, config, precision) if d.parts and not d.explained), None
    )
    if over is None:
        return [main]
    tap = TapName.parse(over.tap)
    return [Target(found=over, tap=tap, precision=precision, nearest_only=True), main]


def _worst_logits(runs: tuple[Run, Run], tolerance: tuple[float, float]) -> TapDifference:
    """Where untapped logits are furthest apart, in shares of their tolerance."""
    found: list[TapDifference] = []
    for number, (a, b) in enumerate(zip(runs[0].prompts, runs[1].prompts, strict=True)):
        for step, (x, y) in enumerate(zip(a.logits, b.logits, strict=True)):
            error = float(np.abs(y.astype(np.float64) - x).max())
            size = float(np.abs(x).max())
            finite = bool(np.isfinite(error))
            limit = max(tolerance[0] + tolerance[1] * size, np.finfo(np.float64).tiny)
            found.append(
                TapDifference(
                    prompt=number,
                    step=step,
                    tap=LOGITS,
                    layer=None,
                    kind="numeric" if finite else "not finite",
                    error=error if finite else np.inf,
                    relative=error / size if finite and size else np.inf,
                    of_tolerance=error / limit if finite else np.inf,
                    where=() if finite else tuple(run.subject.rung for run in runs),
                )
            )
    return max(found, key=lambda d: d.of_tolerance)
