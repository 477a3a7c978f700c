"""The launches of a step of several tokens a sequence: a prompt, or a piece of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from plugins.expert_gather.launches import make_kernels as make_expert_kernels
from plugins.kernel_spec import POINTER_ALIGNMENT, KernelSpec, Launch, OpKernels
from plugins.projection.launches import Embedding
from plugins.projection.matrix import ceil_div
from plugins.prompt_projection.launches import GatherRows, PromptProjection
from plugins.row_norm.launches import RowNorm
from runtime.kernel_step.attention import StepAttention
from runtime.kernel_step.decode_step import seed_values, values_launch
from runtime.kernel_step.formats import StepFormats
from runtime.kernel_step.places import Places
from runtime.kernel_step.step_model import ExpertGrid, StepModel

_FLOAT32 = 4


class PromptStep:
    """The kernels of such steps.

    Attributes:
        model: its numbers.
        batch: most sequences.
        max_tokens: most tokens of all sequences together.
    """

    def __init__(self, model: StepModel, formats: StepFormats, batch: int, max_tokens: int) -> None:
        """Choose the kernels.

        Raises:
            ValueError: what no kernel covers.
        """
        self.model, self.batch, self.max_tokens = model, batch, max_tokens
        self._formats = formats
        H, attended = model.hidden, model.query_heads * model.head_size
        residual: Literal["residual", "scaled_residual"] = (
            "residual" if model.is_seed else "scaled_residual"
        )
        self._attention = StepAttention(model, formats)
        self._embedding = Embedding(
            columns=H, weights=formats.table, activation="float32", token="int64"
        )
        dot = formats.dot
        self._qkv = PromptProjection(
            rows=model.projected,
            columns=H,
            weights=formats.projection(H),
            input="float32",
            norm=True,
            eps=model.eps,
            output_stride=model.row_numbers,
            dot=dot,
        )
        self._score = self._small(model.score_heads, model.head_numbers, model.row_numbers)
        self._values = seed_values(model)
        inner = model.inner_values
        self._value_score = self._small(0 if inner is None else inner.score_rows)
        self._o = PromptProjection(
            rows=H,
            columns=attended,
            weights=formats.projection(attended),
            input="float32",
            epilogue=residual,
            dot=dot,
        )
        self._gate_up = PromptProjection(
            rows=model.gated_rows,
            columns=H,
            weights=formats.projection(H),
            input="float32",
            norm=True,
            eps=model.eps,
            epilogue="silu" if model.is_seed else "silu_product",
            dot=dot,
        )
        self._down = PromptProjection(
            rows=H,
            columns=model.inner,
            weights=formats.projection(model.inner),
            input="float32",
            epilogue=residual,
            addend=model.experts is not None,
            dot=dot,
        )
        self._router = self._row_norm = self._experts = None
        if model.experts is not None:
            # A router's rows are one matrix where prompts are cut as published, else one an axis.
            mixed = model.experts.router_mode == "mixed"
            if mixed and model.experts.num_keys % 4:
                raise ValueError(
                    f"{model.experts.num_keys} keys per axis with the router mode `mixed`, our "
                    "kernels take multiples of 4; build with --router per_token"
                )
            self._router = self._small(model.experts.router_rows // (1 if mixed else 2))
            self._row_norm = RowNorm(columns=H, eps=model.eps)
            self._experts = self._expert_kernels(model.experts)
        self._last_rows = GatherRows(columns=H)
        self._head = PromptProjection(
            rows=model.vocab_size,
            columns=H,
            weights=formats.table,
            input="float32",
            norm=True,
            eps=model.eps,
            dot=dot,
        )

    @property
    def specs(self) -> tuple[KernelSpec, ...]:
        """Every kernel that a step may launch."""
        ends = (self._embedding.spec, self._last_rows.spec, *self._head.specs)
        return (*ends, *self.layer_specs)

    @property
    def layer_specs(self) -> tuple[KernelSpec, ...]:
        """Every kernel of a layer."""
        projections = (
            self._qkv, self._score, self._value_score, self._o, self._gate_up, self._router,
            self._down,
        )  # fmt: skip
        singles = (self._values, self._row_norm)
        experts = () if self._experts is None else self._experts.specs
        return (
            *(spec for part in projections if part is not None for spec in part.specs),
            *(part.spec for part in singles if part is not None),
            *self._attention.prompt_specs,
            *experts,
        )

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory of the launch that needs most."""
        experts = 0
        if self._experts is not None:
            experts = self._experts.workspace_bytes(self._expert_shapes(self.max_tokens))
        return max(experts, *(self._attention.workspace_bytes(*sizes) for sizes in self._sizes))

    @property
    def counters(self) -> int:
        """int32 counters of the launch that needs most; zero before and after each."""
        experts = 0
        if self._experts is not None:
            experts = self._experts.counters(self._expert_shapes(self.max_tokens))
        return max(experts, *(self._attention.counters(*sizes) for sizes in self._sizes))

    @property
    def _sizes(self) -> tuple[tuple[int, int], ...]:
        """Sequences, and tokens of each, of the steps that need most."""
        return tuple((rows, self.max_tokens // rows) for rows in range(1, self.batch + 1))

    def launches(self, places: Places, batch: int, tokens: int, logits: int) -> tuple[Launch, ...]:
        """One step, in order; its logits are not computed (`logits_launch`).

        Args:
            places: addresses; `tokens` [B, S] and `positions` [B] hold the step's.
            batch: B sequences.
            tokens: S, of each.
            logits: how many rows of `x` the logits are asked of: `logits_index` [B·M] names them.
        """
        every = batch * tokens
        body = [
            launch
            for layer in range(self.model.layers)
            for launch in self.layer_launches(places, layer, batch, tokens)
        ]
        embed = self._embedding.launch(
            batch=every,
            tokens=places.area("tokens"),
            table=places.weight("embedding.weights"),
            scales=places.weight("embedding.scales"),
            output=places.area("x"),
        )
        last = self._last_rows.launch(
            rows=logits,
            x=places.area("x"),
            index=places.area("logits_index"),
            output=places.area("last"),
        )
        return (embed, *body, last)

    def logits_launch(self, places: Places, first: int, rows: int) -> Launch:
        """The logits [rows, V] of rows of `last` from `first` on, into `logits`."""
        head = "embedding" if self.model.tied else "head"
        return self._head.launch(
            tokens=rows,
            x=places.area("last") + first * self.model.hidden * _FLOAT32,
            norm=places.weight("norm"),
            weights=places.weight(f"{head}.weights"),
            scales=places.weight(f"{head}.scales"),
            output=places.area("logits"),
        )

    def layer_launches(
        self, places: Places, layer: int, batch: int, tokens: int
    ) -> Iterator[Launch]:
        """One layer, in order: from `x` to `x_out`."""
        area, every = places.area, batch * tokens

        def weight(name: str) -> int:
            return places.of_layer(layer, name)

        def project(
            kernel: PromptProjection, name: str, x: str, output: str, **more: int
        ) -> Launch:
            return kernel.launch(
                tokens=every,
                x=area(x),
                weights=weight(f"{name}.weights"),
                scales=weight(f"{name}.scales"),
                output=area(output),
                **more,
            )

        input_norm, mlp_norm = weight("input_norm"), weight("mlp_norm")
        yield project(self._qkv, "qkv", "x", "rows", norm=input_norm)
        if self._score is not None:
            yield project(self._score, "score", "x", "rows", norm=input_norm)
        if self._value_score is not None:
            yield project(self._value_score, "value_score", "x", "value_scores", norm=input_norm)
        if self._values is not None:
            yield values_launch(self._values, places, layer, every)
        yield from self._attention.prompt(places, layer, batch, tokens)
        residual = {"residual": area("x"), "residual_weight": weight("input_residual")}
        yield project(self._o, "o", "attended", "x_between", **residual)
        yield project(self._gate_up, "gate_up", "x_between", "inner", norm=mlp_norm)
        residual = {"residual": area("x_between"), "residual_weight": weight("mlp_residual")}
        if self.model.experts is not None:
            yield from self._expert_launches(places, layer, every)
            residual["addend"] = area("experts")
        yield project(self._down, "down", "inner", "x_out", **residual)

    def _expert_launches(self, places: Places, layer: int, tokens: int) -> Iterator[Launch]:
        """Route the tokens and add up their experts, into `experts`."""
        area, experts = places.area, self.model.experts
        assert experts is not None and self._router is not None
        assert self._row_norm is not None and self._experts is not None
        norm = places.of_layer(layer, "mlp_norm")
        yield self._row_norm.launch(
            tokens=tokens, x=area("x_between"), weight=norm, output=area("normed")
        )
        half = self._axis_bytes(tokens)
        matrix = places.of_layer(layer, "router.weights")
        axes = (0,) if experts.router_mode == "mixed" else (0, 1)
        for axis in axes:
            yield self._router.launch(
                tokens=tokens,
                x=area("x_between"),
                norm=norm,
                weights=matrix
                + axis * self._router.rows * self._router.columns * self._small_bytes,
                output=area("router") + axis * half,
            )
        # The numbers of all tokens, cut in the middle: as published where one matrix gave them.
        addresses = {
            "hidden": area("normed"),
            "scores_x": area("router"),
            "scores_y": area("router") + half,
            "down": places.of_layer(layer, "expert_down"),
            "up": places.of_layer(layer, "expert_up"),
            "expert_output": area("experts"),
        }
        yield from self._experts.launches(
            self._expert_shapes(tokens), addresses, area("workspace"), area("counters")
        )

    def _axis_bytes(self, tokens: int) -> int:
        """Bytes from the router scores of one axis to those of the other."""
        experts = self.model.experts
        assert experts is not None
        size = tokens * experts.router_rows // 2 * _FLOAT32
        if experts.router_mode == "mixed":
            return size
        return ceil_div(size, POINTER_ALIGNMENT) * POINTER_ALIGNMENT

    @property
    def _small_bytes(self) -> int:
        return self._formats.small.bits // 8

    def _small(self, rows: int, offset: int = 0, stride: int = 0) -> PromptProjection | None:
        """A small matrix times the normed stream; None for one without rows."""
        if not rows:
            return None
        # Few products, which decide a choice: their inputs are not rounded.
        return PromptProjection(
            rows=rows,
            columns=self.model.hidden,
            weights=self._formats.small,
            input="float32",
            norm=True,
            eps=self.model.eps,
            output_offset=offset,
            output_stride=stride,
            dot="float32",
        )

    def _expert_kernels(self, experts: ExpertGrid) -> OpKernels:
        dtypes = {
            "hidden": "float32",
            "scores_x": "float32",
            "scores_y": "float32",
            "down": self._formats.float_kind,
            "up": self._formats.float_kind,
            "expert_output": "float32",
        }
        attributes = {
            "top_k": experts.top_k,
            "weight_inside": int(experts.weight_inside),
            "normalize": int(experts.normalize),
        }
        return make_expert_kernels(attributes, self._expert_shapes(-1), dtypes)

    def _expert_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        experts = self.model.experts
        assert experts is not None
        scores = (tokens, experts.heads, experts.num_keys)
        table = (experts.count, self.model.hidden)
        return {
            "hidden": (tokens, self.model.hidden),
            "scores_x": scores,
            "scores_y": scores,
            "down": table,
            "up": table,
            "expert_output": (tokens, self.model.hidden),
        }
