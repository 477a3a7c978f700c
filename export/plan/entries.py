"""Reading the section `Layers:` of the builder's verbose log into typed entries.

The text is not documented. It was seen in TensorRT-RTX 1.7.1.116 with profiling verbosity DETAILED:
one message, one line per entry, an empty line behind the last. Anything else is an error.

Where plugins write their inputs, the graph is cut at them: plugins, their stored tensors and copies
are layers of their own, in a form of their own, and what lies between is compiled piece by piece.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

# The version whose log this module reads.
READ_VERSION = "1.7.1.116"
# Kinds of entries that start no kernel: shapes computed by the host, and events between streams.
# Beside plugins, stored tensors that they read, and a copy that is none.
NO_KERNEL = frozenset({"shape_call", "reshape", "cast", "signal", "wait", "Constant", "NoOp"})
KERNEL = frozenset({"kgen", "gemm", "runtime_fusion"})
# A plugin starts as many kernels as it likes: within a compiled graph, and beside it.
PLUGIN = frozenset({"custom_layer", "PluginV3"})

_ENTRY = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], "
    r"TacticName: (?P<tactic>.*?), StreamId: (?P<stream>\d+), "
    r"(?:EventId: \d+, )?Metadata: ?(?P<metadata>.*)"
)
_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"(?P<constants>)Outputs: \[(?P<outputs>(?:.*?\})?)\], (?:.*?, )?"
    r"TacticValue: (?P<tactic>0x[0-9a-f]+), StreamId: (?P<stream>\d+), Metadata: ?(?P<metadata>.*)"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<shape>[-\d,]*)\], "
    r"(?:Strides: \[[-\d,]*\], StrideOrder: \[[\d,]*\], )?Datatype: (?P<dtype>\w+), "
    r"Format: [^{}]*\}"
)
_NODE = re.compile(r"\[ONNX Layer: (?P<node>[^\]]*)\]")
_PROFILE_OF_NAME = re.compile(r"_myl(\d+)(?:_\d+)?$")
_PROFILE_OF_TENSOR = re.compile(r"\[profile (\d+)\]$")
_MARK = re.compile(r" \[profile (\d+)\]")
_BITS = {
    "Bool": 8, "Int8": 8, "UInt8": 8, "FP8": 8, "Int4": 4, "FP4": 4,
    "Half": 16, "BFloat16": 16, "Float": 32, "Int32": 32, "Int64": 64,
}  # fmt: skip


class PlanError(Exception):
    """The log does not show the plan in the form that this module reads."""


@dataclass(frozen=True, kw_only=True)
class PlanTensor:
    """What an entry reads or writes; -1 stands for a size that is only known at run time."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int | None:
        """Size where it is known."""
        if any(size < 0 for size in self.shape):
            return None
        if self.dtype not in _BITS:
            raise PlanError(
                f"tensor {self.name} is {self.dtype}, whose size is not known here; known: "
                f"{', '.join(_BITS)}"
            )
        return prod(self.shape) * _BITS[self.dtype] // 8


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """One line of the plan, about one kernel launch where `starts_kernel`.

    Attributes:
        name: the builder's name for it.
        kind: `kgen`, `gemm`, `runtime_fusion`, `shape_call`, `signal`, `wait`, …
        profile: index of its optimization profile.
        tactic: the builder's name for the kernel, empty without one.
        stream: the stream it runs on.
        inputs: tensors it reads that other entries or the caller write.
        constants: stored tensors it reads.
        outputs: tensors it writes.
        nodes: the ONNX nodes it came from, the node of the main graph where one stands in a
            function.
    """

    name: str
    kind: str
    profile: int
    tactic: str
    stream: int
    inputs: tuple[PlanTensor, ...]
    constants: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    nodes: tuple[str, ...]

    @property
    def starts_kernel(self) -> bool:
        """Whether the device runs something for it; a kind that is not known counts as one."""
        return self.kind not in NO_KERNEL

    @property
    def is_fused_attention(self) -> bool:
        """Whether it is a whole attention in one kernel, `_gemm_mha_v2…` or `_gemv_mha_v1…`."""
        return re.match(r"_gem[mv]_mha_v\d", self.name) is not None


@dataclass(frozen=True, kw_only=True)
class CompiledPlan:
    """Everything the log says of an engine.

    Attributes:
        entries: in the order of the log.
        activation_bytes: device memory for activations, by profile.
        weights_bytes: device memory for weights.
    """

    entries: tuple[PlanEntry, ...]
    activation_bytes: tuple[int, ...]
    weights_bytes: int


def read_plan(messages: Sequence[str], profiles: int) -> CompiledPlan:
    """Read the plan from the messages of one build, those of level INFO and VERBOSE.

    Raises:
        PlanError: no plan, several, or one in another form.
    """
    sections = [message for message in messages if message.startswith("Layers:\n")]
    if len(sections) != 1:
        raise PlanError(
            f"the builder's log has {len(sections)} sections `Layers:`, expected one; its form is "
            f"known for TensorRT-RTX {READ_VERSION} with profiling verbosity DETAILED"
        )
    lines = sections[0].partition("\n\n")[0].splitlines()[1:]
    found = [_line(line) for line in lines]
    pieces = _pieces(found) if any(line.is_layer for line in found) else None
    entries = _with_constants([_entry(line, profiles, pieces) for line in found])
    empty = [p for p in range(profiles) if not any(e.profile == p for e in entries)]
    if empty:
        raise PlanError(f"the plan has no entries for profile {empty[0]} of {profiles}")
    activation = _sizes(messages, "Total Activation Memory")
    weights = _sizes(messages, "Total Weights Memory")
    if len(activation) != profiles or len(weights) != 1:
        raise PlanError(
            f"the builder's log gives {len(activation)} sizes of activation memory and "
            f"{len(weights)} of weights, expected {profiles} and 1"
        )
    return CompiledPlan(
        entries=entries, activation_bytes=tuple(activation), weights_bytes=weights[0]
    )


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A line of the section.

    Attributes:
        groups: its parts, by the names of the patterns.
        tensors: what it reads and writes, by `inputs`, `constants` and `outputs`.
        is_layer: whether it has the form of layers beside compiled graphs.
    """

    groups: dict[str, str]
    tensors: dict[str, tuple[PlanTensor, ...]]
    is_layer: bool

    @property
    def texts(self) -> tuple[str, ...]:
        """Names that may say which profile it belongs to."""
        tensors = (tensor.name for group in self.tensors.values() for tensor in group)
        return (self.groups["name"], *tensors)


def _line(line: str) -> _Line:
    entry, layer = _ENTRY.fullmatch(line), _LAYER.fullmatch(line)
    found = entry or layer
    if found is None:
        raise PlanError(
            f"cannot read an entry of the plan, expected the form of TensorRT-RTX {READ_VERSION}: "
            f"{line[:200]!r}"
        )
    groups = found.groupdict()
    tensors = {
        group: _tensors(groups[group], groups["name"])
        for group in ("inputs", "constants", "outputs")
    }
    return _Line(groups=groups, tensors=tensors, is_layer=entry is None)


def _entry(line: _Line, profiles: int, pieces: dict[str, int] | None) -> PlanEntry:
    groups, tensors = line.groups, line.tensors
    if pieces is None:
        profile = _profile(line.texts, profiles)
    else:
        profile = pieces.get(_piece(groups["name"]), _marked(line.texts))
    return PlanEntry(
        name=groups["name"],
        kind=groups["kind"],
        profile=profile,
        tactic=groups["tactic"],
        stream=int(groups["stream"]),
        inputs=tensors["inputs"],
        constants=tensors["constants"],
        outputs=tensors["outputs"],
        nodes=_nodes(groups["metadata"]),
    )


def _with_constants(entries: Sequence[PlanEntry]) -> tuple[PlanEntry, ...]:
    """Inputs that are layers of stored tensors, as constants by the tensors' own names."""
    stored = {
        entry.outputs[0].name: replace(entry.outputs[0], name=_plain(entry.name))
        for entry in entries
        if entry.kind == "Constant"
    }
    return tuple(
        replace(
            entry,
            inputs=tuple(tensor for tensor in entry.inputs if tensor.name not in stored),
            constants=(
                *entry.constants,
                *(stored[tensor.name] for tensor in entry.inputs if tensor.name in stored),
            ),
        )
        for entry in entries
    )


def _pieces(lines: Sequence[_Line]) -> dict[str, int]:
    """The profile of each compiled piece: its number counts pieces, not profiles.

    What crosses a piece's border names any profile but the first.
    """
    found: dict[str, int] = {}
    for line in lines:
        if piece := _piece(line.groups["name"]):
            found[piece] = max(found.get(piece, 0), _marked(line.texts))
    return found


def _piece(name: str) -> str:
    found = _PROFILE_OF_NAME.search(name)
    return found[1] if found else ""


def _marked(texts: Sequence[str]) -> int:
    return max((int(number) for text in texts for number in _MARK.findall(text)), default=0)


def _plain(name: str) -> str:
    return _MARK.sub("", name)


def _tensors(text: str, entry: str) -> tuple[PlanTensor, ...]:
    found = list(_TENSOR.finditer(text))
    rest = _TENSOR.sub("", text)
    if rest.strip(" ,"):
        raise PlanError(f"cannot read the tensors of entry {entry}: {rest.strip(' ,')[:200]!r}")
    return tuple(
        PlanTensor(
            name=m["name"],
            shape=tuple(int(size) for size in m["shape"].split(",") if size),
            dtype=m["dtype"],
        )
        for m in found
    )


def _profile(texts: Sequence[str], profiles: int) -> int:
    """The index in the entry's own name, or, where the builder left it out, in a tensor's."""
    for text in texts:
        found = _PROFILE_OF_NAME.search(text) or _PROFILE_OF_TENSOR.search(text)
        if found is not None:
            index = int(found[1])
            if index >= profiles:
                raise PlanError(
                    f"entry {texts[0]} belongs to profile {index}, there are {profiles}"
                )
            return index
    if profiles == 1:
        return 0
    raise PlanError(f"entry {texts[0]} does not say which of {profiles} profiles it belongs to")


def _nodes(metadata: str) -> tuple[str, ...]:
    """Names of main-graph nodes: `inner | outer (Function)` names the outer one last."""
    names = (m["node"].rpartition(" | ")[2] for m in _NODE.finditer(metadata))
    return tuple(dict.fromkeys(name.partition(" (")[0] for name in names))


def _sizes(messages: Sequence[str], title: str) -> list[int]:
    pattern = re.compile(rf"{title}: (\d+) bytes")
    return [int(m[1]) for message in messages if (m := pattern.fullmatch(message))]
