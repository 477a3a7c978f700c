"""How far each kind of tap is apart at each precision: what the table of tolerances rests on.

Checkpoints are exported, lowered and run, tapped, on what the float32 network in torch is fed.
fp32 is the canonical model and the one lowered for the CPU, int8 and int4 are what is lowered for
the CPU. fp16 and bf16 are the canonical model with what a half-precision engine stores rounded to
that type: weights, caches and the result of every node but those of mask scores. Sums inside a
node are float32, as in the engine's products; what an engine fuses is not rounded there.

Once a run has kept another key or picked another expert, what follows in that prompt is another
computation. So each number is given twice: the worst before any such split, and the worst of all.

    python benchmarks/tap_tolerances.py tests/data/golden/* model/checkpoints/doge-tiny \
        --text docs/custom_ops.md
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from export.graph import canonical_model
from export.lowerings.cpu import CPU_PRECISIONS, lower_for_cpu
from export.lowerings.half_precision import HalfType, lower_to_half
from model.checkpoint import load_checkpoint
from model.contract import step_contract
from model.doge import DogeForCausalLM
from model.seed_rewrites import rewrite_for_export
from runtime.backends.base import Limits
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from runtime.backends.tapped_model import tapped_session
from runtime.backends.torch_backend import TorchBackend
from runtime.comparison.logits import random_prompts
from runtime.comparison.record import Run, Subject, record_run
from runtime.comparison.taps import CHOICES, TOKEN, TapName, comparison_taps, sources_of
from runtime.comparison.tolerances import TAP_TOLERANCES, tap_tolerance
from runtime.comparison.verdict import TapDifference, differences
from runtime.cpu_threads import CpuThreads
from runtime.tokenizer import Tokenizer

HALF: dict[str, HalfType] = {"fp16": "float16", "bf16": "bfloat16"}
# A prompt longer than the window of the checkpoint that has a tokenizer, and short ones.
TEXT_LENGTHS, RANDOM_LENGTHS = (16, 40, 300), (1, 12, 12, 30)
STEPS = 24


@dataclass(frozen=True)
class Step:
    """A checkpoint exported for so many cache slots."""

    name: str
    network: DogeForCausalLM
    slots: int
    canonical: Path
    taps: tuple[TapName, ...]

    def subject(self, rung: str, precision: str) -> Subject:
        """What a run of it is of."""
        return Subject(
            rung=rung,
            precision=precision,
            weights_sha256="",
            config=self.network.config.as_dict(),
            generation=self.network.generation.name,
            max_input_len=self.slots,
            max_seq_len=self.slots,
        )

    @property
    def limits(self) -> Limits:
        """One row, any length."""
        return Limits(max_batch_size=1, max_input_len=self.slots, max_seq_len=self.slots)


def export(folder: Path, work: Path, longest: int) -> Step:
    """Write the canonical model of a checkpoint."""
    network = load_checkpoint(folder)
    slots = longest + STEPS
    rewritten, _ = rewrite_for_export(network, slots)
    path = work / "canonical.onnx"
    ir.save(canonical_model(rewritten, max_seq_len=slots), path)
    selects = slots > network.config.keep_window_size
    taps = comparison_taps(network.config, network.generation, selects=selects)
    return Step(folder.name, network, slots, path, taps)


def round_like(canonical: Path, dtype: HalfType, path: Path) -> None:
    """Write the canonical model with a rounding behind everything that `dtype` would store."""
    model, half = ir.load(canonical), ir.load(canonical)
    lower_to_half(half, dtype)
    target = ir.DataType.FLOAT16 if dtype == "float16" else ir.DataType.BFLOAT16
    for name, value in model.graph.initializers.items():
        tensor = half.graph.initializers[name].const_value
        if value.const_value is None or tensor is None or value.dtype != ir.DataType.FLOAT:
            continue
        value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=name)
    stored = {v.name for node in half.graph for v in node.outputs if v.dtype == target}
    for node in list(model.graph):
        for value in node.outputs:
            if value.name in stored:
                _round(model.graph, node, value, target)
    ir.save(model, path)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, target: ir.DataType) -> None:
    narrow = ir.node("Cast", [value], attributes={"to": target})
    wide = ir.node("Cast", [narrow.outputs[0]], attributes={"to": ir.DataType.FLOAT})
    result = wide.outputs[0]
    for use in list(value.uses()):
        if use.node is not narrow:
            use.node.replace_input_with(use.idx, result)
    for place, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[place] = result
    result.name, result.shape, result.dtype = value.name, value.shape, ir.DataType.FLOAT
    value.name, narrow.outputs[0].name = f"{value.name}.exact", f"{value.name}.narrow"
    graph.insert_after(node, [narrow, wide])


def candidates(step: Step, work: Path) -> Iterator[tuple[str, str, Path, int | None]]:
    """Rung, precision, model and cached scores of a key of everything that is measured."""
    yield "canonical", "fp32", step.canonical, None
    for precision in CPU_PRECISIONS:
        path = work / f"{precision}.onnx"
        lowered = lower_for_cpu(
            step.canonical, path, step.network.config, slots=step.slots, precision=precision
        )
        yield f"cpu {precision}", precision, path, lowered.score_heads
    for half, dtype in HALF.items():
        path = work / f"{half}.onnx"
        round_like(step.canonical, dtype, path)
        yield f"rounded {half}", half, path, None


def run_torch(step: Step, prompts: Sequence[Sequence[int]]) -> Run:
    """The reference, which chooses the tokens."""
    backend = TorchBackend(step.network, limits=step.limits, variant="fp32")
    backend.tap_values(sources_of(step.taps))
    subject = step.subject("torch:fp32", "fp32")
    return record_run(subject, backend, backend, step.taps, prompts, STEPS)


def run_onnx(
    step: Step, rung: str, precision: str, path: Path, heads: int | None, like: Run
) -> Run:
    """A model fed what the reference was fed."""
    config = step.network.config
    session, given = tapped_session(path, sources_of(step.taps), CpuThreads(1))
    backend = OnnxRuntimeBackend(
        session,
        step_contract(config, step.network.generation, max_seq_len=step.slots, score_heads=heads),
        limits=step.limits,
        variant=path.stem,
        vocab_size=config.vocab_size,
        router_mode=config.router_mode if config.is_moe else None,
    )
    backend.taps = given
    return record_run(
        step.subject(rung, precision),
        backend,
        backend,
        step.taps,
        [prompt.prompt for prompt in like.prompts],
        STEPS,
        tokens=[prompt.tokens for prompt in like.prompts],
    )


@dataclass
class Measured:
    """The worst relative error of a kind: before a prompt's first split, and of all."""

    before: float = 0.0
    of_all: float = 0.0
    compared_before: int = 0


@dataclass
class Splits:
    """Choices that differed: all, those that were their prompt's first, and near ties of those."""

    all: int = 0
    first: int = 0
    near_ties: int = 0
    widest: float = 0.0  # of first ones, the larger margin as a share of the scores


class Table:
    """What was measured of a set of checkpoints, by precision."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, str], Measured] = defaultdict(Measured)
        self.splits: dict[str, Splits] = defaultdict(Splits)

    def add(self, reference: Run, candidate: Run, step: Step) -> None:
        """Count one run."""
        precision = candidate.subject.precision
        split: set[int] = set()
        for found in differences(reference, candidate, step.network.config, precision):
            kind = TapName.parse(found.tap).kind
            if found.kind == "discrete":
                if kind != TOKEN and found.error:
                    self._add_split(found, precision, first=found.prompt not in split)
                    split.add(found.prompt)
                continue
            measured = self.kinds[kind, precision]
            measured.of_all = max(measured.of_all, found.relative)
            if found.prompt not in split:
                measured.compared_before += 1
                measured.before = max(measured.before, found.relative)

    def _add_split(self, found: TapDifference, precision: str, *, first: bool) -> None:
        splits = self.splits[precision]
        splits.all += 1
        if first:
            splits.first += 1
            splits.near_ties += found.near_tie
            share = 2 * tap_tolerance(CHOICES[TapName.parse(found.tap).kind], precision)
            splits.widest = max(splits.widest, found.of_tolerance * share)

    def print(self, title: str) -> None:
        """As a table of Markdown: `before / of all`."""
        names = list(TAP_TOLERANCES)
        print(f"\n{title}\n\n| tap | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}")
        for kind in dict.fromkeys(kind for kind, _ in self.kinds):
            cells = [self._cell(kind, name) for name in names]
            print(f"| {kind} | {' | '.join(cells)} |")
        for name in names:
            told = self.splits[name]
            print(
                f"- {name}: {told.all} other choices, {told.first} of them a prompt's first, "
                f"{told.near_ties} of these near ties, the widest {told.widest:.2g} of the scores"
            )

    def _cell(self, kind: str, name: str) -> str:
        found = self.kinds[kind, name]
        if not found.of_all and not found.compared_before:
            return "none"
        before = f"{found.before:.1e}" if found.compared_before else "none"
        return f"{before} / {found.of_all:.1e}"


LINES: dict[Literal["random", "text"], str] = {
    "random": "Checkpoints without a tokenizer, random prompts",
    "text": "Checkpoints with a tokenizer, prompts of text",
}


def main() -> None:
    """Measure and print one table for checkpoints with, one for those without a tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--text", type=Path, required=True, help="prompts are cut from it")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    tables: dict[Literal["random", "text"], Table] = defaultdict(Table)
    for folder in args.checkpoints:
        has_tokenizer = (folder / "tokenizer.json").is_file()
        kind: Literal["random", "text"] = "text" if has_tokenizer else "random"
        if has_tokenizer:
            ids = Tokenizer.open(folder).encode(text)
            prompts = [ids[length : 2 * length] for length in TEXT_LENGTHS]
        else:
            vocabulary = load_checkpoint(folder).config.vocab_size
            prompts = [
                random_prompts(vocabulary, 1, length, seed)[0]
                for seed, length in enumerate(RANDOM_LENGTHS)
            ]
        with tempfile.TemporaryDirectory() as work:
            step = export(folder, Path(work), max(map(len, prompts)))
            reference = run_torch(step, prompts)
            for rung, precision, path, heads in candidates(step, Path(work)):
                run = run_onnx(step, rung, precision, path, heads, reference)
                tables[kind].add(reference, run, step)
                print(f"measured {step.name}: {rung}")
    for kind, table in tables.items():
        table.print(LINES[kind])


if __name__ == "__main__":
    main()
