"""How the kernels of the expert gather are compiled and launched. No Triton, no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from plugins.kernel_spec import POINTER_ALIGNMENT, TRITON_TYPES, KernelSpec, Launch, Shapes
from plugins.registry import EXPERT_GATHER

MAX_TOP_K = 64
MAX_NUM_KEYS = 128
MAX_HIDDEN = 8192
# A row is read 16 bytes at a time, which is 8 half-precision numbers.
HIDDEN_MULTIPLE = 8
# Up to that many tokens, the picks of one are split among programs: a token alone would leave the
# GPU idle. A prompt has enough tokens, and splitting would only add traffic.
MAX_SPLIT_TOKENS = 32
# More shares take longer to add up than their rows take to read.
MAX_SPLITS = 32
_MODULE = "plugins.expert_gather.kernel"
# Bytes of `down`, and as many of `up`, that a thread holds at a time; its registers bound them.
_THREAD_BYTES = 64


def make_kernels(
    attributes: Mapping[str, int | float], shapes: Shapes, dtypes: Mapping[str, str]
) -> ExpertGatherKernels:
    """The kernels of one ExpertGather, see `OpKernels`.

    Args:
        attributes: `top_k`, `weight_inside` and `normalize` of the node.
        shapes: of its inputs and its output; T may be -1.
        dtypes: numpy's names of their types.

    Raises:
        ValueError: what no kernel covers.
    """
    names = (*EXPERT_GATHER.inputs, *EXPERT_GATHER.outputs)
    _, heads, num_keys = shapes["scores_x"]
    hidden = shapes["hidden"][1]
    top_k = int(attributes["top_k"])
    problems = [
        f"{name} is {dtypes[name]}, expected one of {', '.join(TRITON_TYPES)}"
        for name in names
        if dtypes[name] not in TRITON_TYPES
    ]
    problems += [
        f"{second} is {dtypes[second]}, expected {dtypes[first]} like {first}"
        for first, second in (
            ("scores_x", "scores_y"), ("down", "up"), ("hidden", "expert_output")
        )
        if dtypes[first] != dtypes[second]
    ]  # fmt: skip
    problems += _shape_problems(shapes, heads, num_keys, hidden)
    if not 1 <= num_keys <= MAX_NUM_KEYS:
        problems.append(f"the grid has {num_keys} keys per axis, expected 1 to {MAX_NUM_KEYS}")
    if not 1 <= top_k <= min(MAX_TOP_K, num_keys**2):
        problems.append(
            f"top_k is {top_k}, expected 1 to {min(MAX_TOP_K, num_keys**2)} of {num_keys}² experts"
        )
    if not 1 <= hidden <= MAX_HIDDEN or hidden % HIDDEN_MULTIPLE:
        problems.append(
            f"H is {hidden}, expected a multiple of {HIDDEN_MULTIPLE} up to {MAX_HIDDEN}"
        )
    if problems:
        raise ValueError(
            f"no kernel covers this {EXPERT_GATHER.name}: {'; '.join(problems)}. Build without "
            "plugins: the node's ONNX function computes the same"
        )
    return ExpertGatherKernels(
        heads=heads,
        num_keys=num_keys,
        hidden=hidden,
        top_k=top_k,
        weight_inside=bool(attributes["weight_inside"]),
        normalize=bool(attributes["normalize"]),
        score_type=TRITON_TYPES[dtypes["scores_x"]],
        hidden_type=TRITON_TYPES[dtypes["hidden"]],
        row_type=TRITON_TYPES[dtypes["down"]],
    )


@dataclass(frozen=True, kw_only=True)
class ExpertGatherKernels:
    """`OpKernels` of one ExpertGather: route, then gather.

    Attributes:
        heads: P.
        num_keys: n.
        hidden: H.
        top_k: K.
        weight_inside: multiply by the weight before the activation.
        normalize: divide the weights by their sum.
        score_type: Triton's name of the scores' type.
        hidden_type: of the tokens and of the output.
        row_type: of `down` and `up`.
    """

    heads: int
    num_keys: int
    hidden: int
    top_k: int
    weight_inside: bool
    normalize: bool
    score_type: str
    hidden_type: str
    row_type: str

    @cached_property
    def specs(self) -> tuple[KernelSpec, ...]:
        """The router, the gather of one program per token, and the split one if it differs."""
        return (self._route, *(self._gather(splits) for splits in sorted({1, self.splits})))

    @property
    def per_axis(self) -> int:
        """How many keys of each axis can be picked."""
        return min(self.top_k, self.num_keys)

    @property
    def pairs(self) -> int:
        """Pairs of ranks (i, j) that can be picked: (i+1)·(j+1) ≤ K."""
        return sum(min(self.top_k // (i + 1), self.per_axis) for i in range(self.per_axis))

    @property
    def picks(self) -> int:
        """Rows that a token reads."""
        return self.heads * self.top_k

    @property
    def splits(self) -> int:
        """Programs that share the picks of one token when tokens are few."""
        return _ceil_div(self.picks, self._picks_per_split)

    def workspace_bytes(self, shapes: Shapes) -> int:
        """Scratch memory for that many tokens or fewer."""
        return sum(self._regions(shapes["hidden"][0]).values())

    def counters(self, shapes: Shapes) -> int:
        """One for each token whose picks are split."""
        return min(shapes["hidden"][0], MAX_SPLIT_TOKENS) if self.splits > 1 else 0

    def launches(
        self, shapes: Shapes, addresses: Mapping[str, int], workspace: int, counters: int
    ) -> tuple[Launch, ...]:
        """Route, then gather; see `OpKernels.launches`."""
        if problems := _shape_problems(shapes, self.heads, self.num_keys, self.hidden):
            raise ValueError(
                f"{EXPERT_GATHER.name}'s kernels were made for other shapes: "
                f"{'; '.join(problems)}. Make kernels for these"
            )
        tokens = shapes["hidden"][0]
        splits = self.splits if tokens <= MAX_SPLIT_TOKENS else 1
        scratch = {}
        for name, size in self._regions(tokens).items():
            scratch[name] = workspace
            workspace += size
        picks = {"experts": scratch["experts"], "weights": scratch["weights"]}
        route = Launch(
            kernel=self._route.name,
            sizes={"tokens": tokens},
            arguments={
                "scores_x": addresses["scores_x"],
                "scores_y": addresses["scores_y"],
                "best_scores": scratch["best_scores"],
                "best_keys": scratch["best_keys"],
                "pair_sums": scratch["pair_sums"],
                **picks,
            },
        )
        gather = Launch(
            kernel=self._gather(splits).name,
            sizes={"tokens": tokens},
            arguments={
                "hidden": addresses["hidden"],
                "down": addresses["down"],
                "up": addresses["up"],
                **picks,
                "partial_sums": scratch["partial_sums"] if splits > 1 else 0,
                "arrivals": counters if splits > 1 else 0,
                "output": addresses["expert_output"],
            },
        )
        return route, gather

    def _regions(self, tokens: int) -> dict[str, int]:
        """Bytes of each scratch array, in their order in the workspace."""
        heads = tokens * self.heads
        shares = min(tokens, MAX_SPLIT_TOKENS) * self.splits if self.splits > 1 else 0
        items = {  # of 4 bytes
            "best_scores": heads * 2 * self.per_axis,
            "best_keys": heads * 2 * self.per_axis,
            "pair_sums": heads * self.pairs,
            "experts": heads * self.top_k,
            "weights": heads * self.top_k,
            "partial_sums": shares * self.hidden,
        }
        return {
            name: _ceil_div(4 * count, POINTER_ALIGNMENT) * POINTER_ALIGNMENT
            for name, count in items.items()
        }

    @cached_property
    def _route(self) -> KernelSpec:
        keys_block, pairs_block = _power_of_two(self.num_keys), _power_of_two(self.pairs)
        return KernelSpec(
            name=f"route_experts-{self.score_type}-p{self.heads}-n{self.num_keys}-k{self.top_k}"
            f"{'-normalize' if self.normalize else ''}",
            function=f"{_MODULE}:route_experts",
            arguments={
                "scores_x": f"*{self.score_type}",
                "scores_y": f"*{self.score_type}",
                "best_scores": "*fp32",
                "best_keys": "*i32",
                "pair_sums": "*fp32",
                "experts": "*i32",
                "weights": "*fp32",
            },
            constants={
                "NUM_KEYS": self.num_keys,
                "TOP_K": self.top_k,
                "PER_AXIS": self.per_axis,
                "NORMALIZE": self.normalize,
                "KEYS_BLOCK": keys_block,
                "PAIRS_BLOCK": pairs_block,
                # Where 16 pay, for many pairs, the unrolled loops of 8 would spill; elsewhere those
                # of 16 do.
                "STEP": 16 if pairs_block > 128 else 8,
            },
            grid=(f"tokens * {self.heads}", "1", "1"),
            num_warps=min(max(keys_block // 32, pairs_block // 32, 1), 8),
        )

    def _gather(self, splits: int) -> KernelSpec:
        inside = "-inside" if self.weight_inside else ""
        types = "_".join(dict.fromkeys((self.hidden_type, self.row_type)))
        return KernelSpec(
            name=f"gather_experts-{types}-h{self.hidden}-picks{self.picks}-splits{splits}{inside}",
            function=f"{_MODULE}:gather_experts",
            arguments={
                "hidden": f"*{self.hidden_type}",
                "down": f"*{self.row_type}",
                "up": f"*{self.row_type}",
                "experts": "*i32",
                "weights": "*fp32",
                "partial_sums": "*fp32",
                "arrivals": "*i32",
                "output": f"*{self.hidden_type}",
            },
            constants={
                "HIDDEN": self.hidden,
                "PICKS": self.picks,
                "SPLITS": splits,
                "PICKS_PER_SPLIT": self.picks if splits == 1 else self._picks_per_split,
                "WEIGHT_INSIDE": self.weight_inside,
                "HIDDEN_BLOCK": _power_of_two(self.hidden),
                "PICKS_BLOCK": self._picks_block,
            },
            grid=("tokens", str(splits), "1"),
            num_warps=self._gather_warps,
        )

    @property
    def _gather_warps(self) -> int:
        """More for longer rows, but no thread reads less than 16 bytes at a time."""
        return max(min(self._most_warps, self._picks_block * self._row_bytes // (16 * 32)), 1)

    @property
    def _picks_block(self) -> int:
        """Rows of `down` and of `up` that a program has in flight."""
        rows = _THREAD_BYTES * 32 * self._most_warps // self._row_bytes
        return min(max(rows, 1), _power_of_two(self.picks))

    @property
    def _most_warps(self) -> int:
        return min(max(_power_of_two(self.hidden) // 256, 4), 16)

    @property
    def _row_bytes(self) -> int:
        """A row with its padding."""
        return _power_of_two(self.hidden) * (4 if self.row_type == "fp32" else 2)

    @property
    def _picks_per_split(self) -> int:
        """As few as are in flight at once, but no more than `MAX_SPLITS` splits."""
        blocks = _ceil_div(self.picks, self._picks_block)
        return self._picks_block * _ceil_div(blocks, MAX_SPLITS)


def _shape_problems(shapes: Shapes, heads: int, num_keys: int, hidden: int) -> list[str]:
    """Inputs and outputs that do not fit together; T is the first dimension of hidden."""
    tokens = shapes["hidden"][0]
    experts = shapes["down"][0]
    expected: dict[str, Sequence[int]] = {
        "hidden": (tokens, hidden),
        "scores_x": (tokens, heads, num_keys),
        "scores_y": (tokens, heads, num_keys),
        "down": (experts, hidden),
        "up": (experts, hidden),
        "expert_output": (tokens, hidden),
    }
    problems = [
        f"{name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if list(shapes[name]) != list(shape)
    ]
    if experts < num_keys**2:
        problems.append(f"down has {experts} rows, expected at least {num_keys}²")
    return problems


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below the number."""
    return 1 << (number - 1).bit_length()
