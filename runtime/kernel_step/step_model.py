"""The numbers of a model that a step of our kernels depends on, whatever its generation."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import DogeConfig, RouterMode
from model.generations.generation import Generation

# Cached slots of a sequence are a multiple of it, so that every row of a cache tensor begins where
# a kernel may load 16 bytes.
SLOT_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class ExpertGrid:
    """Rank-1 experts picked by product keys.

    Attributes:
        count: E, rows of each table.
        num_keys: n, per axis of the grid.
        heads: P, each of which picks for itself.
        top_k: K, picks of a head.
        weight_inside: whether a pick's weight stands inside its activation (the seed).
        normalize: divide the weights of a head by their sum.
        router_mode: how a prompt's router scores are cut into two axes.
    """

    count: int
    num_keys: int
    heads: int
    top_k: int
    weight_inside: bool
    normalize: bool
    router_mode: RouterMode

    @property
    def router_rows(self) -> int:
        """2·P·n: the scores of both axes."""
        return 2 * self.heads * self.num_keys


@dataclass(frozen=True, kw_only=True)
class InnerValues:
    """The seed's values: the normed input times the sum of retrieved rows.

    Attributes:
        heads: R, each of which picks for itself.
        count: N, rows of the table; with one row there is nothing to pick.
        picks: k, rows that a head picks.
        mask_heads: heads of the stored mask; 1 where it hides nothing.
    """

    heads: int
    count: int
    picks: int
    mask_heads: int

    @property
    def score_rows(self) -> int:
        """R·N: what the picks are chosen by; 0 where there is nothing to pick."""
        return 0 if self.count == 1 else self.heads * self.count


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """One model.

    Attributes:
        layers: L.
        hidden: H.
        inner: I, of the feed-forward block.
        query_heads: Nq.
        key_heads: Nkv.
        head_size: D.
        score_heads: N, mask scores cached with a key; 0 where none is.
        vocab_size: V.
        eps: of every norm.
        tied: whether the head is the embedding table.
        qk_norm: whether queries and keys are normed per head.
        rotates_keys: whether keys are rotated as queries are.
        max_seq_len: prompt and new tokens of a sequence.
        keep_window_size: keys that a query keeps; 0 where none can ever be dropped.
        experts: None for a dense model.
        inner_values: of the seed, else None.
    """

    layers: int
    hidden: int
    inner: int
    query_heads: int
    key_heads: int
    head_size: int
    score_heads: int
    vocab_size: int
    eps: float
    tied: bool
    qk_norm: bool
    rotates_keys: bool
    max_seq_len: int
    keep_window_size: int
    experts: ExpertGrid | None
    inner_values: InnerValues | None

    @classmethod
    def make(
        cls,
        config: DogeConfig,
        generation: Generation,
        max_seq_len: int,
        inner_values: InnerValues | None = None,
    ) -> StepModel:
        """The numbers of a checkpoint.

        Args:
            config: the architecture.
            generation: of the checkpoint.
            max_seq_len: prompt and new tokens of a sequence.
            inner_values: what packing found; of the seed alone.

        Raises:
            ValueError: the seed without `inner_values`, or those without the seed.
        """
        if config.is_seed != (inner_values is not None):
            raise ValueError(
                f"inner values are {'missing' if config.is_seed else 'given'}, and the generation "
                f"is {generation.name}"
            )
        scores = generation.num_score_heads(config)
        window = config.keep_window_size if scores else 0
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            query_heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_size=config.head_dim,
            score_heads=scores,
            vocab_size=config.vocab_size,
            eps=config.rms_norm_eps,
            tied=config.tie_word_embeddings,
            qk_norm=generation.qk_norm,
            rotates_keys=generation.rotates_keys,
            max_seq_len=max_seq_len,
            keep_window_size=window if max_seq_len > window else 0,
            experts=_experts(config),
            inner_values=inner_values,
        )

    @property
    def slots(self) -> int:
        """C, cached slots of a sequence: `max_seq_len`, rounded up."""
        return -(-self.max_seq_len // SLOT_MULTIPLE) * SLOT_MULTIPLE

    @property
    def is_seed(self) -> bool:
        """Whether values are retrieved and the feed-forward block has no gate."""
        return self.inner_values is not None

    @property
    def head_numbers(self) -> int:
        """(Nq + 2·Nkv)·D: a token's queries, keys and values."""
        return (self.query_heads + 2 * self.key_heads) * self.head_size

    @property
    def projected(self) -> int:
        """Of them, those that are products with stored weights: the seed's values are not."""
        values = self.key_heads * self.head_size if self.is_seed else 0
        return self.head_numbers - values

    @property
    def row_numbers(self) -> int:
        """Numbers of a token between the projections and the attention, mask scores included."""
        return self.head_numbers + self.score_heads

    @property
    def bias_heads(self) -> int:
        """Heads of what attention adds: mask scores, or the seed's stored mask."""
        if self.score_heads:
            return self.score_heads
        return self.inner_values.mask_heads if self.inner_values is not None else 1

    @property
    def gated_rows(self) -> int:
        """Rows of the matrix before the activation: gate and up in turn, or the seed's up."""
        return self.inner if self.is_seed else 2 * self.inner


def _experts(config: DogeConfig) -> ExpertGrid | None:
    if config.is_seed:
        return ExpertGrid(
            count=config.num_cdmmoe_experts,
            num_keys=config.num_keys,
            heads=config.num_cdmmoe_heads,
            top_k=config.num_cdmmoe_experts_per_head,
            weight_inside=True,
            normalize=False,
            router_mode="per_token",
        )
    if not config.is_moe:
        return None
    return ExpertGrid(
        count=config.num_experts,
        num_keys=config.num_keys,
        heads=1,
        top_k=config.num_experts_per_tok,
        weight_inside=False,
        normalize=config.norm_topk_prob,
        router_mode=config.router_mode,
    )
