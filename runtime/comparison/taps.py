"""Which values of a step are compared, in which order, and what they are called.

To the named values of the contract come what a cache holds and two choices: the keys that a window
keeps and the experts that a router picks. Choices are no values of any graph; they are derived
from the scores by the ops' own rules (`runtime.comparison.choices`), so every rung that gives the
scores gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.config import DogeConfig
from model.contract import layer_taps
from model.generations.generation import Generation

LOGITS, TOKEN = "logits", "token"
CHOICES = {"kept_keys": "score", "experts": "router_scores"}
CACHED = {"cached_key": "key", "cached_value": "value", "cached_score": "score"}

# What the value of a kind is computed by, for a reader who looks for the fault.
COMPUTED_BY = {
    "embedding": "the embedding table",
    "attention_norm": "the norm in front of attention",
    "value": "v_proj (in the seed: retrieval of values)",
    "score": "dt_proj, A and the exponential behind them",
    "query": "q_proj, its norm and the rotation",
    "key": "k_proj, its norm and the rotation",
    "cached_key": "the cache of keys, written in this step or before",
    "cached_value": "the cache of values, written in this step or before",
    "cached_score": "the cache of mask scores, written in this step or before",
    "kept_keys": "the selection of keys by mask score",
    "attention_output": "attention (mask, softmax, weighted sum) or o_proj",
    "attention_residual": "the residual sum around attention",
    "mlp_norm": "the norm in front of the feed-forward block",
    "router_scores": "the router's projection",
    "experts": "the choice of experts by router score",
    "expert_output": "expert gather: which experts, their weights or their rows",
    "mlp_output": "the shared feed-forward projections",
    "output": "the residual sum around the feed-forward block",
    "final_norm": "the last norm",
    LOGITS: "the head",
    TOKEN: "the greedy choice of a token",
}


@dataclass(frozen=True)
class TapName:
    """A tap's name in parts.

    Attributes:
        name: as in the contract, e.g. `layers.3.key`.
        layer: its layer, None outside the layers.
        kind: the part behind the layer, a key of `COMPUTED_BY`.
    """

    name: str
    layer: int | None
    kind: str

    @classmethod
    def parse(cls, name: str) -> TapName:
        """Take a name apart."""
        first, _, rest = name.partition(".")
        if first != "layers":
            return cls(name, None, name)
        number, _, kind = rest.partition(".")
        return cls(name, int(number), kind)


def comparison_taps(
    config: DogeConfig, generation: Generation, *, selects: bool
) -> tuple[TapName, ...]:
    """Every tap of a model in the order in which it is computed.

    Args:
        config: the architecture.
        generation: decides which values there are.
        selects: whether a window can drop keys (the cache has more slots than the window).
    """
    taps: list[TapName] = []
    kinds = ("key", "value", "score") if generation.score_heads else ("key", "value")
    for name in layer_taps(config, generation):
        tap = TapName.parse(name)
        prefix = f"layers.{tap.layer}"
        taps.append(tap)
        if tap.kind == "key":
            taps += [TapName.parse(f"{prefix}.cached_{kind}") for kind in kinds]
            if selects and generation.score_heads:
                taps.append(TapName.parse(f"{prefix}.kept_keys"))
        if tap.kind == "router_scores":
            taps.append(TapName.parse(f"{prefix}.experts"))
    return (*taps, TapName.parse(LOGITS), TapName.parse(TOKEN))


def select_taps(taps: Sequence[TapName], wanted: str) -> tuple[TapName, ...]:
    """Those of the taps that `--taps` asks for.

    Args:
        taps: all there are.
        wanted: `all`, or names and kinds separated by commas: `layers.1.key`, or `key` for that of
            every layer.

    Raises:
        ValueError: something that names no tap; lists the kinds.
    """
    if wanted == "all":
        return tuple(taps)
    asked = [part.strip() for part in wanted.split(",") if part.strip()]
    known = {tap.name for tap in taps} | {tap.kind for tap in taps}
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        kinds = ", ".join(dict.fromkeys(tap.kind for tap in taps))
        raise ValueError(
            f"this model has no tap {', '.join(unknown) or repr(wanted)}; give `all`, names such "
            f"as layers.0.output, or kinds: {kinds}"
        )
    return tuple(tap for tap in taps if tap.name in asked or tap.kind in asked)


def sources_of(taps: Sequence[TapName]) -> tuple[str, ...]:
    """Names of the values from which these taps are made, in order; choices come from scores."""
    names = []
    for tap in taps:
        kind = CHOICES.get(tap.kind, tap.kind)
        if kind in CACHED or kind in (LOGITS, TOKEN):
            continue
        names.append(kind if tap.layer is None else f"layers.{tap.layer}.{kind}")
    return tuple(dict.fromkeys(names))
