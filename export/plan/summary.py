"""What a plan amounts to: entries by kind and by model part, memory, and an estimate of a step.

The estimate is the time of the launches and of the reading, one after the other:

    launches · 1.5 µs + bytes / (1008 GB/s)

A launch is an entry that starts a kernel; a plugin has as many as it was said to have.

Both numbers are stated, not measured here: about 1.5 µs for a small kernel inside a CUDA graph, and
the bandwidth in NVIDIA's data sheet of the RTX 4090. No engine of this project has run yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from export.estimate import RTX_4090_BYTES_PER_SECOND
from export.plan.entries import KERNEL, PLUGIN, CompiledPlan, PlanEntry

LAUNCH_US = 1.5
# Operators that look rows of a table up, by which the table is not read as a whole.
_LOOKUPS = {"Gather", "GatherElements", "RotaryEmbedding"}
# Tables of which a plugin of a whole layer reads rows.
_TABLES = {"cos", "sin", "expert_down", "expert_up"}
UNKNOWN_PART = "other"


@dataclass(frozen=True, kw_only=True)
class ProfilePlan:
    """One profile's part of a plan.

    Attributes:
        name: of the profile.
        entries: entries that start a kernel.
        entries_per_layer: entries, divided by the decoder layers; those outside layers included.
        plugins: entries that are plugins, each of which may start several kernels.
        by_kind: entries by kind.
        by_part: entries by `embedding`, `attention`, `feed_forward`, `layer` (one that is a whole
            decoder layer), `head`, `tail`, `sampling` or `other`.
        fused_attention: entries that are a whole attention.
        waits: entries of a stream that waits for another.
        streams: how many streams are used.
        activation_bytes: device memory for activations.
        weight_bytes: stored tensors that a step reads as a whole, tables of rows left out.
    """

    name: str
    entries: int
    entries_per_layer: float
    plugins: int
    by_kind: dict[str, int]
    by_part: dict[str, int]
    fused_attention: int
    waits: int
    streams: int
    activation_bytes: int
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """A plan in numbers.

    Attributes:
        profiles: in the engine's order.
        weights_bytes: device memory for weights.
        unknown_kinds: kinds of entries that were never seen before; counted as kernels.
        decode_estimate: of one decode step at batch size 1.
    """

    profiles: tuple[ProfilePlan, ...]
    weights_bytes: int
    unknown_kinds: tuple[str, ...]
    decode_estimate: dict[str, float]

    @property
    def fused_attention(self) -> int:
        """Fused attentions of all profiles."""
        return sum(profile.fused_attention for profile in self.profiles)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "profiles": [asdict(profile) for profile in self.profiles],
            "weights_bytes": self.weights_bytes,
            "unknown_kinds": list(self.unknown_kinds),
            "decode_estimate": self.decode_estimate,
        }


def summarize(
    plan: CompiledPlan,
    profile_names: Sequence[str],
    *,
    layers: int,
    cache_bytes: int,
    plugin_launches: int = 1,
) -> PlanSummary:
    """Count a plan.

    Args:
        plan: with as many profiles as there are names, the decode profile first.
        profile_names: names of the profiles.
        layers: decoder layers.
        cache_bytes: cached numbers of one sequence; the built-in attention reads every slot.
        plugin_launches: kernels that each plugin starts in a decode step, as far as it is known.
    """
    kernels = [entry for entry in plan.entries if entry.starts_kernel]
    profiles = tuple(
        _profile_plan(plan, index, name, layers) for index, name in enumerate(profile_names)
    )
    return PlanSummary(
        profiles=profiles,
        weights_bytes=plan.weights_bytes,
        unknown_kinds=tuple(sorted({entry.kind for entry in kernels} - KERNEL - PLUGIN)),
        decode_estimate=estimate_step(profiles[0], cache_bytes, plugin_launches),
    )


def estimate_step(
    profile: ProfilePlan, cache_bytes: int, plugin_launches: int = 1
) -> dict[str, float]:
    """The estimate of this module's docstring, with its parts."""
    count = profile.entries + profile.plugins * (plugin_launches - 1)
    launches = count * LAUNCH_US
    reading = (profile.weight_bytes + cache_bytes) / RTX_4090_BYTES_PER_SECOND * 1e6
    return {
        "launches": count,
        "launch_us": LAUNCH_US,
        "bytes_per_second": RTX_4090_BYTES_PER_SECOND,
        "weight_bytes": profile.weight_bytes,
        "cache_bytes": cache_bytes,
        "launches_us": round(launches, 1),
        "reading_us": round(reading, 1),
        "total_us": round(launches + reading, 1),
    }


def part_of(entry: PlanEntry) -> str:
    """The part of the model that most of an entry's nodes belong to, the earlier of equal ones.

    Nodes are called `<part>/<operator>_<number>` (export/lowerings/model_parts.py).
    """
    parts = Counter(node.partition("/")[0] for node in entry.nodes if "/" in node)
    return max(parts, key=lambda part: parts[part]) if parts else UNKNOWN_PART


def _profile_plan(plan: CompiledPlan, index: int, name: str, layers: int) -> ProfilePlan:
    own = [entry for entry in plan.entries if entry.profile == index]
    kernels = [entry for entry in own if entry.starts_kernel]
    parts = Counter(part_of(entry).rpartition(".")[2] for entry in kernels)
    return ProfilePlan(
        name=name,
        entries=len(kernels),
        entries_per_layer=round(len(kernels) / layers, 2),
        plugins=sum(entry.kind in PLUGIN for entry in kernels),
        by_kind=dict(sorted(Counter(entry.kind for entry in kernels).items())),
        by_part=dict(sorted(parts.items())),
        fused_attention=sum(entry.is_fused_attention for entry in own),
        waits=sum(entry.kind == "wait" for entry in own),
        streams=len({entry.stream for entry in own}),
        activation_bytes=plan.activation_bytes[index],
        weight_bytes=sum(_constant_bytes(entry) for entry in kernels),
    )


def _constant_bytes(entry: PlanEntry) -> int:
    operators = {node.partition("/")[2].rpartition("_")[0] for node in entry.nodes}
    if operators & _LOOKUPS:
        return 0
    return sum(
        constant.bytes or 0
        for constant in entry.constants
        if entry.kind not in PLUGIN or constant.name.rpartition(".")[2] not in _TABLES
    )
