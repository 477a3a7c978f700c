"""What the stand-ins write down: which handles live, and which rule was broken."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable


class MisuseError(AssertionError):
    """The caller did what the real library answers with undefined behaviour; names the rule."""


class Ledger:
    """Of one fake GPU.

    `violations` also has what could not be raised: destructors must not raise.
    """

    def __init__(self) -> None:
        self.violations: list[str] = []
        self._live: dict[int, tuple[str, tuple[int, ...]]] = {}
        self._numbers = itertools.count(1)

    def misuse(self, rule: str) -> MisuseError:
        """Note a broken rule; the caller raises what this gives."""
        self.violations.append(rule)
        return MisuseError(rule)

    def born(self, kind: str, needs: Iterable[int] = ()) -> int:
        """A handle exists from now on, and needs others as long as it does."""
        number = next(self._numbers)
        self._live[number] = (kind, tuple(needs))
        return number

    def died(self, number: int) -> None:
        """A handle was released."""
        kind, _ = self._live.pop(number)
        for other, needs in self._live.values():
            if number in needs:
                self.violations.append(f"a {kind} was released before the {other} that needs it")

    def lives(self, number: int) -> bool:
        return number in self._live

    @property
    def live(self) -> dict[str, int]:
        """How many handles of each kind there are."""
        return dict(Counter(kind for kind, _ in self._live.values()))
