"""Runs kernels in Triton's interpreter on the host's memory.

`TRITON_INTERPRET` must be set before a kernel's module is imported; tests/conftest.py does so for
the whole process. Nothing can be compiled in such a process: compilers run in one of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
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
        _spare_work()
        runtime = {
            argument: _as_tensor(argument, launch.arguments[argument], kind)
            for argument, kind in spec.arguments.items()
        }
        with _no_collection():
            function[grid_of(spec.grid, launch.sizes)](**runtime, **spec.constants)
        self.launched.append(launch)

    def run(self, launches: Iterable[Launch]) -> None:
        for launch in launches:
            self.launch(launch)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected: what a collected backend has left on a stream would run in between.

    The interpreter knows one grid at a time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


_prepared: set[int] = set()


def _spare_work() -> None:
    """Take work off the interpreter that changes no result.

    It changes Triton's language anew at every call of a device function, though all of that lasts
    until the launch is over, whoever launches. It computes whether sums of integers overflow and
    does nothing with the answer. It makes a table of all types whenever it looks one up.
    """
    from triton.runtime import interpreter

    if hasattr(interpreter, "spared"):
        return
    interpreter.spared = True
    prepare, type_of = interpreter._patch_lang, interpreter._get_np_dtype
    known = (interpreter.tl, interpreter.tl.core)
    types: dict[str, np.dtype] = {}

    def prepare_new(function):
        found = {id(value) for value in function.__globals__.values() if value in known}
        if found <= _prepared:
            return interpreter._LangPatchScope()
        scope = prepare(function)
        restore = scope.restore

        def restore_and_note():
            restore()
            _prepared.difference_update(found)

        _prepared.update(found)
        scope.restore = restore_and_note
        return scope

    def known_type(dtype):
        if dtype.name not in types:
            types[dtype.name] = type_of(dtype)
        return types[dtype.name]

    interpreter._patch_lang = prepare_new
    interpreter._get_np_dtype = known_type
    builder = interpreter.interpreter_builder
    assert not builder.options.debug, "an overflow would be an error"
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


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


def mend_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter do to bfloat16 what a GPU does.

    It keeps such numbers as their bits. Left alone, it multiplies the bits in `tl.dot`, and cuts a
    float32 off where a GPU rounds it to the nearest, ties to even.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    convert = InterpreterBuilder.create_fp_to_fp

    def widened(handle):
        return cast(None, handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    def rounded(handle):
        numbers = torch.from_numpy(np.ascontiguousarray(handle.data)).bfloat16()
        return TensorHandle(numbers.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def is_rounding(handle, target):
        return handle.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16

    def create_dot(self, a, b, *more):
        return dot(self, widened(a), widened(b), *more)

    def cast_impl(self, handle, target):
        return rounded(handle) if is_rounding(handle, target) else cast(self, handle, target)

    def create_fp_to_fp(self, handle, target, mode):
        if is_rounding(handle, target):
            return rounded(handle)
        return convert(self, handle, target, mode)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)
