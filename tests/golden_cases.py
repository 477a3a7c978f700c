"""The golden cases in tests/data/golden and the generation of each."""

from __future__ import annotations

GOLDEN_CASES = {
    "g1": "g1",
    "g3": "g3",
    "g3_moe": "g3",
    "g4h": "g4h",
    "g4h_window": "g4h",
    "g4": "g4",
    "g4_untied_mha": "g4",
    "g4_moe": "g4",
    "g4_window": "g4",
}
