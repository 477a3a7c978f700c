"""What the seed generation (G1) has of its own: inner function attention and experts per head.

Both modules hold what a checkpoint stores and compute it as published. `model/seed_rewrites.py`
changes them into equal but shorter forms before an export.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import DogeConfig
from model.layers import linear
from model.step_ops import LayerCache, Tap, append_layer, rotary_embedding
from plugins.dynamic_mask_attention.op import dynamic_mask_attention
from plugins.expert_gather.op import expert_gather
from plugins.value_gather.op import value_gather

# Half the most negative number: no product of a query and a key lifts it, and it lies far above the
# bias of a key that is not there yet.
HIDDEN_BIAS = torch.finfo(torch.float32).min / 2


class InnerFunctionAttention(nn.Module):
    """Attention whose values are the normed input times retrieved rows, under a stored mask.

    Queries are rotated and keys are not, so what a key scores depends on the query's position
    alone. Key j is hidden from head a where `dynamic_mask[a, j]` is exactly zero.

    Attributes:
        mask_bias: float32 [1, H or 1, slots, 1], computed once from `dynamic_mask`, which is then
            gone; None while the mask is read as it is stored.
        value_gate: the product of `v_queries` and `v_keys`, which are then gone.
        value_sums: the sums of every set of rows of `v_embed`, which is then gone.
        value_scale: [H], the rows that are picked whatever the token, once that is known;
            retrieval is then gone.
    """

    mask_bias: Tensor | None

    def __init__(self, config: DogeConfig) -> None:
        super().__init__()
        H, heads = config.hidden_size, config.num_inner_value_heads
        retrieval, values = config.inner_values_retrieval_size, config.num_inner_values
        self.head_dim = config.head_dim
        self.value_heads = heads
        self.values_per_head = config.num_value_per_head
        self.q_proj = linear(H, H)
        self.k_proj = linear(H, H)
        self.o_proj = linear(H, H)
        slots = config.max_position_embeddings
        self.dynamic_mask: nn.Parameter | None = nn.Parameter(
            torch.ones(config.num_attention_heads, slots)
        )
        self.v_queries: nn.Linear | None = linear(H, heads * retrieval)
        self.v_keys: nn.Parameter | None = nn.Parameter(torch.zeros(heads, retrieval, values))
        self.v_embed: nn.Embedding | None = nn.Embedding(values, H)
        self.register_buffer("mask_bias", None, persistent=False)
        self.value_gate: nn.Linear | None = None
        self.value_sums: nn.Embedding | None = None
        self.value_scale: nn.Parameter | None = None

    @property
    def custom_ops(self) -> tuple[str, ...]:
        """ONNX names of the custom ops that one forward pass applies."""
        retrieval = () if self.value_scale is not None else ("ValueGather",)
        return (*retrieval, "DynamicMaskAttention")

    def bias_of_mask(self, slots: int) -> Tensor:
        """The stored mask of the first `slots` keys as a bias, float32 [1, H, slots, 1].

        A hidden key's bias stands above that of a key that is not there yet, so a query all of
        whose keys are hidden averages those up to itself, as published code does token by token.

        Raises:
            ValueError: more slots than the mask is wide.
        """
        if self.dynamic_mask is None:
            raise AssertionError("the stored mask is gone once mask_bias is there")
        width = self.dynamic_mask.shape[1]
        if slots > width:
            raise ValueError(
                f"{slots} tokens exceed the {width} keys that the checkpoint's dynamic mask covers"
            )
        bias = torch.zeros_like(self.dynamic_mask[:, :slots], dtype=torch.float32)
        bias = bias.masked_fill(self.dynamic_mask[:, :slots] == 0, HIDDEN_BIAS)
        return bias[None, :, :, None]

    def inner_values(self, x: Tensor) -> Tensor:
        """The sum of the rows that each token of x [B, S, H] retrieves, [B, S, H] or [H]."""
        if self.value_scale is not None:
            return self.value_scale
        table = self.v_embed if self.value_sums is None else self.value_sums
        if table is None:
            raise AssertionError("rows are in v_embed or in value_sums")
        B, S, H = x.shape
        if self.value_gate is not None:
            scores = self.value_gate(x).view(B * S, self.value_heads, -1)
        elif self.v_queries is not None and self.v_keys is not None:
            queries = self.v_queries(x).view(B * S, self.value_heads, 1, -1)
            scores = (queries @ self.v_keys)[:, :, 0]  # [B·S, R, N]
        else:
            raise AssertionError("values are scored by v_queries and v_keys, or by value_gate")
        gathered = value_gather(
            scores,
            table.weight,
            top_k=self.values_per_head,
            subset_sums=self.value_sums is not None,
        )
        return gathered.view(B, S, H)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        rotary: tuple[Tensor, Tensor],
        write_index: Tensor,
        past: LayerCache | None,
        layer: str,
        tap: Tap,
    ) -> tuple[Tensor, LayerCache]:
        """Attend from x [B, S, H]; without a `past`, the step's own tokens are all there is."""
        B, S, _ = x.shape
        by_head = (B, S, -1, self.head_dim)
        value = (x * self.inner_values(x)).view(by_head).transpose(1, 2)
        value = tap(value, f"{layer}.value")
        query = self.q_proj(x).view(by_head).transpose(1, 2)
        query = tap(rotary_embedding(query, *rotary, position_ids), f"{layer}.query")
        key = tap(self.k_proj(x).view(by_head).transpose(1, 2), f"{layer}.key")
        present = append_layer(past, (key, value), write_index)
        keys, values = present
        slots = keys.shape[2]
        bias = self.bias_of_mask(slots) if self.mask_bias is None else self.mask_bias
        attended = dynamic_mask_attention(
            query, keys, values, bias, write_index, scale=self.head_dim**-0.5, keep_window_size=0
        )
        return tap(self.o_proj(attended), f"{layer}.attention_output"), present


class SeedMoE(nn.Module):
    """A feed-forward block without a gate, plus rank-1 experts that each head picks for itself.

    Attributes:
        router_gate: the product of `queries` and `keys`, which are then gone.
    """

    custom_ops = ("ExpertGather",)

    def __init__(self, config: DogeConfig) -> None:
        super().__init__()
        H, heads = config.hidden_size, config.num_cdmmoe_heads
        retrieval, n = config.private_expert_retrieval_size, config.num_keys
        self.top_k = config.num_cdmmoe_experts_per_head
        self.heads = heads
        self.num_keys = n
        self.up_proj = linear(H, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, H)
        self.queries: nn.Linear | None = linear(H, heads * retrieval)
        self.keys: nn.Parameter | None = nn.Parameter(torch.zeros(heads, n, 2, retrieval // 2))
        self.down_embed = nn.Embedding(config.num_cdmmoe_experts, H)
        self.up_embed = nn.Embedding(config.num_cdmmoe_experts, H)
        self.router_gate: nn.Linear | None = None

    def router_scores(self, x: Tensor) -> Tensor:
        """Scores of the grid's rows and columns in each head: x [B, S, H] to [B, S, 2·P·n]."""
        scores: Tensor
        if self.router_gate is not None:
            scores = self.router_gate(x)
            return scores
        if self.queries is None or self.keys is None:
            raise AssertionError("experts are scored by queries and keys, or by router_gate")
        B, S, _ = x.shape
        queries = self.queries(x).view(B, S, 2, self.heads, 1, -1)
        keys = self.keys.permute(2, 0, 3, 1)  # [2, P, r/2, n]
        scores = (queries @ keys).reshape(B, S, -1)
        return scores

    def forward(self, x: Tensor, layer: str, tap: Tap) -> Tensor:
        """Apply the block to x [B, S, H]."""
        B, S, H = x.shape
        router = tap(self.router_scores(x), f"{layer}.router_scores")
        router = router.reshape(B * S, 2, self.heads, self.num_keys)
        experts = expert_gather(
            x.reshape(B * S, H),
            router[:, 0],
            router[:, 1],
            self.down_embed.weight,
            self.up_embed.weight,
            top_k=self.top_k,
            weight_inside=True,
        )
        experts = tap(experts.reshape(B, S, H), f"{layer}.expert_output")
        shared: Tensor = self.down_proj(nn.functional.silu(self.up_proj(x)))
        return tap(shared + experts, f"{layer}.mlp_output")
