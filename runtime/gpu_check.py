"""Check kernels and engines on the GPU present: python runtime/gpu_check.py [BUNDLE ...]."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path

from model.config import UnsupportedModelError
from plugins.launcher import LaunchError
from runtime.backends.base import BackendUnavailableError
from runtime.command import NEGATIVE, SUCCESS, CommandParser, UsageError, print_json, run_command
from runtime.gpu_checks import SECTIONS
from runtime.gpu_checks.bundles import open_bundles
from runtime.gpu_checks.cuda_device import CudaDevice
from runtime.gpu_checks.environment import checkout_commit
from runtime.gpu_checks.evidence import Evidence
from runtime.gpu_checks.kernel_reference import require_torch
from runtime.gpu_checks.kernels import KernelsSection
from runtime.gpu_checks.report import print_evidence
from runtime.gpu_checks.section import (
    CheckedBundle,
    Deadline,
    Report,
    Section,
    Subject,
    overall,
    run_sections,
)

ERRORS = (BackendUnavailableError, LaunchError, OSError, UnsupportedModelError, ValueError)
_BUILD_FOLDER = Path("build")
_EVIDENCE_FOLDER = Path("docs/evidence")
_TIME_LIMIT_S = 420.0
_SEEDS = 2**31

logger = logging.getLogger("runtime.gpu_check")


def make_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser(
        "gpu_check",
        "Compare the kernels of bundles with their definitions and their engines with the "
        "reference, time them, and write what was found to an evidence file. Needs an NVIDIA GPU; "
        "without one it says what it would do.",
    )
    parser.add_argument(
        "bundles", type=Path, nargs="*", metavar="BUNDLE",
        help=f"folders of bundles with kernels (all below {_BUILD_FOLDER}/)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help=f"where the evidence file goes ({_EVIDENCE_FOLDER} where there is a "
        f"{_EVIDENCE_FOLDER.parent} folder, else the current one)",
    )  # fmt: skip
    parser.add_argument(
        "--sections", metavar="NAME[,NAME...]",
        help=f"leave out all others (of {', '.join(section.name for section in SECTIONS)}); "
        "shares of the bandwidth need bandwidth",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="of the random inputs (a new one; it is recorded)")
    parser.add_argument(
        "--time-limit", type=float, default=_TIME_LIMIT_S, metavar="SECONDS",
        help="start nothing new after that long; what was left out is recorded",
    )  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> int:
    """Check, write the evidence, print it, and tell the verdict by the exit status."""
    begin = time.monotonic()
    deadline = Deadline(_positive("--time-limit", args.time_limit))
    seed = secrets.randbelow(_SEEDS) if args.seed is None else args.seed
    if seed < 0:
        raise UsageError(f"--seed must be at least 0, got {seed}")
    sections = _chosen(args.sections)
    bundles = open_bundles(args.bundles, _BUILD_FOLDER)
    folder = args.output or _default_folder()
    try:
        device = CudaDevice.open()
    except LaunchError as error:
        if not args.json:
            _print_plan(sections, bundles, folder)
        raise LaunchError(
            f"{error}; nothing was checked: run this where there is an NVIDIA GPU"
        ) from error
    with closing(device):
        reports = _check(device, sections, bundles, seed, deadline)
    gpu = device.facts.gpu
    evidence = Evidence(
        gpu=gpu.name,
        compute_capability="{}.{}".format(*gpu.compute_capability),
        driver_cuda="{}.{}".format(*gpu.driver_version),
        project_version=importlib.metadata.version("doge-tensorrt"),
        commit=checkout_commit(),
        command=_command(bundles, args.sections, seed, args.time_limit),
        date=datetime.now(UTC).date().isoformat(),
        seed=seed,
        seconds=round(time.monotonic() - begin, 1),
        verdict=overall(reports),
        sections=reports,
    )
    path = evidence.write(folder)
    if args.json:
        print_json({"evidence": str(path), **evidence.as_dict()})
    else:
        print_evidence(evidence)
        print(f"evidence {path}")
    return SUCCESS if evidence.verdict == "pass" else NEGATIVE


def _check(
    device: CudaDevice,
    sections: Sequence[Section],
    bundles: tuple[CheckedBundle, ...],
    seed: int,
    deadline: Deadline,
) -> dict[str, Report]:
    """Load every bundle's kernels, which may be refused, and only then run the sections."""
    if any(section.name == KernelsSection.name for section in sections):
        require_torch()
    with ExitStack() as stack:
        launchers = {
            bundle.name: stack.enter_context(closing(device.open_launcher(bundle.library)))
            for bundle in bundles
        }
        logger.info("checking %s with seed %d", device.facts.gpu.name, seed)
        subject = Subject(
            device=device, bundles=bundles, launchers=launchers, seed=seed, deadline=deadline
        )
        return run_sections(sections, subject, lambda name: logger.info("section %s", name))


def _chosen(names: str | None) -> tuple[Section, ...]:
    """The sections with these names, in the order in which they run; all when None."""
    if names is None:
        return SECTIONS
    wanted = names.split(",")
    if unknown := sorted(set(wanted) - {section.name for section in SECTIONS}):
        raise UsageError(
            f"--sections: there is no {', '.join(map(repr, unknown))}; there are "
            f"{', '.join(section.name for section in SECTIONS)}"
        )
    return tuple(section for section in SECTIONS if section.name in wanted)


def _command(
    bundles: Sequence[CheckedBundle], sections: str | None, seed: int, time_limit: float
) -> str:
    """What gives the same inputs again."""
    words = ["python", "runtime/gpu_check.py", *(bundle.name for bundle in bundles)]
    if sections is not None:
        words += ["--sections", sections]
    words += ["--seed", str(seed)]
    if time_limit != _TIME_LIMIT_S:
        words += ["--time-limit", f"{time_limit:g}"]
    return shlex.join(words)


def _print_plan(
    sections: Sequence[Section], bundles: Sequence[CheckedBundle], folder: Path
) -> None:
    print("With a GPU this would:")
    for section in sections:
        for line in section.plan(bundles):
            print(f"  {line}")
    print(f"  write evidence-<gpu>.json to {folder}")


def _default_folder() -> Path:
    return _EVIDENCE_FOLDER if _EVIDENCE_FOLDER.parent.is_dir() else Path()


def _positive(flag: str, value: float) -> float:
    if not value > 0:
        raise UsageError(f"{flag} must be positive, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(make_parser(), run, argv, ERRORS)


if __name__ == "__main__":
    sys.exit(main())
