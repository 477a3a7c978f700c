"""What a kernel must compute, and how close it comes."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from plugins.custom_op import CustomOp
from plugins.registry import OPS
from runtime.backends.base import BackendUnavailableError
from runtime.gpu_checks.number_formats import Array
from runtime.kernel_library import OpUse

# Needs PyTorch; imported when a definition runs.
_DEFINITION = "plugins.numpy_definition"
# ‖found - expected‖ / ‖expected‖ at most. Half precisions: the result alone is rounded by up to
# 2^-11 and 2^-8 of itself, by 0.4 of that on average, which leaves room for as much again inside.
# float32: sums in another order and the GPU's approximate exponential, 2^-22 each.
NORM_LIMITS = {"float32": 2.0**-18, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def require_torch() -> None:
    """Make sure that definitions can run.

    Raises:
        BackendUnavailableError: PyTorch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise BackendUnavailableError(
            "kernels are compared with definitions in PyTorch, which is not installed; run: pip "
            "install 'doge-tensorrt[torch]'"
        )


def op_of(use: OpUse) -> CustomOp:
    """The custom op that a model uses."""
    return {op.name: op for op in OPS}[use.op]


def expected_output(use: OpUse, inputs: Mapping[str, Array]) -> Array:
    """What the op's definition gives in float64 for inputs as they are stored, in float64 too."""
    module = importlib.import_module(_DEFINITION)
    output: Array = module.run_definition(op_of(use), use.attributes, inputs)
    return output


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far an output is from the definition's.

    Attributes:
        unusable: how many numbers are not finite, which is what unwritten ones are.
        largest: error of a number at most; None where some are unusable, as the two below.
        norm: ‖found - expected‖ / ‖expected‖.
        norm_limit: what it may be.
        of_tolerance: largest ratio of an error to what the op's tolerances allow there; None too
            where the op has none for the type.
    """

    unusable: int
    largest: float | None
    norm: float | None
    norm_limit: float
    of_tolerance: float | None

    def problems(self) -> list[str]:
        """What is out of limits, in sentences."""
        if self.unusable:
            return [f"{self.unusable} numbers were not written or are not finite"]
        found = []
        if self.norm is not None and not self.norm <= self.norm_limit:
            found.append(f"the relative error is {self.norm:.2g}, at most {self.norm_limit:.2g}")
        if self.of_tolerance is not None and not self.of_tolerance <= 1:
            found.append(f"a number is off by {self.of_tolerance:.3g} times the op's tolerance")
        return found

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "max_error": _rounded(self.largest),
            "norm_error": _rounded(self.norm),
            "norm_limit": _rounded(self.norm_limit),
            "error_of_tolerance": _rounded(self.of_tolerance),
        }


def difference(op: CustomOp, dtype: str, found: Array, expected: Array) -> Difference:
    """Compare an output with the definition's.

    Args:
        op: whose tolerances.
        dtype: of the output.
        found: float64, of any shape.
        expected: float64, of that shape.
    """
    limit = NORM_LIMITS[dtype]
    unusable = int(found.size - np.isfinite(found).sum())
    if unusable:
        return Difference(
            unusable=unusable, largest=None, norm=None, norm_limit=limit, of_tolerance=None
        )
    error = np.abs(found - expected)
    size = float(np.linalg.norm(expected))
    norm = float(np.linalg.norm(error)) / size if size else float(error.max(initial=0.0))
    tolerance = op.tolerances.get(dtype)
    ratio = None
    if tolerance is not None:
        allowed = tolerance.atol + tolerance.rtol * np.abs(expected)
        ratio = float((error / allowed).max(initial=0.0))
    return Difference(
        unusable=0,
        largest=float(error.max(initial=0.0)),
        norm=norm,
        norm_limit=limit,
        of_tolerance=ratio,
    )


def _rounded(value: float | None) -> float | None:
    """Four significant digits; what JSON has no number for becomes null."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")
