"""How kernels of a prompt's projections are compiled and launched. No Triton, no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, get_args

from plugins.kernel_spec import TRITON_TYPES, KernelSpec, Launch
from plugins.launch_arguments import checked_addresses
from plugins.projection.launches import Activation, Epilogue, TokenType
from plugins.projection.matrix import (
    ceil_div,
    format_label,
    kernel_format,
    matrix_problems,
    power_of_two,
    scale_type,
    weight_type,
)
from plugins.projection.packing import WeightFormat

_MODULE = "plugins.prompt_projection.kernel"
_FEW_TOKENS = 16  # the least that tensor cores multiply at once
_MANY_TOKENS = 64
_LEAST_COLUMNS = 16
_MOST_COLUMNS = 64
_FLOAT_COLUMNS = 32
# The GPUs have 80 to 170 multiprocessors: for few tokens a block has no more rows than leave each
# a program.
_ENOUGH_PROGRAMS = 128
_MANY_ROWS = 1024
_COLUMNS_AT_ONCE = 1024
_INDEX_TYPES = {"int32": "i32", "int64": "i64"}


class PromptTile(NamedTuple):
    """What one program of a prompt's projection does."""

    tokens: int
    rows: int
    columns: int  # at a time

    @property
    def label(self) -> str:
        """Part of a variant's name."""
        return f"t{self.tokens}x{self.rows}x{self.columns}"


@dataclass(frozen=True, kw_only=True)
class PromptProjection:
    """One projection of any number of tokens, with what surrounds it.

    It has a variant for up to 16 tokens and one for more; a launch takes the right one.

    Attributes:
        rows: of the packed matrix.
        columns: of the packed matrix, the size of x.
        weights: how the matrix is stored.
        input: type of x.
        output: type of the output.
        norm: normalise x by its root mean square and a float32 weight first.
        eps: of the norm.
        epilogue: what becomes of the products, see `plugins.projection.kernel.project`.
        addend: add a float32 tensor of the output's shape to the products.
        output_offset: numbers from the output's address to the first token's.
        output_stride: numbers from one token's to the next's; 0 for one behind the other.
        dot: type of what is multiplied, accumulated in float32; None for the weights' own, of int8
            and int4 weights float16. A float16 holds x, or its normed x, up to 65504. float32 is
            exact and uses no tensor cores.
    """

    rows: int
    columns: int
    weights: WeightFormat
    input: Activation
    output: Activation = "float32"
    norm: bool = False
    eps: float = 1e-6
    epilogue: Epilogue = "plain"
    addend: bool = False
    output_offset: int = 0
    output_stride: int = 0
    dot: Activation | None = None

    def __post_init__(self) -> None:
        problems = matrix_problems(self.rows, self.columns, self.weights, batch=1)
        for name in ("input", "output", "dot"):
            type_ = getattr(self, name)
            if type_ not in TRITON_TYPES and (name != "dot" or type_ is not None):
                problems.append(f"unknown {name} {type_!r}")
        if self.epilogue not in get_args(Epilogue):
            problems.append(f"unknown epilogue {self.epilogue!r}")
        if self.epilogue == "silu_product" and self.rows % 2:
            problems.append(f"{self.rows} rows are no pairs of gate and up")
        if self.addend and self.epilogue in ("silu", "silu_product"):
            problems.append(f"nothing is added after {self.epilogue}")
        if self.output_offset < 0 or 0 != self.output_stride < self.outputs:
            problems.append(
                f"outputs of {self.outputs} numbers from {self.output_offset} on, "
                f"{self.output_stride} apart"
            )
        if problems:
            raise ValueError(f"no kernel covers this prompt projection: {'; '.join(problems)}")

    @property
    def outputs(self) -> int:
        """Numbers of a token's output."""
        return self.rows // 2 if self.epilogue == "silu_product" else self.rows

    @property
    def dot_type(self) -> Activation:
        """Type of what is multiplied."""
        if self.dot is not None:
            return self.dot
        kind = self.weights.kind
        if kind == "int8" or kind == "int4":
            return "float16"
        return kind

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory of a launch."""
        return 0

    @property
    def counters(self) -> int:
        """How many int32 counters it needs."""
        return 0

    @cached_property
    def tiles(self) -> tuple[PromptTile, PromptTile]:
        """How the work is cut for few and for many tokens."""
        return self._tile(_FEW_TOKENS), self._tile(_MANY_TOKENS)

    @cached_property
    def specs(self) -> tuple[KernelSpec, KernelSpec]:
        """The variants for few and for many tokens."""
        few, many = self.tiles
        return self._spec(few), self._spec(many)

    def launch(
        self,
        *,
        tokens: int,
        x: int,
        weights: int,
        output: int,
        scales: int = 0,
        norm: int = 0,
        addend: int = 0,
        residual: int = 0,
        residual_weight: int = 0,
    ) -> Launch:
        """Run it once.

        Args:
            tokens: T.
            x: address of [T, columns].
            weights: address of the packed matrix.
            output: address of [T, outputs], or of what holds it at an offset and stride; may be
                `residual`, not `x`.
            scales: address of the packed matrix's scales.
            norm: address of the norm's weight, [columns] float32.
            addend: address of [T, outputs] float32.
            residual: address of [T, outputs] float32.
            residual_weight: address of [outputs] float32.

        Raises:
            ValueError: no tokens, or an address that is missing or that it has no use for.
        """
        if tokens < 1:
            raise ValueError(f"a projection of {tokens} tokens, expected at least 1")
        spec = self.specs[tokens > _FEW_TOKENS]
        needed = {
            "x": (x, True),
            "weights": (weights, True),
            "output": (output, True),
            "scales": (scales, self.weights.kind in ("int8", "int4")),
            "norm": (norm, self.norm),
            "addend": (addend, self.addend),
            "residual": (residual, self.epilogue in ("residual", "scaled_residual")),
            "residual_weight": (residual_weight, self.epilogue == "scaled_residual"),
        }
        return Launch(
            kernel=spec.name,
            sizes={"tokens": tokens},
            arguments={**checked_addresses(spec.name, needed), "tokens": tokens, "eps": self.eps},
        )

    def _tile(self, tokens: int) -> PromptTile:
        half = self.dot_type != "float32"
        # Narrower than a row, a tile lies within a group of int4 weights.
        widest = min(self.weights.group or _MOST_COLUMNS, _MOST_COLUMNS if half else _FLOAT_COLUMNS)
        columns = min(max(power_of_two(self.columns), _LEAST_COLUMNS), widest)
        if tokens == _MANY_TOKENS:
            rows = 64 if half and self.rows >= _MANY_ROWS else 32
        else:
            rows = min(max(power_of_two(self.rows // _ENOUGH_PROGRAMS), 16), 64)
        return PromptTile(tokens, rows, columns)

    def _spec(self, tile: PromptTile) -> KernelSpec:
        stride = self.output_stride or self.outputs
        is_apart = (self.output_offset, stride) != (0, self.outputs)
        parts = [
            f"project_prompt-{TRITON_TYPES[self.input]}-{TRITON_TYPES[self.output]}",
            f"{format_label(self.weights)}-{TRITON_TYPES[self.dot_type]}",
            f"{self.rows}x{self.columns}",
            *(["norm"] if self.norm else []),
            self.epilogue,
            *(["addend"] if self.addend else []),
            *([f"at{self.output_offset}by{stride}"] if is_apart else []),
            tile.label,
        ]
        return KernelSpec(
            name="-".join(parts),
            function=f"{_MODULE}:project_prompt",
            arguments={
                "x": f"*{TRITON_TYPES[self.input]}",
                "norm": "*fp32",
                "weights": weight_type(self.weights),
                "scales": scale_type(self.weights),
                "addend": "*fp32",
                "residual": "*fp32",
                "residual_weight": "*fp32",
                "output": f"*{TRITON_TYPES[self.output]}",
                "tokens": "i32",
                "eps": "fp32",
            },
            constants={
                "ROWS": self.rows,
                "COLUMNS": self.columns,
                "FORMAT": kernel_format(self.weights),
                "GROUP": self.weights.group,
                "NORM": self.norm,
                "EPILOGUE": self.epilogue,
                "ADDEND": self.addend,
                "DOT": self.dot_type,
                "OUTPUT_OFFSET": self.output_offset,
                "OUTPUT_STRIDE": stride,
                "BLOCK_TOKENS": tile.tokens,
                "BLOCK_ROWS": tile.rows,
                "BLOCK_COLUMNS": tile.columns,
            },
            grid=(f"ceil(tokens / {tile.tokens})", str(ceil_div(self.rows, tile.rows)), "1"),
            num_stages=3,
        )


@dataclass(frozen=True, kw_only=True)
class GatherRows:
    """Rows of a tensor [T, columns] by their numbers, such as the last token of each prompt.

    Attributes:
        columns: size of a row.
        type: of its numbers.
        index_type: type of the rows' numbers.
    """

    columns: int
    type: Activation = "float32"
    index_type: TokenType = "int64"

    def __post_init__(self) -> None:
        problems = []
        if self.columns < 1:
            problems.append(f"rows of {self.columns} numbers")
        if self.type not in TRITON_TYPES:
            problems.append(f"unknown type {self.type!r}")
        if self.index_type not in _INDEX_TYPES:
            problems.append(f"unknown index {self.index_type!r}")
        if problems:
            raise ValueError(f"no kernel gathers such rows: {'; '.join(problems)}")

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory of a launch."""
        return 0

    @property
    def counters(self) -> int:
        """How many int32 counters it needs."""
        return 0

    @cached_property
    def spec(self) -> KernelSpec:
        """The variant of the kernel."""
        type_ = TRITON_TYPES[self.type]
        return KernelSpec(
            name=f"gather_rows-{type_}-{self.columns}-{self.index_type}",
            function=f"{_MODULE}:gather_rows",
            arguments={
                "x": f"*{type_}",
                "index": f"*{_INDEX_TYPES[self.index_type]}",
                "output": f"*{type_}",
            },
            constants={
                "COLUMNS": self.columns,
                "BLOCK_COLUMNS": min(power_of_two(self.columns), _COLUMNS_AT_ONCE),
            },
            grid=("rows", "1", "1"),
        )

    def launch(self, *, rows: int, x: int, index: int, output: int) -> Launch:
        """Run it once.

        Args:
            rows: M rows to gather.
            x: address of [T, columns].
            index: address of [M], each below T.
            output: address of [M, columns]; not `x`.

        Raises:
            ValueError: no rows, or an address that is missing.
        """
        if rows < 1:
            raise ValueError(f"{rows} rows to gather, expected at least 1")
        needed = {"x": (x, True), "index": (index, True), "output": (output, True)}
        return Launch(
            kernel=self.spec.name,
            sizes={"rows": rows},
            arguments=checked_addresses(self.spec.name, needed),
        )
