"""TensorRT engines, of either product. **Never executed on a GPU yet**: none has been at hand.

Tests run this code over a stand-in for TensorRT-RTX and CUDA that enforces their documented rules
(tests/fake_tensorrt); what an engine of ours does when it runs is unverified until an evidence file
from a machine with such a GPU says otherwise. docs/tensorrt_runtime.md tells what happens when.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from runtime.backends.base import Backend, Cache, Ids, Logits
from runtime.engines.fit import EngineFit
from runtime.engines.lane import EngineLane, lane_needs
from runtime.engines.lane_pool import LanePool
from runtime.engines.loaded_engine import LoadedEngine
from runtime.engines.plugins import plugin_problems, prepare_plugins
from runtime.engines.runtime_cache import CacheKey, RuntimeCacheFile
from runtime.gpu.cuda_runtime import CudaRuntime, load_cuda
from runtime.tensorrt_module import Product, load_tensorrt

if TYPE_CHECKING:
    from types import TracebackType

    from runtime.bundle import Bundle
    from runtime.cpu_threads import CpuThreads
    from runtime.manifest import Variant


@dataclass(kw_only=True)
class TensorRTCache(Cache):
    """The sequences of one batch on a lane of the engine, which is this batch's alone.

    When the cache is closed, or nothing refers to it any more, its lane serves another batch.

    Attributes:
        lane: a context, a stream and the cache's memory; None once the cache is closed.
    """

    lane: EngineLane | None = field(repr=False)
    _give_back: Callable[[], object] = field(init=False, repr=False, default=lambda: None)

    def close(self) -> None:
        """Let another batch have the lane; harmless when called again."""
        self.lane = None
        self._give_back()


class _EngineBackend(Backend):
    """Runs an engine of the bundle; a subclass names the product."""

    product: ClassVar[Product]

    def __init__(
        self, trt: Any, cuda: CudaRuntime, blob: bytes, bundle: Bundle, variant: Variant
    ) -> None:
        """Load an engine whose bytes are those of the bundle.

        Raises:
            BackendUnavailableError: it cannot run here; says what to install or change.
            ValueError: it is not what the manifest says.
        """
        config, gpu = bundle.config, cuda.gpu()
        self.variant = variant.name
        self.limits = bundle.limits
        self.vocab_size = config.vocab_size
        self.router_mode = config.router_mode if config.is_moe else None
        fit = EngineFit(trt, self.product, bundle, variant)
        header = fit.check_blob(blob, gpu)
        key = CacheKey(
            product=self.product,
            version=str(trt.__version__),
            gpu=gpu.file_word,
            target=gpu.target,
            driver="{}.{}".format(*gpu.driver),
            engine=next(f.sha256 for f in bundle.manifest.files if f.path == variant.path),
        )
        contract = bundle.contract_of(variant)
        needs = {
            "weights": len(blob) if header is None else header.weight_bytes,
            **lane_needs(contract, self.limits, self.vocab_size, 1),
        }
        engine = LoadedEngine(trt, cuda, variant, contract, lambda: plugin_problems(trt))
        self._lanes = LanePool(engine, cuda, self.limits, self.vocab_size)
        # Also where nobody closes the backend, but for the end of the process: the driver takes
        # everything then, and half of Python is gone.
        self._close = weakref.finalize(self, self._lanes.close)
        self._close.atexit = False
        try:
            engine.load(blob, fit, RuntimeCacheFile(bundle.path, key), needs)
            self._lanes.add()  # now: what is missing shows before any prompt
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, bundle: Bundle, variant: Variant, threads: CpuThreads) -> Self:
        """Check the engine file's hash, then load it on the GPU.

        Raises:
            BackendUnavailableError: no product, driver or GPU, or the engine does not load here.
            LaunchError: the driver refuses a kernel of the engine's plugins.
            ValueError: the engine file was altered, or is not what the manifest says.
        """
        trt = load_tensorrt(cls.product)
        cuda = CudaRuntime(load_cuda())
        blob = bundle.executable_file(variant).read_bytes()
        prepare_plugins(trt, bundle, variant)
        return cls(trt, cuda, blob, bundle, variant)

    def new_cache(self, batch_size: int, capacity: int | None = None) -> TensorRTCache:
        """Zeroed cache; its buffers always have the engine's `max_seq_len` slots.

        Raises:
            BackendUnavailableError: too little memory; says how much is needed.
            ValueError: as in the base class.
        """
        slots = self.check_cache_size(batch_size, capacity)
        lane = self._lanes.take(batch_size)
        cache = TensorRTCache(capacity=slots, lengths=np.zeros(batch_size, np.int64), lane=lane)
        give_back = weakref.finalize(cache, self._lanes.give_back, lane)
        give_back.atexit = False
        cache._give_back = give_back
        return cache

    def close(self) -> None:
        """Save the runtime cache, free every context, the engine and every buffer."""
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

    def _step(
        self, input_ids: Ids, write_index: Ids, logits_index: Ids, cache: Cache, row: int | None
    ) -> Logits:
        if not isinstance(cache, TensorRTCache):
            raise TypeError(f"a cache of {type(cache).__name__} does not belong to this backend")
        self._lanes.check_open()
        if cache.lane is None:
            raise ValueError("this cache is closed; take another from new_cache")
        if not self._lanes.owns(cache.lane):
            raise TypeError("this cache is of another backend; take one from this one's new_cache")
        return cache.lane.step(input_ids, write_index, logits_index, row)


class TensorRTRTXBackend(_EngineBackend):
    """Engines of TensorRT-RTX, which are built on any machine."""

    name = "tensorrt_rtx"
    product = "tensorrt_rtx"


class TensorRTBackend(_EngineBackend):
    """Engines of standard TensorRT, which are built where the GPU is."""

    name = "tensorrt"
    product = "tensorrt"
