"""Steps of nothing but our kernels, on any NVIDIA GPU from sm_80 on.

**Never run on a GPU yet.** Tests run this code over a stand-in for CUDA, with every kernel in
Triton's interpreter; speed, and what compilers make of the kernels, are unknown until an evidence
file says otherwise. docs/kernel_step.md tells what happens when. Neither PyTorch nor Triton is
needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from plugins.launcher import Launcher
from runtime.backends.base import BackendUnavailableError, Cache, Ids, Logits
from runtime.backends.lane_backend import LaneBackend
from runtime.gpu.cuda_runtime import CudaRuntime, load_cuda
from runtime.gpu.lane_pool import LanePool
from runtime.kernel_step.choice_rules import ChoiceRules, why_host_chooses
from runtime.kernel_step.device_weights import DeviceWeights
from runtime.kernel_step.kernel_lane import KernelLane, lane_needs
from runtime.kernel_step.packed_weights import PackedWeights
from runtime.kernel_step.variant import kernels_of_variant
from runtime.sampling import no_token_to_pick
from runtime.token_chooser import TokenChooser

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.cpu_threads import CpuThreads
    from runtime.manifest import Variant

logger = logging.getLogger(__name__)

# What the kernels' instructions ask for: asynchronous copies and bfloat16.
LEAST_CAPABILITY = (8, 0)
_LESS = "end other programs on the GPU, or build with a smaller --max-batch-size or --max-seq-len"


class CudaBackend(LaneBackend[KernelLane]):
    """Runs a model by our ahead-of-time kernels."""

    name = "cuda"

    def __init__(
        self, cuda: CudaRuntime, launcher: Launcher, bundle: Bundle, variant: Variant
    ) -> None:
        """Load the weights of a variant.

        Args:
            cuda: the GPU.
            launcher: has the code of every kernel of the variant; closed with the backend.
            bundle: what to run.
            variant: of this backend.

        Raises:
            BackendUnavailableError: too little memory; says how much is needed.
            ValueError: the variant, or its file, is not what a build writes.
        """
        config = bundle.config
        self.variant = variant.name
        self.limits = bundle.limits
        self.vocab_size = config.vocab_size
        self.router_mode = config.router_mode if config.is_moe else None
        super().__init__(cuda)
        self._told: set[str] = set()
        kernels = kernels_of_variant(bundle, variant)
        self.chunk_length = kernels.chunk_length
        self._kernels = kernels
        weights = PackedWeights(bundle.file(variant.path), kernels.model, kernels.formats)
        needs = {"weights": weights.size, **lane_needs(kernels, 1)}
        cuda.require_free(needs, _LESS)
        self._weights = on_device = DeviceWeights(cuda, weights)

        def make(rows: int) -> KernelLane:
            return KernelLane(kernels, on_device, cuda, launcher, rows)

        self._own(LanePool(make, last=(on_device.close, launcher.close)))
        try:
            self._lanes.add()  # now: what is missing shows before any prompt
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, bundle: Bundle, variant: Variant, threads: CpuThreads) -> Self:
        """Check the kernels' hashes, then load them and the weights on the GPU.

        Raises:
            BackendUnavailableError: no driver or GPU, one that is too old, no kernels for it, or
                too little memory.
            LaunchError: the driver refuses a kernel.
            ValueError: kernels or weights that were altered or made by another version.
        """
        cuda = CudaRuntime(load_cuda())
        gpu = cuda.gpu()
        if gpu.compute_capability < LEAST_CAPABILITY:
            raise BackendUnavailableError(
                f"{gpu} is older than sm80, which our kernels need; here --backend onnxruntime runs"
            )
        specs = kernels_of_variant(bundle, variant).specs
        library = bundle.kernel_library()
        library.require(specs)
        launcher = library.open_launcher(frozenset(spec.name for spec in specs))
        try:
            return cls(cuda, launcher, bundle, variant)
        except BaseException:
            launcher.close()
            raise

    def decode_many(
        self,
        input_ids: Ids,
        cache: Cache,
        choice: TokenChooser,
        active: npt.NDArray[np.bool_],
    ) -> Iterator[Ids]:
        """As in the base class; tokens are chosen on the device where its rules are the request's.

        Steps run ahead of what is read. Rows that have ended take part in them, and nothing that
        comes of it is read.
        """
        lane = self._lane_of(cache)
        reason = why_host_chooses(choice)
        if reason is None:
            return self._choose_ahead(lane, input_ids, cache, choice, active)
        if reason not in self._told:
            self._told.add(reason)
            logger.info("the host chooses each token, which waits for every step: %s", reason)
        return super().decode_many(input_ids, cache, choice, active)

    def _choose_ahead(
        self,
        lane: KernelLane,
        input_ids: Ids,
        cache: Cache,
        choice: TokenChooser,
        active: npt.NDArray[np.bool_],
    ) -> Iterator[Ids]:
        self.check_decoding(input_ids, cache, active, 1)
        steps = cache.capacity - int(cache.lengths[active].min())
        rules = ChoiceRules.of(
            choice,
            vocab_size=self.vocab_size,
            rows=cache.batch_size,
            width=self._kernels.step_for(cache.batch_size).batch,
            steps=steps,
        )
        tokens = np.where(active, input_ids, 0)
        for chosen in lane.choose_ahead(tokens, cache.lengths, rules, steps):
            if (chosen[active] < 0).any():
                row = int(np.flatnonzero(active & (chosen < 0))[0])
                raise ValueError(no_token_to_pick(row))
            cache.lengths += active
            yield chosen
            if active.any():
                self.check_decoding(chosen, cache, active, 1)

    def _step(
        self, input_ids: Ids, write_index: Ids, logits_index: Ids, cache: Cache, row: int | None
    ) -> Logits:
        return self._lane_of(cache).step(input_ids, write_index, logits_index, row)
