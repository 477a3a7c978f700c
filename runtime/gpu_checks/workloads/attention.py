"""Dynamic mask attention: decode steps and prompts, with a cache that is empty, part full, full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from runtime.backends.base import Limits
from runtime.gpu_checks.number_formats import Array
from runtime.gpu_checks.workloads.workload import (
    AWKWARD_TOKENS,
    PROMPT_TOKENS,
    Case,
    item_bytes,
    stored_bytes,
)
from runtime.kernel_library import OpUse

# Several tokens at once that decode kernels still take.
_FEW_TOKENS = 5
# What stands in slots that no query sees: large, so that a kernel that looks at it is found out.
_UNSEEN_FACTOR = 100.0
_UNSEEN_SCORE = 4.0


class AttentionWorkload:
    """Scores are distinct where the type has numbers enough, so selection has one right answer.

    They lie within ±1: with a window the keys that must be dropped have half of the weight, so a
    wrong selection is far out of tolerance.

    Attributes:
        tables: none.
    """

    tables = ()

    def cases(self, use: OpUse, limits: Limits) -> list[Case]:
        """Alone and in the largest batch; the cache has every slot of the bundle."""
        found: dict[tuple[object, ...], Case] = {}
        for label, B, S, filled in _sizes(limits):
            case = Case(label=label, shapes=_shapes(use, limits, B, S), filled=filled)
            found.setdefault((B, S, filled if limits.max_seq_len > S else "empty"), case)
        return list(found.values())

    def inputs(self, use: OpUse, case: Case, random: np.random.Generator) -> dict[str, Array]:
        """Everything random; what no query sees is made to stand out.

        Returns:
            query [B, Nq, S, D], key and value [B, Nkv, C, D], score [B or 1, N, C, 1], and
            write_index [B].
        """
        B, _, S, _ = case.shapes["query"]
        C = case.shapes["key"][2]
        write_index = _write_index(case.filled, B, C - S, random)
        unseen = np.arange(C) >= (write_index + S)[:, None]  # [B, C]
        factor = np.where(unseen, _UNSEEN_FACTOR, 1.0)[:, None, :, None]
        score = _distinct(case.shapes["score"], random)
        if len(score) == B:
            score = score + np.where(unseen, _UNSEEN_SCORE, 0.0)[:, None, :, None]
        return {
            "query": random.standard_normal(case.shapes["query"]),
            "key": random.standard_normal(case.shapes["key"]) * factor,
            "value": random.standard_normal(case.shapes["value"]) * factor,
            "score": score,
            "write_index": write_index,
        }

    def other_picks(self, use: OpUse, case: Case, random: np.random.Generator) -> dict[str, Array]:
        """Nothing: there are no tables."""
        return {}

    def moved_bytes(self, use: OpUse, case: Case, inputs: Mapping[str, Array]) -> int:
        """The query, the result, scores of visible slots, keys and values of slots that count.

        A single query needs the keys that its window keeps; of several, together, all are taken to
        be needed.
        """
        S = case.shapes["query"][2]
        Nkv, D = case.shapes["key"][1], case.shapes["key"][3]
        rows, N = case.shapes["score"][:2]
        visible = np.asarray(inputs["write_index"]) + S  # [B]
        window = int(use.attributes["keep_window_size"])
        read = np.minimum(visible, window) if window and S == 1 else visible
        scored = visible.sum() if rows == len(visible) else visible.max()
        cached = int(read.sum()) * Nkv * D * 2 * item_bytes(use.dtypes["key"])
        scores = int(scored) * N * item_bytes(use.dtypes["score"])
        return (
            cached + scores + stored_bytes(use, case, ("query", "write_index", "attention_output"))
        )


def _sizes(limits: Limits) -> Iterator[tuple[str, int, int, str]]:
    """Label, B, S and how much of the cache is filled before."""
    batch, longest = limits.max_batch_size, min(limits.max_input_len, PROMPT_TOKENS)
    awkward, few = min(AWKWARD_TOKENS, longest), min(_FEW_TOKENS, longest)
    yield "decode, cache full", 1, 1, "full"
    yield "decode, cache part full", 1, 1, "part"
    yield "decode, cache empty", 1, 1, "empty"
    yield f"decode, batch of {batch}", batch, 1, "mixed"
    yield f"{few} tokens, batch of {batch}", batch, few, "mixed"
    yield f"prompt of {longest}", 1, longest, "empty"
    yield f"prompt of {awkward} behind a cache, batch of {batch}", batch, awkward, "mixed"


def _shapes(use: OpUse, limits: Limits, B: int, S: int) -> dict[str, tuple[int, ...]]:
    _, Nq, _, D = use.shapes["query"]
    _, Nkv, C, _ = use.shapes["key"]
    rows, N = use.shapes["score"][:2]
    slots = limits.max_seq_len if C < 0 else C
    return {
        "query": (B, Nq, S, D),
        "key": (B, Nkv, slots, D),
        "value": (B, Nkv, slots, D),
        "score": (1 if rows == 1 else B, N, slots, 1),
        "write_index": (B,),
        "attention_output": (B, S, Nq * D),
    }


def _write_index(filled: str, B: int, most: int, random: np.random.Generator) -> Array:
    """[B] int64 slots that are filled, at most `most`."""
    if filled in ("empty", "full"):
        return np.full(B, 0 if filled == "empty" else most, np.int64)
    least = min(1, most)
    index = random.integers(least, max(most, least + 1), B)  # neither empty nor full
    if filled == "mixed":
        index[0], index[-1] = 0, most
    return index.astype(np.int64)


def _distinct(shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """Scores of each row and head: all different, evenly spread between -1 and 1."""
    slots = shape[2]
    step = 2.0 ** -np.ceil(np.log2(max(slots / 2, 1)))  # a power of two: exact in few bits
    places = np.broadcast_to(np.arange(slots), (*shape[:2], slots))
    levels = random.permuted(places, axis=-1) - slots // 2
    scores: Array = (levels * step)[..., None]
    return scores
