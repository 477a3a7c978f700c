"""Runs the kernels of a custom op in Triton's interpreter, on memory that shows what they miss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins.custom_op import CustomOp
from plugins.kernel_spec import Launch
from tests.interpreter import InterpreterLauncher

# Bytes around every array: room for a row that is written too far, or the heap would break before
# a test can say so.
GUARD = 1 << 15
NAN = 0xFF  # a byte of which every float type makes NaN


class Guarded:
    """A tensor among bytes that must stay as they are; all of them make NaN at first."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = torch.Size(shape).numel() * dtype.itemsize
        self._bytes = torch.full((GUARD + size + GUARD,), NAN, dtype=torch.uint8)
        self._end = GUARD + size
        self.tensor = self._bytes[GUARD : self._end].view(dtype).view(shape)

    @property
    def address(self) -> int:
        return self._bytes.data_ptr() + GUARD

    def check(self, name: str) -> None:
        before, after = self._bytes[:GUARD], self._bytes[self._end :]
        assert (before == NAN).all(), f"written in front of {name}"
        assert (after == NAN).all(), f"written behind {name}"


def guarded(tensor: Tensor) -> Guarded:
    copy = Guarded(tuple(tensor.shape), tensor.dtype)
    copy.tensor.copy_(tensor)
    return copy


@dataclass(frozen=True, kw_only=True)
class KernelRun:
    """What one run of an op's kernels left behind."""

    outputs: dict[str, Tensor]
    launches: tuple[Launch, ...]
    workspace: Tensor  # bytes
    workspace_address: int

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The array that the first launch got as its argument `name`."""
        start = int(self.launches[0].arguments[name]) - self.workspace_address
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.workspace[start : start + size].view(dtype).view(shape)


def run_kernels(
    op: CustomOp,
    attributes: Mapping[str, int | float],
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    *,
    times: int = 1,
) -> KernelRun:
    """Run the op on copies of its inputs.

    Outputs and workspace hold NaN before, counters zero. Checked after: nothing was written beyond
    an array, inputs are as they were, counters are zero, and each further time gives the same bits.
    """
    arrays = {name: guarded(tensor) for name, tensor in inputs.items()}
    arrays |= {name: Guarded(shape, dtype) for name, (shape, dtype) in outputs.items()}
    shapes = {name: tuple(array.tensor.shape) for name, array in arrays.items()}
    dtypes = {
        name: str(array.tensor.dtype).removeprefix("torch.") for name, array in arrays.items()
    }
    kernels = op.make_kernels(attributes, shapes, dtypes)
    workspace = Guarded((kernels.workspace_bytes(shapes),), torch.uint8)
    counters = Guarded((kernels.counters(shapes),), torch.int32)
    counters.tensor.zero_()
    launcher = InterpreterLauncher(kernels.specs)
    addresses = {name: array.address for name, array in arrays.items()}
    launches = kernels.launches(shapes, addresses, workspace.address, counters.address)

    results: list[dict[str, Tensor]] = []
    for _ in range(times):
        for name in outputs:
            arrays[name].tensor.view(torch.uint8).fill_(NAN)
        launcher.run(launches)
        results.append({name: arrays[name].tensor.clone() for name in outputs})
        for name, array in {**arrays, "workspace": workspace, "counters": counters}.items():
            array.check(name)
        for name, tensor in inputs.items():
            assert torch.equal(arrays[name].tensor, tensor), f"{name} was written"
        assert not counters.tensor.any(), "counters are not zero again"
        for name, tensor in results[0].items():
            assert torch.equal(results[-1][name], tensor), f"{name} differs from the first time"
    return KernelRun(
        outputs=results[0],
        launches=launches,
        workspace=workspace.tensor.clone(),
        workspace_address=workspace.address,
    )


# ‖kernel - float64‖ / ‖float64‖. Half precision: rounding of the result, 2^-11 and 2^-8 relative at
# most; the interpreter cuts a cast to bfloat16 off where a GPU rounds it.
NORM_ERRORS = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 5e-3}


def assert_close_to_float64(op: CustomOp, actual: Tensor, expected: Tensor) -> None:
    """Within the op's tolerances element by element, and close as a whole.

    Args:
        op: whose tolerances; bfloat16 has none there and is judged as a whole.
        actual: the kernels' output.
        expected: float64, of the same inputs.
    """
    assert expected.dtype == torch.float64
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= NORM_ERRORS[actual.dtype], f"relative error {error:.1e}"
    tolerance = op.tolerances.get(str(actual.dtype).removeprefix("torch."))
    if tolerance is not None:
        torch.testing.assert_close(actual.double(), expected, **tolerance.as_kwargs())
