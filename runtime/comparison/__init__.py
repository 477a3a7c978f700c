"""How far two backends are apart, and where they part: docs/compare.md."""

from runtime.comparison.logits import (
    ComparisonReport,
    Divergence,
    compare_backends,
    random_prompts,
)
from runtime.comparison.rungs import bundle_taps, check_same_checkpoint, run_rung
from runtime.comparison.tapped_report import TappedReport, compare_runs, print_tapped
from runtime.comparison.tolerances import TOLERANCES, variant_tolerance

__all__ = [
    "TOLERANCES",
    "ComparisonReport",
    "Divergence",
    "TappedReport",
    "bundle_taps",
    "check_same_checkpoint",
    "compare_backends",
    "compare_runs",
    "print_tapped",
    "random_prompts",
    "run_rung",
    "variant_tolerance",
]
