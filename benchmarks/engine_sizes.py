"""Sizes, build times and plans of engines, one table row for each model and precision.

    python benchmarks/engine_sizes.py                           all of docs/engine_precisions.md
    python benchmarks/engine_sizes.py doge-160m --precision fp16,int4
    python benchmarks/engine_sizes.py doge-tiny --decode-graph  the graph that chooses tokens, too

Needs no GPU: engines are built for sm_89 one after the other and thrown away. Weights are random,
but for doge-tiny. Each build checks that its network copies no cache (`check_cache_in_place`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from export.decode_graph import write_decode_graph
from export.engine import DTYPES, BuiltEngine, EngineConfig, Precision, build_engine
from export.graph import export_onnx
from export.lowerings.engine_weights import weight_format
from export.lowerings.tensorrt import lower_for_tensorrt
from export.profiles import step_profiles
from export.progress import BuildProgress
from export.sources import BUNDLED_CHECKPOINT
from model.checkpoint import load_checkpoint
from model.contract import StepContract, step_contract
from model.doge import DogeForCausalLM
from model.random_weights import write_random_checkpoint
from model.released import released_shape
from model.seed_rewrites import rewrite_for_export
from runtime.engines.decode_graph import DecodeGraphContract, EngineInterface

TINY = "doge-tiny"
MODELS = (TINY, "doge-20m", "doge-76m", "doge-120m-moe", "doge-160m")
# Of everything but fp32, which no table has.
ROWS: tuple[Precision, ...] = ("fp16", "bf16", "int8", "int4", "fp8")
MOST_SLOTS = 4096
HEADER = (
    "| shape | precision | engine, MB | weights, MB | activations, MB (decode, prefill) "
    "| lowering, s | engine build, s | entries | a layer | us |\n" + "| --- " * 10 + "|"
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A canonical model.

    Attributes:
        path: the file.
        network: what it was made of.
        slots: of its cache.
    """

    path: Path
    network: DogeForCausalLM
    slots: int

    def contract(self, precision: Precision) -> StepContract:
        """Inputs and outputs of an engine."""
        network = self.network
        return step_contract(
            network.config,
            network.generation,
            max_seq_len=self.slots,
            cache_dtype=DTYPES[precision],
        )

    def config(self, precision: Precision) -> EngineConfig:
        """An engine for up to 4 sequences of all slots."""
        return EngineConfig(precision=precision, max_input_len=self.slots, max_seq_len=self.slots)


def exported(name: str, folder: Path) -> Exported:
    """The canonical model of the bundled checkpoint, or of a released shape with random weights."""
    checkpoint = folder
    if name == TINY:
        checkpoint = BUNDLED_CHECKPOINT
    else:
        write_random_checkpoint(folder, released_shape(name), 0)
    network = load_checkpoint(checkpoint)
    slots = min(network.config.max_position_embeddings, MOST_SLOTS)
    rewritten, _ = rewrite_for_export(network, slots)
    path = export_onnx(rewritten, folder / "model.onnx", max_seq_len=slots)
    return Exported(path=path, network=network, slots=slots)


def row(label: str, precision: str, built: BuiltEngine, lowering_s: float, build_s: float) -> str:
    """A line of the table."""
    plan = built.report.plan
    if plan is None:
        raise RuntimeError("the builder's log shows no plan in a form that is known")
    decode = plan.profiles[0]
    cells = (
        label,
        precision,
        f"{len(built.blob) / 1e6:.1f}",
        f"{plan.weights_bytes / 1e6:.1f}",
        ", ".join(f"{profile.activation_bytes / 1e6:.1f}" for profile in plan.profiles),
        f"{lowering_s:.1f}",
        f"{build_s:.0f}",
        decode.entries,
        f"{decode.entries_per_layer:.1f}",
        f"{plan.decode_estimate['total_us']:.0f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def measure(name: str, model: Exported, precision: Precision, *, decode_graph: bool) -> None:
    """Build one engine, or its decode graph too, and print their rows."""
    contract, config = model.contract(precision), model.config(precision)
    with tempfile.TemporaryDirectory() as scratch:
        begin = time.perf_counter()
        lowered = lower_for_tensorrt(
            model.path, Path(scratch), DTYPES[precision], weights=weight_format(precision)
        )
        lowering_s = time.perf_counter() - begin
        jobs: list[tuple[str, Path, EngineInterface, int]] = [(name, lowered, contract, 2)]
        if decode_graph:
            graph = write_decode_graph(lowered)
            jobs.append((f"{name}, decode graph", graph, DecodeGraphContract(contract), 1))
        for label, path, interface, count in jobs:
            begin = time.perf_counter()
            profiles = step_profiles(config.limits)[:count]
            built = build_engine(
                path, config, interface, BuildProgress(quiet=True), profiles=profiles
            )
            seconds = time.perf_counter() - begin
            print(row(label, precision, built, lowering_s, seconds), flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help="doge-tiny, doge-20m, …")
    parser.add_argument("--precision", default=",".join(ROWS), metavar="P[,P...]")
    parser.add_argument("--decode-graph", action="store_true", help="build that, too")
    arguments = parser.parse_args()
    precisions = [p for p in get_args(Precision) if p in arguments.precision.split(",")]
    if len(precisions) != len(arguments.precision.split(",")):
        parser.error(f"--precision must be of {', '.join(get_args(Precision))}")
    print(HEADER, flush=True)
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            model = exported(name, Path(folder))
            for precision in precisions:
                measure(name, model, precision, decode_graph=arguments.decode_graph)


if __name__ == "__main__":
    main()
