"""Every kernel that the steps of one model need, and the memory that the steps take."""

from __future__ import annotations

from collections.abc import Iterable

from plugins.kernel_spec import KernelSpec
from plugins.projection.matrix import MAX_BATCH
from runtime.backends.base import Limits
from runtime.kernel_step.areas import cache_areas, step_areas
from runtime.kernel_step.decode_step import DecodeStep
from runtime.kernel_step.formats import StepFormats
from runtime.kernel_step.persistent import PersistentDecode
from runtime.kernel_step.prompt_step import PromptStep
from runtime.kernel_step.step_model import StepModel

# Tokens of one sequence in one pass, unless the router wants a prompt whole: longer passes gain
# little and their intermediate results take memory.
CHUNK_LENGTH = 512


class StepKernels:
    """Every kernel that the steps of one model need.

    Attributes:
        model: its numbers.
        formats: of weights and cache.
        batch: most sequences.
        chunk_length: most tokens of a sequence in one pass.
        prompt: steps of several tokens.
        persistent: several greedy steps of one sequence in one launch; None where that is not
            wanted.
    """

    def __init__(
        self, model: StepModel, formats: StepFormats, limits: Limits, *, persistent: bool = False
    ) -> None:
        """Choose the kernels.

        Args:
            model: its numbers.
            formats: of weights and cache.
            limits: of the model.
            persistent: whether there is a persistent kernel among them.

        Raises:
            ValueError: what no kernel covers.
        """
        self.model, self.formats, self.batch = model, formats, limits.max_batch_size
        if self.batch > MAX_BATCH:
            raise ValueError(
                f"our kernels take up to {MAX_BATCH} sequences, max_batch_size is {self.batch}; "
                f"build with --max-batch-size {MAX_BATCH}"
            )
        mixed = model.experts is not None and model.experts.router_mode == "mixed"
        self.chunk_length = limits.max_input_len
        if not mixed:
            self.chunk_length = min(self.chunk_length, CHUNK_LENGTH)
        # With that router each sequence runs alone.
        passes = 1 if mixed else self.batch
        self.prompt = PromptStep(model, formats, self.batch, passes * self.chunk_length)
        # One for a single sequence, which is the common case, and one for all.
        self.persistent = PersistentDecode(model, formats) if persistent else None
        self._steps = {size: DecodeStep(model, formats, size) for size in sorted({1, self.batch})}

    @property
    def specs(self) -> tuple[KernelSpec, ...]:
        """Each kernel once, by name."""
        parts: Iterable[DecodeStep | PromptStep] = (*self._steps.values(), self.prompt)
        by_name = {spec.name: spec for part in parts for spec in part.specs}
        if self.persistent is not None:
            by_name |= {spec.name: spec for spec in self.persistent.specs}
        return tuple(by_name[name] for name in sorted(by_name))

    @property
    def areas(self) -> dict[str, int]:
        """Bytes of what steps write."""
        areas = step_areas(self.model, self.formats, tuple(self._steps.values()), self.prompt)
        return areas if self.persistent is None else areas | self.persistent.areas

    def cache_areas(self, rows: int) -> dict[str, int]:
        """Bytes of the cache tensors of so many sequences."""
        return cache_areas(self.model, self.formats, rows)

    def step_for(self, rows: int) -> DecodeStep:
        """The kernels of a step of one token for so many sequences."""
        return self._steps[1 if rows == 1 else self.batch]
