"""Section: what runs on the GPU, against the reference on the CPU; engines against each other."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from runtime.bundle import Bundle
from runtime.gpu_checks.section import CheckedBundle, Report, Subject, combined
from runtime.gpu_checks.worker_process import run_worker
from runtime.manifest import Variant

_ENGINE_BACKENDS = ("tensorrt_rtx", "tensorrt", "cuda")
_WORKER = "runtime.gpu_checks.engine_comparison"
_NO_REFERENCE = (
    "nothing to compare with: the bundle has neither a checkpoint that PyTorch could run nor a "
    "model for ONNX Runtime"
)
_HOW = (
    "Each comparison runs in a process of its own, so that one that dies does not end the others. "
    "Both sides get the same prompts and then the reference's greedy tokens; logits must agree "
    "within the tolerances of runtime/comparison/tolerances.py for the coarser precision. "
    "`chosen`: tokens that the GPU chooses while it runs ahead of the host, by three sets of "
    "rules; they are fed to the same backend once more, one by one with logits, from which the "
    "host picks. Nine of ten must be the host's, and the logit of a greedy one no less than the "
    "largest by twice the tolerance. `step_ms`: one "
    "token of one sequence through the backend, its copies and Python included, by the host's "
    "clock. `starts`: opening, first prompt and first step, then the same after closing; the "
    "memory that is taken, and whether saved kernels were used. `speeds`: medians of 3 prompts of "
    "each length and of the 16 steps behind each, through the host. `said`: what the process "
    "printed and the error that ended it, the machine's folders replaced. An engine that cannot be "
    "opened is skipped; one that opens and then fails has failed."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models of one bundle.

    Attributes:
        bundle: what they are of.
        reference: the one that is right.
        candidate: the engine, or steps of our kernels (`cuda`).
    """

    bundle: CheckedBundle
    reference: Variant
    candidate: Variant

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.bundle.name}, {_name(self.candidate)} against {_name(self.reference)}"

    def describe(self) -> dict[str, Any]:
        """JSON-ready: what is compared."""
        return {
            "bundle": self.bundle.name,
            "reference": _name(self.reference),
            "candidate": _name(self.candidate),
            "plugin": self.candidate.details.get("plugin", "none"),
            "targets": list(self.candidate.details.get("targets", [])),
        }


class EnginesSection:
    """Every engine against the reference; those with plugins against those without.

    Attributes:
        name: `engines`.
    """

    name = "engines"

    def __init__(self, backends: Sequence[str] = _ENGINE_BACKENDS) -> None:
        """Look at the variants of these backends."""
        self._backends = backends

    def plan(self, bundles: Sequence[CheckedBundle]) -> list[str]:
        """A line for each comparison."""
        found = [f"compare {comparison.label}" for comparison in self._comparisons(bundles)]
        return found or ["compare no engine: no bundle has one that could be"]

    def run(self, subject: Subject, earlier: Mapping[str, Report]) -> Report:
        """Compare, one after the other."""
        del earlier
        cases, left_out = [], []
        for comparison in self._comparisons(subject.bundles):
            if subject.deadline.passed:
                left_out.append(f"{comparison.label}: the time was up")
                continue
            logger.info("comparing %s", comparison.label)
            found = _compare(comparison, subject.seed, subject.deadline.remaining_s)
            if found is None:
                left_out.append(f"{comparison.label}: the time was up before it ended")
            else:
                cases.append({**comparison.describe(), **found})
        without = [
            f"{bundle.name}: {_NO_REFERENCE}"
            for bundle in subject.bundles
            if self._engines(bundle.bundle) and _reference(bundle.bundle) is None
        ]
        return {
            "verdict": combined(case["verdict"] for case in cases),
            "how": _HOW,
            "cases": cases,
            "left_out": left_out + without,
        }

    def _comparisons(self, bundles: Sequence[CheckedBundle]) -> Iterator[Comparison]:
        for bundle in bundles:
            engines = self._engines(bundle.bundle)
            reference = _reference(bundle.bundle)
            if reference is not None:
                for engine in engines:
                    yield Comparison(bundle=bundle, reference=reference, candidate=engine)
            for one, other in combinations(sorted(engines, key=_plugin), 2):
                if _differ_by_plugin(one, other):
                    yield Comparison(bundle=bundle, reference=one, candidate=other)

    def _engines(self, bundle: Bundle) -> list[Variant]:
        return [v for backend in self._backends for v in bundle.variants(backend)]


def _reference(bundle: Bundle) -> Variant | None:
    """What runs on the CPU: the network itself where it can, else its export."""
    for backend, package in (("torch", "torch"), ("onnxruntime", "onnxruntime")):
        if (found := bundle.variants(backend)) and importlib.util.find_spec(package) is not None:
            return found[0]
    return None


def _name(variant: Variant) -> str:
    return f"{variant.backend}:{variant.name}"


def _plugin(variant: Variant) -> bool:
    """Whether plugins of ours run in it; an engine without sorts first."""
    return bool(variant.details.get("plugin", "none") != "none")


def _differ_by_plugin(one: Variant, other: Variant) -> bool:
    same = (one.backend, one.precision) == (other.backend, other.precision)
    return same and not _plugin(one) and _plugin(other)


def _compare(comparison: Comparison, seed: int, seconds: float) -> dict[str, Any] | None:
    """What a process of its own finds; None where it took longer than `seconds`."""
    arguments = [
        str(comparison.bundle.bundle.path), _name(comparison.reference),
        _name(comparison.candidate), "--seed", str(seed),
    ]  # fmt: skip
    result = run_worker(_WORKER, arguments, seconds)
    if result is None:
        return None
    return {
        "verdict": result.verdict,
        "said": result.said,
        "opened": result.found.get("opened"),
        "report": result.found.get("report"),
        "chosen": result.found.get("chosen"),
        "load_s": result.found.get("load_s"),
        "step_ms": result.found.get("step_ms"),
        "starts": result.found.get("starts"),
        "speeds": result.found.get("speeds"),
    }
