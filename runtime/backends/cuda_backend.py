"""Steps of nothing but our kernels, on any NVIDIA GPU from sm_80 on.

**Never run on a GPU yet.** Tests run this code over a stand-in for CUDA, with every kernel in
Triton's interpreter; speed, and what compilers make of the kernels, are unknown until an evidence
file says otherwise. docs/kernel_step.md tells what happens when. Neither PyTorch nor Triton is
needed.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from plugins.launcher import Launcher
from runtime.backends.base import Backend, BackendUnavailableError, Cache, Ids, Logits
from runtime.gpu.copy_speed import copy_bytes_per_s
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
    from types import TracebackType

    from runtime.bundle import Bundle
    from runtime.cpu_threads import CpuThreads
    from runtime.manifest import Variant

logger = logging.getLogger(__name__)

# What the kernels' instructions ask for: asynchronous copies and bfloat16.
LEAST_CAPABILITY = (8, 0)
_LESS = "end other programs on the GPU, or build with a smaller --max-batch-size or --max-seq-len"


@dataclass(kw_only=True)
class CudaCache(Cache):
    """The sequences of one batch on a lane, which is this batch's alone.

    When the cache is closed, or nothing refers to it any more, its lane serves another batch.

    Attributes:
        lane: a stream, graphs, and the memory of steps and cache; None once the cache is closed.
    """

    lane: KernelLane | None = field(repr=False)
    _give_back: Callable[[], object] = field(init=False, repr=False, default=lambda: None)

    def close(self) -> None:
        """Let another batch have the lane; harmless when called again."""
        self.lane = None
        self._give_back()


class CudaBackend(Backend):
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
        self._cuda, self._free_before = cuda, cuda.free_bytes()
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

        self._lanes = LanePool(make, last=(on_device.close, launcher.close))
        # Also where nobody closes the backend, but for the end of the process.
        self._close = weakref.finalize(self, self._lanes.close)
        self._close.atexit = False
        try:
            self._lanes.add()  # now: what is missing shows before any prompt
        except BaseException:
            self.close()
            raise

    def device_facts(self) -> dict[str, Any]:
        """What a benchmark tells of the GPU, JSON-ready; memory is what is taken now, in MiB."""
        speed = copy_bytes_per_s(self._cuda)
        return {
            "gpu": str(self._cuda.gpu()),
            "runtime_cache": "none",
            "memory_mb": round((self._free_before - self._cuda.free_bytes()) / 2**20, 1),
            "copy_gb_per_s": None if speed is None else round(speed / 1e9, 3),
        }

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

    def new_cache(self, batch_size: int, capacity: int | None = None) -> CudaCache:
        """Zeroed cache; its buffers always have `max_seq_len` slots.

        Raises:
            BackendUnavailableError: too little memory; says how much is needed.
            ValueError: as in the base class, or the backend is closed.
        """
        slots = self.check_cache_size(batch_size, capacity)
        lane = self._lanes.take(batch_size)
        cache = CudaCache(capacity=slots, lengths=np.zeros(batch_size, np.int64), lane=lane)
        give_back = weakref.finalize(cache, self._lanes.give_back, lane)
        give_back.atexit = False
        cache._give_back = give_back
        return cache

    def close(self) -> None:
        """Free every lane, the weights and the kernels; harmless when called again."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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

    def _lane_of(self, cache: Cache) -> KernelLane:
        if not isinstance(cache, CudaCache):
            raise TypeError(f"a cache of {type(cache).__name__} does not belong to this backend")
        self._lanes.check_open()
        if cache.lane is None:
            raise ValueError("this cache is closed; take another from new_cache")
        if not self._lanes.owns(cache.lane):
            raise TypeError("this cache is of another backend; take one from this one's new_cache")
        return cache.lane
