"""How attention in a step of our own is compiled and launched. No Triton, no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from plugins.dynamic_mask_attention.launches import AttentionKernels, type_problems
from plugins.dynamic_mask_attention.variants import HeadShape, append_variant, decode_variant
from plugins.kernel_spec import TRITON_TYPES, KernelSpec, Launch
from plugins.launch_arguments import checked_addresses


def make_step_attention(
    *,
    query_heads: int,
    key_heads: int,
    score_heads: int,
    head_size: int,
    dtype: str,
    score_dtype: str,
    output_dtype: str,
    scale: float,
    keep_window_size: int,
) -> AttentionKernels:
    """The kernels that attend after `StepAppend`, in a step of our own.

    They serve passes of several tokens, and steps of one token where the cache outgrows the window.
    Their `launches` take the op's names: the query that `StepAppend` wrote, the caches, and as
    `attention_output` the output [B, S, Nq·D].

    Args:
        query_heads: Nq.
        key_heads: Nkv.
        score_heads: N of the score tensor.
        head_size: D.
        dtype: numpy's name of the type of the query and the caches.
        score_dtype: of the score tensor.
        output_dtype: of the output.
        scale: factor on q·k.
        keep_window_size: W; 0 never selects.

    Raises:
        ValueError: what no kernel covers.
    """
    heads = HeadShape(query=query_heads, key=key_heads, score=score_heads, size=head_size)
    types = {"dtype": dtype, "score_dtype": score_dtype, "output_dtype": output_dtype}
    problems = [*heads.problems(), *type_problems(types)]
    if keep_window_size < 0:
        problems.append(f"keep_window_size is {keep_window_size}, expected 0 or more")
    if problems:
        raise ValueError(f"no kernel covers this attention step: {'; '.join(problems)}")
    return AttentionKernels(
        heads=heads,
        scale=scale,
        keep_window_size=keep_window_size,
        dtype=TRITON_TYPES[dtype],
        score_dtype=TRITON_TYPES[score_dtype],
        output_dtype=TRITON_TYPES[output_dtype],
    )


def make_step_attention_spec(
    *,
    query_heads: int,
    key_heads: int,
    score_heads: int,
    head_size: int,
    dtype: str,
    row_dtype: str,
    score_dtype: str,
    qk_norm: bool,
    rotate_query: bool,
    rotate_key: bool,
    computes_score: bool,
    output_dtype: str | None = None,
) -> KernelSpec:
    """`attend_decode` for a step of our own: it norms, rotates, scores and appends as well.

    One token per row of the batch. It selects no keys, so the cache must not outgrow the window.
    Types are numpy's names; norm weights, cosines, sines and `A` are float32. A launch takes what
    `plan_decode` says.

    Args:
        query_heads: Nq.
        key_heads: Nkv.
        score_heads: N of the score tensor; 1 where a bias of zeros stands for no score.
        head_size: D.
        dtype: of the caches.
        row_dtype: of the rows [B, (Nq + 2·Nkv)·D (+ N)] that a projection gives: query, key and
            value heads, and what the score is computed from.
        score_dtype: of the score tensor.
        qk_norm: norm queries and keys per head.
        rotate_query: rotate the query by its position.
        rotate_key: rotate the key by its position.
        computes_score: compute the new key's score from the row's last N numbers and store it;
            otherwise the score tensor has it already.
        output_dtype: of the output; that of the caches where it is not given.

    Raises:
        ValueError: what the kernel does not cover.
    """
    heads = HeadShape(query=query_heads, key=key_heads, score=score_heads, size=head_size)
    output_dtype = dtype if output_dtype is None else output_dtype
    types = {
        "dtype": dtype,
        "row_dtype": row_dtype,
        "score_dtype": score_dtype,
        "output_dtype": output_dtype,
    }
    problems = _step_problems(heads, types, rotates=rotate_query or rotate_key)
    if problems:
        raise ValueError(f"no kernel covers this attention step: {'; '.join(problems)}")
    return decode_variant(
        heads,
        dtype=TRITON_TYPES[dtype],
        row_dtype=TRITON_TYPES[row_dtype],
        score_dtype=TRITON_TYPES[score_dtype],
        output_dtype=TRITON_TYPES[output_dtype],
        options={
            "SELECT": False,
            "APPEND": True,
            "QK_NORM": qk_norm,
            "ROTATE_QUERY": rotate_query,
            "ROTATE_KEY": rotate_key,
            "SCORE": computes_score,
        },
    )


@dataclass(frozen=True, kw_only=True)
class StepAppend:
    """Norms, rotates and scores the tokens of a pass and appends them to the caches.

    For passes of several tokens, and for steps of one token where keys are selected, which needs
    the new score first. Attention follows, by `make_step_attention`. Types are numpy's names; norm
    weights, cosines, sines and `A` are float32.

    Attributes:
        query_heads: Nq.
        key_heads: Nkv.
        score_heads: N of the score tensor.
        head_size: D.
        dtype: of the query and of the caches.
        row_dtype: of the rows [B·S, (Nq + 2·Nkv)·D (+ N)], see `make_step_attention_spec`.
        score_dtype: of the score tensor.
        qk_norm: norm queries and keys per head.
        rotate_query: rotate queries by their positions.
        rotate_key: rotate keys by their positions.
        computes_score: compute the scores of the new keys from each row's last N numbers and store
            them; otherwise nothing is done with scores.
        eps: of the norms.
    """

    query_heads: int
    key_heads: int
    score_heads: int
    head_size: int
    dtype: str
    row_dtype: str
    score_dtype: str
    qk_norm: bool
    rotate_query: bool
    rotate_key: bool
    computes_score: bool
    eps: float = 1e-6

    def __post_init__(self) -> None:
        types = {
            "dtype": self.dtype,
            "row_dtype": self.row_dtype,
            "score_dtype": self.score_dtype,
        }
        if problems := _step_problems(self._heads, types, rotates=self._rotates):
            raise ValueError(f"no kernel covers this append: {'; '.join(problems)}")

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory of a launch: none."""
        return 0

    @property
    def counters(self) -> int:
        """How many int32 counters it needs: none."""
        return 0

    @property
    def _heads(self) -> HeadShape:
        return HeadShape(
            query=self.query_heads,
            key=self.key_heads,
            score=self.score_heads,
            size=self.head_size,
        )

    @property
    def _rotates(self) -> bool:
        return self.rotate_query or self.rotate_key

    @cached_property
    def spec(self) -> KernelSpec:
        """The variant of the kernel."""
        return append_variant(
            self._heads,
            dtype=TRITON_TYPES[self.dtype],
            row_dtype=TRITON_TYPES[self.row_dtype],
            score_dtype=TRITON_TYPES[self.score_dtype],
            options={
                "QK_NORM": self.qk_norm,
                "ROTATE_QUERY": self.rotate_query,
                "ROTATE_KEY": self.rotate_key,
                "SCORE": self.computes_score,
            },
        )

    def launch(
        self,
        *,
        batch: int,
        tokens: int,
        slots: int,
        rows: int,
        query: int,
        key: int,
        value: int,
        write_index: int,
        score: int = 0,
        position: int = 0,
        query_norm: int = 0,
        key_norm: int = 0,
        cos: int = 0,
        sin: int = 0,
        A: int = 0,
    ) -> Launch:
        """Run it once.

        Args:
            batch: B sequences.
            tokens: S of each.
            slots: C.
            rows: address of [B·S, (Nq + 2·Nkv)·D (+ N)].
            query: address of [B, Nq, S, D], which is written.
            key: address of the cache [B, Nkv, C, D].
            value: address of the cache [B, Nkv, C, D].
            write_index: address of [B] int64, the slot of each sequence's first token. Tokens
                without a slot are not appended.
            score: address of the cache [B, N, C, 1].
            position: address of [B] int64, by which each sequence's first token is rotated; may be
                `write_index`.
            query_norm: address of [D].
            key_norm: address of [D].
            cos: address of [positions, D/2], a row for every token that has a slot.
            sin: address of [positions, D/2].
            A: address of [N].

        Raises:
            ValueError: sizes beyond the kernel, or an address that is missing or that it has no
                use for.
        """
        needed = {
            "rows": (rows, True),
            "query": (query, True),
            "key": (key, True),
            "value": (value, True),
            "score": (score, self.computes_score),
            "write_index": (write_index, True),
            "position": (position, self._rotates),
            "query_norm": (query_norm, self.qk_norm),
            "key_norm": (key_norm, self.qk_norm),
            "cos": (cos, self._rotates),
            "sin": (sin, self._rotates),
            "A": (A, self.computes_score),
        }
        problems = []
        if min(batch, tokens, slots) < 1:
            problems.append(
                f"{batch} sequences of {tokens} tokens and {slots} slots, expected positive numbers"
            )
        return Launch(
            kernel=self.spec.name,
            sizes={"rows": batch * tokens},
            arguments={
                **checked_addresses(self.spec.name, needed, *problems),
                "S": tokens,
                "C": slots,
                "eps": self.eps,
            },
        )


def _step_problems(heads: HeadShape, types: Mapping[str, str], *, rotates: bool) -> list[str]:
    problems = [*heads.problems(), *type_problems(types)]
    if heads.size % 2 and rotates:
        problems.append(f"D is {heads.size}, expected an even number to rotate halves")
    return problems
