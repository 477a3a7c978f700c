"""Which models have a persistent kernel, and its launches for one of them."""

from __future__ import annotations

from plugins.kernel_spec import KernelSpec, Launch
from plugins.persistent_step.launches import PersistentStep
from runtime.kernel_step.decode_step import RING
from runtime.kernel_step.formats import StepFormats
from runtime.kernel_step.places import Places
from runtime.kernel_step.step_model import StepModel

# Tokens of one launch: a text that ends has run up to so many too far in each launch on the stream.
TOKENS_PER_LAUNCH = 8


class PersistentDecode:
    """Greedy steps of one sequence, several in one launch.

    Attributes:
        kernel: what is launched.
    """

    def __init__(self, model: StepModel, formats: StepFormats) -> None:
        """Choose the kernel.

        Raises:
            ValueError: a model that it does not cover; says which it does.
        """
        if problems := _problems(model):
            raise ValueError(
                f"no persistent kernel for this model: {'; '.join(problems)}. It is for dense "
                "models of the generations g3, g4 and g4h whose --max-seq-len is within the keep "
                "window; build without --persistent"
            )
        self._model = model
        try:
            self.kernel = _kernel(model, formats)
        except ValueError as error:
            raise ValueError(f"{error}; build without --persistent") from error

    @property
    def specs(self) -> tuple[KernelSpec, ...]:
        """Its kernels: the steps, and one that shows what a barrier costs."""
        return (self.kernel.spec, self.kernel.barrier_spec)

    @property
    def barriers_of_step(self) -> int:
        """How often all blocks wait for each other in a step: five times a layer, and once."""
        return 5 * self._model.layers + 1

    @property
    def areas(self) -> dict[str, int]:
        """Bytes of the areas that it has beside those of a step."""
        return self.kernel.areas(TOKENS_PER_LAUNCH)

    def launch(self, places: Places, steps: int) -> Launch:
        """So many steps from the token in `tokens` at the slot in `positions` on.

        Args:
            places: addresses; of the first sequence.
            steps: 1 to `TOKENS_PER_LAUNCH`, all of which find room in the cache.

        Raises:
            ValueError: another number of steps.
        """
        if not 1 <= steps <= TOKENS_PER_LAUNCH:
            raise ValueError(f"a launch has 1 to {TOKENS_PER_LAUNCH} steps, got {steps}")
        model = self._model
        return self.kernel.launch(
            weight=places.weight,
            cache=places.cache,
            area=places.area,
            slots=model.slots,
            last_slot=model.max_seq_len - 1,
            steps=steps,
            eps=model.eps,
            tied=model.tied,
        )

    def barriers(self, places: Places, count: int) -> Launch:
        """Nothing but so many barriers."""
        return self.kernel.barrier_launch(barrier=places.area("barrier"), count=count)


def _problems(model: StepModel) -> list[str]:
    problems = []
    if model.is_seed:
        problems.append("it is of the seed generation")
    elif not model.score_heads or not model.rotates_keys:
        problems.append("its generation has no mask scores")
    if model.experts is not None:
        problems.append("it has experts")
    if model.keep_window_size:
        problems.append(
            f"{model.max_seq_len} tokens exceed the keep window of {model.keep_window_size}"
        )
    return problems


def _kernel(model: StepModel, formats: StepFormats) -> PersistentStep:
    return PersistentStep(
        layers=model.layers,
        hidden=model.hidden,
        inner=model.inner,
        query_heads=model.query_heads,
        key_heads=model.key_heads,
        score_heads=model.score_heads,
        head_size=model.head_size,
        vocab_size=model.vocab_size,
        qk_norm=model.qk_norm,
        projection=formats.projection,
        table=formats.table,
        floats=formats.float_kind,
        ring=RING,
    )
