"""Where a step finds what it reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Places:
    """Addresses by name; 0 stands for what a model does not have.

    Attributes:
        weight: of a stored tensor (`packed_weights.stored_tensors`).
        area: of an area of the step (`areas.step_areas`). The residual stream is `x` before a
            layer, `x_between` its attention and what follows, and `x_out` behind it: one place,
            unless the caller wants each apart.
        cache: of a layer's cached `key`, `value` or `score`.
        position: of the rotary positions int64 [B] of each sequence's first token; 0 where they
            are the slots, as in the area `positions`.
    """

    weight: Callable[[str], int]
    area: Callable[[str], int]
    cache: Callable[[int, str], int]
    position: int = 0

    def of_layer(self, layer: int, name: str) -> int:
        """Address of a layer's tensor."""
        return self.weight(f"layers.{layer}.{name}")
