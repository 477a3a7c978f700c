"""The second engine of a variant, the decode graph: steps of one token that choose the next one.

It has the same model and the same cache tensors as the first engine, no logits, and one profile.
The manifest describes it in the variant's details (`decode_graph`), of which it replaces what is
its own: path, profiles, layers, plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from model.contract import StepContract, TensorSpec
from runtime.sampling_tail import ENGINE_TAIL_INPUTS

if TYPE_CHECKING:
    from runtime.manifest import Variant

# Where a variant's details describe it.
DECODE_GRAPH = "decode_graph"


class EngineInterface(Protocol):
    """What any engine takes and gives."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """All inputs, in order."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """All outputs, in order."""

    @property
    def past(self) -> tuple[TensorSpec, ...]:
        """The inputs that are cache tensors."""

    @property
    def aliases(self) -> tuple[tuple[str, str], ...]:
        """Pairs (past, present) that share one buffer."""

    def as_dict(self) -> dict[str, object]:
        """JSON-ready form."""

    def bytes_per_token(self) -> int:
        """Cache bytes that one token of one sequence takes."""


@dataclass(frozen=True)
class DecodeGraphContract:
    """Inputs and outputs of a decode graph, in its order.

    Attributes:
        step: of the model in it; S and M are 1.
    """

    step: StepContract

    @property
    def tokens(self) -> tuple[TensorSpec, ...]:
        """As in the step."""
        return self.step.tokens

    @property
    def past(self) -> tuple[TensorSpec, ...]:
        """As in the step."""
        return self.step.past

    @property
    def present(self) -> tuple[TensorSpec, ...]:
        """As in the step."""
        return self.step.present

    @property
    def rules(self) -> tuple[TensorSpec, ...]:
        """What tokens are chosen by (`EngineTailInputs`), [B] each."""
        return tuple(
            TensorSpec(name=name, dtype="float32", shape=("B",)) for name in ENGINE_TAIL_INPUTS
        )

    @property
    def choice(self) -> tuple[TensorSpec, TensorSpec]:
        """The chosen token, and whether it is certain."""
        return (
            TensorSpec(name="next_id", dtype="int64", shape=("B", 1)),
            TensorSpec(name="fits", dtype="bool", shape=("B", 1)),
        )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """All inputs, in order."""
        return (*self.step.inputs, *self.rules)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """All outputs, in order: no logits."""
        return (*self.choice, *self.present)

    @property
    def aliases(self) -> tuple[tuple[str, str], ...]:
        """As in the step."""
        return self.step.aliases

    def as_dict(self) -> dict[str, object]:
        """JSON-ready form, as the manifest stores it."""
        return {
            "inputs": [spec.as_dict() for spec in self.inputs],
            "outputs": [spec.as_dict() for spec in self.outputs],
            "aliases": [list(pair) for pair in self.aliases],
        }

    def bytes_per_token(self) -> int:
        """As in the step."""
        return self.step.bytes_per_token()


def decode_graph_of(variant: Variant) -> Variant | None:
    """The decode graph of an engine as a variant of its own, None where it has none.

    Raises:
        ValueError: the variant's details are not what a build writes.
    """
    own: Any = variant.details.get(DECODE_GRAPH)
    if own is None:
        return None
    if not isinstance(own, dict) or not isinstance(own.get("path"), str):
        raise ValueError(
            f"variant {variant.name} describes its decode graph as {own!r}; no build writes that"
        )
    if not isinstance(own.get("width"), int):
        raise ValueError(
            f"the decode graph of variant {variant.name} compares {own.get('width')!r} candidates; "
            "no build writes that"
        )
    return replace(variant, path=own["path"], details={**variant.details, **own})


def engine_files(variant: Variant) -> Sequence[str]:
    """Paths of a variant's engines, the first one's first."""
    graph = decode_graph_of(variant)
    return [variant.path] if graph is None else [variant.path, graph.path]
