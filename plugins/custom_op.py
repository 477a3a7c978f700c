"""What a custom op of the domain `doge` consists of, whichever backend runs it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from plugins.kernel_spec import OpKernels, Shapes

AttributeType = Literal["INT", "FLOAT"]

DOMAIN = "doge"
# A node names its plugin by these two attributes; without them TensorRT-RTX 1.7 expands the ONNX
# function even when the plugin is registered. Drop them once the parser prefers plugins by itself.
PLUGIN_NAMESPACE = "doge"
PLUGIN_VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How close an implementation must come to the definition, elementwise.

    Attributes:
        atol: absolute error allowed.
        rtol: error allowed relative to the expected magnitude.
    """

    atol: float
    rtol: float

    def as_kwargs(self) -> dict[str, float]:
        """Keyword arguments for the `assert_close` and `assert_allclose` of torch and numpy."""
        return {"atol": self.atol, "rtol": self.rtol}


@dataclass(frozen=True, kw_only=True)
class CustomOp:
    """One op of the domain `doge`.

    Attributes:
        name: op type of the ONNX node, e.g. `DynamicMaskAttention`.
        inputs: input names of the ONNX node, in order.
        outputs: output names of the ONNX node, in order.
        attributes: type of each ONNX attribute by name, `INT` or `FLOAT`.
        integer_inputs: inputs of type int64; all others are floats.
        exact_inputs: float inputs that stay float32 where a model is lowered to half precision.
        output_shape: a rule for each dimension of the only output: products such as
            `query.1 * query.3` of an input's dimensions.
        definition: `module:function` of the eager PyTorch definition, which *is* the op.
        torch_op: qualified name of the `torch.library` op, `doge::...`.
        function: `module:function` that makes the ONNX function body for given attributes.
        kernels: `module:function` that makes the op's `OpKernels`.
        tolerances: by numpy dtype name, how close every other implementation must come.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, AttributeType]
    integer_inputs: tuple[str, ...] = ()
    exact_inputs: tuple[str, ...] = ()
    output_shape: tuple[str, ...]
    definition: str
    torch_op: str
    function: str
    kernels: str
    tolerances: dict[str, Tolerance]

    def load_definition(self) -> Callable[..., Any]:
        """Import the eager definition; needs PyTorch."""
        return _load(self.definition)

    def load_function(self) -> Callable[..., Any]:
        """Import the maker of the ONNX function; needs onnxscript."""
        return _load(self.function)

    def make_kernels(
        self, attributes: Mapping[str, int | float], shapes: Shapes, dtypes: Mapping[str, str]
    ) -> OpKernels:
        """The op's kernels, see `OpKernels`; needs neither Triton nor a GPU.

        Raises:
            ValueError: attributes, shapes or types that no kernel covers.
        """
        kernels: OpKernels = _load(self.kernels)(attributes, shapes, dtypes)
        return kernels


def _load(reference: str) -> Callable[..., Any]:
    module_name, _, name = reference.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module_name), name)
    return loaded
