"""How kernels of projections and of the head are compiled and launched. No Triton, no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from plugins.kernel_spec import POINTER_ALIGNMENT, TRITON_TYPES, KernelSpec, Launch
from plugins.launch_arguments import checked_addresses, checked_batch
from plugins.projection.matrix import (
    ENOUGH_HEAD_PROGRAMS,
    ENOUGH_PROGRAMS,
    MAX_HEAD_LOADS,
    MAX_LOADS,
    Tile,
    ceil_div,
    choose_extra_tile,
    choose_tile,
    column_problems,
    format_label,
    grid_rules,
    kernel_format,
    matrix_constants,
    matrix_problems,
    power_of_two,
    scale_type,
    weight_type,
)
from plugins.projection.packing import WeightFormat

Activation = Literal["float32", "float16", "bfloat16"]
Epilogue = Literal["plain", "silu", "silu_product", "residual", "scaled_residual"]
TokenType = Literal["int32", "int64"]

_MODULE = "plugins.projection.kernel"
_TOKEN_TYPES = {"int32": "i32", "int64": "i64"}
_FLOATS = WeightFormat(kind="float32")
_KEYS_AT_ONCE = 4096  # of the last program of a head, 8 bytes each
_EMBEDDING_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One projection of a decode step, with what surrounds it.

    Attributes:
        rows: of the packed matrix.
        columns: of the packed matrix, the size of x.
        weights: how the matrix is stored.
        activation: type of x, of what is added and of the output.
        norm: normalise x by its root mean square and a weight first.
        eps: of the norm.
        epilogue: what becomes of the products, see `kernel.project`.
        addend: add a tensor of the output's shape to the products.
        batch: most sequences of a launch.
        input: type of x, where it is not `activation`.
        output_stride: numbers from one row of the output to the next; 0 for the size of a row.
        extra_rows: of a second, small matrix that is multiplied by the same, normed x in programs
            of its own; its products are written as float32 without an epilogue. 0 for none.
        extra_weights: how that matrix is stored; floats.
        extra_offset: numbers from the address given for its products to the first of them.
        extra_stride: numbers from one row of its products to the next; 0 for `extra_rows`.
    """

    rows: int
    columns: int
    weights: WeightFormat
    activation: Activation
    norm: bool = False
    eps: float = 1e-6
    epilogue: Epilogue = "plain"
    addend: bool = False
    batch: int = 1
    input: Activation | None = None
    output_stride: int = 0
    extra_rows: int = 0
    extra_weights: WeightFormat = _FLOATS
    extra_offset: int = 0
    extra_stride: int = 0

    def __post_init__(self) -> None:
        problems = matrix_problems(self.rows, self.columns, self.weights, self.batch)
        if self.activation not in TRITON_TYPES:
            problems.append(f"unknown activation {self.activation!r}")
        if self.input_type not in TRITON_TYPES:
            problems.append(f"unknown input {self.input!r}")
        if self.epilogue not in get_args(Epilogue):
            problems.append(f"unknown epilogue {self.epilogue!r}")
        if self.epilogue == "silu_product" and self.rows % 2:
            problems.append(f"{self.rows} rows are no pairs of gate and up")
        if self.addend and self.epilogue in ("silu", "silu_product"):
            problems.append(f"nothing is added after {self.epilogue}")
        if self.output_stride and self.output_stride < self.outputs:
            problems.append(
                f"output rows {self.output_stride} apart, expected at least {self.outputs}"
            )
        problems += self._extra_problems()
        if problems:
            raise ValueError(f"no kernel covers this projection: {'; '.join(problems)}")

    def _extra_problems(self) -> list[str]:
        if not self.extra_rows:
            used = self.extra_offset or self.extra_stride
            return ["a place for extra rows, of which there are none"] if used else []
        problems = []
        if self.extra_weights.kind in ("int8", "int4"):
            problems.append(f"extra rows are {self.extra_weights.kind}, expected floats")
        elif self.extra_rows < 0:
            problems.append(f"{self.extra_rows} extra rows, expected 0 or more")
        else:
            problems += [
                f"extra rows: {problem}"
                for problem in column_problems(self.columns, self.extra_weights)
            ]
        if self.extra_offset < 0:
            problems.append(f"extra products from {self.extra_offset} on, expected 0 or more")
        if self.extra_stride and self.extra_stride < self.extra_rows:
            problems.append(
                f"extra products {self.extra_stride} apart, expected at least {self.extra_rows}"
            )
        return problems

    @property
    def input_type(self) -> Activation:
        """Type of x."""
        return self.activation if self.input is None else self.input

    @property
    def outputs(self) -> int:
        """Size of an output row."""
        return self.rows // 2 if self.epilogue == "silu_product" else self.rows

    @cached_property
    def tile(self) -> Tile:
        """How the work is cut."""
        return choose_tile(
            self.rows, self.columns, self.weights, self.batch, ENOUGH_PROGRAMS, MAX_LOADS
        )

    @cached_property
    def extra_tile(self) -> Tile:
        """How the work of the second matrix is cut."""
        return choose_extra_tile(self.extra_rows, self.columns, self.extra_weights, self.tile)

    @cached_property
    def spec(self) -> KernelSpec:
        """The variant of the kernel."""
        type_, input_ = TRITON_TYPES[self.activation], TRITON_TYPES[self.input_type]
        output_stride = self.output_stride or self.outputs
        extra_stride = self.extra_stride or self.extra_rows
        extra = self.extra_tile if self.extra_rows else self.tile
        extra_label = f"{format_label(self.extra_weights)}_{self.extra_rows}at{self.extra_offset}"
        parts = [
            f"project-{type_}-{format_label(self.weights)}",
            f"{self.rows}x{self.columns}",
            *([f"x_{input_}"] if input_ != type_ else []),
            *(["norm"] if self.norm else []),
            self.epilogue,
            *(["addend"] if self.addend else []),
            *([f"stride{output_stride}"] if output_stride != self.outputs else []),
            *([f"extra_{extra_label}stride{extra_stride}"] if self.extra_rows else []),
            self.tile.label,
        ]
        extra_blocks = ceil_div(self.extra_rows, extra.rows)
        return KernelSpec(
            name="-".join(parts),
            function=f"{_MODULE}:project",
            arguments={
                "x": f"*{input_}",
                "norm": f"*{type_}",
                "weights": weight_type(self.weights),
                "scales": scale_type(self.weights),
                "addend": f"*{type_}",
                "residual": f"*{type_}",
                "residual_weight": f"*{type_}",
                "output": f"*{type_}",
                "extra": weight_type(self.extra_weights),
                "extra_output": "*fp32",
                "batch": "i32",
                "eps": "fp32",
            },
            constants={
                **matrix_constants(self.rows, self.columns, self.weights, self.tile),
                "NORM": self.norm,
                "EPILOGUE": self.epilogue,
                "ADDEND": self.addend,
                "OUTPUT_STRIDE": output_stride,
                "EXTRA_ROWS": self.extra_rows,
                "EXTRA_OFFSET": self.extra_offset,
                "EXTRA_STRIDE": extra_stride,
                "EXTRA_BLOCK_ROWS": extra.rows,
                "EXTRA_BLOCK_COLUMNS": extra.columns,
            },
            grid=grid_rules(self.rows, self.tile, extra_blocks),
            num_warps=self.tile.warps,
        )

    def launch(
        self,
        *,
        batch: int,
        x: int,
        weights: int,
        output: int,
        scales: int = 0,
        norm: int = 0,
        addend: int = 0,
        residual: int = 0,
        residual_weight: int = 0,
        extra: int = 0,
        extra_output: int = 0,
    ) -> Launch:
        """Run it once.

        Args:
            batch: B sequences.
            x: address of [B, columns].
            weights: address of the packed matrix.
            output: address of [B, outputs], rows `output_stride` apart; may be `residual` where
                rows are not apart, not `x`.
            scales: address of the packed matrix's scales.
            norm: address of the norm's weight, [columns] in the activation's type.
            addend: address of [B, outputs].
            residual: address of [B, outputs].
            residual_weight: address of [outputs] in the activation's type.
            extra: address of the packed second matrix, [extra_rows, columns].
            extra_output: address from which `extra_offset` and `extra_stride` count to its
                products, float32; may be `output`.

        Raises:
            ValueError: a larger batch than the projection was made for, or an address that is
                missing or that it has no use for.
        """
        needed = {
            "x": (x, True),
            "weights": (weights, True),
            "output": (output, True),
            "scales": (scales, self.weights.kind in ("int8", "int4")),
            "norm": (norm, self.norm),
            "addend": (addend, self.addend),
            "residual": (residual, self.epilogue in ("residual", "scaled_residual")),
            "residual_weight": (residual_weight, self.epilogue == "scaled_residual"),
            "extra": (extra, self.extra_rows > 0),
            "extra_output": (extra_output, self.extra_rows > 0),
        }
        return Launch(
            kernel=self.spec.name,
            sizes={"batch": checked_batch(batch, self.batch)},
            arguments={
                **checked_addresses(self.spec.name, needed),
                "batch": batch,
                "eps": self.eps,
            },
        )


@dataclass(frozen=True, kw_only=True)
class Head:
    """Final norm, the logits, and the token that greedy decoding takes next.

    Attributes:
        vocab_size: V, rows of the packed matrix.
        columns: H, of the packed matrix.
        weights: how the matrix is stored.
        activation: type of x and of the next x.
        eps: of the final norm.
        logits: write them, as float32.
        token: type of the tokens to write; None writes none.
        embedding: how the embedding table [V, H] is stored, whose row of the token becomes the next
            step's x; None writes none. A tied table is the head's own matrix.
        batch: most sequences of a launch.
        advance: prepare the next step too, so that a captured graph is replayed without the host:
            keep the tokens in a ring, add 1 to the positions and to the count of steps.
        ring: steps whose tokens the ring holds.
    """

    vocab_size: int
    columns: int
    weights: WeightFormat
    activation: Activation
    eps: float = 1e-6
    logits: bool = False
    token: TokenType | None = "int64"
    embedding: WeightFormat | None = None
    batch: int = 1
    advance: bool = False
    ring: int = 64

    def __post_init__(self) -> None:
        problems = matrix_problems(self.vocab_size, self.columns, self.weights, self.batch)
        if self.activation not in TRITON_TYPES:
            problems.append(f"unknown activation {self.activation!r}")
        if not self.logits and self.token is None:
            problems.append("neither logits nor a token is written")
        if self.embedding is not None:
            if self.token is None:
                problems.append("an embedding row needs a token")
            problems += column_problems(self.columns, self.embedding)
        if self.advance and self.token is None:
            problems.append("no step is prepared without a token")
        if self.ring < 1:
            problems.append(f"a ring of {self.ring} steps, expected at least 1")
        if problems:
            raise ValueError(f"no kernel covers this head: {'; '.join(problems)}")

    @cached_property
    def tile(self) -> Tile:
        """How the work is cut."""
        return choose_tile(
            self.vocab_size, self.columns, self.weights, self.batch, ENOUGH_HEAD_PROGRAMS,
            MAX_HEAD_LOADS,
        )  # fmt: skip

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory of a launch; what it holds is arbitrary."""
        keys = self.batch * ceil_div(self.vocab_size, self.tile.rows)
        return (
            0 if self.token is None else ceil_div(8 * keys, POINTER_ALIGNMENT) * POINTER_ALIGNMENT
        )

    @property
    def counters(self) -> int:
        """How many int32 counters it needs: zero before the first launch, and after each."""
        return 0 if self.token is None else 1

    @cached_property
    def spec(self) -> KernelSpec:
        """The variant of the kernel."""
        type_ = TRITON_TYPES[self.activation]
        table = self.embedding or WeightFormat(kind="float32")
        every = power_of_two(self.batch)
        parts = [
            f"head-{type_}-{format_label(self.weights)}",
            f"{self.vocab_size}x{self.columns}",
            *(["logits"] if self.logits else []),
            *([self.token] if self.token else []),
            *([f"embed_{format_label(table)}"] if self.embedding else []),
            *([f"advance{self.ring}by{self.batch}"] if self.advance else []),
            f"b{every}",
            self.tile.label,
        ]
        blocks = ceil_div(self.vocab_size, self.tile.rows)
        return KernelSpec(
            name="-".join(parts),
            function=f"{_MODULE}:head",
            arguments={
                "x": f"*{type_}",
                "norm": f"*{type_}",
                "weights": weight_type(self.weights),
                "scales": scale_type(self.weights),
                "embedding": weight_type(table),
                "embedding_scales": scale_type(table),
                "best_keys": "*i64",
                "arrivals": "*i32",
                "logits": "*fp32",
                "tokens": f"*{_TOKEN_TYPES[self.token or 'int64']}",
                "next_x": f"*{type_}",
                "positions": "*i64",
                "ring": f"*{_TOKEN_TYPES[self.token or 'int64']}",
                "step": "*i32",
                "batch": "i32",
                "last_slot": "i32",
                "eps": "fp32",
            },
            constants={
                **matrix_constants(self.vocab_size, self.columns, self.weights, self.tile),
                "LOGITS": self.logits,
                "TOKENS": self.token is not None,
                "EMBEDDING": kernel_format(self.embedding) if self.embedding else "none",
                "EMBEDDING_GROUP": table.group,
                "ADVANCE": self.advance,
                "RING": self.ring if self.advance else 0,
                "RING_ROW": self.batch if self.advance else 0,
                "MAX_BATCH": every,
                "BLOCK_KEYS": min(power_of_two(blocks), _KEYS_AT_ONCE // every),
                "BLOCK_EMBEDDING": min(power_of_two(self.columns), _EMBEDDING_AT_ONCE // every),
            },
            grid=grid_rules(self.vocab_size, self.tile),
            num_warps=self.tile.warps,
        )

    def launch(
        self,
        *,
        batch: int,
        x: int,
        norm: int,
        weights: int,
        scales: int = 0,
        logits: int = 0,
        tokens: int = 0,
        embedding: int = 0,
        embedding_scales: int = 0,
        next_x: int = 0,
        positions: int = 0,
        ring: int = 0,
        step: int = 0,
        last_slot: int = 0,
        workspace: int = 0,
        counters: int = 0,
    ) -> Launch:
        """Run it once.

        Args:
            batch: B sequences.
            x: address of [B, H].
            norm: address of the final norm's weight, [H] in the activation's type.
            weights: address of the packed matrix.
            scales: address of its scales.
            logits: address of [B, V] float32.
            tokens: address of [B].
            embedding: address of the packed embedding table.
            embedding_scales: address of its scales.
            next_x: address of [B, H]; may be `x`, which all programs have read when the last of
                them writes it.
            positions: address of [B] int64, the place of each sequence's token; 1 is added.
            ring: address of [ring, batch], the head's own numbers, in the tokens' type; row
                step mod ring gets the tokens.
            step: address of [1] int32, not negative; 1 is added.
            last_slot: what no position exceeds.
            workspace: address of `workspace_bytes` of scratch memory.
            counters: address of the counter.

        Raises:
            ValueError: a larger batch than the head was made for, or an address that is missing or
                that it has no use for.
        """
        table = self.embedding
        needed = {
            "x": (x, True),
            "norm": (norm, True),
            "weights": (weights, True),
            "scales": (scales, self.weights.kind in ("int8", "int4")),
            "embedding": (embedding, table is not None),
            "embedding_scales": (
                embedding_scales, table is not None and table.kind in ("int8", "int4")
            ),
            "best_keys": (workspace, self.token is not None),
            "arrivals": (counters, self.token is not None),
            "logits": (logits, self.logits),
            "tokens": (tokens, self.token is not None),
            "next_x": (next_x, table is not None),
            "positions": (positions, self.advance),
            "ring": (ring, self.advance),
            "step": (step, self.advance),
        }  # fmt: skip
        return Launch(
            kernel=self.spec.name,
            sizes={"batch": checked_batch(batch, self.batch)},
            arguments={
                **checked_addresses(self.spec.name, needed),
                "batch": batch,
                "last_slot": last_slot,
                "eps": self.eps,
            },
        )


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """The embedding rows of tokens that come from no head.

    Attributes:
        columns: H, of the packed table.
        weights: how the table is stored.
        activation: type of the output.
        token: type of the tokens.
    """

    columns: int
    weights: WeightFormat
    activation: Activation
    token: TokenType = "int64"

    def __post_init__(self) -> None:
        problems = column_problems(self.columns, self.weights)
        if self.activation not in TRITON_TYPES:
            problems.append(f"unknown activation {self.activation!r}")
        if problems:
            raise ValueError(f"no kernel covers this embedding: {'; '.join(problems)}")

    @cached_property
    def spec(self) -> KernelSpec:
        """The variant of the kernel."""
        type_ = TRITON_TYPES[self.activation]
        return KernelSpec(
            name=f"embed-{type_}-{format_label(self.weights)}-{self.columns}-{self.token}",
            function=f"{_MODULE}:embed",
            arguments={
                "tokens": f"*{_TOKEN_TYPES[self.token]}",
                "table": weight_type(self.weights),
                "scales": scale_type(self.weights),
                "output": f"*{type_}",
            },
            constants={
                "COLUMNS": self.columns,
                "FORMAT": kernel_format(self.weights),
                "GROUP": self.weights.group,
                "BLOCK_COLUMNS": power_of_two(self.columns),
            },
            grid=("batch", "1", "1"),
        )

    def launch(
        self, *, batch: int, tokens: int, table: int, output: int, scales: int = 0
    ) -> Launch:
        """Run it once.

        Args:
            batch: B sequences.
            tokens: address of [B], each a row of the table.
            table: address of the packed table.
            output: address of [B, H].
            scales: address of the table's scales.

        Raises:
            ValueError: an address that is missing or that it has no use for.
        """
        needed = {
            "tokens": (tokens, True),
            "table": (table, True),
            "scales": (scales, self.weights.kind in ("int8", "int4")),
            "output": (output, True),
        }
        return Launch(
            kernel=self.spec.name,
            sizes={"batch": batch},
            arguments=checked_addresses(self.spec.name, needed),
        )
