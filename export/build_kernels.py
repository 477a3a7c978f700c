"""Compile a bundle's kernels: python export/build_kernels.py BUNDLE --target sm89. Needs no GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.bundle_writer import BundleWriteError, BundleWriter
from export.engine import DTYPES, PRECISIONS
from export.graph import MODEL_NAME
from export.kernel_build import op_uses, specs_of_steps, write_kernels
from export.kernel_compiler import KernelCompileError
from export.progress import BuildProgress
from runtime.backends.base import BackendUnavailableError
from runtime.bundle import Bundle
from runtime.command import SUCCESS, CommandParser, UsageError, print_json, run_command
from runtime.kernel_library import KERNEL_FOLDER, KernelLibrary, OpUse

TARGETS = ("sm86", "sm89", "sm90", "sm120")
ERRORS = (
    BackendUnavailableError,
    BundleWriteError,
    KernelCompileError,
    OSError,
    ValueError,
)


def make_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser("build_kernels", "Compile the GPU kernels that a bundle's model needs.")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the kernels are added to it")
    parser.add_argument(
        "--target", default=",".join(TARGETS), help="GPU architectures, e.g. sm89,sm86"
    )
    parser.add_argument(
        "--precision",
        default="fp16",
        metavar="P[,P...]",
        help=f"number formats, of {', '.join(PRECISIONS)}",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Compile, put the kernels into the bundle and print what is in it."""
    Bundle.open(args.bundle)  # before anything is made beside it
    targets = tuple(args.target.split(","))
    progress = BuildProgress(quiet=args.quiet)
    with BundleWriter(args.bundle) as writer, progress.shown():
        bundle = writer.previous
        if bundle is None:
            raise ValueError(f"bundle {args.bundle} was replaced by something that is none")
        uses = _uses(bundle, args.precision.split(","))
        with progress.stage(f"compile kernels for {', '.join(targets)}"):
            steps = specs_of_steps(bundle)
            library = write_kernels(uses, targets, writer, bundle, step_specs=steps)
        writer.adopt(bundle, lambda file: file.role != "kernels")
        writer.publish(bundle.manifest)
    if args.json:
        print_json({"bundle": str(args.bundle), **library.as_dict()})
    else:
        _print(args.bundle, library)
    return SUCCESS


def _uses(bundle: Bundle, precisions: Sequence[str]) -> tuple[OpUse, ...]:
    unknown = [name for name in precisions if name not in DTYPES]
    if unknown:
        raise UsageError(
            f"--precision {','.join(unknown)} is unknown; there are {', '.join(DTYPES)}"
        )
    model = bundle.file(MODEL_NAME)
    return tuple(
        use for name, dtype in DTYPES.items() if name in precisions for use in op_uses(model, dtype)
    )


def _print(bundle: Path, library: KernelLibrary) -> None:
    print(f"bundle {bundle}: kernels by Triton {library.triton_version}")
    for entry in library.entries:
        size = (bundle / KERNEL_FOLDER / entry.file).stat().st_size
        print(f"  {entry.target:6} {entry.name:48} {size:>9,} bytes, {entry.threads} threads")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(make_parser(), run, argv, ERRORS)


if __name__ == "__main__":
    sys.exit(main())
