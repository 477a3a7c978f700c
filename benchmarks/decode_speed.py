"""Decoding with our kernels beside PyTorch, for released shapes with random weights.

    python benchmarks/decode_speed.py --build --target sm90,sm89     bundles; needs no GPU
    python benchmarks/decode_speed.py                                what gpu_check finds of them

The second runs `runtime/gpu_check.py --sections environment,bandwidth,decode_speed`; what it does
and where the results go is in docs/gpu_check.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("doge-20m", "doge-60m", "doge-160m", "doge-320m", "doge-20m-moe", "doge-120m-moe")
PRECISIONS = ("fp16", "bf16", "int8", "int4")
# The smallest, whose steps are launches rather than bytes.
PERSISTENT_SHAPES = ("doge-20m", "doge-60m")
SECTIONS = "environment,bandwidth,decode_speed"
# Enough for all of it where compiling takes a minute a model; less leaves out the last of it.
TIME_LIMIT_S = 3600


def build_commands(
    shapes: Sequence[str], precisions: Sequence[str], target: str, folder: Path
) -> Iterator[list[str]]:
    """A build for each precision of each shape; those of a shape share a bundle."""
    for shape in shapes:
        for precision in precisions:
            yield [
                sys.executable, "export/build_engine.py", "--random-weights", shape,
                "--backend", "cuda", "--cpu", "none", "--precision", precision,
                "--target", target, "--output", str(folder / shape),
                *(["--persistent"] if shape in PERSISTENT_SHAPES else []),
            ]  # fmt: skip


def check_command(
    shapes: Sequence[str], folder: Path, output: Path | None, time_limit: float
) -> list[str]:
    """The check of the bundles of these shapes.

    Raises:
        SystemExit: one is missing; says how to build it.
    """
    bundles = [folder / shape for shape in shapes]
    if missing := [str(bundle) for bundle in bundles if not bundle.is_dir()]:
        sys.exit(
            f"decode_speed: there is no {', '.join(missing)}; build it with: python "
            "benchmarks/decode_speed.py --build --target sm90"
        )
    return [
        sys.executable, "runtime/gpu_check.py", *map(str, bundles), "--sections", SECTIONS,
        "--time-limit", f"{time_limit:g}", *(["--output", str(output)] if output else []),
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Build or measure; the exit status of what failed first, builds go on behind a failure."""
    parser = argparse.ArgumentParser(
        prog="decode_speed", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--build", action="store_true", help="build the bundles, measure nothing")
    parser.add_argument("--target", default="sm90,sm89", help="GPUs that kernels are compiled for")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="a part of %(default)s")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="of %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("build/decode-speed"))
    parser.add_argument("--output", type=Path, help="folder of the evidence file")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, metavar="SECONDS")
    args = parser.parse_args(argv)
    shapes = args.shapes.split(",")
    if args.build:
        commands = list(
            build_commands(shapes, args.precisions.split(","), args.target, args.folder)
        )
    else:
        commands = [check_command(shapes, args.folder, args.output, args.time_limit)]
    status = 0
    for command in commands:
        print("+ python", " ".join(command[1:]), flush=True)
        status = status or subprocess.run(command, cwd=ROOT, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
