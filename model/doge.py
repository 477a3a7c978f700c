"""The Doge network, top to bottom: attention, decoder layer, stack and head.

One forward pass is one *step* (docs/contract.md): S new tokens of each of B sequences go into the
cache, and the hidden states that `logits_index` names become logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.config import DogeConfig
from model.contract import cache_sizes
from model.generations import Generation
from model.layers import CrossDomainMoE, GatedMLP, RMSNorm, linear, rotary_tables
from model.seed import InnerFunctionAttention, SeedMoE
from model.step_ops import LayerCache, Tap, append_layer, no_tap, rotary_embedding
from plugins.dynamic_mask_attention.op import dynamic_mask_attention


class DogeAttention(nn.Module):
    """Grouped attention biased by a score of each cached key, where the generation has scores.

    Attributes:
        mask_bias: float32 [1, 1, slots, 1], the zero bias of a generation without scores, once it
            has been made for an export.
    """

    custom_ops = ("DynamicMaskAttention",)
    mask_bias: Tensor | None

    def __init__(self, config: DogeConfig, generation: Generation) -> None:
        super().__init__()
        H, D = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
        score_heads = generation.num_score_heads(config)
        self.head_dim = D
        # Without scores there is nothing to select by.
        self.keep_window_size = config.keep_window_size if score_heads else 0
        self.q_proj = linear(H, queries)
        self.k_proj = linear(H, keys)
        self.v_proj = linear(H, keys)
        self.o_proj = linear(queries, H)
        self.register_buffer("mask_bias", None, persistent=False)
        self.scored = score_heads > 0
        if self.scored:
            self.A = nn.Parameter(torch.zeros(score_heads))
            self.dt_proj = linear(keys, score_heads)
        if generation.qk_norm:
            self.q_norm: nn.Module = RMSNorm(D, config.rms_norm_eps)
            self.k_norm: nn.Module = RMSNorm(D, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def no_bias(self, slots: int) -> Tensor:
        """The bias of `slots` keys that no score lifts, float32 [1, 1, slots, 1]."""
        return torch.zeros(1, 1, slots, 1, device=self.o_proj.weight.device)

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
        key = self.k_norm(self.k_proj(x).view(B, S, -1, D)).transpose(1, 2)
        values = tap(value.view(B, S, -1, D).transpose(1, 2), f"{layer}.value")
        scores = (tap(self.mask_scores(value), f"{layer}.score"),) if self.scored else ()
        query = self.q_norm(self.q_proj(x).view(B, S, -1, D)).transpose(1, 2)
        query = tap(rotary_embedding(query, *rotary, position_ids), f"{layer}.query")
        key = tap(rotary_embedding(key, *rotary, position_ids), f"{layer}.key")
        present = append_layer(past, (key, values, *scores), write_index)
        keys, values = present[:2]
        slots = keys.shape[2]
        if self.scored:
            bias = present[2]
        else:
            bias = self.no_bias(slots) if self.mask_bias is None else self.mask_bias
        attended = dynamic_mask_attention(
            query,
            keys,
            values,
            bias,
            write_index,
            scale=D**-0.5,
            # With no more slots than the window, nothing can ever be dropped.
            keep_window_size=self.keep_window_size if slots > self.keep_window_size else 0,
        )
        return tap(self.o_proj(attended), f"{layer}.attention_output"), present


class DogeDecoderLayer(nn.Module):
    """Attention and feed-forward, each added to a residual, which all but the seed scale."""

    def __init__(self, config: DogeConfig, generation: Generation) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(H, eps)
        self.post_attention_layernorm = RMSNorm(H, eps)
        self.input_residual: nn.Parameter | None = None
        self.post_attention_residual: nn.Parameter | None = None
        self.self_attn: nn.Module
        self.mlp: nn.Module
        if generation.inner_function:
            self.self_attn = InnerFunctionAttention(config)
            self.mlp = SeedMoE(config)
            return
        self.self_attn = DogeAttention(config, generation)
        self.mlp = CrossDomainMoE(config) if config.is_moe else GatedMLP(config)
        self.input_residual = nn.Parameter(torch.ones(H))
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
        residual = x if self.input_residual is None else self.input_residual * x
        x = tap(residual + attended, f"{layer}.attention_residual")
        normed = tap(self.post_attention_layernorm(x), f"{layer}.mlp_norm")
        residual = x if self.post_attention_residual is None else self.post_attention_residual * x
        x = residual + self.mlp(normed, layer, tap)
        return tap(x, f"{layer}.output"), present


class DogeModel(nn.Module):
    """Embedding, decoder layers and final norm; parameter names are those of G4."""

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

    def published_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by the name that the generation's checkpoints give it."""
        named = self.named_parameters()
        return {self.generation.published_name(name): parameter for name, parameter in named}

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
        sizes = cache_sizes(self.config, self.generation, slots).values()
        weight = self.model.norm.weight
        return [
            tuple(weight.new_zeros(batch_size, *size) for size in sizes)
            for _ in range(self.config.num_hidden_layers)
        ]
