"""What `runtime/gpu_check.py` checks on a GPU, a section for each thing; see docs/gpu_check.md."""

from __future__ import annotations

from runtime.gpu_checks.bandwidth import BandwidthSection
from runtime.gpu_checks.decode_speed import DecodeSpeedSection
from runtime.gpu_checks.engines import EnginesSection
from runtime.gpu_checks.environment import EnvironmentSection
from runtime.gpu_checks.kernels import KernelsSection
from runtime.gpu_checks.section import Section

__all__ = ["SECTIONS"]

# In the order in which they run: a section may use what those before it found.
SECTIONS: tuple[Section, ...] = (
    EnvironmentSection(),
    BandwidthSection(),
    KernelsSection(),
    EnginesSection(),
    DecodeSpeedSection(),
)
