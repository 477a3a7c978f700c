"""How the kernels of dynamic mask attention are launched. No Triton, no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plugins.dynamic_mask_attention.variants import (
    MAX_SPLITS,
    HeadShape,
    decode_variant,
    prompt_variant,
    threshold_variant,
)
from plugins.kernel_spec import POINTER_ALIGNMENT, TRITON_TYPES, KernelSpec, Launch, Shapes
from plugins.registry import DYNAMIC_MASK_ATTENTION

# Up to that many tokens of a row, each reads the keys for itself and the keys are split among
# programs; more share what they read, and are enough programs without a split.
MAX_DECODE_TOKENS = 8
# Programs of one decode launch that fill a GPU of some 130 processors.
_TARGET_PROGRAMS = 256
# Keys are addressed within their head by 32-bit numbers.
_MAX_HEAD_ELEMENTS = 2**31 - 1
# What CUDA allows along the third axis of a grid.
_MAX_GRID = 65535


def make_kernels(
    attributes: Mapping[str, int | float], shapes: Shapes, dtypes: Mapping[str, str]
) -> AttentionKernels:
    """The kernels of one DynamicMaskAttention, see `OpKernels`.

    Args:
        attributes: `scale` and `keep_window_size` of the node.
        shapes: of its inputs and its output; B, S and C may be -1.
        dtypes: numpy's names of their types.

    Raises:
        ValueError: what no kernel covers.
    """
    heads = HeadShape(
        query=shapes["query"][1],
        key=shapes["key"][1],
        score=shapes["score"][1],
        size=shapes["query"][3],
    )
    window = int(attributes["keep_window_size"])
    problems = [
        *heads.problems(),
        *type_problems({name: dtypes[name] for name in ("query", "score")}),
        *(
            f"{name} is {dtypes[name]}, expected {dtypes['query']} like query"
            for name in ("key", "value", "attention_output")
            if dtypes[name] != dtypes["query"]
        ),
    ]
    if dtypes["write_index"] != "int64":
        problems.append(f"write_index is {dtypes['write_index']}, expected int64")
    if window < 0:
        problems.append(f"keep_window_size is {window}, expected 0 or more")
    if problems:
        raise ValueError(
            f"no kernel covers this {DYNAMIC_MASK_ATTENTION.name}: {'; '.join(problems)}. Build "
            "without plugins: the node's ONNX function computes the same"
        )
    return AttentionKernels(
        heads=heads,
        scale=float(attributes["scale"]),
        keep_window_size=window,
        dtype=TRITON_TYPES[dtypes["query"]],
        score_dtype=TRITON_TYPES[dtypes["score"]],
        output_dtype=TRITON_TYPES[dtypes["attention_output"]],
    )


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """How one launch of an `attend_decode` variant splits its keys.

    Attributes:
        splits: programs that share the keys of a key/value head: the argument and the size.
        value_bytes: scratch for `partial_values`.
        mass_bytes: scratch for `partial_masses`.
        counters: int32 counters, zero before and after.
    """

    splits: int
    value_bytes: int
    mass_bytes: int
    counters: int


def plan_decode(spec: KernelSpec, slots: int, rows: int) -> DecodePlan:
    """The plan for C slots and B·S queries; how many slots are filled has no influence."""
    Nq, Nkv, D = (int(spec.constants[name]) for name in ("NQ", "NKV", "D"))
    shares = _ceil_div(slots, int(spec.constants["SHARE_STEP"]))
    splits = max(1, min(shares, MAX_SPLITS, _TARGET_PROGRAMS // (rows * Nkv)))
    parts = rows * Nq * splits
    return DecodePlan(
        splits=splits,
        value_bytes=_aligned(4 * parts * D),
        mass_bytes=_aligned(4 * parts * 2),
        counters=rows * Nkv,
    )


@dataclass(frozen=True, kw_only=True)
class AttentionKernels:
    """`OpKernels` of one DynamicMaskAttention: select where keys can be dropped, then attend.

    Attributes:
        heads: Nq, Nkv, N and D.
        scale: factor on q·k.
        keep_window_size: W; 0 never selects.
        dtype: Triton's name of the type of query, key and value.
        score_dtype: of the scores.
        output_dtype: of the output.
    """

    heads: HeadShape
    scale: float
    keep_window_size: int
    dtype: str
    score_dtype: str
    output_dtype: str

    @property
    def specs(self) -> tuple[KernelSpec, ...]:
        """Decode and prompt; with a window, both with a selection too, and what selects."""
        attend = (self._decode(select=False), self._prompt(select=False))
        if not self.keep_window_size:
            return attend
        return (
            *attend,
            self._threshold(single=True),
            self._threshold(single=False),
            self._decode(select=True),
            self._prompt(select=True),
        )

    def workspace_bytes(self, shapes: Shapes) -> int:
        """Thresholds, and what the shares of a decode launch leave for joining."""
        B, S, C = _sizes(shapes)
        step = int(self._decode(select=False).constants["SHARE_STEP"])
        programs = B * min(S, MAX_DECODE_TOKENS) * self.heads.key
        # Fewer rows are split more often, up to the number of programs aimed at.
        shares = min(_ceil_div(C, step), MAX_SPLITS)
        parts = max(programs, min(programs * shares, _TARGET_PROGRAMS)) * self.heads.group
        values, masses = _aligned(4 * parts * self.heads.size), _aligned(4 * parts * 2)
        return 2 * self._threshold_bytes(B, S) + values + masses

    def counters(self, shapes: Shapes) -> int:
        """One for every key/value head and token of the largest decode launch."""
        B, S, _ = _sizes(shapes)
        return B * min(S, MAX_DECODE_TOKENS) * self.heads.key

    def launches(
        self, shapes: Shapes, addresses: Mapping[str, int], workspace: int, counters: int
    ) -> tuple[Launch, ...]:
        """Select, where keys can be dropped, and attend; see `OpKernels.launches`."""
        self._check(shapes)
        B, S, C = _sizes(shapes)
        select = 0 < self.keep_window_size < C
        threshold_bytes = self._threshold_bytes(B, S)
        values: dict[str, int | float] = {
            **{name: addresses[name] for name in DYNAMIC_MASK_ATTENTION.inputs},
            "output": addresses["attention_output"],
            "threshold": workspace if select else 0,
            "limit": workspace + threshold_bytes if select else 0,
            "S": S,
            "C": C,
            "keep_window_size": self.keep_window_size,
            "score_row_stride": self.heads.score * C if shapes["score"][0] > 1 else 0,
            "scale": self.scale,
        }
        sizes = {"batch": B, "tokens": S, "rows": B * S}
        if S <= MAX_DECODE_TOKENS:
            attend = self._decode(select=select)
            plan = plan_decode(attend, C, B * S)
            scratch = workspace + 2 * threshold_bytes
            sizes["splits"] = values["splits"] = plan.splits
            values["partial_values"] = scratch
            values["partial_masses"] = scratch + plan.value_bytes
            values["counters"] = counters
        else:
            attend = self._prompt(select=select)
            sizes["pairs"] = S * int(attend.constants["HEADS"])
        specs = (self._threshold(single=S == 1), attend) if select else (attend,)
        # What only a step of our own passes stays null.
        return tuple(
            Launch(
                kernel=spec.name,
                sizes=sizes,
                arguments={name: values.get(name, 0) for name in spec.arguments},
            )
            for spec in specs
        )

    def _check(self, shapes: Shapes) -> None:
        B, S, C = _sizes(shapes)
        Nq, Nkv, N, D = self.heads.query, self.heads.key, self.heads.score, self.heads.size
        expected: dict[str, Sequence[int]] = {
            "query": (B, Nq, S, D),
            "key": (B, Nkv, C, D),
            "value": (B, Nkv, C, D),
            "score": (1 if shapes["score"][0] == 1 else B, N, C, 1),
            "write_index": (B,),
            "attention_output": (B, S, Nq * D),
        }
        problems = [
            f"{name} is {list(shapes[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if list(shapes[name]) != list(shape)
        ]
        if C * D > _MAX_HEAD_ELEMENTS:
            problems.append(
                f"C is {C}, expected at most {_MAX_HEAD_ELEMENTS // D} slots of {D} numbers"
            )
        rows = B * min(S, MAX_DECODE_TOKENS)
        if rows > _MAX_GRID:
            problems.append(f"{rows} queries of a decode step, expected at most {_MAX_GRID}")
        if problems:
            raise ValueError(
                f"{DYNAMIC_MASK_ATTENTION.name}'s kernels were made for other shapes: "
                f"{'; '.join(problems)}. Build for these shapes, or without plugins"
            )

    def _threshold_bytes(self, batch: int, tokens: int) -> int:
        """Bytes of one of the two arrays [B, N, S] that say which keys stay."""
        return _aligned(4 * batch * self.heads.score * tokens) if self.keep_window_size else 0

    def _threshold(self, *, single: bool) -> KernelSpec:
        return threshold_variant(self.heads.score, self.score_dtype, single=single)

    def _decode(self, *, select: bool) -> KernelSpec:
        step_options = ("APPEND", "QK_NORM", "ROTATE_QUERY", "ROTATE_KEY", "SCORE")
        return decode_variant(
            self.heads,
            dtype=self.dtype,
            row_dtype=self.dtype,
            score_dtype=self.score_dtype,
            output_dtype=self.output_dtype,
            options={"SELECT": select, **dict.fromkeys(step_options, False)},
        )

    def _prompt(self, *, select: bool) -> KernelSpec:
        return prompt_variant(
            self.heads,
            dtype=self.dtype,
            score_dtype=self.score_dtype,
            output_dtype=self.output_dtype,
            select=select,
        )


def type_problems(types: Mapping[str, str]) -> list[str]:
    """What is wrong with numpy's names of types, by what they are of."""
    return [
        f"{name} is {value}, expected one of {', '.join(TRITON_TYPES)}"
        for name, value in types.items()
        if value not in TRITON_TYPES
    ]


def _sizes(shapes: Shapes) -> tuple[int, int, int]:
    """B, S and C."""
    return shapes["query"][0], shapes["query"][2], shapes["key"][2]


def _aligned(size: int) -> int:
    return _ceil_div(size, POINTER_ALIGNMENT) * POINTER_ALIGNMENT


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)
