"""Instructions that products with 8-bit activations need to be fast."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

# By how Linux names them: of x86 in `flags`, of 64-bit Arm in `Features`.
_NEEDED = {"flags": "avx2", "Features": "asimddp"}


def missing_instructions(cpuinfo: str) -> str | None:
    """The instruction set that this CPU lacks for narrow weights; None where it lacks none.

    Args:
        cpuinfo: the text of /proc/cpuinfo. One that names no features (another architecture,
            another system) says nothing, and None is returned.
    """
    for line in cpuinfo.splitlines():
        key, _, features = line.partition(":")
        needed = _NEEDED.get(key.strip())
        if needed is not None:
            return None if needed in features.split() else needed
    return None


@functools.cache
def warn_of_missing_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Say in one line, once per process, that narrow weights will be slow on this CPU."""
    try:
        missing = missing_instructions(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return
    if missing is not None:
        logger.warning(
            "this CPU has no %s instructions: products with weights of 8 or 4 bits are computed "
            "slowly; --variant fp32 may be faster",
            missing,
        )
