"""One kernel case: run twice on poisoned memory, compare, then time."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from plugins.custom_op import CustomOp
from plugins.kernel_spec import Launch, OpKernels
from plugins.launcher import Launcher
from runtime.gpu_checks.device import CheckDevice
from runtime.gpu_checks.guarded_memory import GuardedMemory, Snapshot, guarded_memory
from runtime.gpu_checks.kernel_reference import Difference, difference, expected_output, op_of
from runtime.gpu_checks.number_formats import STORAGE, Array, from_storage, to_storage
from runtime.gpu_checks.workloads import WORKLOADS, Case, Workload
from runtime.gpu_checks.workloads.workload import stored_bytes
from runtime.kernel_library import OpUse

# Names of what a launch needs beside an op's inputs and outputs.
_WORKSPACE, _COUNTERS = "the workspace", "the counters"


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """A use of an op at concrete shapes.

    Attributes:
        bundle: name of the bundle.
        use: how its model uses the op.
        case: the shapes.
    """

    bundle: str
    use: OpUse
    case: Case

    @property
    def workload(self) -> Workload:
        """How the op is checked."""
        return WORKLOADS[self.use.op]

    @property
    def op(self) -> CustomOp:
        """The op."""
        return op_of(self.use)

    @property
    def dtype(self) -> str:
        """Type of the output, by which the use is told from the same one in other precisions."""
        return self.use.dtypes[self.op.outputs[0]]

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.bundle}, {self.use.op} {self.dtype}, {self.case.label}"

    @cached_property
    def kernels(self) -> OpKernels:
        """The op's kernels."""
        return self.use.make_kernels()

    def random(self, seed: int) -> np.random.Generator:
        """Random numbers of this case alone: whatever else runs, they are the same for a seed."""
        key = repr((self.use.op, self.use.attributes, self.use.dtypes, self.case.shapes))
        return np.random.default_rng([seed, zlib.crc32(f"{key} {self.case.filled}".encode())])

    def stored(self, numbers: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs as the device holds them."""
        return {name: to_storage(array, self.use.dtypes[name]) for name, array in numbers.items()}

    def describe(self) -> dict[str, Any]:
        """JSON-ready: what is run."""
        return {
            "bundle": self.bundle,
            "op": self.use.op,
            "dtype": self.dtype,
            "attributes": dict(self.use.attributes),
            "dtypes": dict(self.use.dtypes),
            "nodes": self.use.nodes,
            "case": self.case.label,
            "shapes": {name: list(shape) for name, shape in self.case.shapes.items()},
        }

    def output_bytes(self) -> dict[str, int]:
        """Size of every output."""
        return {name: stored_bytes(self.use, self.case, (name,)) for name in self.op.outputs}

    def scratch_bytes(self) -> tuple[int, int]:
        """Sizes of the workspace and of the counters."""
        shapes = self.case.shapes
        return self.kernels.workspace_bytes(shapes), 4 * self.kernels.counters(shapes)


def compare_case(
    device: CheckDevice, launcher: Launcher, case: KernelCase, stored: Mapping[str, Array]
) -> tuple[list[str], dict[str, Any]]:
    """Run a case twice on fresh poison and compare it with the definition.

    Args:
        device: where it runs.
        launcher: its kernels.
        case: what to run.
        stored: its inputs.

    Returns:
        Everything that is wrong, in sentences, and the errors, JSON-ready.

    Raises:
        LaunchError: the launch or the GPU failed.
    """
    workspace, counters = case.scratch_bytes()
    with guarded_memory(
        device, stored, {**case.output_bytes(), _WORKSPACE: workspace}, {_COUNTERS: counters}
    ) as memory:
        launches = _launches(case, memory)
        snapshots = [_run(device, launcher, launches, memory) for _ in range(2)]
    numbers = {
        name: from_storage(array, case.use.dtypes[name]).reshape(case.case.shapes[name])
        for name, array in stored.items()
    }
    found = _difference(case, snapshots[0], expected_output(case.use, numbers))
    problems = found.problems() + _memory_problems(case, snapshots)
    return problems, found.as_dict()


def _launches(case: KernelCase, memory: GuardedMemory) -> tuple[Launch, ...]:
    return case.kernels.launches(
        case.case.shapes,
        {name: memory.addresses[name] for name in case.case.shapes},
        memory.addresses[_WORKSPACE],
        memory.addresses[_COUNTERS],
    )


def _run(
    device: CheckDevice, launcher: Launcher, launches: tuple[Launch, ...], memory: GuardedMemory
) -> Snapshot:
    memory.reset()
    for launch in launches:
        launcher.launch(launch, device.stream)
    return memory.read()


def _difference(case: KernelCase, snapshot: Snapshot, expected: Array) -> Difference:
    (name,) = case.op.outputs
    stored = snapshot.bytes_of(name).view(STORAGE[case.dtype])
    found = from_storage(stored, case.dtype).reshape(case.case.shapes[name])
    return difference(case.op, case.dtype, found, expected)


def _memory_problems(case: KernelCase, snapshots: list[Snapshot]) -> list[str]:
    """What the runs did to memory that they should not have."""
    problems = []
    for snapshot in snapshots:
        problems += [f"something was written {place}" for place in snapshot.broken_guards()]
        written = filter(snapshot.changed, case.op.inputs)
        problems += [f"input {name} was written" for name in written]
        if snapshot.changed(_COUNTERS):
            problems.append("the counters are not zero again")
    (name,) = case.op.outputs
    first, second = (snapshot.bytes_of(name) for snapshot in snapshots)
    if not np.array_equal(first, second):
        # Not bytes: several may belong to one number.
        item = first.size // max(prod(case.case.shapes[name]), 1)
        differing = (first != second).reshape(-1, item).any(axis=1).sum()
        problems.append(f"{differing} numbers differ between two runs")
    return list(dict.fromkeys(problems))
