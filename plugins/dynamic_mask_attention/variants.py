"""The variants of the attention kernels: constants, tiles and names. No Triton, no PyTorch.

Tiles are the largest that spill no registers on any GPU compiled for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from plugins.kernel_spec import Constant, KernelSpec

MAX_HEAD_SIZE = 256
MAX_GROUP = 8
# Joining more shares than that takes longer than reading a share.
MAX_SPLITS = 64
# A share of fewer keys costs more to join than to read.
_MIN_SHARE = 64
_MODULE = "plugins.dynamic_mask_attention.kernel"


@dataclass(frozen=True)
class HeadShape:
    """What of the shapes a kernel is compiled for.

    Attributes:
        query: Nq.
        key: Nkv.
        score: N.
        size: D.
    """

    query: int
    key: int
    score: int
    size: int

    @property
    def group(self) -> int:
        """Query heads of one key/value head."""
        return self.query // self.key

    @property
    def shares_scores(self) -> bool:
        """Whether the query heads of one key/value head have one score."""
        return self.key % self.score == 0

    @property
    def constants(self) -> dict[str, Constant]:
        """The constants of a kernel that say this."""
        return {"NQ": self.query, "NKV": self.key, "N": self.score, "D": self.size}

    def name(self, dtype: str, score_dtype: str) -> str:
        """The part of a variant's name that says this and the types."""
        return f"{dtype}-score_{score_dtype}-d{self.size}-q{self.query}-kv{self.key}-n{self.score}"

    def problems(self) -> list[str]:
        """What no kernel covers."""
        Nq, Nkv, N, D = self.query, self.key, self.score, self.size
        if min(Nq, Nkv, N, D) < 1:
            return [f"Nq, Nkv, N and D are {Nq}, {Nkv}, {N} and {D}, expected positive numbers"]
        problems = []
        if Nq % Nkv or Nq // Nkv > MAX_GROUP:
            problems.append(
                f"{Nq} query heads, expected 1 to {MAX_GROUP} for each of {Nkv} key/value heads"
            )
        if Nq % N:
            problems.append(f"{N} score heads, expected a divisor of the {Nq} query heads")
        if D > MAX_HEAD_SIZE:
            problems.append(f"D is {D}, expected at most {MAX_HEAD_SIZE}")
        return problems


def threshold_variant(score_heads: int, score_dtype: str, *, single: bool) -> KernelSpec:
    """`keep_threshold`, for steps of a single token or for more.

    Args:
        score_heads: N.
        score_dtype: Triton's name of the scores' type.
        single: every row of the batch has one query.
    """
    block_s, block_c = (1, 1024) if single else (8, 256)
    return KernelSpec(
        name=f"keep_threshold-score_{score_dtype}-n{score_heads}-s{block_s}",
        function=f"{_MODULE}:keep_threshold",
        arguments={
            "score": f"*{score_dtype}",
            "write_index": "*i64",
            "threshold": "*fp32",
            "limit": "*i32",
            "S": "i32",
            "C": "i32",
            "keep_window_size": "i32",
            "score_row_stride": "i64",
        },
        constants={"N": score_heads, "BLOCK_S": block_s, "BLOCK_C": block_c},
        grid=(f"ceil(tokens / {block_s})", str(score_heads), "batch"),
        num_warps=8,
    )


def decode_variant(
    heads: HeadShape,
    *,
    dtype: str,
    row_dtype: str,
    score_dtype: str,
    output_dtype: str,
    options: Mapping[str, bool],
) -> KernelSpec:
    """`attend_decode` for types by Triton's names.

    Args:
        heads: the shapes.
        dtype: of keys and values.
        row_dtype: of `query`, which holds whole rows of a projection with the option APPEND.
        score_dtype: of the scores.
        output_dtype: of the output.
        options: value of each of the kernel's options, SELECT to SCORE.
    """
    block_d = max(_power_of_two(heads.size), 8)
    num_warps = 8 if block_d > 64 else 4
    # Numbers of a key that a thread holds; it has as many sums for every query head.
    numbers = 16 if heads.group <= 2 else 8
    block_n = 32 * num_warps * numbers // block_d
    rows = f"-row_{row_dtype}" if options["APPEND"] else ""
    output = _output_name(dtype, output_dtype)
    suffix = "".join(f"-{name.lower()}" for name, on in options.items() if on)
    return KernelSpec(
        name=f"attend_decode-{heads.name(dtype, score_dtype)}{rows}{output}{suffix}",
        function=f"{_MODULE}:attend_decode",
        arguments={
            "query": f"*{row_dtype}",
            "key": f"*{dtype}",
            "value": f"*{dtype}",
            "score": f"*{score_dtype}",
            "write_index": "*i64",
            "threshold": "*fp32",
            "limit": "*i32",
            "partial_values": "*fp32",
            "partial_masses": "*fp32",
            "counters": "*i32",
            "output": f"*{output_dtype}",
            "position": "*i64",
            "query_norm": "*fp32",
            "key_norm": "*fp32",
            "cos": "*fp32",
            "sin": "*fp32",
            "A": "*fp32",
            "S": "i32",
            "C": "i32",
            "splits": "i32",
            "score_row_stride": "i64",
            "scale": "fp32",
            "eps": "fp32",
        },
        constants={
            **heads.constants,
            "BLOCK_D": block_d,
            "BLOCK_N": block_n,
            "SHARE_STEP": max(_MIN_SHARE, block_n),
            "MAX_SPLITS": MAX_SPLITS,
            **options,
        },
        grid=("splits", str(heads.key), "rows"),
        num_warps=num_warps,
    )


def prompt_variant(
    heads: HeadShape, *, dtype: str, score_dtype: str, output_dtype: str, select: bool
) -> KernelSpec:
    """`attend_prompt` for types by Triton's names; arguments as in `decode_variant`."""
    # Query heads with keys and scores in common share a tile.
    together = heads.group if heads.shares_scores else 1
    block_d = max(_power_of_two(heads.size), 16)  # the least that tl.dot takes
    block_m, block_n, num_warps = _prompt_tile(heads.size, block_d, dtype)
    return KernelSpec(
        name=f"attend_prompt-{heads.name(dtype, score_dtype)}{_output_name(dtype, output_dtype)}"
        f"{'-select' if select else ''}",
        function=f"{_MODULE}:attend_prompt",
        arguments={
            "query": f"*{dtype}",
            "key": f"*{dtype}",
            "value": f"*{dtype}",
            "score": f"*{score_dtype}",
            "write_index": "*i64",
            "threshold": "*fp32",
            "limit": "*i32",
            "output": f"*{output_dtype}",
            "S": "i32",
            "C": "i32",
            "score_row_stride": "i64",
            "scale": "fp32",
        },
        constants={
            **heads.constants,
            "BLOCK_D": block_d,
            "HEADS": together,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "SELECT": select,
        },
        grid=(f"ceil(pairs / {block_m})", str(heads.query // together), "batch"),
        num_warps=num_warps,
    )


def append_variant(
    heads: HeadShape, *, dtype: str, row_dtype: str, score_dtype: str, options: Mapping[str, bool]
) -> KernelSpec:
    """`append_rows` for types by Triton's names.

    Args:
        heads: the shapes.
        dtype: of queries, keys and values.
        row_dtype: of the rows of a projection.
        score_dtype: of the scores.
        options: value of each of the kernel's options, QK_NORM to SCORE.
    """
    block_d = _power_of_two(heads.size)
    suffix = "".join(f"-{name.lower()}" for name, on in options.items() if on)
    return KernelSpec(
        name=f"append_rows-{heads.name(dtype, score_dtype)}-row_{row_dtype}{suffix}",
        function=f"{_MODULE}:append_rows",
        arguments={
            "rows": f"*{row_dtype}",
            "query": f"*{dtype}",
            "key": f"*{dtype}",
            "value": f"*{dtype}",
            "score": f"*{score_dtype}",
            "write_index": "*i64",
            "position": "*i64",
            "query_norm": "*fp32",
            "key_norm": "*fp32",
            "cos": "*fp32",
            "sin": "*fp32",
            "A": "*fp32",
            "S": "i32",
            "C": "i32",
            "eps": "fp32",
        },
        constants={**heads.constants, "BLOCK_D": block_d, **options},
        grid=("rows", str(heads.query + 2 * heads.key), "1"),
        num_warps=min(max(block_d // 128, 1), 4),
    )


def _output_name(dtype: str, output_dtype: str) -> str:
    """The part of a variant's name that says the output's type, where it is not the cache's."""
    return f"-out_{output_dtype}" if output_dtype != dtype else ""


def _prompt_tile(size: int, block_d: int, dtype: str) -> tuple[int, int, int]:
    """(Token, head) pairs and keys of a tile, and its warps."""
    if dtype == "fp32":
        return (32, 16, 8) if block_d > 128 else (32, 32, 4)
    if block_d > 64:
        return (64, 32, 8) if block_d > 128 else (64, 32, 4)
    # Rows that are no multiple of 16 bytes are read in pieces, each with registers for its address.
    return (64, 64, 4) if size % 8 == 0 else (64, 32, 4)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below the number."""
    return 1 << (number - 1).bit_length()
