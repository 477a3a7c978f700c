"""A bundle beside transformers and llama.cpp, in one run: python benchmarks/cpu_peers.py BUNDLE.

All systems take turns in rounds, each in a process of its own, one prompt length after the other;
ratios are to transformers in the same round. What has to be installed: requirements.txt.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llama_gguf import FORMATS, write_llama
from peer_systems import open_llama_cpp, open_transformers

from model.config import UnsupportedModelError
from runtime.backends.base import BackendUnavailableError
from runtime.benchmark_report import (
    Result,
    describe_machine,
    describe_versions,
    make_results,
    print_table,
)
from runtime.benchmarking import Contender, measure_interleaved, open_backend_system
from runtime.bundle import Bundle, Variant
from runtime.command import SUCCESS, CommandParser, UsageError, print_json, run_command
from runtime.cpu_threads import CpuThreads
from runtime.roofline import BandwidthMeter, step_bytes
from runtime.system_process import Opener, SystemProcessError

logger = logging.getLogger("runtime.cpu_peers")

ERRORS = (
    BackendUnavailableError,
    OSError,
    SystemProcessError,
    UnsupportedModelError,
    ValueError,
)


@dataclass(frozen=True, kw_only=True)
class _Peer:
    """A system; `variant` where it is one of the bundle's models."""

    name: str
    label: str
    open_system: Opener
    variant: Variant | None = None


def make_parser() -> CommandParser:
    """The script's flags."""
    parser = CommandParser("cpu_peers", "Measure a bundle beside transformers and llama.cpp.")
    parser.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="of generation G4, with its checkpoint"
    )
    parser.add_argument(
        "--variants", type=_names, metavar="V[,V...]",
        help="models of ONNX Runtime (all but the canonical one, if there are others)",
    )  # fmt: skip
    parser.add_argument(
        "--llama", type=_names, default=",".join(FORMATS), metavar="F[,F...]",
        help="formats of the Llama of the same shape, or `none`",
    )  # fmt: skip
    parser.add_argument(
        "--input-len", type=_numbers, default="16,512,1900", metavar="N[,N...]",
        help="prompt tokens",
    )  # fmt: skip
    parser.add_argument("--output-len", type=int, default=64, help="generated tokens")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them that do not")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every system")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure one prompt length after the other, then print."""
    bundle = Bundle.open(args.bundle)
    _check(args, bundle)
    meter = BandwidthMeter(args.threads)
    with tempfile.TemporaryDirectory(prefix="llama-gguf-") as folder:
        llamas = _write_llamas(args, bundle, Path(folder))
        results = [
            result
            for input_len in args.input_len
            for result in _measure(args, bundle, llamas, input_len, meter)
        ]
    machine = describe_machine(meter)
    if args.json:
        report = {
            "machine": machine,
            "versions": describe_versions("transformers", "llama-cpp-python", "gguf"),
            "results": [_as_dict(result) for result in results],
        }
        print_json(report)
    else:
        print_table(results, machine)
    return SUCCESS


def _measure(
    args: argparse.Namespace,
    bundle: Bundle,
    llamas: dict[str, Path],
    input_len: int,
    meter: BandwidthMeter,
) -> list[Result]:
    peers = list(_peers(args, bundle, llamas, input_len + args.output_len))
    contenders = [
        Contender(
            label=f"{peer.label}, prompt of {input_len}",
            open_system=peer.open_system,
            vocab_size=bundle.config.vocab_size,
            batch_size=1,
            input_len=input_len,
            output_len=args.output_len,
        )
        for peer in peers
    ]
    found = measure_interleaved(
        contenders, repeats=args.repeats, warmup=args.warmup, before_round=meter.measure
    )
    context = input_len + args.output_len / 2
    floors: list[float | None] = []
    for peer in peers:
        read = step_bytes(bundle, peer.variant, 1, context) if peer.variant else None
        floors.append(None if read is None else read / meter.bytes_per_s)
    return make_results([peer.name for peer in peers], contenders, found, floors)


def _peers(
    args: argparse.Namespace, bundle: Bundle, llamas: dict[str, Path], capacity: int
) -> Iterator[_Peer]:
    """The systems, transformers first: ratios are to it."""
    checkpoint = bundle.path / bundle.variant("torch").path
    yield _Peer(
        name=str(args.bundle),
        label="transformers",
        open_system=partial(open_transformers, checkpoint, args.threads),
    )
    for variant in _variants(args, bundle):
        yield _Peer(
            name=str(args.bundle),
            label=f"onnxruntime:{variant.name}",
            variant=variant,
            open_system=partial(
                open_backend_system, args.bundle, "onnxruntime", variant.name,
                threads=CpuThreads(args.threads), batch_size=1, capacity=capacity,
            ),
        )  # fmt: skip
    for name, file in llamas.items():
        yield _Peer(
            name="Llama, same shape",
            label=f"llama.cpp:{name}",
            open_system=partial(
                open_llama_cpp, file, name, capacity=capacity, threads=args.threads
            ),
        )


def _variants(args: argparse.Namespace, bundle: Bundle) -> list[Variant]:
    if args.variants:
        return [bundle.variant("onnxruntime", name) for name in args.variants]
    every = bundle.variants("onnxruntime")
    return [variant for variant in every if variant.name != "canonical"] or [*every]


def _write_llamas(args: argparse.Namespace, bundle: Bundle, folder: Path) -> dict[str, Path]:
    """A file for each format asked for; none beside a mixture of experts."""
    if args.llama == ["none"]:
        return {}
    if bundle.config.is_moe:
        logger.info("llama.cpp is left out: no Llama has the shape of a mixture of Doge's experts")
        return {}
    files = {}
    for name in args.llama:
        logger.info("writing a Llama of the same shape as %s", name)
        files[name] = folder / f"{name}.gguf"
        write_llama(files[name], bundle.config, name)
    return files


def _check(args: argparse.Namespace, bundle: Bundle) -> None:
    for name, least in {"output_len": 1, "repeats": 1, "warmup": 0, "threads": 1}.items():
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}")
    longest, limit = max(args.input_len), bundle.limits.max_seq_len
    if longest + args.output_len > limit:
        raise UsageError(
            f"--input-len {longest} and --output-len {args.output_len} exceed the {limit} tokens "
            "of the bundle"
        )


def _as_dict(result: Result) -> dict[str, object]:
    decode = result.decode_ratio
    return {
        **result.as_dict(),
        "prefill_ratio": round(result.prefill_ratio, 3),
        "decode_ratio": None if decode is None else round(decode, 3),
    }


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return names


def _numbers(text: str) -> list[int]:
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}")
    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_command(make_parser(), run, argv, ERRORS)


if __name__ == "__main__":
    sys.exit(main())
