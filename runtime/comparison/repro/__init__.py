"""The smallest piece of a model that still differs, as a folder: docs/compare_repro.md."""

from runtime.comparison.repro.replay import Side, side_of
from runtime.comparison.repro.write import ReproSummary, check_folder, write_repro

__all__ = ["ReproSummary", "Side", "check_folder", "side_of", "write_repro"]
