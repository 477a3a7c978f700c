"""Section: the GPU, its driver, the machine, versions, and which kernels ran."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.environment import cpu_name, describe_versions
from runtime.gpu_checks.device import DeviceFacts
from runtime.gpu_checks.section import CheckedBundle, Report, Subject

_CHECKOUT = Path(__file__).parent
_PACKAGES = ("cuda-python", "cuda-bindings", "triton", "tensorrt-rtx", "tensorrt-cu13")


class EnvironmentSection:
    """What numbers of the other sections depend on.

    Attributes:
        name: `environment`.
    """

    name = "environment"

    def plan(self, bundles: Sequence[CheckedBundle]) -> list[str]:
        """One line for the machine and one for each bundle's kernels."""
        return [
            "describe the GPU, its driver, this machine and versions",
            *(
                f"load {len(bundle.library.names)} kernels of {bundle.name}, compiled for "
                f"{', '.join(bundle.library.targets)}"
                for bundle in bundles
            ),
        ]

    def run(self, subject: Subject, earlier: Mapping[str, Report]) -> Report:
        """Describe."""
        del earlier
        return {
            "verdict": "pass",
            "gpu": describe_gpu(subject.device.facts),
            "machine": {
                "system": f"{platform.system()} {platform.release()} {platform.machine()}",
                "cpu": cpu_name(),
            },
            "versions": describe_versions(*_PACKAGES),
            "bundles": [_bundle(bundle, subject.device.facts) for bundle in subject.bundles],
        }


def describe_gpu(facts: DeviceFacts) -> dict[str, Any]:
    """JSON-ready; `memory_bandwidth_gb_per_s` is what its clock and bus allow, at two a clock."""
    peak = 2 * facts.memory_clock_khz * facts.memory_bus_bits / 8 / 1e6
    return {
        "multiprocessors": facts.multiprocessors,
        "memory_bytes": facts.memory_bytes,
        "l2_bytes": facts.l2_bytes,
        "clock_mhz": round(facts.clock_khz / 1e3),
        "memory_clock_mhz": round(facts.memory_clock_khz / 1e3),
        "memory_bus_bits": facts.memory_bus_bits,
        "memory_bandwidth_gb_per_s": round(peak, 1) if peak else None,
        "kernel_module": facts.kernel_module,
    }


def _bundle(bundle: CheckedBundle, facts: DeviceFacts) -> dict[str, Any]:
    """Where it came from, and the kernels that this GPU runs."""
    manifest, library = bundle.bundle.manifest, bundle.library
    return {
        "name": bundle.name,
        "source": manifest.source.name,
        "weights_sha256": manifest.source.weights_sha256,
        "project_version": manifest.project_version,
        "generation": manifest.generation,
        "triton": library.triton_version,
        "kernels": [
            {
                "name": entry.name,
                "target": entry.target,
                "toolkit": entry.toolkit,
                "sha256": entry.sha256,
            }
            for entry in library.best_for(facts.gpu)
        ],
    }


def checkout_commit() -> str | None:
    """The commit that this runs from, None where git does not tell."""
    texts = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                ["git", *command], cwd=_CHECKOUT, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        texts.append(done.stdout.strip())
    head, changes = texts
    return f"{head}+changes" if changes else head
