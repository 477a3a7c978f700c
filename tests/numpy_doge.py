"""Every published generation of Doge in plain numpy: a second reading, to compare the network with.

Written from the specification of each generation and from nothing else: it imports neither torch
nor anything of `model/`. One sequence at a time, the whole of it, without a cache; loops where they
make the formula plainer. Tensors have their published names, config.json its published fields.

Shapes: S tokens, H hidden size, Nq query heads, Nkv key/value heads, D head size, G = Nq / Nkv, V
vocabulary, n keys on each axis of the expert grid. A linear layer is `x @ W.T` with W [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
Ids = npt.NDArray[np.integer[Any]]
Generation = Literal["g1", "g2_first", "g2", "g3", "g4", "g4h"]
Router = Literal["mixed", "per_token"]


@dataclass(frozen=True, kw_only=True)
class Names:
    """How a generation spells the parts of the model and of a layer; seed layers have no scales."""

    embedding: str
    final_norm: str
    attention_norm: str
    attention: str
    attention_residual: str | None
    mlp_norm: str
    mlp: str
    mlp_residual: str | None


_G3_NAMES = Names(
    embedding="word_embed.weight",
    final_norm="final_layernorm.weight",
    attention_norm="pre_layernorm.weight",
    attention="self_attn",
    attention_residual="pre_residual.weight",
    mlp_norm="post_layernorm.weight",
    mlp="feed_forward",
    mlp_residual="post_residual.weight",
)
_G4_NAMES = Names(
    embedding="embed_tokens.weight",
    final_norm="norm.weight",
    attention_norm="input_layernorm.weight",
    attention="self_attn",
    attention_residual="input_residual",
    mlp_norm="post_attention_layernorm.weight",
    mlp="mlp",
    mlp_residual="post_attention_residual",
)
NAMES: Mapping[Generation, Names] = {
    "g1": Names(
        embedding="word_embed.weight",
        final_norm="final_layernorm.weight",
        attention_norm="in_attn_layernorm.weight",
        attention="attn",
        attention_residual=None,
        mlp_norm="in_ff_layernorm.weight",
        mlp="feed_forward",
        mlp_residual=None,
    ),
    "g2_first": Names(
        embedding="word_embed.weight",
        final_norm="final_layernorm.weight",
        attention_norm="pre_sequence_layernorm.weight",
        attention="attn",
        attention_residual="post_sequence_residual.weight",
        mlp_norm="pre_state_layernorm.weight",
        mlp="feed_forward",
        mlp_residual="post_state_residual.weight",
    ),
    "g2": _G3_NAMES,
    "g3": _G3_NAMES,
    "g4": _G4_NAMES,
    "g4h": _G4_NAMES,
}


def logits(
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    ids: Ids,
    generation: Generation,
    router: Router = "mixed",
    *,
    token_by_token: bool = False,
    dtype: type[np.floating[Any]] = np.float64,
) -> Array:
    """Logits of every token, each row of `ids` as if it were alone.

    Args:
        config: the content of config.json.
        tensors: the checkpoint, by published name.
        ids: [B, S].
        generation: what the checkpoint is.
        router: how router scores are split among tokens, where there is a router; `per_token` is
            what published code does with a token in a step of its own.
        token_by_token: whether later keys do not exist, as with a token in a step of its own, or
            are hidden. The same, except for a query all of whose keys are hidden: it averages the
            keys that exist.
        dtype: what everything is computed in, except rotary angles, which are float32.

    Returns:
        [B, S, V] in `dtype`.
    """
    doge = NumpyDoge(
        config=config,
        tensors={name: tensor.astype(dtype) for name, tensor in tensors.items()},
        generation=generation,
        router=router,
        token_by_token=token_by_token,
    )
    return np.stack([doge.sequence(row) for row in ids])


@dataclass(kw_only=True)
class NumpyDoge:
    """One checkpoint, and the tensors that were read from it."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Array]
    generation: Generation
    router: Router
    token_by_token: bool
    used: set[str] = field(default_factory=set)

    def tensor(self, name: str) -> Array:
        self.used.add(name)
        return self.tensors[name]

    def sequence(self, ids: Ids) -> Array:
        """[S] token ids to [S, V] logits."""
        names = NAMES[self.generation]
        embedding = self.tensor(f"model.{names.embedding}")
        x = embedding[ids]  # [S, H]
        for index in range(self.config["num_hidden_layers"]):
            x = self.layer(f"model.layers.{index}.", x)
        x = self.norm(f"model.{names.final_norm}", x)
        head = self.tensor("lm_head.weight") if "lm_head.weight" in self.tensors else embedding
        assert self.used == set(self.tensors), sorted(set(self.tensors) - self.used)
        return x @ head.T

    def layer(self, place: str, x: Array) -> Array:
        names = NAMES[self.generation]
        u = self.norm(place + names.attention_norm, x)
        attention = self.seed_attention if self.generation == "g1" else self.attention
        attended = attention(f"{place}{names.attention}.", u)
        x = self.residual(place, names.attention_residual, x) + attended
        u = self.norm(place + names.mlp_norm, x)
        fed = self.feed_forward(f"{place}{names.mlp}.", u)
        return self.residual(place, names.mlp_residual, x) + fed

    def residual(self, place: str, name: str | None, x: Array) -> Array:
        return x if name is None else self.tensor(place + name) * x

    def norm(self, name: str, x: Array) -> Array:
        return rms_norm(x, self.tensor(name), self.config.get("rms_norm_eps", 1e-6))

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.tensor(f"{name}.weight").T

    @property
    def theta(self) -> float:
        nested = self.config.get("rope_parameters") or {}
        return float(nested.get("rope_theta") or self.config.get("rope_theta") or 10000.0)

    def attend(self, q: Array, k: Array, v: Array, bias: Array) -> Array:
        """One head: q, k and v [S, D], bias [S, S]."""
        scores = q @ k.T / q.dtype.type(math.sqrt(q.shape[1])) + bias
        if not self.token_by_token:
            return softmax(scores) @ v
        ends = range(1, len(q) + 1)
        return np.stack([softmax(scores[end - 1, :end]) @ v[:end] for end in ends])

    # --- attention of the seed generation ---

    def seed_attention(self, place: str, u: Array) -> Array:
        """Queries rotated once, keys never; values are retrieved; a stored mask hides keys."""
        S, H = u.shape
        Nq = self.config["num_attention_heads"]
        q = self.linear(f"{place}q_proj", u).reshape(S, Nq, H // Nq)
        k = self.linear(f"{place}k_proj", u).reshape(S, Nq, H // Nq)
        v = (u * self.retrieved_values(place, u)).reshape(S, Nq, H // Nq)
        stored = self.tensor(f"{place}dynamic_mask")  # [Nq, M]
        assert stored.shape[1] >= S, "the stored mask is as wide as the longest sequence"
        visible = causal(S)
        heads = []
        for a in range(Nq):
            # Compared with zero exactly: a small or negative number keeps its key.
            bias = hide(np.zeros((S, S), u.dtype), visible & (stored[a, :S] != 0))
            heads.append(self.attend(rotate(q[:, a], self.theta), k[:, a], v[:, a], bias))
        return self.linear(f"{place}o_proj", np.concatenate(heads, axis=1))

    def retrieved_values(self, place: str, u: Array) -> Array:
        """[S, H]: the rows of one table that each token's heads choose, summed over the heads.

        The similarities choose and are not used otherwise; a row that two heads choose counts
        twice.
        """
        S = len(u)
        heads, kept = self.config["num_inner_value_heads"], self.config["num_value_per_head"]
        keys = self.tensor(f"{place}v_keys")  # [R, r_v, N]
        table = self.tensor(f"{place}v_embed.weight")  # [N, H]
        queries = self.linear(f"{place}v_queries", u).reshape(S, heads, -1)  # [S, R, r_v]
        values = np.zeros_like(u)
        for t in range(S):
            for r in range(heads):
                for chosen in largest(queries[t, r] @ keys[r], kept):
                    values[t] += table[chosen]
        return values

    # --- attention of the later generations ---

    def attention(self, place: str, u: Array) -> Array:
        """Grouped attention; G3 and later add a bonus per key that the values determine."""
        S = len(u)
        Nq = self.config["num_attention_heads"]
        Nkv = self.config.get("num_key_value_heads") or Nq
        D = self.config.get("head_dim") or self.config["hidden_size"] // Nq
        q = self.linear(f"{place}q_proj", u).reshape(S, Nq, D)
        k = self.linear(f"{place}k_proj", u).reshape(S, Nkv, D)
        v = self.linear(f"{place}v_proj", u).reshape(S, Nkv, D)
        if self.generation == "g4":
            q, k = self.norm(f"{place}q_norm.weight", q), self.norm(f"{place}k_norm.weight", k)
        bias = self.bias(place, v, Nq)  # [Nq, S, S]
        heads = []
        for a in range(Nq):
            g = a // (Nq // Nkv)  # query heads share a key/value head with their neighbours
            query, key = rotate(q[:, a], self.theta), rotate(k[:, g], self.theta)
            heads.append(self.attend(query, key, v[:, g], bias[a]))
        return self.linear(f"{place}o_proj", np.concatenate(heads, axis=1))

    def bias(self, place: str, v: Array, Nq: int) -> Array:
        """[Nq, S, S], added to the attention scores, from the values [S, Nkv, D]."""
        S, Nkv, _ = v.shape
        G = Nq // Nkv
        A = self.tensor(f"{place}A")
        if self.generation in ("g2_first", "g2"):
            v = np.repeat(v, G, axis=1)  # dt_proj reads the values as the query heads see them
        dt = self.linear(f"{place}dt_proj", v.reshape(S, -1))  # [S, N]
        beta = np.exp(A * softplus(dt)).T  # [N, S]
        visible = causal(S)
        if self.generation in ("g2_first", "g2"):
            # A threshold, and no bonus. It hides nothing as long as no A is negative.
            return np.stack([hide(np.zeros((S, S), v.dtype), visible & (b >= 1)) for b in beta])
        every = [hide(np.broadcast_to(b, (S, S)), visible) for b in beta]
        if self.generation in ("g4", "g4h"):
            every = [self.best(rows) for rows in every]
        # G4 has scores per key/value head, which its query heads share.
        return np.stack(every if len(every) == Nq else [every[a // G] for a in range(Nq)])

    def best(self, bias: Array) -> Array:
        """[S, S] with only the W largest of each row left, of equal ones the lower slots."""
        S, W = len(bias), self.config.get("keep_window_size", 2048)
        if S <= W:
            return bias
        kept = np.zeros((S, S), bool)
        for i in range(S):
            kept[i, largest(bias[i], W)] = True
        return hide(bias, kept)

    # --- feed-forward ---

    def feed_forward(self, place: str, u: Array) -> Array:
        up = self.linear(f"{place}up_proj", u)
        if self.generation == "g1":
            shared = self.linear(f"{place}down_proj", silu(up))  # without a gate
            return shared + self.product_key_experts(place, u)
        shared = self.linear(f"{place}down_proj", silu(self.linear(f"{place}gate_proj", u)) * up)
        return shared + self.routed_experts(place, u) if self.config.get("is_moe") else shared

    def product_key_experts(self, place: str, u: Array) -> Array:
        """[S, H]: the seed's experts. A softmax for each head, weights are inside SiLU."""
        S = len(u)
        P = self.config["num_cdmmoe_heads"]
        picks = self.config["num_cdmmoe_experts_per_head"]
        keys = self.tensor(f"{place}keys")  # [P, n, 2, r_e/2]
        down = self.tensor(f"{place}down_embed.weight")
        up = self.tensor(f"{place}up_embed.weight")
        n = keys.shape[1]
        # The axis of the grid is slowest in the projection, then the head, then the channel.
        queries = self.linear(f"{place}queries", u).reshape(S, 2, P, keys.shape[3])
        y = np.zeros_like(u)
        for t in range(S):
            for a in range(P):
                axes = [keys[a, :, axis] @ queries[t, axis, a] for axis in (0, 1)]
                scores, experts = pick(axes[0], axes[1], picks, n)
                for weight, expert in zip(softmax(scores), experts, strict=True):
                    y[t] += silu((u[t] @ down[expert]) * weight) * up[expert]
        return y

    def routed_experts(self, place: str, u: Array) -> Array:
        """[S, H]: the experts of G3 and later. Weights are outside SiLU."""
        S = len(u)
        gate = self.linear(f"{place}router_gate", u)  # [S, 2n]
        down = self.tensor(f"{place}down_embed.weight")
        up = self.tensor(f"{place}up_embed.weight")
        n = math.isqrt(self.config["num_experts"])
        y = np.zeros_like(u)
        for t in range(S):
            if self.router == "mixed":
                x_scores = half(gate[t // 2], t % 2)
                y_scores = half(gate[(S + t) // 2], (S + t) % 2)
            else:
                x_scores, y_scores = half(gate[t], 0), half(gate[t], 1)
            scores, experts = pick(x_scores, y_scores, self.config["num_experts_per_tok"], n)
            weights = softmax(scores)
            if self.config.get("norm_topk_prob"):
                weights = weights / weights.sum()
            for weight, expert in zip(weights, experts, strict=True):
                y[t] += silu(u[t] @ down[expert]) * weight * up[expert]
        return y


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def softmax(x: Array) -> Array:
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def rotate(x: Array, theta: float) -> Array:
    """Rotary embedding of [S, D] at positions 0 to S - 1; halves, not pairs, are rotated."""
    S, D = x.shape
    frequencies = np.float32(theta) ** (-np.arange(0, D, 2, dtype=np.float32) / np.float32(D))
    angles = np.arange(S, dtype=np.float32)[:, None] * frequencies  # [S, D/2]
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    low, high = x[:, : D // 2], x[:, D // 2 :]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=1)


def causal(S: int) -> npt.NDArray[np.bool_]:
    return np.tri(S, dtype=bool)


def hide(bias: Array, visible: npt.NDArray[np.bool_]) -> Array:
    """The bias where visible; elsewhere the most negative finite number, in its place."""
    return np.where(visible, bias, np.finfo(bias.dtype).min)


def largest(values: Array, count: int) -> Ids:
    """Indices of the `count` largest, largest first, of equal ones the lower index first."""
    return np.argsort(-values, kind="stable")[:count]


def half(row: Array, number: int) -> Array:
    return row[: len(row) // 2] if number == 0 else row[len(row) // 2 :]


def pick(x_scores: Array, y_scores: Array, picks: int, n: int) -> tuple[Array, Ids]:
    """Scores and numbers of the best experts of the n x n grid; expert (i, j) is i * n + j."""
    xs, ys = largest(x_scores, min(picks, n)), largest(y_scores, min(picks, n))
    scores = (x_scores[xs][:, None] + y_scores[ys]).reshape(-1)
    experts = (xs[:, None] * n + ys).reshape(-1)
    chosen = largest(scores, picks)
    return scores[chosen], experts[chosen]
