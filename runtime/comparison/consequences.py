"""What follows from another choice that rounding explains, and so explains nothing itself.

Where two rungs keep another key or pick another expert for one token because their scores tie but
for rounding, everything computed from that choice differs by as much as it likes. Those tokens are
known: the token itself behind the choice in its layer, and in later layers every token from it on,
since attention reads them. All others are compared as strictly as ever.
"""

from __future__ import annotations

# No slot: nothing follows.
NEVER = 1 << 62


class Consequences:
    """Of one prompt: from which slot on values follow from such a choice, in the order of taps."""

    def __init__(self, *, mixes: bool) -> None:
        """Begin a prompt.

        Args:
            mixes: whether the router reads the numbers of a prompt's tokens across each other, so
                that what one token's choice moves can move any other's.
        """
        self._mixes = mixes
        self._earlier: dict[int, int] = {}
        self._now: dict[int, int] = {}
        self._prefill = True

    def next_step(self) -> None:
        """The prompt's pass is over, or one more decode step."""
        self._prefill = False
        for layer, slot in self._now.items():
            self._earlier[layer] = min(slot, self._earlier.get(layer, NEVER))
        self._now = {}

    def note(self, layer: int, slot: int) -> None:
        """A near tie fell otherwise for the token in `slot`."""
        self._now[layer] = min(slot, self._now.get(layer, NEVER))

    def first_slot(self, layer: int | None, kind: str) -> int:
        """From which slot on a tap follows from the choices noted before it; `NEVER` for none.

        Args:
            layer: of the tap, None outside the layers.
            kind: of the tap.
        """
        if kind == "embedding":
            return NEVER
        before = [
            slot
            for noted in (self._earlier, self._now)
            for where, slot in noted.items()
            if layer is None or where < layer
        ]
        here = [] if layer is None else [self._now.get(layer, NEVER)]
        found = min((*before, *here), default=NEVER)
        return 0 if self._mixes and self._prefill and found < NEVER else found
