"""The launches of one decoder layer for whoever brings the memory, such as a TensorRT plugin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from plugins.kernel_spec import POINTER_ALIGNMENT, KernelSpec, Launch
from runtime.gpu.device_memory import aligned
from runtime.kernel_step.areas import layer_areas
from runtime.kernel_step.decode_step import DecodeStep
from runtime.kernel_step.layer_spec import ANY_LAYER, SHARED, LayerSpec
from runtime.kernel_step.places import Places
from runtime.kernel_step.prompt_step import PromptStep

_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """Addresses of one run of a layer.

    Attributes:
        x: residual stream before the layer, float32 [B, S, H].
        x_out: and behind it; another place.
        write_index: slot of a sequence's first token, int64 [B].
        position: rotary position of a sequence's first token, int64 [B].
        cache: of the cached `key`, `value` and `score`.
        weights: of `LayerSpec.weights`.
        workspace: scratch memory; what it holds is arbitrary.
        counters: int32, zero before the first launch and after each.
    """

    x: int
    x_out: int
    write_index: int
    position: int
    cache: Mapping[str, int]
    weights: Mapping[str, int]
    workspace: int
    counters: int


class LayerWork:
    """The kernels of a layer.

    Attributes:
        spec: what they depend on.
    """

    def __init__(self, spec: LayerSpec) -> None:
        """Choose the kernels.

        Raises:
            ValueError: what no kernel covers.
        """
        self.spec = spec
        model, formats, batch = spec.model, spec.formats, spec.max_batch_size
        # One for a single sequence, which is the common case, and one for all.
        self._steps = {size: DecodeStep(model, formats, size) for size in sorted({1, batch})}
        rows = 1 if spec.rows_alone else batch
        self._prompt = PromptStep(model, formats, batch, rows * spec.max_input_len)

    @property
    def specs(self) -> tuple[KernelSpec, ...]:
        """Each kernel once, by name."""
        parts: Iterable[DecodeStep | PromptStep] = (*self._steps.values(), self._prompt)
        by_name = {spec.name: spec for part in parts for spec in part.layer_specs}
        return tuple(by_name[name] for name in sorted(by_name))

    @property
    def counters(self) -> int:
        """int32 counters of the launch that needs most."""
        return max(*(step.layer_counters for step in self._steps.values()), self._prompt.counters)

    def workspace_bytes(self, batch: int, tokens: int) -> int:
        """Scratch memory of a run of so many sequences of so many tokens each, or fewer."""
        return sum(aligned(size) for size in self._areas(batch, tokens).values())

    def check(self, batch: int, tokens: int) -> None:
        """Make sure that the kernels were made for so many tokens of so many sequences.

        Raises:
            ValueError: they were not.
        """
        spec = self.spec
        alone = spec.rows_alone and tokens > 1
        most = 1 if alone else spec.max_batch_size
        if not (1 <= batch <= most and 1 <= tokens <= spec.max_input_len):
            raise ValueError(
                f"a step of {batch} x {tokens} tokens, expected at most {most} x "
                f"{spec.max_input_len}"
                f"{': its router mixes tokens, each sequence runs alone' if alone else ''}"
            )

    def launches(self, memory: LayerMemory, batch: int, tokens: int) -> Iterator[Launch]:
        """What to run, in order.

        Args:
            memory: where everything is.
            batch: B sequences.
            tokens: S of each.

        Raises:
            ValueError: more than the kernels were made for.
        """
        self.check(batch, tokens)
        places = self._places(memory, batch, tokens)
        if tokens == 1:
            return self._step_for(batch).layer_launches(places, 0, batch)
        return self._prompt.layer_launches(places, 0, batch, tokens)

    def count_launches(self, batch: int, tokens: int) -> int:
        """How many kernels such a run starts.

        Raises:
            ValueError: more than the kernels were made for.
        """
        place = POINTER_ALIGNMENT  # any address: nothing is run
        memory = LayerMemory(
            x=place,
            x_out=place,
            write_index=place,
            position=place,
            cache=dict.fromkeys(self.spec.cache_kinds, place),
            weights=dict.fromkeys(self.spec.weights, place),
            workspace=place,
            counters=place,
        )
        return sum(1 for _ in self.launches(memory, batch, tokens))

    def _places(self, memory: LayerMemory, batch: int, tokens: int) -> Places:
        areas = {"x": memory.x, "x_out": memory.x_out, "positions": memory.write_index}
        areas["counters"] = memory.counters
        end = memory.workspace
        for name, size in self._areas(batch, tokens).items():
            areas[name] = end
            end += aligned(size)
        weights = {
            name if name in SHARED else f"{ANY_LAYER}{name}": address
            for name, address in memory.weights.items()
        }
        return Places(
            weight=lambda name: weights.get(name, 0),
            area=areas.__getitem__,
            cache=lambda _, kind: memory.cache[kind],
            position=memory.position,
        )

    def _areas(self, batch: int, tokens: int) -> dict[str, int]:
        model = self.spec.model
        rows = 1 if self.spec.rows_alone and tokens > 1 else batch
        every = rows * tokens
        workspace = max(step.layer_workspace_bytes for step in self._steps.values())
        if tokens > 1:
            workspace = max(workspace, self._prompt.workspace_bytes)
        between = every * model.hidden * _FLOAT32
        return {
            "x_between": between,
            **layer_areas(model, self.spec.formats, every, workspace),
        }

    def _step_for(self, batch: int) -> DecodeStep:
        return self._steps[1 if batch == 1 else self.spec.max_batch_size]


@cache
def work_of(spec: LayerSpec) -> LayerWork:
    """The kernels of layers that are all alike, made once."""
    return LayerWork(spec)
