"""How far two backends are apart, and where they part: docs/compare.md."""

from runtime.comparison.logits import (
    ComparisonReport,
    Divergence,
    compare_backends,
    random_prompts,
)
from runtime.comparison.printed import print_report
from runtime.comparison.published import PUBLISHED, is_recorded, recorded_run
from runtime.comparison.record import Run
from runtime.comparison.run_report import RunReport, compare_runs, run_tolerance
from runtime.comparison.rungs import (
    Rung,
    bundle_taps,
    recorded_subject,
    run_rung,
    rung_of,
    variant_rung,
)
from runtime.comparison.saved_run import check_comparable, check_subjects, load_run, save_run
from runtime.comparison.taps import TapName
from runtime.comparison.tolerances import TOLERANCES, variant_tolerance

__all__ = [
    "PUBLISHED",
    "TOLERANCES",
    "ComparisonReport",
    "Divergence",
    "Run",
    "RunReport",
    "Rung",
    "TapName",
    "bundle_taps",
    "check_comparable",
    "check_subjects",
    "compare_backends",
    "compare_runs",
    "is_recorded",
    "load_run",
    "print_report",
    "random_prompts",
    "recorded_run",
    "recorded_subject",
    "run_rung",
    "run_tolerance",
    "rung_of",
    "save_run",
    "variant_rung",
    "variant_tolerance",
]
