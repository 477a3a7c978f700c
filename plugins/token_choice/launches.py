"""How the kernel that chooses tokens is compiled and launched. No Triton, no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from plugins.kernel_spec import POINTER_ALIGNMENT, TRITON_TYPES, KernelSpec, Launch
from plugins.launch_arguments import checked_addresses, checked_batch
from plugins.projection.launches import Activation, TokenType
from plugins.projection.matrix import (
    MAX_BATCH,
    ceil_div,
    column_problems,
    format_label,
    kernel_format,
    power_of_two,
    scale_type,
    weight_type,
)
from plugins.projection.packing import WeightFormat

# What a row of the parameter block holds, in order; the names of `runtime.sampling.SamplingParams`.
PARAMETERS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
)
# What a token of the prompt, and each time that a token was generated, adds to the count table.
IN_PROMPT = 1
GENERATED = 2

Bias = Literal["none", "shared", "rows"]

_TOKEN_TYPES = {"int32": "i32", "int64": "i64"}
_TOKENS_AT_ONCE = 4096
_TOKENS_OF_WARP = 128
_EMBEDDING_AT_ONCE = 1024
_MAX_WARPS = 32
_MAX_VOCABULARY = 1 << 24  # a float32 counts so far


@dataclass(frozen=True, kw_only=True)
class TokenChoice:
    """The next tokens by the rules of docs/sampling.md, and the end of a step.

    What differs between requests is memory of the device: one captured graph serves all whose bias
    and penalties this variant covers.

    Attributes:
        vocab_size: V.
        columns: H, of the embedding table; 0 without one.
        embedding: how the embedding table [V, H] is stored, whose row of the token becomes the next
            step's x; None writes none.
        activation: type of the next x.
        token: type of the tokens.
        bias: what is added to the logits: nothing, one row for all sequences, or a row for each.
        history: count tokens, for the penalties of repetition, presence and frequency. Without it
            those parameters are not read.
        stop_ids: most ids that cannot be picked before `min_tokens` steps.
        ring: steps whose tokens the ring holds.
        uniforms: steps whose uniform numbers the ring of them holds.
        batch: most sequences of a launch.
    """

    vocab_size: int
    columns: int = 0
    embedding: WeightFormat | None = None
    activation: Activation = "float32"
    token: TokenType = "int64"
    bias: Bias = "none"
    history: bool = False
    stop_ids: int = 0
    ring: int = 64
    uniforms: int = 64
    batch: int = 1

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.vocab_size <= _MAX_VOCABULARY:
            problems.append(f"{self.vocab_size} tokens, expected 1 to {_MAX_VOCABULARY}")
        if self.activation not in TRITON_TYPES:
            problems.append(f"unknown activation {self.activation!r}")
        if self.token not in _TOKEN_TYPES:
            problems.append(f"unknown token {self.token!r}")
        if self.bias not in get_args(Bias):
            problems.append(f"unknown bias {self.bias!r}")
        if self.embedding is not None:
            problems += column_problems(self.columns, self.embedding)
        for name in ("ring", "uniforms"):
            if getattr(self, name) < 1:
                problems.append(f"{name} of {getattr(self, name)} steps, expected at least 1")
        if self.stop_ids < 0:
            problems.append(f"{self.stop_ids} stop ids, expected 0 or more")
        if not 1 <= self.batch <= MAX_BATCH:
            problems.append(f"a batch of {self.batch}, expected 1 to {MAX_BATCH}")
        if problems:
            raise ValueError(f"no kernel covers this choice: {'; '.join(problems)}")

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory of a launch; what it holds is arbitrary."""
        return 2 * self._array_bytes

    @property
    def counters(self) -> int:
        """How many int32 counters it needs: zero before the first launch, and after each."""
        return 1

    @cached_property
    def spec(self) -> KernelSpec:
        """The variant of the kernel."""
        type_ = TRITON_TYPES[self.activation]
        table = self.embedding or WeightFormat(kind="float32")
        block = min(power_of_two(self.vocab_size), _TOKENS_AT_ONCE)
        embed = f"embed_{type_}_{format_label(table)}_{self.columns}"
        parts = [
            f"choose-{self.vocab_size}",
            self.token,
            *([f"bias_{self.bias}"] if self.bias != "none" else []),
            *(["history"] if self.history else []),
            *([f"stops{self.stop_ids}"] if self.stop_ids else []),
            f"ring{self.ring}uniforms{self.uniforms}by{self.batch}",
            *([embed] if self.embedding else []),
        ]
        token_type = f"*{_TOKEN_TYPES[self.token]}"
        return KernelSpec(
            name="-".join(parts),
            function="plugins.token_choice.kernel:choose_tokens",
            arguments={
                "logits": "*fp32",
                "bias": "*fp32",
                "counts": "*i32",
                "stop_ids": "*i32",
                "parameters": "*fp32",
                "uniforms": "*fp32",
                "embedding": weight_type(table),
                "embedding_scales": scale_type(table),
                "images": "*i32",
                "masses": "*fp32",
                "arrivals": "*i32",
                "tokens": token_type,
                "next_x": f"*{type_ if self.embedding else 'fp32'}",
                "positions": "*i64",
                "ring": token_type,
                "step": "*i32",
                "last_slot": "i32",
                "vocab_size": "i32",
            },
            constants={
                "V": self.vocab_size,
                "BIAS": self.bias,
                "HISTORY": self.history,
                "STOPS": self.stop_ids,
                "UNIFORMS": self.uniforms,
                "RING": self.ring,
                "RING_ROW": self.batch,
                "COLUMNS": self.columns if self.embedding else 0,
                "EMBEDDING": kernel_format(self.embedding) if self.embedding else "none",
                "EMBEDDING_GROUP": table.group,
                "BLOCK": block,
                "BLOCK_EMBEDDING": min(power_of_two(max(self.columns, 1)), _EMBEDDING_AT_ONCE)
                if self.embedding
                else 1,
            },
            grid=("batch", "1", "1"),
            divisible=() if self.vocab_size % 16 else ("vocab_size",),
            num_warps=min(max(block // _TOKENS_OF_WARP, 1), _MAX_WARPS),
        )

    def launch(
        self,
        *,
        batch: int,
        logits: int,
        parameters: int,
        uniforms: int,
        tokens: int,
        positions: int,
        ring: int,
        step: int,
        last_slot: int,
        workspace: int,
        counters: int,
        bias: int = 0,
        counts: int = 0,
        stop_ids: int = 0,
        embedding: int = 0,
        embedding_scales: int = 0,
        next_x: int = 0,
    ) -> Launch:
        """Run it once.

        Args:
            batch: B sequences.
            logits: address of [B, V] float32.
            parameters: address of [B, 8] float32: `PARAMETERS` in order. Of `min_tokens` it is the
                step before which stop ids cannot be picked.
            uniforms: address of [uniforms, batch], the choice's own numbers, float32 in [0, 1); row
                step mod uniforms is read.
            tokens: address of [B]; -1 is written where no token can be picked: a logit is NaN or
                infinite, or every token is forbidden.
            positions: address of [B] int64; 1 is added.
            ring: address of [ring, batch], the choice's own numbers, in the tokens' type; row
                step mod ring gets the tokens.
            step: address of [1] int32, not negative; 1 is added.
            last_slot: what no position exceeds.
            workspace: address of `workspace_bytes` of scratch memory.
            counters: address of the counter.
            bias: address of [V] or [B, V] float32.
            counts: address of [B, V] int32: `IN_PROMPT` for a token of the prompt plus `GENERATED`
                for each time that it was generated, which the launch adds.
            stop_ids: address of [stop_ids] int32; -1 stands for none.
            embedding: address of the packed embedding table.
            embedding_scales: address of its scales.
            next_x: address of [B, H].

        Raises:
            ValueError: a larger batch than the choice was made for, or an address that is missing
                or that it has no use for.
        """
        checked_batch(batch, self.batch)
        table = self.embedding
        needed = {
            "logits": (logits, True),
            "bias": (bias, self.bias != "none"),
            "counts": (counts, self.history),
            "stop_ids": (stop_ids, self.stop_ids > 0),
            "parameters": (parameters, True),
            "uniforms": (uniforms, True),
            "embedding": (embedding, table is not None),
            "embedding_scales": (
                embedding_scales, table is not None and table.kind in ("int8", "int4")
            ),
            "images": (workspace, True),
            "arrivals": (counters, True),
            "tokens": (tokens, True),
            "next_x": (next_x, table is not None),
            "positions": (positions, True),
            "ring": (ring, True),
            "step": (step, True),
        }  # fmt: skip
        return Launch(
            kernel=self.spec.name,
            sizes={"batch": batch},
            arguments={
                **checked_addresses(self.spec.name, needed),
                "masses": workspace + self._array_bytes,
                "last_slot": last_slot,
                "vocab_size": self.vocab_size,
            },
        )

    @property
    def _array_bytes(self) -> int:
        return ceil_div(4 * self.batch * self.vocab_size, POINTER_ALIGNMENT) * POINTER_ALIGNMENT
