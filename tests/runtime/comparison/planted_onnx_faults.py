"""Faults planted in ONNX models, as exported and as lowered for the CPU, and what names them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from export.lowerings.cpu import lower_for_cpu
from runtime.backends.base import Backend, Cache
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from runtime.backends.tapped_model import tapped_session
from runtime.comparison.choices import chosen_experts, kept_keys
from runtime.comparison.record import Run, record_run
from runtime.comparison.run_report import RunReport, compare_runs
from runtime.comparison.taps import CHOICES, TapName, comparison_taps, sources_of
from runtime.comparison.tolerances import tap_tolerance
from runtime.cpu_threads import CpuThreads
from tests.export.conftest import Exported
from tests.runtime.comparison.planted_faults import (
    PROMPTS,
    BeforeStep,
    run_torch,
    subject_of,
    with_precision,
)

Form = Literal["canonical", "lowered"]
Plant = Callable[[onnx.ModelProto], None]
FORMS: tuple[Form, ...] = ("canonical", "lowered")
STEPS = 3
# Part of a layer's tensor name, and the first tap that it moves. A mixture's experts stand beside
# projections of the same names.
_MOVES = {
    r"(pre|input|in_attn)_layernorm": "attention_norm",
    r"v_proj": "value",
    r"dt_proj|\.A$|score_proj|score_factor": "score",
    r"q_proj|q_norm": "query",
    r"k_proj|k_norm": "key",
    r"o_proj": "attention_output",
    r"(pre|input)_residual": "attention_residual",
    r"(post|post_attention|in_ff)_layernorm": "mlp_norm",
    r"router_gate": "router_scores",
    r"(down|up)_embed": "expert_output",
    r"(gate|up|down)_proj": "mlp_output",
    r"(post|post_attention)_residual": "output",
}


@dataclass(frozen=True)
class Place:
    """One element of a tensor (or a row of some), and the name of the tap that it moves first."""

    tensor: str
    index: tuple[int | slice, ...]
    tap: str


class FaultyCase:
    """A golden case with both forms of its ONNX model, into which faults are planted."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.exported = Exported(folder, work)
        network, slots = self.exported.network, self.exported.slots
        self.config, self.generation = network.config, network.generation
        self.taps = comparison_taps(
            self.config, self.generation, selects=self.config.keep_window_size < slots
        )
        lowered = work / "lowered.onnx"
        model = lower_for_cpu(self.exported.path, lowered, self.config, slots=slots)
        self._paths = {"canonical": self.exported.path, "lowered": lowered}
        self._score_heads = {"canonical": None, "lowered": model.score_heads}
        self.work = work
        self.reference = run_torch(network, steps=STEPS)
        self.prefill = self.reference.prompts[0].values[0]

    @cached_property
    def clean(self) -> dict[Form, OnnxRuntimeBackend]:
        """The backends on models as they were exported."""
        return {form: self._backend(form, self._paths[form]) for form in FORMS}

    def model(self, form: Form) -> onnx.ModelProto:
        """A copy of a form, weights included."""
        return onnx.load(self._paths[form])

    def random(self, *what: str) -> np.random.Generator:
        """Seeded by the case and by what is planted."""
        return np.random.default_rng([*map(ord, self.exported.case), *map(ord, "".join(what))])

    def named(self, form: Form, tap: str) -> str:
        """The first tap from `tap` on that a form has: lowered models have no query."""
        if form == "lowered" and tap.endswith(".query"):
            return tap.removesuffix("query") + "attention_output"
        return tap

    def compare(
        self,
        form: Form,
        plant: Plant | None = None,
        before_step: BeforeStep | None = None,
        precision: str = "fp32",
    ) -> RunReport:
        """The network against a form of its model behind `plant`."""
        backend = self.clean[form]
        if plant is not None:
            model = self.model(form)
            plant(model)
            path = self.work / "faulty.onnx"
            onnx.save(model, path)
            backend = self._backend(form, path)
        run = with_precision(self._run(form, backend, before_step), precision)
        return compare_runs(self.reference, run, self.config, atol=1e-3, rtol=1e-4)

    def _backend(self, form: Form, path: Path) -> OnnxRuntimeBackend:
        session, given = tapped_session(path, sources_of(self.taps), CpuThreads(1))
        backend = OnnxRuntimeBackend(
            session,
            self.exported.contract_with(score_heads=self._score_heads[form]),
            limits=self.exported.limits,
            variant=form,
            vocab_size=self.config.vocab_size,
            router_mode=self.config.router_mode if self.config.is_moe else None,
        )
        backend.taps = given
        return backend

    def _run(self, form: Form, backend: Backend, before_step: BeforeStep | None) -> Run:
        return record_run(
            subject_of(self.exported.network, f"onnxruntime:{form}"),
            backend,
            backend,
            self.taps,
            PROMPTS,
            STEPS,
            tokens=[prompt.tokens for prompt in self.reference.prompts],
            before_step=before_step,
        )

    def random_place(self, form: Form, random: np.random.Generator) -> Place:
        """An element of a random layer's random tensor.

        Not of the tensors by which the seed retrieves values, where an element may move a choice
        or nothing; of experts, in a row that the first prompt picks.
        """
        layer = int(random.integers(0, self.config.num_hidden_layers))
        here = re.compile(rf"layers\.{layer}\.")
        tensors = {
            tensor.name: tuple(tensor.dims)
            for tensor in self.model(form).graph.initializer
            if here.search(tensor.name)
            and not re.search(r"value_sums|value_gate|mask_bias", tensor.name)
        }
        name = str(random.choice(sorted(tensors)))
        index = tuple(int(random.integers(0, size)) for size in tensors[name])
        part = self._part(name, index)
        kind = next(kind for pattern, kind in _MOVES.items() if re.search(pattern, part))
        if kind == "expert_output":
            scores = self.prefill[f"layers.{layer}.router_scores"]
            used = np.flatnonzero(chosen_experts(scores, self.config).chosen.any((0, 1)))
            index = (int(random.choice(used)), index[1])
        tap = self.named(form, f"layers.{layer}.{kind}")
        if kind == "query" and tap.endswith("attention_output") and len(index) == 2:
            # Where one key's score takes all of a head's weight, as in a head of g4h_window, its
            # queries move nothing behind them. A row of the projection moves every head.
            width = self.config.num_attention_heads * self.config.head_dim
            return Place(name, (index[0], slice(width)), tap)
        return Place(name, index, tap)

    def turning_nudge(
        self, random: np.random.Generator, kind: str
    ) -> tuple[str, int, npt.NDArray[np.float32]]:
        """A nudge of a random layer's scores that turns a choice of the first prompt's prefill.

        Returns:
            The scores' name, the token at which they are nudged, and by what (`nudge`).
        """
        source = CHOICES[kind]
        ids = np.array(self.reference.prompts[0].prompt)
        for layer in random.permutation(self.config.num_hidden_layers):
            name = f"layers.{layer}.{source}"
            scores = self.prefill[name]
            before = self._chosen(kind, scores)
            heads = source == "score"  # [N, S, 1], else [S, numbers]
            table = scores[..., 0].T if heads else scores
            largest = np.abs(table).max(-1)
            for place in random.permutation(table.size):
                slot, number = divmod(int(place), table.shape[1])
                by = np.zeros(table.shape[1], np.float32)
                by[number] = largest[slot] * tap_tolerance(source, "bf16") / 2
                by = by[:, None, None] if heads else by
                here = (ids == ids[slot])[:, None]
                if (self._chosen(kind, scores + here * by) != before).any():
                    return name, int(ids[slot]), by
        raise AssertionError(f"no choice of {kind} is close to another; take another case")

    def _chosen(self, kind: str, scores: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        if kind == "experts":
            return chosen_experts(scores, self.config).chosen
        length = scores.shape[1]
        return kept_keys(scores[..., 0], 0, length, self.config.keep_window_size).chosen

    def _part(self, name: str, index: tuple[int, ...]) -> str:
        """Of tensors that a lowering packs side by side, the one that holds a column."""
        parts = name.split(" ")
        if len(parts) == 1:
            return name
        size = self.config.head_dim
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        rows = {"q_proj": heads * size, "k_proj": groups * size, "v_proj": groups * size}
        left = index[1]
        for part in parts:
            width = next((rows[key] for key in rows if key in part), self.config.intermediate_size)
            if left < width:
                return part
            left -= width
        raise AssertionError(f"column {index[1]} is outside of {name}")


def tensor_of(model: onnx.ModelProto, name: str) -> npt.NDArray[Any]:
    """A copy of a stored tensor."""
    (found,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    return numpy_helper.to_array(found).copy()


def set_tensor(model: onnx.ModelProto, name: str, array: npt.NDArray[Any]) -> None:
    """Replace a stored tensor."""
    (found,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    found.CopyFrom(numpy_helper.from_array(array, name))


def perturb(place: Place, share: float) -> Plant:
    """Move one element by a share of the tensor's largest."""

    def plant(model: onnx.ModelProto) -> None:
        array = tensor_of(model, place.tensor)
        array[place.index] += np.float32(share * np.abs(array).max())
        set_tensor(model, place.tensor, array)

    return plant


def node_of_layer(
    model: onnx.ModelProto, layer: int, op_types: Sequence[str]
) -> tuple[int, onnx.NodeProto]:
    """Of the nodes of these types, one a layer, that of a layer, with its place."""
    found = [pair for pair in enumerate(model.graph.node) if pair[1].op_type in op_types]
    return found[layer]


def insert_behind(
    model: onnx.ModelProto, value: str, make: Callable[[str], Sequence[onnx.NodeProto]]
) -> None:
    """Let nodes that read what was `value` give it, under its name, to all who read it."""
    raw = f"{value}.raw"
    for place, node in enumerate(model.graph.node):
        if value in node.output:
            node.output[list(node.output).index(value)] = raw
            for offset, new in enumerate(make(raw)):
                model.graph.node.insert(place + 1 + offset, new)
            return
    raise AssertionError(f"no node gives {value}")


def store(model: onnx.ModelProto, name: str, array: npt.ArrayLike) -> str:
    """Store another tensor."""
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return name


def drop_bias(layer: int) -> Plant:
    """Let a layer's attention read zeros for its bias."""

    def plant(model: onnx.ModelProto) -> None:
        place, node = node_of_layer(model, layer, ["DynamicMaskAttention", "GroupQueryAttention"])
        which = 3 if node.op_type == "DynamicMaskAttention" else 10
        bias, zeros = node.input[which], f"layers.{layer}.dropped"
        node.input[which] = zeros
        new = helper.make_node("Mul", [bias, store(model, "zero", np.float32(0))], [zeros])
        model.graph.node.insert(place, new)

    return plant


def roll_experts(layer: int) -> Plant:
    """Move every row of a layer's expert tables to the next expert's place."""

    def plant(model: onnx.ModelProto) -> None:
        names = [tensor.name for tensor in model.graph.initializer]
        tables = [n for n in names if re.search(rf"layers\.{layer}\..*(down|up)_embed", n)]
        assert len(tables) == 2
        for name in tables:
            set_tensor(model, name, np.roll(tensor_of(model, name), 1, 0))

    return plant


def permute_router(layer: int) -> Plant:
    """Give a layer's router scores in another order."""

    def plant(model: onnx.ModelProto) -> None:
        names = [tensor.name for tensor in model.graph.initializer]
        (name,) = (n for n in names if re.search(rf"layers\.{layer}\..*router_gate", n))
        set_tensor(model, name, np.roll(tensor_of(model, name), 1, int(name.endswith("posed"))))

    return plant


def overflow(value: str, largest: float) -> Plant:
    """Send a value through float16, so scaled that its largest number is far beyond 65504."""

    def plant(model: onnx.ModelProto) -> None:
        def make(raw: str) -> list[onnx.NodeProto]:
            scale = store(model, "scale", np.float32(1e7 / largest))
            types = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
            return [
                helper.make_node("Mul", [raw, scale], ["half.in"]),
                helper.make_node("Cast", ["half.in"], ["half.16"], to=types[0]),
                helper.make_node("Cast", ["half.16"], ["half.out"], to=types[1]),
                helper.make_node("Div", ["half.out", scale], [value]),
            ]

        insert_behind(model, value, make)

    return plant


def shift_positions(layer: int) -> Plant:
    """Rotate queries, and keys where they are rotated, of a layer as if one position later."""

    def plant(model: onnx.ModelProto) -> None:
        shifted = {}
        for name in ("cos", "sin"):
            table = np.roll(tensor_of(model, name), -1, 0)
            shifted[name] = store(model, f"{name}.shifted", table)
        rotations = [n for n in model.graph.node if "cos" in n.input]
        each = len(rotations) // 3
        for node in rotations[layer * each : (layer + 1) * each]:
            for place, name in enumerate(node.input):
                node.input[place] = shifted.get(name, name)

    return plant


def drop_norm(tensor: str) -> Plant:
    """A norm's weight becomes ones."""

    def plant(model: onnx.ModelProto) -> None:
        weight = tensor_of(model, tensor)
        assert np.abs(weight - 1).max() > 0.1
        set_tensor(model, tensor, np.ones_like(weight))

    return plant


def nudge(value: str, token: int, by: npt.NDArray[np.float32]) -> Plant:
    """Add a vector, or a number, to a value wherever a token stands among the inputs.

    Args:
        value: [B, S, numbers], or scores [B, N, S, 1].
        token: its id.
        by: [numbers], or [N, 1, 1].
    """

    def plant(model: onnx.ModelProto) -> None:
        axes = [1, 3] if value.endswith(".score") else [2]

        def make(raw: str) -> list[onnx.NodeProto]:
            names = {
                "token": store(model, "nudge.token", np.int64(token)),
                "axes": store(model, "nudge.axes", np.array(axes)),
                "by": store(model, "nudge.by", by),
                "nothing": store(model, "nudge.nothing", np.float32(0)),
            }
            return [
                helper.make_node("Equal", ["input_ids", names["token"]], ["nudge.is"]),
                helper.make_node("Unsqueeze", ["nudge.is", names["axes"]], ["nudge.here"]),
                helper.make_node("Where", ["nudge.here", names["by"], names["nothing"]], ["nudge"]),
                helper.make_node("Add", [raw, "nudge"], [value]),
            ]

        insert_behind(model, value, make)

    return plant


def spoil_slot(tap: TapName, at: int, slot: int) -> BeforeStep:
    """Overwrite one slot of a layer's cache before a step."""

    def spoil(backend: Backend, cache: Cache, step: int) -> None:
        if step == at:
            kind = tap.kind.removeprefix("cached_")
            backend.cached(cache)[f"past_key_values.{tap.layer}.{kind}"][0, :, slot] += 1

    return spoil
