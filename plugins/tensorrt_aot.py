"""Registers the plugins whose kernels an engine holds, with `tensorrt.plugin` of standard TensorRT.

Written against the documentation of that module and its Python source (TensorRT 11.1), and tested
against a stand-in: it has not run with the library.

TensorRT calls the three functions of a plugin while it builds: `describe` for types and shapes of
outputs, `tune` for tactics, `implement` for the PTX, the launch and the extra arguments as symbols
that it evaluates at each step. Nothing here is needed where the engine runs. Its checks read the
functions' signatures, so these are made from the plugin's data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import GenericAlias
from typing import Any

import numpy as np
import numpy.typing as npt

from plugins.aot_plugin import AotCode, AotPlugin, Attributes, Sizes
from plugins.aot_registry import AOT_PLUGINS
from plugins.custom_op import PLUGIN_NAMESPACE
from plugins.kernel_spec import KernelSpec
from plugins.plugin_host import PluginError

# Numpy's names of number types by TensorRT's.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
}
# What `AutoTuneCombination` calls the types that it does not call as TensorRT does.
_TUNE_NAMES = {"FLOAT": "FP32", "HALF": "FP16"}


@dataclass(kw_only=True)
class AotHost:
    """What the plugins of one process share.

    Attributes:
        codes: the code of each kernel by name, for the GPU that is built for.
        used: kernels that TensorRT has asked for.
        problems: what went wrong in a plugin's function; TensorRT reports only that one failed.
    """

    codes: dict[str, AotCode] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def code_of(self, spec: KernelSpec) -> AotCode:
        """The code of a kernel.

        Raises:
            PluginError: it was not compiled.
        """
        self.used.add(spec.name)
        if spec.name not in self.codes:
            raise PluginError(
                f"no kernel {spec.name} was compiled; there are "
                f"{', '.join(sorted(self.codes)) or 'none'}"
            )
        return self.codes[spec.name]


class _PluginFunctions:
    """The functions of one plugin, with the signatures that TensorRT wants."""

    def __init__(self, trt: Any, trtp: Any, plugin: AotPlugin, host: AotHost) -> None:
        self._trt = trt
        self._trtp = trtp
        self._plugin = plugin
        self._host = host

    def describe(self, *tensors: Any, **attributes: Any) -> Any:
        """Types and shapes of the outputs."""
        plugin, trtp = self._plugin, self._trtp
        shapes = {name: desc.shape_expr for name, desc in self._named(tensors)}
        dtypes = {name: _dtype(desc) for name, desc in self._named(tensors)}
        sizes = Sizes(plugin, _numbers(attributes.items()), shapes, ceil_div=trtp.cdiv)
        outputs = tuple(
            trtp.from_shape_expr(
                sizes.output_shape(name), self._type(plugin.output_type(name, dtypes))
            )
            for name in plugin.outputs
        )
        return outputs if len(outputs) > 1 else outputs[0]

    def tune(self, *arguments: Any) -> list[Any]:
        """One combination of types, linear layouts, and a tactic for each kernel if several."""
        *inputs, outputs = arguments
        names = [desc.dtype.name for desc in (*inputs, *outputs)]
        text = ", ".join(_TUNE_NAMES.get(name, name) for name in names)
        count = self._plugin.tactics
        tactics = list(range(1, count + 1)) if count > 1 else None
        return [self._trtp.AutoTuneCombination(text, "LINEAR", tactics)]

    def implement(self, *arguments: Any) -> tuple[bytes, bytes, Any, Any]:
        """The kernel's name and PTX, its launch, and its arguments between inputs and outputs."""
        plugin, trtp = self._plugin, self._trtp
        *given, _, tactic = arguments
        tensors, values = given[: len(plugin.inputs)], given[len(plugin.inputs) :]
        attributes = _numbers(zip(plugin.attributes, values, strict=True))
        spec = self._spec(tensors, attributes, int(tactic or 0))
        code = self._host.code_of(spec)
        shapes = {name: desc.shape_expr for name, desc in self._named(tensors)}
        sizes = Sizes(plugin, attributes, shapes, spec=spec, ceil_div=trtp.cdiv)
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = sizes.grid(spec)
        launch.block_x = code.threads
        launch.shared_mem = code.shared_bytes
        extras = trtp.SymIntExprs.from_tuple([trtp.SymInt32(size) for size in sizes.extras()])
        return code.entry.encode(), code.ptx.encode(), launch, extras

    def _spec(self, tensors: Sequence[Any], attributes: Attributes, tactic: int) -> KernelSpec:
        specs = self._plugin.make_kernels(
            attributes,
            {name: tuple(desc.shape) for name, desc in self._named(tensors)},
            {name: _dtype(desc) for name, desc in self._named(tensors)},
        )
        return specs[max(tactic, 1) - 1]

    def _named(self, tensors: Sequence[Any]) -> list[tuple[str, Any]]:
        return list(zip(self._plugin.inputs, tensors, strict=True))

    def _type(self, dtype: str) -> Any:
        (name,) = (name for name, known in _DTYPES.items() if known == dtype)
        return getattr(self._trt.DataType, name)

    def register(self) -> None:
        """Hand all three to TensorRT."""
        plugin, trtp = self._plugin, self._trtp
        identifier = f"{PLUGIN_NAMESPACE}::{plugin.name}"
        desc = trtp.TensorDesc
        tensors = dict.fromkeys(plugin.inputs, desc)
        # Arrays of one number each: TensorRT 11.1 makes a plain number of a field's array by int(),
        # which numpy 2.4 refuses for an array that has a dimension.
        arrays = {
            name: npt.NDArray[np.int32] if kind == "INT" else npt.NDArray[np.float32]
            for name, kind in plugin.attributes.items()
        }
        outputs = GenericAlias(tuple, (desc,) * len(plugin.outputs))
        result = outputs if len(plugin.outputs) > 1 else desc
        tuned = GenericAlias(list, (trtp.AutoTuneCombination,))
        kernel = GenericAlias(tuple, (bytes, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs))
        trtp.register(identifier)(self._signed(self.describe, {**tensors, **arrays}, result))
        trtp.autotune(identifier)(self._signed(self.tune, {**tensors, "outputs": outputs}, tuned))
        trtp.aot_impl(identifier)(
            self._signed(
                self.implement, {**tensors, **arrays, "outputs": outputs, "tactic": int}, kernel
            )
        )

    def _signed(
        self, function: Callable[..., Any], parameters: Mapping[str, Any], result: Any
    ) -> Callable[..., Any]:
        """The function with a signature, noting its problems where TensorRT drops them."""

        def signed(*arguments: Any, **named: Any) -> Any:
            try:
                return function(*arguments, **named)
            except (PluginError, ValueError) as error:
                self._host.problems.append(f"{self._plugin.name}: {error}")
                raise

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signed.__dict__["__signature__"] = inspect.Signature(
            [inspect.Parameter(name, kind, annotation=hint) for name, hint in parameters.items()],
            return_annotation=result,
        )
        return signed


def _numbers(values: Iterable[tuple[str, Any]]) -> dict[str, int | float]:
    """Attributes as plain numbers, whatever their arrays' dimensions are."""
    return {name: np.asarray(value).reshape(()).item() for name, value in values}


def _dtype(desc: Any) -> str:
    """Numpy's name of a tensor's type."""
    name = desc.dtype.name
    if name not in _DTYPES:
        raise PluginError(f"a tensor is {name}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


# TensorRT takes each name once, and keeps the functions as long as the process lives.
_HOSTS: dict[str, AotHost] = {}


def register_aot_plugins(trt: Any, trtp: Any) -> AotHost:
    """Register every plugin; once for a process.

    Args:
        trt: the module `tensorrt`.
        trtp: the module `tensorrt.plugin`.

    Returns:
        What the plugins share; put the kernels' code into it before a model is parsed.
    """
    product = trt.__name__
    if product not in _HOSTS:
        host = AotHost()
        for plugin in AOT_PLUGINS:
            _PluginFunctions(trt, trtp, plugin, host).register()
        _HOSTS[product] = host
    return _HOSTS[product]
