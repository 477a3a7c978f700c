"""Runs plugins/persistent_step/persistent_step.cu on the CPU: see shim.h."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from plugins.kernel_spec import Launch
from plugins.persistent_step.launches import SOURCE

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
KERNEL_SOURCE = ROOT / SOURCE
_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class ShimError(Exception):
    """The threads cannot go on, or met where they must not."""


class Shim:
    """The compiled kernels of one model.

    Attributes:
        arguments: types of the kernel's arguments by name, in order.
    """

    def __init__(self, library: Path, arguments: Mapping[str, str]) -> None:
        self.arguments = arguments
        self._library = ctypes.CDLL(str(library))
        for function in (self._library.run_step, self._library.run_barriers):
            function.restype = ctypes.c_char_p
            function.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64)

    def run(self, launch: Launch, blocks: int, seed: int = 0) -> None:
        """Run a launch on host memory.

        Raises:
            ShimError: as the class says.
        """
        assert launch.arguments.keys() == self.arguments.keys()
        self._call(self._library.run_step, self.arguments, launch, blocks, seed)

    def run_barriers(self, launch: Launch, blocks: int, seed: int = 0) -> None:
        """Run `grid_barriers`."""
        types = {"barrier": "*i32", "count": "i32"}
        self._call(self._library.run_barriers, types, launch, blocks, seed)

    def plant(self, change: int) -> None:
        """Let a change of the source hold that asks for it: `if (planted != change)`."""
        self._library.plant(change)

    @property
    def prefetched(self) -> int:
        """Cache lines that the last launch has asked for ahead."""
        return int(self._library.prefetched_lines())

    def _call(self, function, types, launch, blocks, seed):
        values = [
            _TYPES.get(kind, ctypes.c_uint64)(launch.arguments[name])
            for name, kind in (*types.items(),)
        ]
        values += [ctypes.c_uint64(0), ctypes.c_uint64(0)]  # a launcher's two hidden pointers
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        problem = function(ctypes.addressof(pointers), blocks, seed)
        if problem:
            raise ShimError(problem.decode())


def compile_shim(
    folder: Path,
    constants: Mapping[str, int],
    arguments: Mapping[str, str],
    source: str | None = None,
) -> Shim:
    """Compile the kernel for the CPU.

    Args:
        folder: gets the library.
        constants: the source's macros.
        arguments: of `persistent_step`.
        source: in place of the file's.
    """
    number = len(list(folder.glob("*.so")))  # a library of one name is loaded once
    kernel = KERNEL_SOURCE
    if source is not None:
        kernel = folder / f"kernel_{number}.cu"
        kernel.write_text(source, encoding="utf-8")
    library = folder / f"shim_{number}.so"
    compiler = ["g++"] if shutil.which("g++") else [sys.executable, "-m", "ziglang", "c++"]
    subprocess.run(
        [
            *compiler, "-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror",
            "-Wno-unknown-warning-option", "-Wno-unknown-pragmas", "-Wno-uninitialized",
            "-Wno-maybe-uninitialized", "-Wno-unused-but-set-variable",
            *(f"-D{name}={value}" for name, value in constants.items()),
            f'-DKERNEL_SOURCE="{kernel}"', "-include", str(FOLDER / "shim.h"),
            str(FOLDER / "shim.cpp"), "-o", str(library),
        ],
        check=True,
    )  # fmt: skip
    return Shim(library, arguments)
