"""What a number may depend on: the machine's names for itself, and versions of packages."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

# Distributions whose version may explain a number.
_PACKAGES = (
    "doge-tensorrt",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "tensorrt",
    "tensorrt-rtx-cu13",
)


def cpu_name() -> str:
    """What this machine calls its processor."""
    return proc_field("cpuinfo", "model name") or platform.processor()


def system_name() -> str:
    """Operating system and instruction set, `Linux x86_64`."""
    return f"{platform.system()} {platform.machine()}"


def describe_versions(*more: str) -> dict[str, str]:
    """Python and those of the interesting packages, and of `more`, that are installed."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def proc_field(file: str, name: str) -> str | None:
    """A line's value in a file of /proc, None where there is none."""
    path = Path("/proc") / file
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None
