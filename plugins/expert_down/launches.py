"""How the kernel that ends a block with experts is compiled and launched. No Triton, no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from plugins.expert_gather.launches import HIDDEN_MULTIPLE, MAX_NUM_KEYS, MAX_TOP_K
from plugins.kernel_spec import POINTER_ALIGNMENT, TRITON_TYPES, KernelSpec, Launch
from plugins.launch_arguments import checked_addresses, checked_batch
from plugins.projection.matrix import (
    ENOUGH_PROGRAMS,
    MAX_LOADS,
    Tile,
    ceil_div,
    choose_tile,
    format_label,
    grid_rules,
    matrix_constants,
    matrix_problems,
    power_of_two,
    scale_type,
    weight_type,
)
from plugins.projection.packing import WeightFormat

Activation = Literal["float32", "float16", "bfloat16"]
ExpertEpilogue = Literal["residual", "scaled_residual"]

MAX_HIDDEN = 2048
# Each share repeats the routing, and the last program reads all of them.
MAX_SPLITS = 8
MAX_HEADS = 8
_WARPS = 4
# Bytes of `down`, and as many of `up`, that a thread has on their way; and numbers at most.
_THREAD_BYTES = 64
_THREAD_NUMBERS = 32


@dataclass(frozen=True, kw_only=True)
class ExpertDown:
    """The end of a feed-forward block with experts: down projection, routing, experts, residual.

    The experts read the residual stream, normed as the block's other projections norm it; their
    scores come from the launch before (`Projection.extra_rows`).

    Attributes:
        hidden: H, rows of the packed matrix.
        inner: I, its columns and the size of x.
        weights: how the matrix is stored.
        activation: type of the residual stream, of norm and residual weights and of the output.
        tables: how `down` and `up` are stored; int8 has a float32 scale per row.
        num_keys: n, of each axis of the grid of experts.
        top_k: K, experts that each head picks.
        heads: P.
        weight_inside: multiply by an expert's weight before the activation.
        normalize: divide the weights by their sum.
        epilogue: `residual` or `scaled_residual`, see `plugins.projection.kernel.project`.
        eps: of the norm.
        batch: most sequences of a launch.
        input: type of x, where it is not `activation`.
    """

    hidden: int
    inner: int
    weights: WeightFormat
    activation: Activation
    tables: WeightFormat
    num_keys: int
    top_k: int
    heads: int = 1
    weight_inside: bool = False
    normalize: bool = False
    epilogue: ExpertEpilogue = "scaled_residual"
    eps: float = 1e-6
    batch: int = 1
    input: Activation | None = None

    def __post_init__(self) -> None:
        problems = matrix_problems(self.hidden, self.inner, self.weights, self.batch)
        if self.activation not in TRITON_TYPES:
            problems.append(f"unknown activation {self.activation!r}")
        if self.input_type not in TRITON_TYPES:
            problems.append(f"unknown input {self.input!r}")
        if self.epilogue not in get_args(ExpertEpilogue):
            problems.append(f"unknown epilogue {self.epilogue!r}")
        if self.tables.kind == "int4":
            problems.append("experts are int4, expected floats or int8")
        if not 1 <= self.hidden <= MAX_HIDDEN or self.hidden % HIDDEN_MULTIPLE:
            problems.append(
                f"H is {self.hidden}, expected a multiple of {HIDDEN_MULTIPLE} up to {MAX_HIDDEN}"
            )
        if not 1 <= self.num_keys <= MAX_NUM_KEYS:
            problems.append(f"{self.num_keys} keys per axis, expected 1 to {MAX_NUM_KEYS}")
        most = min(MAX_TOP_K, self.num_keys**2)
        if not 1 <= self.top_k <= most:
            problems.append(f"top_k is {self.top_k}, expected 1 to {most}")
        if not 1 <= self.heads <= MAX_HEADS:
            problems.append(f"{self.heads} heads, expected 1 to {MAX_HEADS}")
        if problems:
            raise ValueError(f"no kernel covers this block with experts: {'; '.join(problems)}")

    @property
    def input_type(self) -> Activation:
        """Type of x."""
        return self.activation if self.input is None else self.input

    @property
    def splits(self) -> int:
        """Programs that share the picks of a sequence."""
        return ceil_div(self._picks, self._picks_per_split)

    @cached_property
    def tile(self) -> Tile:
        """How the product is cut: as a projection, but with the warps that the experts take."""
        tile = choose_tile(
            self.hidden, self.inner, self.weights, self.batch, ENOUGH_PROGRAMS, MAX_LOADS
        )
        rows = min(tile.rows * _WARPS // tile.warps, power_of_two(self.hidden))
        return Tile(tile.batch, rows, tile.columns, _WARPS)

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory of a launch; what it holds is arbitrary."""
        return sum(self._regions.values())

    @property
    def counters(self) -> int:
        """How many int32 counters it needs: zero before the first launch, and after each."""
        return self.batch

    @cached_property
    def spec(self) -> KernelSpec:
        """The variant of the kernel."""
        type_, input_ = TRITON_TYPES[self.activation], TRITON_TYPES[self.input_type]
        keys_block, pairs_block = power_of_two(self.num_keys), power_of_two(self._pairs)
        parts = [
            f"expert_down-{type_}-{format_label(self.weights)}",
            f"{self.hidden}x{self.inner}",
            *([f"x_{input_}"] if input_ != type_ else []),
            f"experts_{format_label(self.tables)}",
            f"p{self.heads}-n{self.num_keys}-k{self.top_k}",
            *(["inside"] if self.weight_inside else []),
            *(["normalize"] if self.normalize else []),
            self.epilogue,
            self.tile.label,
        ]
        return KernelSpec(
            name="-".join(parts),
            function="plugins.expert_down.kernel:expert_down",
            arguments={
                "x": f"*{input_}",
                "weights": weight_type(self.weights),
                "scales": scale_type(self.weights),
                "stream": f"*{type_}",
                "norm": f"*{type_}",
                "residual_weight": f"*{type_}",
                "router": "*fp32",
                "down": weight_type(self.tables),
                "up": weight_type(self.tables),
                "down_scales": "*fp32",
                "up_scales": "*fp32",
                "best_scores": "*fp32",
                "best_keys": "*i32",
                "pair_sums": "*fp32",
                "experts": "*i32",
                "expert_weights": "*fp32",
                "products": "*fp32",
                "shares": "*fp32",
                "arrivals": "*i32",
                "output": f"*{type_}",
                "batch": "i32",
                "eps": "fp32",
            },
            constants={
                **matrix_constants(self.hidden, self.inner, self.weights, self.tile),
                "SCALED_RESIDUAL": self.epilogue == "scaled_residual",
                "SCALED_EXPERTS": self.tables.kind == "int8",
                "HEADS": self.heads,
                "NUM_KEYS": self.num_keys,
                "TOP_K": self.top_k,
                "PER_AXIS": self._per_axis,
                "NORMALIZE": self.normalize,
                "WEIGHT_INSIDE": self.weight_inside,
                "SPLITS": self.splits,
                "PICKS_PER_SPLIT": self._picks if self.splits == 1 else self._picks_per_split,
                "KEYS_BLOCK": keys_block,
                "PAIRS_BLOCK": pairs_block,
                "STEP": 16 if pairs_block > 128 else 8,
                "ROWS_BLOCK": power_of_two(self.hidden),
                "PICKS_BLOCK": self._picks_block,
            },
            grid=grid_rules(self.hidden, self.tile, self.tile.batch * self.splits),
            num_warps=self.tile.warps,
        )

    def launch(
        self,
        *,
        batch: int,
        x: int,
        weights: int,
        stream: int,
        norm: int,
        router: int,
        down: int,
        up: int,
        output: int,
        workspace: int,
        counters: int,
        scales: int = 0,
        residual_weight: int = 0,
        down_scales: int = 0,
        up_scales: int = 0,
    ) -> Launch:
        """Run it once.

        Args:
            batch: B sequences.
            x: address of [B, I].
            weights: address of the packed matrix [H, I].
            stream: address of the residual stream [B, H].
            norm: address of the norm's weight [H], in the activation's type.
            router: address of the scores [B, 2, P, n] float32: of the first axis, all heads, then
                of the second.
            down: address of [E, H], E at least n².
            up: address of [E, H].
            output: address of [B, H]; may be `stream`, not `x`.
            workspace: address of `workspace_bytes` of scratch memory.
            counters: address of the counters.
            scales: address of the packed matrix's scales.
            residual_weight: address of [H], in the activation's type.
            down_scales: address of [E] float32, where experts are int8.
            up_scales: address of [E] float32.

        Raises:
            ValueError: a larger batch than it was made for, or an address that is missing or that
                it has no use for.
        """
        checked_batch(batch, self.batch)
        scaled = self.tables.kind == "int8"
        needed = {
            "x": (x, True),
            "weights": (weights, True),
            "scales": (scales, self.weights.kind in ("int8", "int4")),
            "stream": (stream, True),
            "norm": (norm, True),
            "residual_weight": (residual_weight, self.epilogue == "scaled_residual"),
            "router": (router, True),
            "down": (down, True),
            "up": (up, True),
            "down_scales": (down_scales, scaled),
            "up_scales": (up_scales, scaled),
            "arrivals": (counters, True),
            "output": (output, True),
        }
        problems = () if workspace else ("workspace missing",)
        addresses = checked_addresses(self.spec.name, needed, *problems)
        scratch = {}
        for name, size in self._regions.items():
            scratch[name] = workspace
            workspace += size
        return Launch(
            kernel=self.spec.name,
            sizes={"batch": batch},
            arguments={
                **addresses,
                **scratch,
                "batch": batch,
                "eps": self.eps,
            },
        )

    @property
    def _regions(self) -> dict[str, int]:
        """Bytes of each scratch array, in their order in the workspace."""
        shares = self.batch * self.splits
        heads = shares * self.heads
        items = {  # of 4 bytes
            "best_scores": heads * 2 * self._per_axis,
            "best_keys": heads * 2 * self._per_axis,
            "pair_sums": heads * self._pairs,
            "experts": heads * self.top_k,
            "expert_weights": heads * self.top_k,
            "products": self.batch * self.hidden,
            "shares": shares * self.hidden,
        }
        return {
            name: ceil_div(4 * count, POINTER_ALIGNMENT) * POINTER_ALIGNMENT
            for name, count in items.items()
        }

    @property
    def _per_axis(self) -> int:
        """How many keys of each axis can be picked."""
        return min(self.top_k, self.num_keys)

    @property
    def _pairs(self) -> int:
        """Pairs of ranks (i, j) that can be picked: (i+1)·(j+1) ≤ K."""
        return sum(min(self.top_k // (i + 1), self._per_axis) for i in range(self._per_axis))

    @property
    def _picks(self) -> int:
        """Experts of a sequence."""
        return self.heads * self.top_k

    @property
    def _picks_block(self) -> int:
        """Experts whose rows a program has on their way."""
        numbers = min(_THREAD_BYTES * 8 // self.tables.bits, _THREAD_NUMBERS)
        rows = numbers * 32 * _WARPS // power_of_two(self.hidden)
        return min(max(rows, 1), power_of_two(self._picks))

    @property
    def _picks_per_split(self) -> int:
        """As few as are on their way at once, but no more than `MAX_SPLITS` splits."""
        return self._picks_block * ceil_div(ceil_div(self._picks, self._picks_block), MAX_SPLITS)
