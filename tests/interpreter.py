"""Runs kernels in Triton's interpreter on the host's memory.

`TRITON_INTERPRET` must be set before a kernel's module is imported; tests/conftest.py does so for
the whole process. Nothing can be compiled in such a process: compilers run in one of their own.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterable

import torch

from plugins.kernel_spec import POINTER_ALIGNMENT, KernelSpec, Launch, grid_of

_TORCH_TYPES = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8,
    "u8": torch.uint8, "i32": torch.int32, "i64": torch.int64,
}  # fmt: skip


class InterpreterLauncher:
    """A launcher for addresses of host memory, in place of one for a GPU."""

    def __init__(self, specs: Iterable[KernelSpec]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self.launched: list[Launch] = []

    def launch(self, launch: Launch, stream: int = 0) -> None:
        assert stream == 0, "host memory has no streams"
        spec = self._specs[launch.kernel]
        assert launch.arguments.keys() == spec.arguments.keys(), (
            launch.arguments.keys() ^ spec.arguments.keys()
        )
        module, _, name = spec.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        runtime = {
            argument: _as_tensor(argument, launch.arguments[argument], kind)
            for argument, kind in spec.arguments.items()
        }
        function[grid_of(spec.grid, launch.sizes)](**runtime, **spec.constants)
        self.launched.append(launch)

    def run(self, launches: Iterable[Launch]) -> None:
        for launch in launches:
            self.launch(launch)


def _as_tensor(name, value, kind):
    if not kind.startswith("*"):
        return value
    assert isinstance(value, int)
    assert value % POINTER_ALIGNMENT == 0, f"{name} is not aligned: {value:#x}"
    dtype = _TORCH_TYPES[kind[1:]]
    if value == 0:
        return torch.zeros(1, dtype=dtype)  # never read; a null pointer on a GPU
    # One element is enough: the interpreter reads and writes by address.
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(value), dtype=dtype)
