"""Inputs of the custom ops, awkward shapes among them; every implementation is tried on these."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from plugins.value_gather.subsets import value_subsets


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """Shapes and attributes of one DynamicMaskAttention; N = Nkv unless given."""

    label: str
    S: int
    C: int
    W: int
    write_index: tuple[int, ...] = (0,)
    Nq: int = 4
    Nkv: int = 2
    N: int = 2
    D: int = 8
    shared: bool = False  # one row of scores for the whole batch
    score_levels: int = 0  # draw scores from that few values, so that many are equal
    scale: float = 0.35

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """query, key, value, score, write_index; the score is always float32."""
        generator = torch.Generator().manual_seed(self.S * 1000 + self.C)
        B = len(self.write_index)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        size = (1 if self.shared else B, self.N, self.C, 1)
        if self.score_levels:
            score = torch.randint(self.score_levels, size, generator=generator) * 0.75 - 1.0
        else:
            score = 2 * randn(*size)
        return (
            randn(B, self.Nq, self.S, self.D).to(dtype),
            randn(B, self.Nkv, self.C, self.D).to(dtype),
            randn(B, self.Nkv, self.C, self.D).to(dtype),
            score,
            torch.tensor(self.write_index),
        )


ATTENTION_CASES = (
    AttentionCase(label="one token, one slot", S=1, C=1, W=0),
    AttentionCase(label="decode", S=1, C=32, W=0, write_index=(13,)),
    AttentionCase(label="decode, window", S=1, C=32, W=7, write_index=(29,)),
    AttentionCase(label="prefill", S=13, C=13, W=0),
    AttentionCase(label="three rows at odds", S=5, C=23, W=0, write_index=(0, 17, 4)),
    AttentionCase(label="three rows, window", S=5, C=23, W=6, write_index=(0, 17, 4)),
    AttentionCase(label="primes", S=7, C=31, W=11, write_index=(19,), Nq=3, Nkv=3, N=3, D=6),
    AttentionCase(label="window of one", S=11, C=17, W=1, write_index=(6,)),
    AttentionCase(label="window one short", S=11, C=12, W=11, write_index=(1,)),
    AttentionCase(label="equal scores", S=19, C=19, W=5, score_levels=3),
    AttentionCase(label="all scores equal", S=19, C=23, W=5, write_index=(4,), score_levels=1),
    AttentionCase(
        label="equal, three rows", S=4, C=17, W=3, write_index=(2, 13, 0), score_levels=2
    ),
    AttentionCase(label="per query head", S=6, C=19, W=4, write_index=(11,), N=4),
    AttentionCase(label="one key head", S=6, C=19, W=4, write_index=(3, 13), Nkv=1, N=1),
    AttentionCase(label="one key head, N=Nq", S=6, C=19, W=4, Nkv=1, N=4, score_levels=2),
    AttentionCase(label="one bias", S=5, C=19, W=0, write_index=(3, 0, 13), N=1, shared=True),
    AttentionCase(label="bias per head", S=5, C=19, W=0, write_index=(3, 13), N=4, shared=True),
    AttentionCase(label="one bias, window", S=5, C=19, W=6, write_index=(3, 13), N=1, shared=True),
    AttentionCase(label="row full", S=3, C=16, W=9, write_index=(13, 0, 7)),
)
# In these nothing can be dropped; a body that selects is only made for W < C.
WIDE_WINDOW_CASES = (
    AttentionCase(label="window equals slots", S=9, C=9, W=9),
    AttentionCase(label="window beyond slots", S=4, C=9, W=50, write_index=(2, 5, 0)),
)


@dataclass(frozen=True, kw_only=True)
class ExpertCase:
    """Shapes and attributes of one ExpertGather."""

    label: str
    T: int = 5
    P: int = 1
    n: int = 4
    K: int = 3
    H: int = 8
    unreachable: int = 0  # experts beyond the n x n grid
    weight_inside: bool = False
    normalize: bool = False
    offset: float = field(default=0.0)  # added to every score

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """hidden, scores_x, scores_y, down, up."""
        generator = torch.Generator().manual_seed(self.T * 1000 + self.n * 10 + self.K)
        experts = self.n**2 + self.unreachable

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        return (
            randn(self.T, self.H),
            randn(self.T, self.P, self.n) + self.offset,
            randn(self.T, self.P, self.n) + self.offset,
            randn(experts, self.H),
            randn(experts, self.H),
        )


EXPERT_CASES = (
    ExpertCase(label="usual"),
    ExpertCase(label="one token", T=1),
    ExpertCase(label="one expert", n=1, K=1),
    ExpertCase(label="one pick", K=1),
    ExpertCase(label="primes", T=13, n=7, K=5, H=11),
    ExpertCase(label="grid of three, more picks than keys", n=3, K=7),
    ExpertCase(label="every expert", n=3, K=9),
    ExpertCase(label="unreachable experts", n=5, K=6, unreachable=4),
    ExpertCase(label="several heads", T=3, P=3, n=6, K=4),
    ExpertCase(label="weight inside", P=2, weight_inside=True),
    ExpertCase(label="normalize", normalize=True, n=6, K=8),
    ExpertCase(label="weight inside, normalize, heads", P=2, weight_inside=True, normalize=True),
    ExpertCase(label="large scores", n=6, K=8, offset=80.0),
)


@dataclass(frozen=True, kw_only=True)
class ValueCase:
    """Shapes and attributes of one ValueGather."""

    label: str
    T: int = 5
    R: int = 2
    N: int = 4
    K: int = 2
    H: int = 8
    subset_sums: bool = False
    levels: int = 0  # draw scores from that few values, so that many are equal

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """scores, table."""
        generator = torch.Generator().manual_seed(self.T * 1000 + self.N * 10 + self.K)
        size = (self.T, self.R, self.N)
        if self.levels:
            scores = torch.randint(self.levels, size, generator=generator).to(dtype)
        else:
            scores = torch.randn(size, generator=generator).to(dtype)
        rows = torch.randn(self.N, self.H, generator=generator)
        if self.subset_sums:
            subsets = value_subsets(self.N, self.K)
            rows = torch.stack([rows[list(subset)].sum(0) for subset in subsets])
        return scores, rows.to(dtype)


VALUE_CASES = (
    ValueCase(label="usual"),
    ValueCase(label="one token, one head", T=1, R=1),
    ValueCase(label="one row", N=1, K=1),
    ValueCase(label="every row", N=3, K=3),
    ValueCase(label="primes", T=13, R=3, N=7, K=5, H=11),
    ValueCase(label="equal scores", T=17, R=3, N=6, K=3, levels=2),
    ValueCase(label="all scores equal", N=6, K=3, levels=1),
    ValueCase(label="sums of pairs", subset_sums=True),
    ValueCase(label="sums of one", N=2, K=1, R=1, subset_sums=True),
    ValueCase(label="sums, equal scores", T=17, R=3, N=6, K=3, levels=2, subset_sums=True),
)
