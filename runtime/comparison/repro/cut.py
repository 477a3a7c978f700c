"""Cut an ONNX model to what computes one value from others. Needs the package onnx_ir.

Polygraphy's `surgeon extract` and `debug reduce` do the same through onnx_graphsurgeon, which is
no dependency of this project; onnx_ir is what the models are made with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.backends.base import BackendUnavailableError

if TYPE_CHECKING:
    import onnx_ir as ir

# Weights up to this many bytes stand in the model's own file; protobuf ends at 2 GiB.
_INSIDE = 64 << 20


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """A value of a model, as a piece takes or gives it.

    Attributes:
        name: of the value in the whole model.
        dtype: numpy's name.
        shape: sizes, None where it is dynamic; None where the model does not say.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None


class Graph:
    """An ONNX model to cut pieces out of; it is not changed.

    Attributes:
        path: its file.
        names: of its computed values.
    """

    def __init__(self, path: Path) -> None:
        """Read the graph; weights are read when a piece is saved.

        Raises:
            BackendUnavailableError: onnx_ir is missing.
            OSError: there is no such model.
        """
        if importlib.util.find_spec("onnx_ir") is None:
            raise BackendUnavailableError(
                "cutting a piece out of an ONNX model needs the package onnx_ir; run: pip install "
                "'doge-tensorrt[export]', or compare without --repro"
            )
        import onnx_ir

        self.path = path
        self._model = onnx_ir.load(path)
        self._inputs = [value.name or "" for value in self._model.graph.inputs]
        computed = (value for node in self._model.graph for value in node.outputs)
        self._values = {v.name: v for v in (*computed, *self._model.graph.inputs) if v.name}
        self.names = frozenset(self._values) - set(self._inputs)

    def spec(self, name: str) -> InputSpec:
        """Type and shape of a computed value or an input."""
        return _spec(self._values[name])

    def cut(self, output: str, stops: Collection[str]) -> Piece:
        """What computes `output` from the nearest of `stops` and from inputs of the model.

        Args:
            output: a name among `names`.
            stops: names of values to take as they are.
        """
        import onnx_ir as ir

        values = [name for name in stops if name in self.names and name != output]
        graph = self._model.graph
        while True:
            piece = ir.convenience.extract(graph, [*values, *self._inputs], [output])
            computed = {value.name for node in piece for value in node.outputs}
            # A node with several results computes one of the stops itself.
            clear = [name for name in values if name not in computed]
            if len(clear) == len(values):
                break
            values = clear
        used = [value for value in piece.inputs if value.uses()]
        piece.inputs.clear()
        piece.inputs.extend(used)
        model = ir.Model(piece, ir_version=self._model.ir_version)
        model.functions.update(_needed_functions(self._model, piece))
        return Piece(model)


class Piece:
    """A part of a model that can be saved."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What it computes from, in the model's order."""
        return tuple(map(_spec, self._model.graph.inputs))

    @property
    def nodes(self) -> int:
        """How many nodes it has."""
        return len(self._model.graph)

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of each stored tensor."""
        return {
            name: 0 if value.const_value is None else value.const_value.nbytes
            for name, value in self._model.graph.initializers.items()
        }

    def save(self, path: Path) -> None:
        """Write it, with weights beside it where they are large."""
        import onnx_ir as ir

        if sum(self.weights.values()) > _INSIDE:
            ir.save(self._model, path, external_data=f"{path.name}.data")
            return
        ir.external_data.load_to_model(self._model)
        ir.save(self._model, path)


def _spec(value: ir.Value) -> InputSpec:
    dtype = "float32" if value.dtype is None else str(value.dtype.numpy())
    shape = value.shape
    sizes = None if shape is None else tuple(d if isinstance(d, int) else None for d in shape)
    return InputSpec(name=value.name or "", dtype=dtype, shape=sizes)


def _needed_functions(
    model: ir.Model, nodes: Iterable[ir.Node]
) -> dict[tuple[str, str, str], ir.Function]:
    """The model-local functions that nodes call, and those that these call."""
    found: dict[tuple[str, str, str], ir.Function] = {}
    for node in nodes:
        name = node.op_identifier()
        if name in model.functions and name not in found:
            function = model.functions[name]
            found[name] = function
            found |= _needed_functions(model, function)
    return found
