"""The Doge network, top to bottom: attention, decoder layer, stack and head.

One forward pass is one *step* (docs/contract.md): S new tokens of each of B sequences go into the
cache, and the hidden states that `logits_index` names become logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import DogeConfig
from model.generations import Generation
from model.layers import CrossDomainMoE, GatedMLP, RMSNorm, linear, rotary_tables
from model.step_ops import Tap, append_to_cache, no_tap, rotary_embedding
from plugins.dynamic_mask_attention.op import dynamic_mask_attention


class LayerCache(NamedTuple):
    """What one layer keeps of every cached token, C slots a sequence."""

    key: Tensor  # [B, Nkv, C, D], rotated
    value: Tensor  # [B, Nkv, C, D]
    score: Tensor  # [B, N, C, 1], mask scores


class DogeAttention(nn.Module):
    """Grouped attention biased by a score of each cached key."""

    def __init__(self, config: DogeConfig, generation: Generation) -> None:
        super().__init__()
        H, D = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
        score_heads = generation.num_score_heads(config)
        self.head_dim = D
        self.keep_window_size = config.keep_window_size
        self.q_proj = linear(H, queries)
        self.k_proj = linear(H, keys)
        self.v_proj = linear(H, keys)
        self.o_proj = linear(queries, H)
        self.A = nn.Parameter(torch.zeros(score_heads))
        self.dt_proj = linear(keys, score_heads)
        if generation.qk_norm:
            self.q_norm: nn.Module = RMSNorm(D, config.rms_norm_eps)
            self.k_norm: nn.Module = RMSNorm(D, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def mask_scores(self, value: Tensor) -> Tensor:
        """exp(A · softplus(dt_proj(v))): the score of each key, from the values of all heads.

        Args:
            value: [B, S, Nkv·D].

        Returns:
            [B, N, S, 1] in value's dtype.
        """
        score = torch.exp(self.A * nn.functional.softplus(self.dt_proj(value)))  # [B, S, N]
        return score.transpose(1, 2).unsqueeze(-1)

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
        D = self.head_dim
        B, S, _ = x.shape
        value = self.v_proj(x)  # [B, S, Nkv·D]
        new = LayerCache(
            key=self.k_norm(self.k_proj(x).view(B, S, -1, D)).transpose(1, 2),
            value=tap(value.view(B, S, -1, D).transpose(1, 2), f"{layer}.value"),
            score=tap(self.mask_scores(value), f"{layer}.score"),
        )
        query = self.q_norm(self.q_proj(x).view(B, S, -1, D)).transpose(1, 2)
        query = tap(rotary_embedding(query, *rotary, position_ids), f"{layer}.query")
        key = tap(rotary_embedding(new.key, *rotary, position_ids), f"{layer}.key")
        present = new._replace(key=key)
        if past is not None:
            present = LayerCache(
                *(append_to_cache(*pair, write_index) for pair in zip(past, present, strict=True))
            )
        slots = present.key.shape[2]
        attended = dynamic_mask_attention(
            query,
            *present,
            write_index,
            scale=D**-0.5,
            # With no more slots than the window, nothing can ever be dropped.
            keep_window_size=self.keep_window_size if slots > self.keep_window_size else 0,
        )
        return tap(self.o_proj(attended), f"{layer}.attention_output"), present


class DogeDecoderLayer(nn.Module):
    """Attention and feed-forward, each added to a residual that is scaled per channel."""

    def __init__(self, config: DogeConfig, generation: Generation) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(H, eps)
        self.self_attn = DogeAttention(config, generation)
        self.input_residual = nn.Parameter(torch.ones(H))
        self.post_attention_layernorm = RMSNorm(H, eps)
        self.mlp = CrossDomainMoE(config) if config.is_moe else GatedMLP(config)
        self.post_attention_residual = nn.Parameter(torch.ones(H))

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
        """Map the residual stream x [B, S, H] to the next layer's."""
        normed = tap(self.input_layernorm(x), f"{layer}.attention_norm")
        attended, present = self.self_attn(
            normed, position_ids, rotary, write_index, past, layer, tap
        )
        x = tap(self.input_residual * x + attended, f"{layer}.attention_residual")
        normed = tap(self.post_attention_layernorm(x), f"{layer}.mlp_norm")
        x = self.post_attention_residual * x + self.mlp(normed, layer, tap)
        return tap(x, f"{layer}.output"), present


class DogeModel(nn.Module):
    """Embedding, decoder layers and final norm, under the names of published checkpoints."""

    def __init__(self, config: DogeConfig, generation: Generation) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DogeDecoderLayer(config, generation) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DogeForCausalLM(nn.Module):
    """The reference network. `load_checkpoint` makes one; `forward` runs one step."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DogeConfig, generation: Generation) -> None:
        super().__init__()
        self.config = config
        self.generation = generation
        self.model = DogeModel(config, generation)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.reset_rotary()

    def reset_rotary(self) -> None:
        """Compute the rotary tables [positions, D/2] anew, in the model's dtype.

        They are no part of a checkpoint. Angles are float32 whatever the dtype, as published.
        """
        cos, sin = rotary_tables(self.config, self.config.max_position_embeddings)
        dtype = self.model.norm.weight.dtype
        self.register_buffer("cos", cos.to(dtype), persistent=False)
        self.register_buffer("sin", sin.to(dtype), persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, H]; the embedding table itself where the checkpoint ties them."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        logits_index: Tensor,
        past_key_values: Sequence[LayerCache] | None,
        tap: Tap = no_tap,
    ) -> tuple[Tensor, list[LayerCache]]:
        """Run one step.

        Args:
            input_ids: [B, S] int64 new tokens, left-aligned.
            position_ids: [B, S] int64 positions for rotary embedding.
            write_index: [B] int64 slots already filled in each row.
            logits_index: [B, M] int64, which of the S tokens get logits.
            past_key_values: one cache per layer, changed in place; None runs without a cache.
            tap: called with each named value (`layer_taps`); returns the value to go on with.

        Returns:
            [B, M, V] float32 logits, and the caches after the step.
        """
        x = tap(self.model.embed_tokens(input_ids), "embedding")
        presents = []
        for index, layer in enumerate(self.model.layers):
            past = None if past_key_values is None else past_key_values[index]
            x, present = layer(
                x, position_ids, (self.cos, self.sin), write_index, past, f"layers.{index}", tap
            )
            presents.append(present)
        wanted = logits_index[..., None].expand(-1, -1, x.shape[-1])  # [B, M, H]
        x = tap(self.model.norm(x.gather(1, wanted)), "final_norm")
        logits = nn.functional.linear(x, self.head_weight)
        return logits.float(), presents

    def new_cache(self, batch_size: int, slots: int) -> list[LayerCache]:
        """Zeroed caches of every layer, C = `slots`, in the model's dtype and on its device."""
        config, weight = self.config, self.model.norm.weight
        keys = (batch_size, config.num_key_value_heads, slots, config.head_dim)
        scores = (batch_size, self.generation.num_score_heads(config), slots, 1)
        return [
            LayerCache(*(weight.new_zeros(shape) for shape in (keys, keys, scores)))
            for _ in range(config.num_hidden_layers)
        ]
