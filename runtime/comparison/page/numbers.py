"""Numbers and untrusted text as the report's page shows them: one rule for each."""

from __future__ import annotations

import math
from collections.abc import Sequence

NOT_FINITE, NOT_THERE = "not finite", "none"
# What no HTML document may hold: C0 controls but tab and newline become their pictures, the rest of
# the controls and lone surrogates the replacement character.
_UNPRINTABLE = (
    {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
    | dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
)
_LONGEST_LIST = 64


def number(value: float | None, missing: str = NOT_FINITE) -> str:
    """A number with three significant digits, whole ones in full.

    Args:
        value: None is what JSON has for a number that is not finite.
        missing: what None is called.
    """
    if value is None:
        return missing
    if not math.isfinite(value):
        return NOT_FINITE
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    digits, _, exponent = f"{value:.3g}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def share(value: float | None, missing: str = NOT_THERE) -> str:
    """A share as a percentage; only what is exactly none or all is written 0% or 100%."""
    if value is None:
        return missing
    if not math.isfinite(value):
        return NOT_FINITE
    if value in (0, 1):
        return f"{value:.0%}"
    if 0 < value < 5e-5:
        return "<0.01%"
    if 0.99995 <= value < 1:
        return ">99.99%"
    return f"{value:.2%}"


def close_number(value: float | None) -> str:
    """One of two numbers that are nearly the same, whose small difference is what matters."""
    return number(value) if value is None or not math.isfinite(value) else f"{value:#.5g}"


def id_list(ids: Sequence[int], longest: int = _LONGEST_LIST) -> str:
    """Ids separated by commas; of many, the first and how many follow."""
    told = ", ".join(str(i) for i in ids[:longest])
    rest = len(ids) - longest
    return f"{told} and {rest} more" if rest > 0 else told


def printable(page: str) -> str:
    """The page without characters that HTML forbids."""
    return page.translate(_UNPRINTABLE)
