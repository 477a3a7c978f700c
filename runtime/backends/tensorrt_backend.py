"""TensorRT engines, of either product. **Never executed yet**: no RTX GPU has been at hand.

The order of calls follows the API's documentation; what an engine of ours does when it runs is
unverified until an evidence file from such a machine says otherwise (README.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from model.contract import DTYPE_BYTES
from runtime.backends.base import Backend, BackendUnavailableError, Cache, Ids, Logits
from runtime.device_memory import DeviceMemory, as_bytes_size, load_cuda
from runtime.engine_plugins import prepare_plugins
from runtime.tensorrt_module import Product, load_tensorrt

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.cpu_threads import CpuThreads
    from runtime.manifest import Variant


@dataclass(kw_only=True)
class TensorRTCache(Cache):
    """Device addresses of the cache tensors, in the contract's order."""

    addresses: list[int]


class _EngineBackend(Backend):
    """Runs an engine of the bundle; a subclass names the product."""

    product: ClassVar[Product]

    def __init__(
        self, trt: Any, memory: DeviceMemory, blob: bytes, bundle: Bundle, variant: Variant
    ) -> None:
        config = bundle.config
        self.variant = variant.name
        self.limits = bundle.limits
        self.vocab_size = config.vocab_size
        self.router_mode = config.router_mode if config.is_moe else None
        self._contract = bundle.contract_of(variant)
        self._trt = trt
        self._memory = memory
        self._logger = trt.Logger(trt.Logger.WARNING)
        runtime = trt.Runtime(self._logger)
        self._engine = runtime.deserialize_cuda_engine(blob)
        if self._engine is None:
            raise BackendUnavailableError(
                f"{self.product} {trt.__version__} cannot load {variant.path}, built with "
                f"{variant.details.get('builder_version', 'an unknown version')} for "
                f"{', '.join(variant.details.get('targets', []))}; build it for this GPU and "
                "version: python export/build_engine.py --target ..."
            )
        self._context = self._engine.create_execution_context(self._runtime_config())
        self._profile = -1
        self._tokens = {
            spec.name: memory.zeros(self._largest(spec.shape, DTYPE_BYTES[spec.dtype]))
            for spec in self._contract.tokens
        }
        self._logits = 0
        self._logits_size = 0

    @classmethod
    def open(cls, bundle: Bundle, variant: Variant, threads: CpuThreads) -> Self:
        """Check the engine file's hash, then load it on the GPU.

        Raises:
            BackendUnavailableError: no product, driver or GPU, or the engine does not load here.
            LaunchError: the driver refuses a kernel of the engine's plugins.
        """
        trt = load_tensorrt(cls.product)
        cudart = load_cuda()
        blob = bundle.executable_file(variant).read_bytes()
        prepare_plugins(trt, bundle, variant)
        return cls(trt, DeviceMemory(cudart), blob, bundle, variant)

    def new_cache(self, batch_size: int, capacity: int | None = None) -> TensorRTCache:
        """Zeroed cache; its buffers always have the engine's `max_seq_len` slots."""
        slots = self.check_cache_size(batch_size, capacity)
        addresses = [
            self._memory.zeros(
                as_bytes_size(_with_batch(spec.shape, batch_size), DTYPE_BYTES[spec.dtype])
            )
            for spec in self._contract.past
        ]
        return TensorRTCache(
            capacity=slots, lengths=np.zeros(batch_size, np.int64), addresses=addresses
        )

    def close(self) -> None:
        """Free the context, the engine and every buffer."""
        self._context = self._engine = None
        self._memory.close()

    def _runtime_config(self) -> Any:
        config = self._engine.create_runtime_config()
        if hasattr(config, "cuda_graph_strategy"):  # TensorRT-RTX
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config

    def _step(
        self, input_ids: Ids, write_index: Ids, logits_index: Ids, cache: Cache, row: int | None
    ) -> Logits:
        if not isinstance(cache, TensorRTCache):
            raise TypeError(f"a cache of {type(cache).__name__} does not belong to this backend")
        if self._context is None:
            raise ValueError("this backend is closed; open another")
        batch, length = input_ids.shape
        self._select_profile(0 if length == 1 else 1)
        position_ids = write_index[:, None] + np.arange(length)
        tokens = (input_ids, position_ids, write_index, logits_index)
        arrays = [np.ascontiguousarray(array) for array in tokens]
        for spec, array in zip(self._contract.tokens, arrays, strict=True):
            self._memory.upload(self._tokens[spec.name], array)
            self._bind(spec.name, self._tokens[spec.name], array.shape)
        self._bind_cache(cache, batch, row)
        logits = np.empty((*logits_index.shape, self.vocab_size), np.float32)
        self._reserve_logits(logits.nbytes)
        self._context.set_tensor_address(self._contract.logits.name, self._logits)
        if missing := self._context.infer_shapes():
            raise RuntimeError(f"the engine misses shapes of {missing}")
        if not self._context.execute_async_v3(self._memory.stream):
            raise RuntimeError("the engine's step could not be enqueued")
        self._memory.download(logits, self._logits)
        return logits

    def _select_profile(self, index: int) -> None:
        """Switch between decode (0) and prefill (1); every input shape is set again after it."""
        if index != self._profile:
            self._context.set_optimization_profile_async(index, self._memory.stream)
            self._memory.synchronize()  # shapes may only be set once the switch is done
            self._profile = index

    def _bind(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        self._context.set_input_shape(name, shape)
        self._context.set_tensor_address(name, address)

    def _bind_cache(self, cache: TensorRTCache, batch: int, row: int | None) -> None:
        contract = self._contract
        for past, present, base in zip(
            contract.past, contract.present, cache.addresses, strict=True
        ):
            row_bytes = as_bytes_size(_with_batch(past.shape, 1), DTYPE_BYTES[past.dtype])
            address = base + (row or 0) * row_bytes
            self._bind(past.name, address, _with_batch(past.shape, batch))
            self._context.set_tensor_address(present.name, address)

    def _reserve_logits(self, size: int) -> None:
        if size > self._logits_size:
            if self._logits:
                self._memory.free([self._logits])
            self._logits, self._logits_size = self._memory.zeros(size), size

    def _largest(self, shape: tuple[int | str, ...], item_size: int) -> int:
        limits = self.limits
        sizes = {"B": limits.max_batch_size, "S": limits.max_input_len, "M": limits.max_input_len}
        return as_bytes_size([sizes[s] if isinstance(s, str) else s for s in shape], item_size)


class TensorRTRTXBackend(_EngineBackend):
    """Engines of TensorRT-RTX, which are built on any machine."""

    name = "tensorrt_rtx"
    product = "tensorrt_rtx"


class TensorRTBackend(_EngineBackend):
    """Engines of standard TensorRT, which are built where the GPU is."""

    name = "tensorrt"
    product = "tensorrt"


def _with_batch(shape: tuple[int | str, ...], batch_size: int) -> tuple[int, ...]:
    return tuple(batch_size if isinstance(size, str) else size for size in shape)
