"""How the kernel of the value gather is compiled and launched. No Triton, no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from plugins.kernel_spec import TRITON_TYPES, KernelSpec, Launch, Shapes
from plugins.registry import VALUE_GATHER

# A program compares all rows of all heads with each other, in registers.
MAX_NUM_ROWS = 32
MAX_HEADS = 16
HIDDEN_BLOCK = 256


def make_kernels(
    attributes: Mapping[str, int | float], shapes: Shapes, dtypes: Mapping[str, str]
) -> ValueGatherKernels:
    """The kernel of one ValueGather, see `OpKernels`.

    Args:
        attributes: `top_k` and `subset_sums` of the node.
        shapes: of its inputs and its output; T may be -1.
        dtypes: numpy's names of their types.

    Raises:
        ValueError: what no kernel covers.
    """
    _, heads, num_rows = shapes["scores"]
    kernels = ValueGatherKernels(
        heads=heads,
        num_rows=num_rows,
        hidden=shapes["table"][1],
        top_k=int(attributes["top_k"]),
        subset_sums=bool(attributes["subset_sums"]),
        score_type=TRITON_TYPES.get(dtypes["scores"], ""),
        row_type=TRITON_TYPES.get(dtypes["table"], ""),
    )
    problems = [
        f"{name} is {dtypes[name]}, expected one of {', '.join(TRITON_TYPES)}"
        for name in ("scores", "table")
        if dtypes[name] not in TRITON_TYPES
    ]
    if dtypes["inner_values"] != dtypes["table"]:
        problems.append(
            f"inner_values is {dtypes['inner_values']}, expected {dtypes['table']} like table"
        )
    problems += size_problems(heads, num_rows, kernels.top_k)
    problems = problems or kernels.shape_problems(shapes)
    if problems:
        raise ValueError(
            f"no kernel covers this {VALUE_GATHER.name}: {'; '.join(problems)}. Build without "
            "plugins: the node's ONNX function computes the same"
        )
    return kernels


@dataclass(frozen=True, kw_only=True)
class ValueGatherKernels:
    """`OpKernels` of one ValueGather: a single kernel without scratch memory.

    Attributes:
        heads: R.
        num_rows: N.
        hidden: H.
        top_k: K.
        subset_sums: whether the table holds the sums of every set of K rows.
        score_type: Triton's name of the scores' type.
        row_type: of the table and of the output.
    """

    heads: int
    num_rows: int
    hidden: int
    top_k: int
    subset_sums: bool
    score_type: str
    row_type: str

    @cached_property
    def specs(self) -> tuple[KernelSpec, ...]:
        """The one kernel."""
        hidden_block = min(HIDDEN_BLOCK, power_of_two(self.hidden))
        # No thread reads less than 16 bytes at a time.
        rows = power_of_two(self.heads if self.subset_sums else self.num_rows)
        row_bytes = hidden_block * (4 if self.row_type == "fp32" else 2)
        types = "_".join(dict.fromkeys((self.score_type, self.row_type)))
        return (
            KernelSpec(
                name=f"gather_values-{types}-h{self.hidden}-r{self.heads}-n{self.num_rows}"
                f"-k{self.top_k}{'-sums' if self.subset_sums else ''}",
                function="plugins.value_gather.kernel:gather_values",
                arguments={
                    "scores": f"*{self.score_type}",
                    "table": f"*{self.row_type}",
                    "output": f"*{self.row_type}",
                },
                constants={
                    "NUM_HEADS": self.heads,
                    "NUM_ROWS": self.num_rows,
                    "TOP_K": self.top_k,
                    "SUBSET_SUMS": self.subset_sums,
                    "HIDDEN": self.hidden,
                    "NUM_HEADS_BLOCK": power_of_two(self.heads),
                    "NUM_ROWS_BLOCK": power_of_two(self.num_rows),
                    "HIDDEN_BLOCK": hidden_block,
                },
                grid=("tokens", str(math.ceil(self.hidden / HIDDEN_BLOCK)), "1"),
                num_warps=min(max(rows * row_bytes // (16 * 32), 1), 4),
            ),
        )

    def workspace_bytes(self, shapes: Shapes) -> int:
        """None."""
        return 0

    def counters(self, shapes: Shapes) -> int:
        """None."""
        return 0

    def launches(
        self, shapes: Shapes, addresses: Mapping[str, int], workspace: int, counters: int
    ) -> tuple[Launch, ...]:
        """A single launch; see `OpKernels.launches`."""
        if problems := self.shape_problems(shapes):
            raise ValueError(
                f"{VALUE_GATHER.name}'s kernel was made for other shapes: "
                f"{'; '.join(problems)}. Make kernels for these"
            )
        return (
            Launch(
                kernel=self.specs[0].name,
                sizes={"tokens": shapes["scores"][0]},
                arguments={
                    "scores": addresses["scores"],
                    "table": addresses["table"],
                    "output": addresses["inner_values"],
                },
            ),
        )

    def shape_problems(self, shapes: Shapes) -> list[str]:
        """Inputs and outputs that these kernels do not fit; T is the scores' first dimension."""
        tokens = shapes["scores"][0]
        table_rows = math.comb(self.num_rows, self.top_k) if self.subset_sums else self.num_rows
        expected: dict[str, Sequence[int]] = {
            "scores": (tokens, self.heads, self.num_rows),
            "table": (table_rows, self.hidden),
            "inner_values": (tokens, self.hidden),
        }
        return [
            f"{name} is {list(shapes[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if list(shapes[name]) != list(shape)
        ]


def size_problems(heads: int, num_rows: int, top_k: int) -> list[str]:
    """Why no kernel picks so many of so many rows."""
    problems = []
    if not 1 <= heads <= MAX_HEADS:
        problems.append(f"there are {heads} heads, expected 1 to {MAX_HEADS}")
    if not 1 <= num_rows <= MAX_NUM_ROWS:
        problems.append(f"a head scores {num_rows} rows, expected 1 to {MAX_NUM_ROWS}")
    if not 1 <= top_k <= num_rows:
        problems.append(f"top_k is {top_k}, expected 1 to {num_rows} rows")
    return problems


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below the number."""
    return 1 << (number - 1).bit_length()
