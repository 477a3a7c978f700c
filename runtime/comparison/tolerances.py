"""How far apart two rungs may be: of logits, and of every kind of tap. The one table."""

from __future__ import annotations

from runtime.comparison.taps import CHOICES
from runtime.manifest import Variant

# What two implementations of the same model may differ by, per precision of the coarser one. fp32:
# sums in another order through all layers, measured at 3e-5 at logits of size 30, with room for
# deeper models. Half precisions: 2^-11 and 2^-8 relative roundings carried through the layers.
# Weights or a cache of 8 and 4 bits are another model: measured on doge-tiny, logits of size 19,
# 0.26 and 2.4, so these bounds find what is broken and no more; the build judges their quality.
TOLERANCES: dict[str, tuple[float, float]] = {
    "fp32": (1e-3, 1e-4),
    "fp16": (5e-2, 1e-2),
    "bf16": (4e-1, 8e-2),
    "int8": (5e-1, 5e-2),
    "fp8": (1e0, 1e-1),  # weights of an engine alone: 0.75 (docs/engine_precisions.md)
    "int4": (3e0, 3e-1),
}


# How much higher the perplexity may be, by bits of a weight; builds are held to it as well. 16 bits
# may not lose more than 8 do.
PERPLEXITY_RISES = {16: 0.02, 8: 0.02, 4: 0.10}
# By which factor that of a text may rise: weights and caches of 8 and 4 bits are another model, of
# which single logits tell little.
PERPLEXITY_BOUNDS: dict[str, float] = {
    "int8": 1 + PERPLEXITY_RISES[8],
    "fp8": 1 + PERPLEXITY_RISES[8],
    "int4": 1 + PERPLEXITY_RISES[4],
}


def variant_tolerance(variant: Variant) -> tuple[float, float]:
    """The coarser of what a variant's weights and its cache may differ by, (atol, rtol).

    Raises:
        ValueError: a precision that no tolerance is known for.
    """
    cache = "int8" if variant.details.get("cache_dtype") == "int8" else variant.precision
    unknown = sorted({variant.precision, cache} - TOLERANCES.keys())
    if unknown:
        raise ValueError(
            f"no tolerance is known for {', '.join(unknown)}; name one by --atol and --rtol"
        )
    return max(TOLERANCES[variant.precision], TOLERANCES[cache])


# What a tap of one token may differ by, as a share of that token's largest number in the reference:
# some three times what was measured (docs/compare_tolerances.md), of kinds without a factor below.
# fp32: 6.5e-5 on the golden checkpoints, whose random weights amplify rounding where queries and
# keys have no norm; 1.3e-6 on doge-tiny. The others rest on doge-tiny, which is trained, up to
# where another choice parts a prompt: 2.2e-3, 1.4e-2, 2.6e-2 and 2.8e-1. There random weights tell
# nothing: they carry a rounding of 8 bits to errors as large as the numbers. Not measured: models
# of more than 4 layers at these precisions; a random walk of 36 would take the three times up.
TAP_TOLERANCES: dict[str, float] = {
    "fp32": 2e-4,
    "fp16": 7e-3,
    "bf16": 5e-2,
    "int8": 8e-2,
    "fp8": 2e-1,  # 5.8e-2 (docs/engine_precisions.md)
    "int4": 8e-1,
}
# By how much more a kind may differ than others do, and why.
KIND_FACTORS: dict[str, float] = {
    # A sum over all keys, whose weights carry the errors of their logits; fp32 1.5e-4.
    "attention_output": 2.0,
    # Small sums of large terms, K experts that cancel each other in part; fp32 1.3e-4, fp16 3.0e-3.
    "expert_output": 2.0,
    "mlp_output": 2.0,  # contains the experts'; fp32 1.1e-4, fp16 3.2e-3
    # An exponential of a product, of whose exponent relative errors are absolute here; no larger
    # than others on doge-tiny, 1.5 to 2.4 times their size at half precision on the golden ones.
    "score": 2.0,
    "cached_score": 2.0,  # likewise
    # A sum over a slot's numbers beside thrice their size, in which roundings cancel; fp32 2.6e-5.
    "cached_key": 0.4,
    "cached_value": 0.4,
}


def tap_tolerance(kind: str, precision: str) -> float:
    """The share of a token's largest number that a tap of `kind` may differ by.

    Raises:
        ValueError: a precision that no tolerance is known for.
    """
    if precision not in TAP_TOLERANCES:
        raise ValueError(
            f"no tolerance of taps is known for {precision}; there are {', '.join(TAP_TOLERANCES)}"
        )
    return TAP_TOLERANCES[precision] * KIND_FACTORS.get(CHOICES.get(kind, kind), 1.0)


def coarser(precisions: tuple[str, str]) -> str:
    """Of two precisions, the one that may differ by more."""
    return max(precisions, key=lambda name: TAP_TOLERANCES.get(name, 0.0))
