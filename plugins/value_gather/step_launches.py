"""How the seed's values in a step of our own are compiled and launched. No Triton, no PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from plugins.kernel_spec import TRITON_TYPES, KernelSpec, Launch
from plugins.value_gather.launches import HIDDEN_BLOCK, power_of_two, size_problems

_MAX_HIDDEN = 8192


@dataclass(frozen=True, kw_only=True)
class SeedValues:
    """The seed generation's values in a step of our own: the normed input times retrieved rows.

    They go into the value heads of the rows that a projection gives, between its products and the
    attention. Rows that are the same for every token are a table of one row, one head and scores of
    zero.

    Attributes:
        columns: H.
        heads: R.
        values: N, rows that a head picks from.
        picks: K, how many it picks.
        table: numpy's name of the table's type.
        subset_sums: whether the table holds the sums of every set of K rows.
        activation: type of x and of the norm's weight.
        eps: of the norm.
        output_offset: numbers from the address given for the output to the first value.
        output_stride: numbers from one row of the output to the next; 0 for H.
    """

    columns: int
    heads: int
    values: int
    picks: int
    table: str = "float32"
    subset_sums: bool = False
    activation: str = "float32"
    eps: float = 1e-6
    output_offset: int = 0
    output_stride: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {dtype}, expected one of {', '.join(TRITON_TYPES)}"
            for name, dtype in (("table", self.table), ("activation", self.activation))
            if dtype not in TRITON_TYPES
        ]
        problems += size_problems(self.heads, self.values, self.picks)
        if not 1 <= self.columns <= _MAX_HIDDEN:
            problems.append(f"H is {self.columns}, expected 1 to {_MAX_HIDDEN}")
        if self.output_offset < 0:
            problems.append(f"values from number {self.output_offset} on, expected 0 or more")
        if self.output_stride and self.output_stride < self.columns:
            problems.append(f"rows {self.output_stride} apart, expected at least {self.columns}")
        if problems:
            raise ValueError(f"no kernel covers these values: {'; '.join(problems)}")

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory of a launch: none."""
        return 0

    @property
    def counters(self) -> int:
        """How many int32 counters it needs: none."""
        return 0

    @cached_property
    def spec(self) -> KernelSpec:
        """The variant of the kernel."""
        stride = self.output_stride or self.columns
        type_, row_type = TRITON_TYPES[self.activation], TRITON_TYPES[self.table]
        hidden_block = min(HIDDEN_BLOCK, power_of_two(self.columns))
        return KernelSpec(
            name=f"seed_values-{type_}-{row_type}-h{self.columns}-r{self.heads}-n{self.values}"
            f"-k{self.picks}{'-sums' if self.subset_sums else ''}"
            f"-at{self.output_offset}stride{stride}",
            function="plugins.value_gather.kernel:seed_values",
            arguments={
                "x": f"*{type_}",
                "norm": f"*{type_}",
                "scores": "*fp32",
                "table": f"*{row_type}",
                "output": "*fp32",
                "eps": "fp32",
            },
            constants={
                "NUM_HEADS": self.heads,
                "NUM_ROWS": self.values,
                "TOP_K": self.picks,
                "SUBSET_SUMS": self.subset_sums,
                "HIDDEN": self.columns,
                "OFFSET": self.output_offset,
                "STRIDE": stride,
                "NUM_HEADS_BLOCK": power_of_two(self.heads),
                "NUM_ROWS_BLOCK": power_of_two(self.values),
                "ROW_BLOCK": power_of_two(self.columns),
                "HIDDEN_BLOCK": hidden_block,
            },
            grid=("tokens", str(math.ceil(self.columns / HIDDEN_BLOCK)), "1"),
            num_warps=4,
        )

    def launch(
        self, *, tokens: int, x: int, norm: int, scores: int, table: int, output: int
    ) -> Launch:
        """Run it once.

        Args:
            tokens: T, of all sequences.
            x: address of [T, H].
            norm: address of [H].
            scores: address of [T, R, N] float32.
            table: address of [N, H], or of [C(N, K), H] sums.
            output: address from which `output_offset` and `output_stride` count to the values;
                float32.

        Raises:
            ValueError: no token, or an address that is missing.
        """
        addresses = {"x": x, "norm": norm, "scores": scores, "table": table, "output": output}
        problems = [f"{name} missing" for name, address in addresses.items() if not address]
        if tokens < 1:
            problems.append(f"{tokens} tokens, expected 1 or more")
        if problems:
            raise ValueError(f"{self.spec.name}: {', '.join(problems)}")
        return Launch(
            kernel=self.spec.name,
            sizes={"tokens": tokens},
            arguments={**addresses, "eps": self.eps},
        )
