"""Time to first token, time per token, memory: python runtime/benchmark.py BUNDLE [BUNDLE...]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from model.config import UnsupportedModelError
from runtime.backends import BACKENDS
from runtime.backends.base import BackendUnavailableError
from runtime.benchmark_report import (
    describe_machine,
    make_results,
    print_table,
)
from runtime.benchmarking import Contender, Measurement, measure_interleaved, open_backend_system
from runtime.bundle import Bundle
from runtime.command import SUCCESS, CommandParser, UsageError, print_json, run_command
from runtime.cpu_threads import CpuThreads
from runtime.environment import describe_versions
from runtime.options import add_thread_flags, split_backend, threads_of
from runtime.roofline import BandwidthMeter, step_bytes
from runtime.system_process import SystemProcessError

ERRORS = (
    BackendUnavailableError,
    OSError,
    SystemProcessError,
    UnsupportedModelError,
    ValueError,
)
# The roofline is that of the CPU's memory; engines tell that of their GPU's.
_ON_CPU = ("onnxruntime", "torch")


def make_parser() -> CommandParser:
    """The command's flags."""
    parser = CommandParser("benchmark", "Measure backends and bundles, interleaved, in one run.")
    parser.add_argument(
        "bundles", type=Path, nargs="+", metavar="BUNDLE", help="folder of a bundle; several run "
        "side by side",
    )  # fmt: skip
    parser.add_argument(
        "--backend", type=_names, metavar="B[:VARIANT][,B...]",
        help=f"each of {', '.join(BACKENDS)} (the first that can run); one named twice is measured "
        "twice, which shows the noise",
    )  # fmt: skip
    parser.add_argument(
        "--input-len", type=_numbers, default="16", metavar="N[,N...]", help="prompt tokens"
    )
    parser.add_argument("--output-len", type=int, default=64, metavar="M", help="generated tokens")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences side by side")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them that do not")
    add_thread_flags(parser)
    return parser


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A contender, and the opened bundle that it runs."""

    name: str
    bundle: Bundle
    contender: Contender


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    _check_numbers(args)
    tasks = list(_tasks(args, threads_of(args)))
    contenders = [task.contender for task in tasks]
    meter = BandwidthMeter(args.threads)
    measurements = measure_interleaved(
        contenders, repeats=args.repeats, warmup=args.warmup, before_round=meter.measure
    )
    versions = describe_versions()
    floors = [
        _floor_s(task, found, meter, on_gpu="onnxruntime-gpu" in versions)
        for task, found in zip(tasks, measurements, strict=True)
    ]
    results = make_results([task.name for task in tasks], contenders, measurements, floors)
    machine = describe_machine(meter)
    if args.json:
        found = [result.as_dict() for result in results]
        print_json({"machine": machine, "versions": versions, "results": found})
    else:
        print_table(results, machine)
    return SUCCESS


def _tasks(args: argparse.Namespace, threads: CpuThreads) -> Iterator[_Task]:
    """Every backend on every bundle at every input length, in the order asked for."""
    bundles = [(path, Bundle.open(path)) for path in args.bundles]
    for _, bundle in bundles:
        _check_limits(args, bundle)
    for input_len in args.input_len:
        for path, bundle in bundles:
            for name in args.backend or [None]:
                backend, variant = _chosen(bundle, name)
                label = f"{path} {name or ''}".rstrip() + f", prompt of {input_len}"
                yield _Task(
                    name=str(path),
                    bundle=bundle,
                    contender=Contender(
                        label=label,
                        open_system=partial(
                            open_backend_system, path, backend, variant, threads=threads,
                            batch_size=args.batch_size, capacity=input_len + args.output_len,
                        ),
                        vocab_size=bundle.config.vocab_size,
                        batch_size=args.batch_size,
                        input_len=input_len,
                        output_len=args.output_len,
                    ),
                )  # fmt: skip


def _chosen(bundle: Bundle, name: str | None) -> tuple[str | None, str | None]:
    """Backend and variant that a name means for a bundle; nothing is opened."""
    if name is None:
        return None, None
    backend, variant = split_backend(name)
    return backend, bundle.variant(backend, variant).name


def _floor_s(
    task: _Task, found: Measurement, meter: BandwidthMeter, *, on_gpu: bool
) -> float | None:
    """Seconds that reading what a step needs takes where it runs; None where that is unknown."""
    backend, asked = found.opened.backend, task.contender
    device = found.opened.device
    bytes_per_s = meter.bytes_per_s
    if device is not None:
        if device["copy_gb_per_s"] is None:
            return None
        bytes_per_s = 1e9 * device["copy_gb_per_s"]
    elif backend not in _ON_CPU or (on_gpu and backend == "onnxruntime"):
        return None
    variant = task.bundle.variant(backend, found.opened.variant)
    context = asked.input_len + asked.output_len / 2  # the mean over the later tokens
    read = step_bytes(task.bundle, variant, asked.batch_size, context)
    return None if read is None else read / bytes_per_s


def _check_numbers(args: argparse.Namespace) -> None:
    least = {"output_len": 1, "batch_size": 1, "repeats": 1, "warmup": 0}
    for name, lowest in least.items():
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {lowest}, got {value}")


def _check_limits(args: argparse.Namespace, bundle: Bundle) -> None:
    limits = bundle.limits
    if args.batch_size > limits.max_batch_size:
        raise UsageError(
            f"--batch-size {args.batch_size} exceeds the {limits.max_batch_size} sequences of "
            f"bundle {bundle.path} (--max-batch-size of the build)"
        )
    for input_len in args.input_len:
        if input_len + args.output_len > limits.max_seq_len:
            raise UsageError(
                f"--input-len {input_len} and --output-len {args.output_len} exceed the "
                f"{limits.max_seq_len} tokens of bundle {bundle.path} (--max-seq-len of the build)"
            )
        if bundle.manifest.router_mode == "mixed" and input_len > limits.max_input_len:
            raise UsageError(
                f"--input-len {input_len} exceeds the {limits.max_input_len} tokens of one pass of "
                f"bundle {bundle.path}, and its router mode `mixed` cannot split a prompt "
                "(--max-input-len or --router per_token of the build)"
            )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(
            f"expected backends separated by commas, e.g. onnxruntime:fp32,torch; got {text!r}"
        )
    return names


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(
            f"expected numbers of tokens separated by commas, 1 or more each, got {text!r}"
        )
    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(make_parser(), run, argv, ERRORS)


if __name__ == "__main__":
    sys.exit(main())
