"""How several decode steps are put into one launch. No CUDA, no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from plugins.kernel_spec import MOST_PROCESSORS, KernelSpec, Launch
from plugins.projection.packing import WeightFormat, WeightKind

SOURCE = "plugins/persistent_step/persistent_step.cu"
# A block has a multiprocessor to itself: a barrier is the faster the fewer blocks arrive.
GRID = ("processors", "1", "1")
# With more, a thread has too few registers.
_WARPS = 12
# Each block joins the shares of all heads by itself, a lane a share.
_MAX_SPLITS = 32
# A share of fewer keys costs more to join than to read.
_SHARE_STEP = 16
# Of what a phase asks for ahead; more could drive out what the next one needs.
_PREFETCH_BYTES = 4 << 20
# A lane's part of the widest row stays in registers; wider ones spill.
_MOST_COLUMNS = 1024
_SHARED_LIMIT = 48 * 1024
_KINDS: tuple[WeightKind, ...] = ("float32", "float16", "bfloat16", "int8", "int4")
_POINTED = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "i8", "int4": "u8"}
_FLOAT32, _INT64 = 4, 8
_GLOBALS = {"cos": "cos", "sin": "sin", "final_norm": "norm"}
_LAYER_VECTORS = ("input_norm", "mlp_norm", "input_residual", "mlp_residual")
_LAYER_MATRICES = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, kw_only=True)
class PersistentStep:
    """The kernel for one model: steps of a single sequence that take the largest logit's token.

    Attributes:
        layers: L.
        hidden: H.
        inner: I.
        query_heads: Nq.
        key_heads: Nkv.
        score_heads: N, mask scores of a key.
        head_size: D.
        vocab_size: V.
        qk_norm: norm queries and keys per head.
        projection: how a projection of so many columns is stored.
        table: how embedding and head are stored.
        floats: type of cached keys and values, and of what mask scores are computed from.
        ring: tokens that stay on the device.
    """

    layers: int
    hidden: int
    inner: int
    query_heads: int
    key_heads: int
    score_heads: int
    head_size: int
    vocab_size: int
    qk_norm: bool
    projection: Callable[[int], WeightFormat]
    table: WeightFormat
    floats: WeightKind
    ring: int

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ValueError(f"no persistent kernel covers this model: {'; '.join(problems)}")

    @cached_property
    def spec(self) -> KernelSpec:
        """The kernel of the steps."""
        pointers = {
            "cos": "fp32", "sin": "fp32", "final_norm": "fp32",
            "embedding_weights": self._pointed(self.table), "embedding_scales": "fp32",
            "head_weights": self._pointed(self.table), "head_scales": "fp32",
        }  # fmt: skip
        layer = {
            "input_norm": "fp32",
            **self._matrix("qkv", self.hidden),
            "score_weights": _POINTED[self.floats],
            "query_norm": "fp32", "key_norm": "fp32", "A": "fp32",
            **self._matrix("o", self.attended),
            "input_residual": "fp32", "mlp_norm": "fp32",
            **self._matrix("gate_up", self.hidden),
            **self._matrix("down", self.inner),
            "mlp_residual": "fp32",
            "key": _POINTED[self.floats], "value": _POINTED[self.floats], "score": "fp32",
        }  # fmt: skip
        memory = {
            "tokens": "i64", "positions": "i64", "ring": "i64", "step": "i32",
            "x": "fp32", "rows": "fp32", "inner": "fp32",
            "partial_values": "fp32", "partial_masses": "fp32", "best_keys": "i64",
            "chosen": "i64", "barrier": "i32",
        }  # fmt: skip
        numbers = {
            "weight_stride": "i64", "cache_stride": "i64", "slots": "i32", "last_slot": "i32",
            "steps": "i32", "scale": "fp32", "eps": "fp32",
        }  # fmt: skip
        pointed = {name: f"*{kind}" for name, kind in (pointers | layer | memory).items()}
        return self._spec("persistent_step", pointed | numbers)

    @cached_property
    def barrier_spec(self) -> KernelSpec:
        """A kernel of nothing but barriers, in the same grid."""
        return self._spec(
            "grid_barriers", {"barrier": "*i32", "count": "i32"}, {"BARRIERS_ALONE": 1}
        )

    @property
    def attended(self) -> int:
        """Nq·D."""
        return self.query_heads * self.head_size

    def areas(self, tokens: int) -> dict[str, int]:
        """Bytes of the memory that is the kernel's own, by argument.

        `barrier` is zero before the first launch and nobody else's; the rest may hold anything.

        Args:
            tokens: of one launch, at most.
        """
        shares = self.query_heads * _MAX_SPLITS
        return {
            "partial_values": shares * self.head_size * _FLOAT32,
            "partial_masses": shares * 2 * _FLOAT32,
            "best_keys": MOST_PROCESSORS * _INT64,
            "chosen": tokens * _INT64,
            "barrier": 4,
        }

    def launch(
        self,
        *,
        weight: Callable[[str], int],
        cache: Callable[[int, str], int],
        area: Callable[[str], int],
        slots: int,
        last_slot: int,
        steps: int,
        eps: float,
        tied: bool,
    ) -> Launch:
        """So many steps.

        Args:
            weight: address of a stored tensor; 0 for one that the model does not have.
            cache: address of a layer's cached `key`, `value` or `score` of the sequence.
            area: address of `tokens`, `positions`, `ring`, `step`, `x`, `rows` and `inner`, as a
                step has them, and of the kernel's own.
            slots: C.
            last_slot: where the last token of a sequence is cached.
            steps: how many; all of them find room in the cache.
            eps: of the norms.
            tied: whether the head is the embedding table.

        Raises:
            ValueError: layers that do not lie at equal distances.
        """
        head = "embedding" if tied else "head"
        places = {name: weight(tensor) for name, tensor in _GLOBALS.items()}
        for name, tensor in (("embedding", "embedding"), ("head", head)):
            places |= {f"{name}_{part}": weight(f"{tensor}.{part}") for part in _PARTS}
        tensors = {name: name for name in (*_LAYER_VECTORS, "A", "query_norm", "key_norm")}
        tensors["score_weights"] = "score.weights"
        for name in _LAYER_MATRICES:
            tensors |= {f"{name}_{part}": f"{name}.{part}" for part in _PARTS}
        rows = [
            {name: weight(f"layers.{layer}.{tensor}") for name, tensor in tensors.items()}
            for layer in range(self.layers)
        ]
        caches = [
            {kind: cache(layer, kind) for kind in ("key", "value", "score")}
            for layer in range(self.layers)
        ]
        own = {name: area(name) for name in (*_STEP_AREAS, *self.areas(steps))}
        return Launch(
            kernel=self.spec.name,
            sizes={},
            arguments={
                **places, **rows[0], **caches[0], **own,
                "weight_stride": _stride(rows), "cache_stride": _stride(caches),
                "slots": slots, "last_slot": last_slot, "steps": steps,
                "scale": float(self.head_size**-0.5), "eps": eps,
            },
        )  # fmt: skip

    def barrier_launch(self, *, barrier: int, count: int) -> Launch:
        """So many barriers.

        Args:
            barrier: address of the word that steps have too.
            count: how many.
        """
        return Launch(
            kernel=self.barrier_spec.name, sizes={}, arguments={"barrier": barrier, "count": count}
        )

    @property
    def constants(self) -> dict[str, int]:
        """The macros of the source."""
        return {
            "LAYERS": self.layers,
            "HIDDEN": self.hidden,
            "INNER": self.inner,
            "QUERY_HEADS": self.query_heads,
            "KEY_HEADS": self.key_heads,
            "SCORE_HEADS": self.score_heads,
            "HEAD_SIZE": self.head_size,
            "VOCAB": self.vocab_size,
            "QK_NORM": int(self.qk_norm),
            "PROJECTION_KIND": _KINDS.index(self.projection(self.hidden).kind),
            "TABLE_KIND": _KINDS.index(self.table.kind),
            "FLOAT_KIND": _KINDS.index(self.floats),
            "HIDDEN_GROUP": self.projection(self.hidden).group,
            "ATTENDED_GROUP": self.projection(self.attended).group,
            "INNER_GROUP": self.projection(self.inner).group,
            "RING": self.ring,
            "THREADS": 32 * _WARPS,
            "MAX_SPLITS": _MAX_SPLITS,
            "SHARE_STEP": _SHARE_STEP,
            "PREFETCH_BYTES": _PREFETCH_BYTES,
        }

    def _spec(
        self, entry: str, arguments: Mapping[str, str], more: Mapping[str, int] | None = None
    ) -> KernelSpec:
        heads = f"d{self.head_size}-q{self.query_heads}-kv{self.key_heads}-n{self.score_heads}"
        kind = self.projection(self.hidden).kind
        return KernelSpec(
            name=f"{entry}-{kind}-l{self.layers}-h{self.hidden}-i{self.inner}-{heads}",
            function=f"{SOURCE}:{entry}",
            arguments=arguments,
            constants=self.constants | dict(more or {}),
            grid=GRID,
            num_warps=_WARPS,
        )

    def _matrix(self, name: str, columns: int) -> dict[str, str]:
        stored = self.projection(columns)
        scales = "fp16" if stored.kind == "int4" else "fp32"
        return {f"{name}_weights": self._pointed(stored), f"{name}_scales": scales}

    @staticmethod
    def _pointed(stored: WeightFormat) -> str:
        return _POINTED[stored.kind]

    def _problems(self) -> list[str]:
        problems = []
        widest = max(self.hidden, self.inner, self.attended)
        if widest > _MOST_COLUMNS:
            problems.append(f"a matrix of {widest} columns, expected at most {_MOST_COLUMNS}")
        if self.table.kind == "int4":
            problems.append("an embedding of 4 bits")
        if self.query_heads % self.key_heads or self.query_heads % self.score_heads:
            problems.append(
                f"{self.query_heads} query heads, expected a multiple of {self.key_heads} "
                f"key/value heads and of {self.score_heads} score heads"
            )
        if self.head_size % 8:
            problems.append(f"heads of {self.head_size} numbers, expected a multiple of 8")
        if not problems and self._shared_bytes > _SHARED_LIMIT:
            problems.append(f"{self._shared_bytes} bytes of shared memory a block")
        return problems

    @property
    def _shared_bytes(self) -> int:
        """Of the source's `Shared`, about."""
        group = self.query_heads // self.key_heads
        numbers = max(self.hidden, self.inner, self.attended) + self.query_heads * _MAX_SPLITS
        numbers += (group + 2) * self.head_size + _WARPS * (3 + group * (self.head_size + 2))
        return numbers * _FLOAT32


_PARTS = ("weights", "scales")
_STEP_AREAS = ("tokens", "positions", "ring", "step", "x", "rows", "inner")


def _stride(places: list[dict[str, int]]) -> int:
    """What lies between the addresses of one layer and of the next; 0 for one layer."""
    distances = {
        after[name] - before[name]
        for before, after in pairwise(places)
        for name in before
        if before[name] or after[name]
    }
    if len(distances) > 1:
        raise ValueError(
            f"layers lie at distances of {sorted(distances)[:4]} bytes, expected one distance"
        )
    return distances.pop() if distances else 0
