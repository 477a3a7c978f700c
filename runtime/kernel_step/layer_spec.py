"""A decoder layer as one unit: the numbers that make its launches, and what it reads.

A TensorRT plugin keeps nothing but whole numbers and floats, so everything that the launches of a
layer depend on is spelled out as such, and put together again where the engine runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self, get_args

from model.config import RouterMode
from plugins.custom_op import AttributeType
from plugins.projection.matrix import MAX_BATCH
from plugins.projection.packing import WeightFormat
from runtime.backends.base import Limits
from runtime.kernel_step.formats import STEP_PRECISIONS, StepFormats, StepPrecision
from runtime.kernel_step.packed_weights import StoredTensor, stored_tensors
from runtime.kernel_step.step_model import SLOT_MULTIPLE, ExpertGrid, InnerValues, StepModel

# The layer whose names stand for every layer's.
ANY_LAYER = "layers.0."
# Tables that all layers share.
SHARED = ("cos", "sin")
_PARTS: dict[str, type[ExpertGrid | InnerValues]] = {
    "experts": ExpertGrid,
    "inner_values": InnerValues,
}
_ROUTER_MODES: tuple[RouterMode, ...] = get_args(RouterMode)
_LIMITS = ("max_batch_size", "max_input_len")


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Everything that the launches of one decoder layer depend on; equal for all layers.

    Attributes:
        model: its numbers.
        precision: how its weights and its cache are stored.
        max_batch_size: most sequences of a step.
        max_input_len: most tokens of a sequence in a step.
    """

    model: StepModel
    precision: StepPrecision
    max_batch_size: int
    max_input_len: int

    def __post_init__(self) -> None:
        if self.model.slots != self.model.max_seq_len:
            below = self.model.max_seq_len // SLOT_MULTIPLE * SLOT_MULTIPLE
            raise ValueError(
                f"max_seq_len is {self.model.max_seq_len}, expected a multiple of {SLOT_MULTIPLE} "
                f"for our kernels; build with --max-seq-len {below or self.model.slots}"
            )
        if self.max_batch_size > MAX_BATCH:
            raise ValueError(
                f"our kernels take up to {MAX_BATCH} sequences, max_batch_size is "
                f"{self.max_batch_size}; build with --max-batch-size {MAX_BATCH}"
            )

    @classmethod
    def of(cls, model: StepModel, precision: StepPrecision, limits: Limits) -> Self:
        """The layers of a model within the limits of a bundle.

        Raises:
            ValueError: limits that our kernels do not cover.
        """
        return cls(
            model=model,
            precision=precision,
            max_batch_size=limits.max_batch_size,
            max_input_len=limits.max_input_len,
        )

    @property
    def rows_alone(self) -> bool:
        """Whether a router cuts the scores of all tokens together, so that sequences run alone."""
        experts = self.model.experts
        return experts is not None and experts.router_mode == "mixed"

    @property
    def formats(self) -> StepFormats:
        """Of weights and cache; embedding and head are not narrowed, as in every engine."""
        formats = StepFormats.of(self.precision)
        return replace(formats, table=WeightFormat(kind=formats.float_kind))

    @property
    def cache_kinds(self) -> tuple[str, ...]:
        """What is kept of a token, in the contract's order."""
        return ("key", "value", "score") if self.model.score_heads else ("key", "value")

    @property
    def weights(self) -> dict[str, StoredTensor]:
        """The stored tensors that a layer reads, without the prefix of its number, in order."""
        stored = stored_tensors(replace(self.model, layers=1), self.formats)
        own = {
            name.removeprefix(ANY_LAYER): tensor
            for name, tensor in stored.items()
            if name.startswith(ANY_LAYER)
        }
        return {name: stored[name] for name in SHARED} | own

    @property
    def attributes(self) -> dict[str, int | float]:
        """Every number, by the names of `attribute_kinds`; 0 for a part that a model lacks."""
        numbers: dict[str, int | float] = {
            "precision": STEP_PRECISIONS.index(self.precision),
            **{name: getattr(self, name) for name in _LIMITS},
        }
        for field in fields(StepModel):
            value = getattr(self.model, field.name)
            if field.name not in _PARTS:
                numbers[field.name] = float(value) if field.name == "eps" else int(value)
                continue
            for part in fields(_PARTS[field.name]):
                number = 0 if value is None else getattr(value, part.name)
                if part.name == "router_mode":
                    number = 0 if value is None else _ROUTER_MODES.index(number)
                numbers[f"{field.name}_{part.name}"] = int(number)
        return numbers

    @classmethod
    def from_attributes(cls, numbers: Mapping[str, int | float]) -> Self:
        """The layer that has these attributes.

        Raises:
            ValueError: numbers that no layer has.
        """
        model: dict[str, Any] = {}
        for field in fields(StepModel):
            if field.name in _PARTS:
                model[field.name] = _part(field.name, numbers)
            elif field.name == "eps":
                model["eps"] = float(numbers["eps"])
            else:
                number = int(numbers[field.name])
                model[field.name] = bool(number) if field.type == "bool" else number
        return cls(
            model=StepModel(**model),
            precision=_named(STEP_PRECISIONS, "precision", numbers["precision"]),
            **{name: int(numbers[name]) for name in _LIMITS},
        )


def attribute_kinds() -> dict[str, AttributeType]:
    """Type of every attribute of a layer, by name."""
    kinds: dict[str, AttributeType] = dict.fromkeys(("precision", *_LIMITS), "INT")
    for field in fields(StepModel):
        if field.name in _PARTS:
            for part in fields(_PARTS[field.name]):
                kinds[f"{field.name}_{part.name}"] = "INT"
        else:
            kinds[field.name] = "FLOAT" if field.name == "eps" else "INT"
    return kinds


def _part(name: str, numbers: Mapping[str, int | float]) -> ExpertGrid | InnerValues | None:
    """One part of a model; a count of 0 says that it has none."""
    if not numbers[f"{name}_count"]:
        return None
    values: dict[str, Any] = {}
    for field in fields(_PARTS[name]):
        number = int(numbers[f"{name}_{field.name}"])
        if field.name == "router_mode":
            values[field.name] = _named(_ROUTER_MODES, f"{name}_{field.name}", number)
        else:
            values[field.name] = bool(number) if field.type == "bool" else number
    return _PARTS[name](**values)


def _named(names: tuple[Any, ...], what: str, number: float) -> Any:
    if not 0 <= number < len(names):
        raise ValueError(f"{what} is {number}, expected a whole number below {len(names)}")
    return names[int(number)]
