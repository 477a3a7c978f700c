"""In which number formats a step keeps weights and cache, by the name of its precision.

Arithmetic, the residual stream and everything else that a step writes for itself are float32: they
are a few thousand numbers, which cost nothing beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from plugins.projection.packing import GROUPS, WeightFormat, WeightKind

StepPrecision = Literal["fp16", "bf16", "fp32", "int8", "int4"]
STEP_PRECISIONS: tuple[StepPrecision, ...] = get_args(StepPrecision)
FloatKind = Literal["float32", "float16", "bfloat16"]

_FLOATS: dict[StepPrecision, FloatKind] = {
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "int8": "float16",
    "int4": "float16",
}
# Shorter groups lose less and cost more: the choice of the models for the CPU and of the engines.
_PREFERRED_GROUPS = tuple(sorted((size for size in GROUPS if size <= 64), reverse=True))


@dataclass(frozen=True, kw_only=True)
class StepFormats:
    """How one precision stores what a step reads.

    Attributes:
        precision: its name.
        kind: type of the weights of projections.
        table: type of the embedding and the head.
        float_kind: type of cached keys and values, of expert tables and of the small matrices that
            decide which keys and experts count (mask scores and routers), which stay wide.
    """

    precision: StepPrecision
    kind: WeightKind
    table: WeightFormat
    float_kind: FloatKind

    @classmethod
    def of(cls, precision: StepPrecision) -> StepFormats:
        """The formats of a precision.

        Raises:
            ValueError: no such precision.
        """
        if precision not in STEP_PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(STEP_PRECISIONS)}, got {precision!r}"
            )
        floats = _FLOATS[precision]
        narrow = precision in ("int8", "int4")
        kind: WeightKind = floats
        if precision == "int8" or precision == "int4":
            kind = precision
        return cls(
            precision=precision,
            kind=kind,
            # A head of 4 bits costs more than it saves: it decides every token.
            table=WeightFormat(kind="int8" if narrow else floats),
            float_kind=floats,
        )

    @property
    def small(self) -> WeightFormat:
        """Of mask-score and router rows."""
        return WeightFormat(kind=self.float_kind)

    @property
    def dot(self) -> FloatKind:
        """Of what a prompt's products multiply, on tensor cores where there are any for it."""
        return self.float_kind

    def projection(self, columns: int) -> WeightFormat:
        """Of a projection of so many columns.

        Raises:
            ValueError: columns that no group of 4-bit weights divides.
        """
        if self.kind != "int4":
            return WeightFormat(kind=self.kind)
        for group in _PREFERRED_GROUPS:
            if columns % group == 0:
                return WeightFormat(kind="int4", group=group)
        raise ValueError(
            f"{columns} columns cannot be stored as int4, expected a multiple of "
            f"{_PREFERRED_GROUPS[-1]}; use int8"
        )
