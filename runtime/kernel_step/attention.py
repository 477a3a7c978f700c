"""The attention of a step: from a token's row to what the output projection reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plugins.dynamic_mask_attention.launches import plan_decode
from plugins.dynamic_mask_attention.step_launches import (
    StepAppend,
    make_step_attention,
    make_step_attention_spec,
)
from plugins.kernel_spec import KernelSpec, Launch
from runtime.kernel_step.formats import StepFormats
from runtime.kernel_step.places import Places
from runtime.kernel_step.step_model import StepModel


class StepAttention:
    """The kernels of one model's attention, for one token a sequence and for prompts.

    Where no key can be dropped, a step of one token takes one launch. Otherwise the new key must be
    in the cache before it is known which keys stay, and it takes three, as a prompt does.
    """

    def __init__(self, model: StepModel, formats: StepFormats) -> None:
        """Choose the kernels.

        Raises:
            ValueError: what no kernel covers.
        """
        self._model = model
        heads: dict[str, Any] = {
            "query_heads": model.query_heads,
            "key_heads": model.key_heads,
            "score_heads": model.bias_heads,
            "head_size": model.head_size,
        }
        types: dict[str, Any] = {"dtype": formats.float_kind, "score_dtype": "float32"}
        options: dict[str, Any] = {
            "qk_norm": model.qk_norm,
            "rotate_query": True,
            "rotate_key": model.rotates_keys,
            "computes_score": model.score_heads > 0,
        }
        self._append = StepAppend(**heads, **types, row_dtype="float32", eps=model.eps, **options)
        self._attend = make_step_attention(
            **heads,
            **types,
            output_dtype="float32",
            scale=self._scale,
            keep_window_size=model.keep_window_size,
        )
        self._step: KernelSpec | None = None
        if not model.keep_window_size:
            self._step = make_step_attention_spec(
                **heads, **types, row_dtype="float32", output_dtype="float32", **options
            )

    @property
    def decode_specs(self) -> tuple[KernelSpec, ...]:
        """Every kernel of a step of one token."""
        return self.prompt_specs if self._step is None else (self._step,)

    @property
    def prompt_specs(self) -> tuple[KernelSpec, ...]:
        """Every kernel of a step of more."""
        return (self._append.spec, *self._attend.specs)

    def workspace_bytes(self, batch: int, tokens: int) -> int:
        """Scratch memory of a step of so many tokens of each sequence, or fewer."""
        split = 0
        if self._step is not None:
            plan = plan_decode(self._step, self._model.slots, batch)
            split = plan.value_bytes + plan.mass_bytes
        return max(split, self._attend.workspace_bytes(self._shapes(batch, tokens)))

    def counters(self, batch: int, tokens: int) -> int:
        """int32 counters of such a step; zero before and after."""
        split = 0
        if self._step is not None:
            split = plan_decode(self._step, self._model.slots, batch).counters
        return max(split, self._attend.counters(self._shapes(batch, tokens)))

    def decode(self, places: Places, layer: int, batch: int) -> Iterator[Launch]:
        """A step of one token: appends to the cache and writes `attended` [B, Nq·D] float32."""
        if self._step is None:
            yield from self.prompt(places, layer, batch, 1)
            return
        model, spec, area = self._model, self._step, places.area
        plan = plan_decode(spec, model.slots, batch)
        values: dict[str, int | float] = {
            "query": area("rows"),
            "key": places.cache(layer, "key"),
            "value": places.cache(layer, "value"),
            "score": self._scores(places, layer),
            "write_index": area("positions"),
            "position": places.position or area("positions"),
            "partial_values": area("workspace"),
            "partial_masses": area("workspace") + plan.value_bytes,
            "counters": area("counters"),
            "output": area("attended"),
            **self._optional(places, layer),
            "S": 1,
            "C": model.slots,
            "splits": plan.splits,
            "score_row_stride": model.score_heads * model.slots,
            "scale": self._scale,
            "eps": model.eps,
        }
        yield Launch(
            kernel=spec.name,
            sizes={"splits": plan.splits, "rows": batch},
            arguments={name: values.get(name, 0) for name in spec.arguments},
        )

    def prompt(self, places: Places, layer: int, batch: int, tokens: int) -> Iterator[Launch]:
        """S tokens of each sequence: appends, and writes `attended` [B, S, Nq·D] float32."""
        area = places.area
        key, value = places.cache(layer, "key"), places.cache(layer, "value")
        score = self._scores(places, layer)
        yield self._append.launch(
            batch=batch,
            tokens=tokens,
            slots=self._model.slots,
            rows=area("rows"),
            write_index=area("positions"),
            position=places.position or area("positions"),
            query=area("query"),
            key=key,
            value=value,
            score=score if self._model.score_heads else 0,
            **self._optional(places, layer),
        )
        addresses = {
            "query": area("query"),
            "key": key,
            "value": value,
            "score": score,
            "write_index": area("positions"),
            "attention_output": area("attended"),
        }
        yield from self._attend.launches(
            self._shapes(batch, tokens), addresses, area("workspace"), area("counters")
        )

    @property
    def _scale(self) -> float:
        return float(self._model.head_size**-0.5)

    def _scores(self, places: Places, layer: int) -> int:
        if self._model.score_heads:
            return places.cache(layer, "score")
        return places.of_layer(layer, "mask_bias")

    def _optional(self, places: Places, layer: int) -> dict[str, int]:
        model = self._model
        found = {"cos": places.weight("cos"), "sin": places.weight("sin")}
        if model.qk_norm:
            for name in ("query_norm", "key_norm"):
                found[name] = places.of_layer(layer, name)
        if model.score_heads:
            found["A"] = places.of_layer(layer, "A")
        return found

    def _shapes(self, batch: int, tokens: int) -> dict[str, tuple[int, ...]]:
        model = self._model
        Nq, Nkv, D, C = model.query_heads, model.key_heads, model.head_size, model.slots
        return {
            "query": (batch, Nq, tokens, D),
            "key": (batch, Nkv, C, D),
            "value": (batch, Nkv, C, D),
            "score": (batch if model.score_heads else 1, model.bias_heads, C, 1),
            "write_index": (batch,),
            "attention_output": (batch, tokens, Nq * D),
        }
