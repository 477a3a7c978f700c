"""How the kernel of the norm of rows is compiled and launched. No Triton, no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from plugins.kernel_spec import KernelSpec, Launch
from plugins.projection.matrix import power_of_two

MAX_COLUMNS = 8192


@dataclass(frozen=True, kw_only=True)
class RowNorm:
    """The root-mean-square norm of float32 rows.

    Attributes:
        columns: H, of a row.
        eps: of the norm.
    """

    columns: int
    eps: float

    def __post_init__(self) -> None:
        if not 1 <= self.columns <= MAX_COLUMNS:
            raise ValueError(
                f"no kernel norms rows of {self.columns} numbers, expected 1 to {MAX_COLUMNS}"
            )

    @cached_property
    def spec(self) -> KernelSpec:
        """The variant of the kernel."""
        return KernelSpec(
            name=f"norm_rows-{self.columns}",
            function="plugins.row_norm.kernel:norm_rows",
            arguments={"x": "*fp32", "weight": "*fp32", "output": "*fp32", "eps": "fp32"},
            constants={"COLUMNS": self.columns, "BLOCK_COLUMNS": power_of_two(self.columns)},
            grid=("tokens", "1", "1"),
        )

    def launch(self, *, tokens: int, x: int, weight: int, output: int) -> Launch:
        """Run it once.

        Args:
            tokens: T rows.
            x: address of [T, H].
            weight: address of [H].
            output: address of [T, H]; not `x`.
        """
        return Launch(
            kernel=self.spec.name,
            sizes={"tokens": tokens},
            arguments={"x": x, "weight": weight, "output": output, "eps": self.eps},
        )
