"""How many entries the compiled plan of a model has, with and without passes of the lowering.

    python benchmarks/plan_entries.py doge-20m doge-160m            all passes against none
    python benchmarks/plan_entries.py doge-20m --each               leaving out one pass at a time
    python benchmarks/plan_entries.py doge-20m --layers 3           the first layers only, faster

Needs no GPU: weights are random, the engine is built for sm_89 and thrown away (docs/plan.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from export.engine import DTYPES, EngineConfig, Precision, build_engine
from export.graph import export_onnx
from export.lowerings.tensorrt import PASSES, lower_for_tensorrt
from export.plan.summary import PlanSummary
from export.progress import BuildProgress
from model.checkpoint import load_checkpoint
from model.contract import step_contract
from model.random_weights import write_random_checkpoint
from model.released import ReleasedShape, released_shape
from model.seed_rewrites import rewrite_for_export

SLOTS = 2048


def canonical(shape: ReleasedShape, folder: Path) -> Path:
    """The canonical model of a shape with random weights."""
    write_random_checkpoint(folder, shape, 0)
    network, _ = rewrite_for_export(load_checkpoint(folder), SLOTS)
    return export_onnx(network, folder / "model.onnx", max_seq_len=SLOTS)


def plan_of(
    model: Path, shape: ReleasedShape, precision: Precision, left_out: frozenset[str]
) -> tuple[PlanSummary, int, float]:
    """The plan, the engine's bytes and the seconds of its build."""
    dtype = DTYPES[precision]
    contract = step_contract(shape.config, shape.generation, max_seq_len=SLOTS, cache_dtype=dtype)
    config = EngineConfig(precision=precision, max_input_len=SLOTS, max_seq_len=SLOTS)
    with tempfile.TemporaryDirectory() as scratch:
        lowered = lower_for_tensorrt(model, Path(scratch), dtype, left_out=left_out)
        begin = time.perf_counter()
        built = build_engine(lowered, config, contract, BuildProgress(quiet=True))
        seconds = time.perf_counter() - begin
    if built.report.plan is None:
        raise RuntimeError("the builder's log shows no plan in a form that is known")
    return built.report.plan, len(built.blob), seconds


def variants(*, each: bool) -> Iterator[tuple[str, frozenset[str]]]:
    """A name for each choice of passes, and the passes that it leaves out."""
    yield "no pass", frozenset(PASSES)
    if each:
        for name in PASSES:
            yield f"without {name}", frozenset({name})
    yield "all passes", frozenset()


def main() -> None:
    """Print one row of Markdown for each model and choice of passes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shapes", nargs="+", help="released shapes, e.g. doge-20m")
    parser.add_argument("--layers", type=int, help="decoder layers; all of them when left out")
    parser.add_argument("--precision", default="fp16", choices=list(DTYPES))
    parser.add_argument("--each", action="store_true", help="also leave out one pass at a time")
    arguments = parser.parse_args()
    print(
        "| model | passes | decode entries | a layer | by kind | by part | prefill entries (waits) "
        "| activations, MB (decode, prefill) | engine, MB | build, s | estimate, us |\n"
        + "|---" * 11
        + "|"
    )
    for name in arguments.shapes:
        shape = released_shape(name)
        if arguments.layers:
            config = dataclasses.replace(shape.config, num_hidden_layers=arguments.layers)
            shape = dataclasses.replace(shape, config=config)
        with tempfile.TemporaryDirectory() as folder:
            model = canonical(shape, Path(folder))
            for label, left_out in variants(each=arguments.each):
                plan, size, seconds = plan_of(model, shape, arguments.precision, left_out)
                print(_row(name, label, plan, size, seconds), flush=True)


def _row(name: str, label: str, plan: PlanSummary, size: int, seconds: float) -> str:
    decode, prefill = plan.profiles
    kinds = ", ".join(f"{count} {kind}" for kind, count in decode.by_kind.items())
    parts = ", ".join(f"{count} {part}" for part, count in decode.by_part.items())
    memory = f"{decode.activation_bytes / 1e6:.1f}, {prefill.activation_bytes / 1e6:.0f}"
    cells = (
        name,
        label,
        decode.entries,
        f"{decode.entries_per_layer:.1f}",
        kinds,
        parts,
        f"{prefill.entries} ({prefill.waits})",
        memory,
        f"{size / 1e6:.1f}",
        f"{seconds:.0f}",
        f"{plan.decode_estimate['total_us']:.0f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
