"""The launches of a step of one token a sequence: five a layer, and one or two at its end.

    qkv       norm, and queries, keys, values and what mask scores are computed from, as one product
    attend    norm and rotation of queries and keys, the new key's score, append, attention
    o         product, and the residual
    gate_up   norm, product and SiLU · up; a router's scores in programs of their own
    down      product, and the residual; routing and experts in programs of their own
    head      norm, product, the largest logit's token and its embedding, and the step's end

The seed has one more, which makes values of retrieved rows. Where the cache is longer than the
window, two more: one appends, one finds which keys stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from plugins.expert_down.launches import ExpertDown
from plugins.kernel_spec import KernelSpec, Launch
from plugins.projection.launches import Embedding, Head, Projection
from plugins.projection.packing import WeightFormat
from plugins.token_choice.launches import TokenChoice
from plugins.value_gather.step_launches import SeedValues
from runtime.kernel_step.attention import StepAttention
from runtime.kernel_step.formats import StepFormats
from runtime.kernel_step.places import Places
from runtime.kernel_step.step_model import StepModel

# What a step ends with: the largest logit's token; a token drawn by temperature, top_k, top_p and
# min_p; one chosen by every rule there is; or the logits, for the host.
Ending = Literal["greedy", "drawn", "ruled", "logits"]
# Tokens of each row that stay on the device until they are overwritten.
RING = 64
# Ids that can be kept from being picked before `min_tokens`; requests with more go to the host.
STOP_IDS = 16
_FLOAT32 = 4


class DecodeStep:
    """The kernels of such steps for up to `batch` sequences.

    Attributes:
        model: its numbers.
        batch: most sequences.
    """

    def __init__(self, model: StepModel, formats: StepFormats, batch: int) -> None:
        """Choose the kernels.

        Raises:
            ValueError: what no kernel covers.
        """
        self.model, self.batch = model, batch
        self._attention = StepAttention(model, formats)
        self._embedding = Embedding(
            columns=model.hidden, weights=formats.table, activation="float32", token="int64"
        )
        self._qkv = _qkv(model, formats, batch)
        self._values = seed_values(model)
        residual: Literal["residual", "scaled_residual"] = (
            "residual" if model.is_seed else "scaled_residual"
        )
        attended = model.query_heads * model.head_size
        self._o = Projection(
            rows=model.hidden,
            columns=attended,
            weights=formats.projection(attended),
            activation="float32",
            epilogue=residual,
            batch=batch,
        )
        experts = model.experts
        self._gate_up = Projection(
            rows=model.gated_rows,
            columns=model.hidden,
            weights=formats.projection(model.hidden),
            activation="float32",
            norm=True,
            eps=model.eps,
            epilogue="silu" if model.is_seed else "silu_product",
            batch=batch,
            extra_rows=0 if experts is None else experts.router_rows,
            extra_weights=formats.small,
        )
        self._down: Projection | ExpertDown
        if experts is None:
            self._down = Projection(
                rows=model.hidden,
                columns=model.inner,
                weights=formats.projection(model.inner),
                activation="float32",
                epilogue=residual,
                batch=batch,
            )
        else:
            self._down = ExpertDown(
                hidden=model.hidden,
                inner=model.inner,
                weights=formats.projection(model.inner),
                activation="float32",
                tables=formats.small,
                epilogue=residual,
                num_keys=experts.num_keys,
                heads=experts.heads,
                top_k=experts.top_k,
                weight_inside=experts.weight_inside,
                normalize=experts.normalize,
                eps=model.eps,
                batch=batch,
            )
        self._heads = {
            "greedy": _head(model, formats, batch, token=True),
            "logits": _head(model, formats, batch, token=False),
        }
        self._choices: dict[str, TokenChoice] = {
            "drawn": _choice(model, formats, batch, every_rule=False),
            "ruled": _choice(model, formats, batch, every_rule=True),
        }

    @property
    def specs(self) -> tuple[KernelSpec, ...]:
        """Every kernel that a step may launch."""
        heads = (head.spec for head in self._heads.values())
        choices = (choice.spec for choice in self._choices.values())
        return (self._embedding.spec, *heads, *choices, *self.layer_specs)

    @property
    def layer_specs(self) -> tuple[KernelSpec, ...]:
        """Every kernel of a layer."""
        parts = (self._qkv, self._values, self._o, self._gate_up, self._down)
        own = tuple(part.spec for part in parts if part is not None)
        return (*own, *self._attention.decode_specs)

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory of the launch that needs most; launches follow each other."""
        return max(
            self.layer_workspace_bytes,
            self._heads["greedy"].workspace_bytes,
            *(choice.workspace_bytes for choice in self._choices.values()),
        )

    @property
    def layer_workspace_bytes(self) -> int:
        """Scratch memory of a layer's launch that needs most."""
        down = self._down.workspace_bytes if isinstance(self._down, ExpertDown) else 0
        return max(down, self._attention.workspace_bytes(self.batch, 1))

    @property
    def counters(self) -> int:
        """int32 counters of the launch that needs most; zero before and after each."""
        return max(
            self.layer_counters,
            self._heads["greedy"].counters,
            *(choice.counters for choice in self._choices.values()),
        )

    @property
    def layer_counters(self) -> int:
        """int32 counters of a layer's launch that needs most."""
        down = self._down.counters if isinstance(self._down, ExpertDown) else 0
        return max(down, self._attention.counters(self.batch, 1))

    def launches(self, places: Places, batch: int, ending: Ending) -> tuple[Launch, ...]:
        """One step, in order.

        Args:
            places: addresses; `x` holds the embeddings of the step's tokens.
            batch: B sequences.
            ending: what the step gives.
        """
        body = [
            launch
            for layer in range(self.model.layers)
            for launch in self.layer_launches(places, layer, batch)
        ]
        return (*body, *self._end(places, batch, ending))

    def embed(self, places: Places, batch: int) -> Launch:
        """`x` of tokens that come from no step: a step's own end leaves the next one's there."""
        return self._embedding.launch(
            batch=batch,
            tokens=places.area("tokens"),
            table=places.weight("embedding.weights"),
            scales=places.weight("embedding.scales"),
            output=places.area("x"),
        )

    def layer_launches(self, places: Places, layer: int, batch: int) -> Iterator[Launch]:
        """One layer, in order: from `x` to `x_out`."""
        model, area = self.model, places.area

        def weight(name: str) -> int:
            return places.of_layer(layer, name)

        values_first = model.inner_values is not None and model.inner_values.score_rows > 0
        has_extra = bool(model.score_heads) or values_first
        yield self._qkv.launch(
            batch=batch,
            x=area("x"),
            norm=weight("input_norm"),
            weights=weight("qkv.weights"),
            scales=weight("qkv.scales"),
            output=area("rows"),
            extra=weight("score.weights") or weight("value_score.weights"),
            extra_output=area("value_scores" if values_first else "rows") if has_extra else 0,
        )
        if self._values is not None:
            yield values_launch(self._values, places, layer, batch)
        yield from self._attention.decode(places, layer, batch)
        yield self._o.launch(
            batch=batch,
            x=area("attended"),
            weights=weight("o.weights"),
            scales=weight("o.scales"),
            output=area("x_between"),
            residual=area("x"),
            residual_weight=weight("input_residual"),
        )
        routes = model.experts is not None
        yield self._gate_up.launch(
            batch=batch,
            x=area("x_between"),
            norm=weight("mlp_norm"),
            weights=weight("gate_up.weights"),
            scales=weight("gate_up.scales"),
            output=area("inner"),
            extra=weight("router.weights"),
            extra_output=area("router") if routes else 0,
        )
        if isinstance(self._down, Projection):
            yield self._down.launch(
                batch=batch,
                x=area("inner"),
                weights=weight("down.weights"),
                scales=weight("down.scales"),
                output=area("x_out"),
                residual=area("x_between"),
                residual_weight=weight("mlp_residual"),
            )
        else:
            yield self._down.launch(
                batch=batch,
                x=area("inner"),
                weights=weight("down.weights"),
                scales=weight("down.scales"),
                stream=area("x_between"),
                norm=weight("mlp_norm"),
                router=area("router"),
                down=weight("expert_down"),
                up=weight("expert_up"),
                output=area("x_out"),
                residual_weight=weight("mlp_residual"),
                workspace=area("workspace"),
                counters=area("counters"),
            )

    def _end(self, places: Places, batch: int, ending: Ending) -> Iterator[Launch]:
        area, weight = places.area, places.weight
        head = "embedding" if self.model.tied else "head"
        common = {
            "batch": batch,
            "x": area("x"),
            "norm": weight("norm"),
            "weights": weight(f"{head}.weights"),
            "scales": weight(f"{head}.scales"),
        }
        if ending != "greedy":
            yield self._heads["logits"].launch(**common, logits=area("logits"))
        bookkeeping = {
            "embedding": weight("embedding.weights"),
            "embedding_scales": weight("embedding.scales"),
            # In place: whoever writes it is the last to arrive, and all have read it before.
            "next_x": area("x"),
            "tokens": area("tokens"),
            "positions": area("positions"),
            "ring": area("ring"),
            "step": area("step"),
            "last_slot": self.model.max_seq_len - 1,
            "workspace": area("workspace"),
            "counters": area("counters"),
        }
        if ending == "greedy":
            yield self._heads["greedy"].launch(**common, **bookkeeping)
        elif ending != "logits":
            rules = ("bias", "counts", "stop_ids") if ending == "ruled" else ()
            yield self._choices[ending].launch(
                batch=batch,
                logits=area("logits"),
                parameters=area("parameters"),
                uniforms=area("uniforms"),
                **{name: area(name) for name in rules},
                **bookkeeping,
            )


def _qkv(model: StepModel, formats: StepFormats, batch: int) -> Projection:
    """Mask scores lie behind a token's heads; what the seed picks values by lies elsewhere."""
    inner = model.inner_values
    value_scores = 0 if inner is None else inner.score_rows
    return Projection(
        rows=model.projected,
        columns=model.hidden,
        weights=formats.projection(model.hidden),
        activation="float32",
        norm=True,
        eps=model.eps,
        batch=batch,
        output_stride=model.row_numbers,
        extra_rows=model.score_heads or value_scores,
        extra_weights=formats.small,
        extra_offset=model.head_numbers if model.score_heads else 0,
        extra_stride=model.row_numbers if model.score_heads else 0,
    )


def seed_values(model: StepModel) -> SeedValues | None:
    """The kernel of the seed's values; None for other generations."""
    if model.inner_values is None:
        return None
    return SeedValues(
        columns=model.hidden,
        heads=model.inner_values.heads,
        values=model.inner_values.count,
        picks=model.inner_values.picks,
        eps=model.eps,
        output_offset=model.projected,
        output_stride=model.row_numbers,
    )


def values_launch(kernel: SeedValues, places: Places, layer: int, tokens: int) -> Launch:
    """The seed's values of so many tokens, into their part of `rows`."""
    return kernel.launch(
        tokens=tokens,
        x=places.area("x"),
        norm=places.of_layer(layer, "input_norm"),
        scores=places.area("value_scores"),
        table=places.of_layer(layer, "values"),
        output=places.area("rows"),
    )


def _head(model: StepModel, formats: StepFormats, batch: int, *, token: bool) -> Head:
    embedding: WeightFormat | None = formats.table if token else None
    return Head(
        vocab_size=model.vocab_size,
        columns=model.hidden,
        weights=formats.table,
        activation="float32",
        eps=model.eps,
        logits=not token,
        token="int64" if token else None,
        embedding=embedding,
        advance=token,
        ring=RING,
        batch=batch,
    )


def _choice(model: StepModel, formats: StepFormats, batch: int, *, every_rule: bool) -> TokenChoice:
    return TokenChoice(
        vocab_size=model.vocab_size,
        columns=model.hidden,
        embedding=formats.table,
        bias="shared" if every_rule else "none",
        history=every_rule,
        stop_ids=STOP_IDS if every_rule else 0,
        ring=RING,
        uniforms=model.slots,
        batch=batch,
    )
