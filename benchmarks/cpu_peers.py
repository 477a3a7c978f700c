"""A bundle beside transformers, llama.cpp and OpenVINO: python benchmarks/cpu_peers.py BUNDLE.

All systems take turns in rounds, each in a process of its own, one prompt length after the other;
ratios are to transformers in the same round. What has to be installed: requirements.txt.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import llama_gguf
import llama_openvino
from peer_systems import open_llama_cpp, open_openvino, open_transformers

from model.config import UnsupportedModelError
from runtime.backends.base import BackendUnavailableError
from runtime.benchmark_report import (
    Result,
    describe_machine,
    make_results,
    print_table,
)
from runtime.benchmarking import Contender, measure_interleaved, open_backend_system
from runtime.bundle import Bundle, Variant
from runtime.command import SUCCESS, CommandParser, UsageError, print_json, run_command
from runtime.cpu_threads import CpuThreads
from runtime.environment import describe_versions
from runtime.roofline import BandwidthMeter, step_bytes
from runtime.system_process import Opener, System, SystemProcessError

logger = logging.getLogger("runtime.cpu_peers")

ERRORS = (
    BackendUnavailableError,
    OSError,
    SystemProcessError,
    UnsupportedModelError,
    ValueError,
)


# File of the Llama by system and format.
Llamas = dict[tuple[str, str], Path]


@dataclass(frozen=True, kw_only=True)
class _Peer:
    """A system; `variant` where it is one of the bundle's models."""

    name: str
    label: str
    open_system: Opener
    variant: Variant | None = None


def make_parser() -> CommandParser:
    """The script's flags."""
    parser = CommandParser(
        "cpu_peers", "Measure a bundle beside transformers, llama.cpp and OpenVINO."
    )
    parser.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="of generation G4, with its checkpoint"
    )
    parser.add_argument(
        "--variants", type=_names, metavar="V[,V...]",
        help="models of ONNX Runtime (all but the canonical one, if there are others)",
    )  # fmt: skip
    parser.add_argument(
        "--llama", type=_names, default=",".join(llama_gguf.FORMATS), metavar="F[,F...]",
        help="formats of llama.cpp's Llama of the same shape, or `none`",
    )  # fmt: skip
    parser.add_argument(
        "--openvino", type=_names, default=",".join(llama_openvino.FORMATS), metavar="F[,F...]",
        help="formats of OpenVINO's Llama of the same shape, or `none`",
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
    with tempfile.TemporaryDirectory(prefix="llama-") as folder:
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
            "versions": describe_versions("transformers", "llama-cpp-python", "gguf", "openvino"),
            "results": [_as_dict(result) for result in results],
        }
        print_json(report)
    else:
        print_table(results, machine)
    return SUCCESS


def _measure(
    args: argparse.Namespace,
    bundle: Bundle,
    llamas: Llamas,
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
    args: argparse.Namespace, bundle: Bundle, llamas: Llamas, capacity: int
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
    openers: dict[str, Callable[..., System]] = {
        "llama.cpp": partial(open_llama_cpp, capacity=capacity),
        "openvino": open_openvino,
    }
    for (system, name), file in llamas.items():
        yield _Peer(
            name="Llama, same shape",
            label=f"{system}:{name}",
            open_system=partial(openers[system], file, name, threads=args.threads),
        )


def _variants(args: argparse.Namespace, bundle: Bundle) -> list[Variant]:
    if args.variants:
        return [bundle.variant("onnxruntime", name) for name in args.variants]
    every = bundle.variants("onnxruntime")
    return [variant for variant in every if variant.name != "canonical"] or [*every]


def _write_llamas(args: argparse.Namespace, bundle: Bundle, folder: Path) -> Llamas:
    """A file for each system and format asked for; none beside a mixture of experts."""
    formats = {"llama.cpp": args.llama, "openvino": args.openvino}
    asked = [
        (system, name) for system, names in formats.items() if names != ["none"] for name in names
    ]
    if asked and (bundle.config.is_moe or bundle.config.is_seed):
        logger.info("Llamas are left out: none has the shape of a mixture of Doge's experts")
        return {}
    files = {}
    for system, name in asked:
        logger.info("writing a Llama of the same shape for %s as %s", system, name)
        if system == "llama.cpp":
            files[system, name] = folder / f"{name}.gguf"
            llama_gguf.write_llama(files[system, name], bundle.config, name)
        else:
            files[system, name] = folder / f"{name}.xml"
            llama_openvino.write_openvino_llama(files[system, name], bundle.config, name)
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
