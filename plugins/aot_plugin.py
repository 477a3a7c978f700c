"""Plugins of standard TensorRT whose kernel is in the engine, as data. No Triton, no TensorRT.

The ahead-of-time form of `tensorrt.plugin`: an engine holds a plugin's PTX, and with it rules by
which it computes grid and arguments from the shapes of a step. It needs neither Python nor a
plugin library where it runs. In exchange a plugin is one kernel, whose arguments are the plugin's
inputs, int32 numbers computed from dimensions, and its outputs; it has no scratch memory.

A custom op is one such plugin or two (`export/lowerings/aot_plugins.py`). Each op's `aot.py` says
which, `aot_registry.py` lists them, `tensorrt_aot.py` registers them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plugins.custom_op import AttributeType
from plugins.kernel_spec import KernelSpec, Shapes

# Dynamic shared memory of a block, bytes: what every GPU gives without being asked for more, and
# TensorRT is not documented to ask.
SHARED_LIMIT = 48 * 1024
_LIKE = "like "
Attributes = Mapping[str, int | float]
# A number of a launch: whole, or TensorRT's symbolic expression of one.
Size = Any
SpecMaker = Callable[[Attributes, Shapes, Mapping[str, str]], Sequence[KernelSpec]]


@dataclass(frozen=True, kw_only=True)
class AotCode:
    """A kernel as an engine holds it.

    Attributes:
        entry: name of the function in the PTX.
        ptx: its parameters are the plugin's inputs, extras and outputs, and no others.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block, at most `SHARED_LIMIT`.
    """

    entry: str
    ptx: str = field(repr=False)
    threads: int
    shared_bytes: int


@dataclass(frozen=True, kw_only=True)
class AotPlugin:
    """One plugin: a single kernel, or several that compute the same.

    A rule is a product of factors such as `tokens * query.3 * ceil(splits / 8)`: whole numbers,
    dimensions of an input, integer attributes, sizes, constants of the kernel, and quotients of
    these rounded up.

    Attributes:
        name: op type of the ONNX node, and the plugin's name in the namespace `doge`; no custom
            op has it, so that plugins of both forms can be registered at once.
        inputs: tensors in the order of the node and of the kernel's arguments.
        outputs: likewise.
        attributes: type of each ONNX attribute by name.
        sizes: named rules, for shapes, grids and arguments.
        extras: sizes that the kernel takes as int32 between inputs and outputs, at least one:
            what TensorRT does with none is not documented.
        output_shapes: a rule for each dimension by output.
        output_types: by output, numpy's name of its type or `like <input>`.
        kernels: makes the kernels at given attributes, shapes and types, all names as in `inputs`
            and `outputs`; what varies between launches is -1 and has no influence. With several,
            the number of each, counted from 1, is a tactic of TensorRT's. It raises ValueError for
            what no kernel covers.
        tactics: how many kernels there are.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, AttributeType]
    sizes: Mapping[str, str]
    extras: tuple[str, ...]
    output_shapes: Mapping[str, tuple[str, ...]]
    output_types: Mapping[str, str]
    kernels: SpecMaker
    tactics: int = 1

    def make_kernels(
        self, attributes: Attributes, shapes: Shapes, dtypes: Mapping[str, str]
    ) -> tuple[KernelSpec, ...]:
        """The kernels, checked; see `kernels`.

        Raises:
            ValueError: attributes, shapes or types that no kernel covers.
        """
        specs = tuple(self.kernels(attributes, shapes, dtypes))
        assert len(specs) == self.tactics, f"{self.name} has {len(specs)} kernels"
        arguments = [*self.inputs, *self.extras, *self.outputs]
        for spec in specs:
            assert list(spec.arguments) == arguments, f"{spec.name} takes {list(spec.arguments)}"
            assert {spec.arguments[name] for name in self.extras} == {"i32"}, spec.name
        return specs

    def output_type(self, name: str, dtypes: Mapping[str, str]) -> str:
        """Numpy's name of an output's type, from those of the inputs."""
        rule = self.output_types[name]
        return dtypes[rule.removeprefix(_LIKE)] if rule.startswith(_LIKE) else rule


class Sizes:
    """The sizes of one plugin layer, as numbers or as symbols.

    The same arithmetic serves both: products, and quotients by `ceil_div`. A symbol takes a whole
    number on its right side only, and `ceil_div` gets at least one symbol.
    """

    def __init__(
        self,
        plugin: AotPlugin,
        attributes: Attributes,
        shapes: Mapping[str, Sequence[Size]],
        *,
        spec: KernelSpec | None = None,
        ceil_div: Callable[[Size, Size], Size] | None = None,
    ) -> None:
        """Sizes of a layer.

        Args:
            plugin: which.
            attributes: of the node.
            shapes: dimensions by input.
            spec: the kernel, whose constants its rules may name.
            ceil_div: quotient of symbols, rounded up; not needed where all are numbers.
        """
        self._plugin = plugin
        self._shapes = shapes
        self._ceil_div = ceil_div
        constants = {} if spec is None else spec.constants
        self._numbers = {
            name: value
            for name, value in {**attributes, **constants}.items()
            if isinstance(value, int)
        }

    def extras(self) -> tuple[Size, ...]:
        """The kernel's arguments between inputs and outputs."""
        return tuple(self.evaluate(self._plugin.sizes[name]) for name in self._plugin.extras)

    def grid(self, spec: KernelSpec) -> tuple[Size, Size, Size]:
        """Programs along x, y and z."""
        x, y, z = (self.evaluate(rule) for rule in spec.grid)
        return x, y, z

    def output_shape(self, name: str) -> tuple[Size, ...]:
        """Dimensions of an output."""
        return tuple(self.evaluate(rule) for rule in self._plugin.output_shapes[name])

    def evaluate(self, rule: str) -> Size:
        """The value of a rule.

        Raises:
            ValueError: a rule that cannot be read, or a name that stands for nothing.
        """
        number, symbol = 1, None
        for text in rule.split("*"):
            factor = self._factor(text.strip())
            if isinstance(factor, int):
                number *= factor
            else:
                symbol = factor if symbol is None else symbol * factor
        if symbol is None:
            return number
        return symbol if number == 1 else symbol * number

    def _factor(self, text: str) -> Size:
        quotient = re.fullmatch(r"ceil\(\s*([\w.]+)\s*/\s*([\w.]+)\s*\)", text)
        if not quotient:
            return self._atom(text)
        top, bottom = self._atom(quotient[1]), self._atom(quotient[2])
        if isinstance(top, int) and isinstance(bottom, int):
            return -(-top // bottom)
        assert self._ceil_div is not None, "symbols come with their division"
        return self._ceil_div(top, bottom)

    def _atom(self, text: str) -> Size:
        if text.isdecimal():
            return int(text)
        tensor, _, axis = text.partition(".")
        if axis.isdecimal() and tensor in self._shapes:
            return self._shapes[tensor][int(axis)]
        if text in self._plugin.sizes:
            return self.evaluate(self._plugin.sizes[text])
        if text in self._numbers:
            return self._numbers[text]
        raise ValueError(f"{self._plugin.name}: {text!r} in a rule stands for nothing")
