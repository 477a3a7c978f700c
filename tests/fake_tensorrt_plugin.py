"""A stand-in for `tensorrt.plugin`: what is documented of it, so that registering can be tested.

Dimensions are symbols that can do no more than TensorRT's: a whole number stands on the right of
`+` and `*`, and dividing takes at least one symbol.
"""

from __future__ import annotations

import enum
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from plugins.aot_plugin import AotPlugin

RESERVED = {"outputs", "stream", "tactic"}


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    FP8 = 6
    BF16 = 7
    INT64 = 8


class Symbol:
    """A number that is known at run time."""

    def __init__(self, value: Callable[[Mapping[str, int]], int]) -> None:
        self.value = value

    def __add__(self, other: Symbol | int) -> Symbol:
        return _combined(self, other, lambda a, b: a + b)

    def __mul__(self, other: Symbol | int) -> Symbol:
        return _combined(self, other, lambda a, b: a * b)


def _combined(
    first: Symbol | int, second: Symbol | int, operation: Callable[[int, int], int]
) -> Symbol:
    return Symbol(lambda step: operation(number(first, step), number(second, step)))


def number(value: Any, step: Mapping[str, int]) -> int:
    """What a size is in a step whose dimensions are known by name."""
    if isinstance(value, SymInt32):
        return number(value.value, step)
    if isinstance(value, Symbol):
        return value.value(step)
    assert type(value) is int, f"{value!r} is neither a whole number nor a symbol"
    return value


class SymInt32:
    def __init__(self, value: Symbol | int) -> None:
        assert isinstance(value, Symbol | int)
        self.value = value


class SymExprs:
    def __init__(self, items: Sequence[SymInt32]) -> None:
        self.items = list(items)


class SymIntExprs(SymExprs):
    @classmethod
    def from_tuple(cls, items: Sequence[SymInt32]) -> SymIntExprs:
        assert items, "no published use passes none"
        assert all(type(item) is SymInt32 for item in items)
        return cls(items)


class KernelLaunchParams:
    __slots__ = ("block_x", "block_y", "block_z", "grid_x", "grid_y", "grid_z", "shared_mem")

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0 if name == "shared_mem" else 1)


class AutoTuneCombination:
    def __init__(self, io_types: str, layouts: str, tactics: Sequence[int] | None = None) -> None:
        assert tactics is None or all(tactic > 0 for tactic in tactics)
        self.io_types, self.layouts, self.tactics = io_types.split(", "), layouts, tactics


class TensorDesc:
    """A tensor; `shape` has numbers, -1 where `shape_expr` has a symbol, once they are known."""

    def __init__(self, shape_expr: Sequence[Symbol | int], dtype: DataType) -> None:
        assert isinstance(dtype, DataType)
        assert all(isinstance(size, Symbol | int) for size in shape_expr)
        self.shape_expr, self.dtype = list(shape_expr), dtype
        self._shape: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self._shape is None:
            raise ValueError("no shape information available at this stage")
        return self._shape

    def know_shape(self) -> None:
        self._shape = tuple(-1 if isinstance(size, Symbol) else size for size in self.shape_expr)


class FakeTensorRt(ModuleType):
    """`tensorrt` with its `plugin`, whose `registered` says what came in by plugin's name."""

    __version__ = "11.1"
    QuickPluginCreationRequest = enum.Enum("QuickPluginCreationRequest", ["STRICT_AOT"])
    DataType = DataType

    def __init__(self, name: str = "tensorrt_stand_in") -> None:
        super().__init__(name)
        self.registered: dict[str, dict[str, Callable[..., Any]]] = {}
        self.plugin = ModuleType(f"{name}.plugin")
        for part in (
            TensorDesc, KernelLaunchParams, AutoTuneCombination, SymInt32, SymExprs, SymIntExprs
        ):  # fmt: skip
            setattr(self.plugin, part.__name__, part)
        vars(self.plugin).update(
            cdiv=_cdiv,
            from_shape_expr=_from_shape_expr,
            register=self._decorator("register", _check_register),
            autotune=self._decorator("autotune", _check_autotune),
            aot_impl=self._decorator("aot_impl", _check_aot_impl),
        )

    def _decorator(self, kind: str, check: Callable[..., None]) -> Callable[[str], Any]:
        def named(identifier: str) -> Any:
            namespace, name = identifier.split("::")
            assert namespace not in {"", "trt", "tensorrt", "std"}
            assert "." not in identifier

            def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
                functions = self.registered.setdefault(name, {})
                assert kind not in functions, f"{name} has a {kind} already"
                assert kind == "register" or "register" in functions, f"{name} is not registered"
                check(inspect.signature(function), functions)
                functions[kind] = function
                return function

            return decorate

        return named


def _cdiv(first: Symbol | int, second: Symbol | int) -> Symbol:
    if isinstance(first, int) and isinstance(second, int):
        raise ValueError("Both arguments cannot be 'int's")
    return _combined(first, second, lambda a, b: -(-a // b))


def _from_shape_expr(shape_expr: tuple[Symbol | int, ...], dtype: DataType) -> TensorDesc:
    assert type(shape_expr) is tuple
    return TensorDesc(shape_expr, dtype)


def _check_register(signature: inspect.Signature, functions: Any) -> None:
    """Tensors first, then attributes; every one annotated, none with a default."""
    del functions
    kinds = []
    for name, parameter in signature.parameters.items():
        hint = parameter.annotation
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert parameter.default is inspect.Parameter.empty
        assert hint is not inspect.Parameter.empty and not isinstance(hint, str)
        kinds.append(hint is TensorDesc)
        if hint is not TensorDesc:
            assert name not in RESERVED
            assert typing.get_origin(hint) is np.ndarray or hint in (int, float, str, bool, bytes)
    assert kinds == sorted(kinds, reverse=True)
    assert kinds[0]
    assert signature.return_annotation is TensorDesc or _outputs(signature.return_annotation)


def _check_autotune(signature: inspect.Signature, functions: dict[str, Any]) -> None:
    *tensors, outputs = signature.parameters
    assert [*tensors, outputs] == [*_names(functions, tensors=True), "outputs"]
    assert _outputs(signature.parameters["outputs"].annotation)
    assert signature.return_annotation == list[AutoTuneCombination]


def _check_aot_impl(signature: inspect.Signature, functions: dict[str, Any]) -> None:
    """Every tensor and attribute as registered: TensorRT passes all, by position."""
    expected = [*_names(functions, tensors=True), *_names(functions, tensors=False)]
    assert list(signature.parameters) == [*expected, "outputs", "tactic"]
    registered = inspect.signature(functions["register"]).parameters
    for name in expected:
        assert signature.parameters[name].annotation == registered[name].annotation
    assert _outputs(signature.parameters["outputs"].annotation)
    assert signature.parameters["tactic"].annotation is int
    name, ptx, launch, extras = typing.get_args(signature.return_annotation)
    assert {name, ptx} <= {str, bytes}
    assert launch is KernelLaunchParams
    assert issubclass(extras, SymExprs)


def _outputs(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple and set(typing.get_args(hint)) == {TensorDesc}


def _names(functions: dict[str, Any], *, tensors: bool) -> list[str]:
    parameters = inspect.signature(functions["register"]).parameters
    return [name for name, p in parameters.items() if (p.annotation is TensorDesc) is tensors]


class BuiltLayer:
    """A plugin layer, as TensorRT would build it from an ONNX node."""

    def __init__(
        self,
        trt: FakeTensorRt,
        plugin: AotPlugin,
        attributes: Mapping[str, int | float],
        shapes: Mapping[str, Sequence[int | str]],
        types: Mapping[str, str],
    ) -> None:
        """Build a layer.

        Args:
            trt: where the plugin is registered.
            plugin: which.
            attributes: of the node.
            shapes: of the inputs; a name is a dimension that varies.
            types: TensorRT's names by input.
        """
        functions = trt.registered[plugin.name]
        # A parser gives arrays of one number, in the order of registration.
        arrays = {
            name: np.array([attributes[name]], np.int32 if kind == "INT" else np.float32)
            for name, kind in plugin.attributes.items()
        }
        inputs = [
            TensorDesc([_dimension(size) for size in shapes[name]], DataType[types[name]])
            for name in plugin.inputs
        ]
        described = functions["register"](*inputs, **arrays)
        outputs = described if isinstance(described, tuple) else (described,)
        self.outputs = dict(zip(plugin.outputs, outputs, strict=True))
        for tensor in (*inputs, *outputs):
            tensor.know_shape()
        (self.combination,) = functions["autotune"](*inputs, list(outputs))
        self.kernels = {
            tactic: functions["aot_impl"](*inputs, *arrays.values(), list(outputs), tactic)
            for tactic in self.combination.tactics or [0]
        }


def _dimension(size: int | str) -> Symbol | int:
    return size if isinstance(size, int) else Symbol(lambda step: step[size])
