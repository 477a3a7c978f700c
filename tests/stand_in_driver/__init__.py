"""A stand-in for the NVIDIA driver: commands that use it run in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("driver.c")
ROOT = Path(__file__).parents[2]
SIZES = {"i32": 4, "fp32": 4}


def compile_driver(folder: Path) -> Path:
    """Compile it as `libcuda.so.1` into `folder`; gives the folder."""
    compiler = ["cc"] if shutil.which("cc") else [sys.executable, "-m", "ziglang", "cc"]
    library = folder / "libcuda.so.1"
    command = [*compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library)]
    subprocess.run([*command, str(SOURCE)], check=True)
    return folder


@dataclass(kw_only=True)
class StandInDriver:
    """A compiled stand-in, and where it writes."""

    library: Path
    folder: Path

    def run(
        self,
        code: str,
        *,
        kernels: Mapping[str, Sequence[str]] | None = None,
        version: int = 13000,
        capability: int = 89,
        fault: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code in a process that finds the stand-in instead of a driver.

        `kernels` has the types of each entry's parameters, Triton's two hidden ones included.
        """
        table = "".join(
            " ".join([entry, *(str(SIZES.get(kind, 8)) for kind in types)]) + "\n"
            for entry, types in (kernels or {}).items()
        )
        (self.folder / "kernels").write_text(table)
        self.log.unlink(missing_ok=True)
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(self.library),
            "STAND_IN_LOG": str(self.log),
            "STAND_IN_KERNELS": str(self.folder / "kernels"),
            "STAND_IN_VERSION": str(version),
            "STAND_IN_CAPABILITY": str(capability),
            "PYTHONPATH": str(ROOT),
        }
        if fault:
            environment["STAND_IN_FAULT"] = "1"
        return subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def calls(self) -> list[str]:
        """The lines that the stand-in wrote."""
        return self.log.read_text().splitlines() if self.log.exists() else []
