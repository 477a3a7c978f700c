"""The parts of a Doge network that its generations share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import DogeConfig
from model.step_ops import Tap, rms_norm
from plugins.expert_gather.op import expert_gather


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x, any leading shape."""
        return rms_norm(x, self.weight, self.eps)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A projection without bias: no published Doge has one."""
    return nn.Linear(inputs, outputs, bias=False)


def rotary_tables(config: DogeConfig, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position · theta^(-2j/D).

    Returns:
        Two float32 tensors [positions, D/2].
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)  # [D/2]
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


class GatedMLP(nn.Module):
    """down( SiLU(gate(x)) · up(x) )."""

    custom_ops: tuple[str, ...] = ()

    def __init__(self, config: DogeConfig) -> None:
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, layer: str, tap: Tap) -> Tensor:
        """Apply the block to x [B, S, H]."""
        inner = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        down: Tensor = self.down_proj(inner)
        return tap(down, f"{layer}.mlp_output")


class CrossDomainMoE(nn.Module):
    """A gated MLP that every token shares, plus rank-1 experts picked by product keys.

    The router gives 2n numbers per token, n for each axis of the expert grid. How the published
    code cuts them into two axes is `router_mode` (docs/reference.md): `per_token` takes a token's
    own two halves; `mixed` reinterprets the S·2n numbers of a sequence as two blocks of S·n, so a
    token reads other tokens' numbers and a sequence must be prefilled in one pass, unpadded.
    """

    custom_ops = ("ExpertGather",)

    def __init__(self, config: DogeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob
        self.num_keys = config.num_keys
        self.router_mode = config.router_mode
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)
        self.router_gate = linear(config.hidden_size, 2 * config.num_keys)
        self.down_embed = nn.Embedding(config.num_experts, config.hidden_size)
        self.up_embed = nn.Embedding(config.num_experts, config.hidden_size)

    def forward(self, x: Tensor, layer: str, tap: Tap) -> Tensor:
        """Apply the block to x [B, S, H]."""
        B, S, H = x.shape
        n = self.num_keys
        router = tap(self.router_gate(x), f"{layer}.router_scores")  # [B, S, 2n]
        if self.router_mode == "mixed":
            router = router.reshape(B, 2, S, n).transpose(1, 2)  # [B, S, 2, n]
        router = router.reshape(B * S, 2, 1, n)
        experts = expert_gather(
            x.reshape(B * S, H),
            router[:, 0],
            router[:, 1],
            self.down_embed.weight,
            self.up_embed.weight,
            top_k=self.top_k,
            normalize=self.normalize,
        )
        experts = tap(experts.reshape(B, S, H), f"{layer}.expert_output")
        inner = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return tap(self.down_proj(inner) + experts, f"{layer}.mlp_output")
