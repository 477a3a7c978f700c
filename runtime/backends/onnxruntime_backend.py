"""ONNX Runtime: the CPU, or CUDA where the build of onnxruntime that has it is installed.

The cache is never copied: each cache tensor is one buffer, bound as the step's input and as its
output. Buffers are bound by address, so one row of a batch is bound as a batch of one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from model.contract import DTYPE_BYTES, StepContract, TensorSpec
from runtime.backends.base import Backend, BackendUnavailableError, Cache, Ids, Limits, Logits

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.manifest import Variant


@dataclass(kw_only=True)
class OnnxRuntimeCache(Cache):
    """Device buffers, one a cache tensor, in the contract's order.

    Attributes:
        buffers: `onnxruntime.OrtValue` of shape [B, heads, C, size].
        bound: for a row or all rows (None), the binding with these buffers in and out.
        decoding: likewise, what a step of one token is bound to.
    """

    buffers: list[Any]
    bound: dict[int | None, Any]
    decoding: dict[int | None, _DecodeBinding]


@dataclass(frozen=True)
class _DecodeBinding:
    """A step of one token, bound once: what changes is written into the arrays.

    Attributes:
        binding: everything bound by address.
        tokens: the token inputs, in the contract's order.
        logits: [B, 1, V] float32, where the step writes.
    """

    binding: Any
    tokens: tuple[Ids, Ids, Ids, Ids]
    logits: Logits


class OnnxRuntimeBackend(Backend):
    """Runs an ONNX model of the bundle with ONNX Runtime."""

    name = "onnxruntime"

    def __init__(
        self,
        session: Any,
        contract: StepContract,
        *,
        limits: Limits,
        variant: str,
        vocab_size: int,
        router_mode: str | None,
        rows_alone: bool = False,
        chunk_length: int | None = None,
    ) -> None:
        self.rows_alone = rows_alone
        self.chunk_length = chunk_length
        self.variant = variant
        self.limits = limits
        self.vocab_size = vocab_size
        self.router_mode = router_mode
        self._contract = contract
        self._session = session
        self._device = "cuda" if "CUDAExecutionProvider" in session.get_providers() else "cpu"

    @classmethod
    def open(cls, bundle: Bundle, variant: Variant, threads: int | None) -> Self:
        """Load the variant's model into a session.

        Raises:
            BackendUnavailableError: onnxruntime is not installed, or refuses the model.
        """
        config = bundle.config
        return cls(
            make_session(str(bundle.path / variant.path), threads),
            bundle.contract_of(variant),
            limits=bundle.limits,
            variant=variant.name,
            vocab_size=config.vocab_size,
            router_mode=config.router_mode if config.is_moe else None,
            rows_alone=bool(variant.details.get("rows_alone", False)),
            chunk_length=variant.details.get("chunk_length"),
        )

    def new_cache(self, batch_size: int, capacity: int | None = None) -> OnnxRuntimeCache:
        """Zeroed cache; its buffers always have the model's `max_seq_len` slots."""
        import onnxruntime

        slots = self.check_cache_size(batch_size, capacity)
        buffers = [
            onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros(_shape(spec, batch_size), spec.dtype), self._device, 0
            )
            for spec in self._contract.past
        ]
        return OnnxRuntimeCache(
            capacity=slots,
            lengths=np.zeros(batch_size, np.int64),
            buffers=buffers,
            bound={},
            decoding={},
        )

    def close(self) -> None:
        """Drop the session."""
        self._session = None

    def _step(
        self, input_ids: Ids, write_index: Ids, logits_index: Ids, cache: Cache, row: int | None
    ) -> Logits:
        if not isinstance(cache, OnnxRuntimeCache):
            raise TypeError(f"a cache of {type(cache).__name__} does not belong to this backend")
        if self._session is None:
            raise ValueError("this backend is closed; open another")
        if input_ids.shape[1] == 1 and logits_index.shape[1] == 1:
            return self._decode_step(input_ids, write_index, cache, row)
        binding = self._binding(cache, row)
        position_ids = write_index[:, None] + np.arange(input_ids.shape[1])
        tokens = (input_ids, position_ids, write_index, logits_index)
        for spec, array in zip(self._contract.tokens, tokens, strict=True):
            binding.bind_cpu_input(spec.name, np.ascontiguousarray(array))
        logits = np.empty((*logits_index.shape, self.vocab_size), np.float32)
        _bind_output(binding, self._contract.logits.name, logits)
        self._session.run_with_iobinding(binding)
        return logits

    def _decode_step(
        self, input_ids: Ids, write_index: Ids, cache: OnnxRuntimeCache, row: int | None
    ) -> Logits:
        """One token of each row; nothing is bound anew."""
        if row not in cache.decoding:
            cache.decoding[row] = self._bind_decoding(cache, row)
        bound = cache.decoding[row]
        ids, positions, slots, _ = bound.tokens
        ids[:] = input_ids
        slots[:] = positions[:, 0] = write_index
        self._session.run_with_iobinding(bound.binding)
        return bound.logits.copy()

    def _bind_decoding(self, cache: OnnxRuntimeCache, row: int | None) -> _DecodeBinding:
        batch = cache.batch_size if row is None else 1
        binding = self._session.io_binding()
        self._bind_cache(binding, cache, row)
        ids, positions, wanted = (np.zeros((batch, 1), np.int64) for _ in range(3))
        tokens = (ids, positions, np.zeros(batch, np.int64), wanted)
        for spec, array in zip(self._contract.tokens, tokens, strict=True):
            binding.bind_input(spec.name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        logits = np.zeros((batch, 1, self.vocab_size), np.float32)
        _bind_output(binding, self._contract.logits.name, logits)
        return _DecodeBinding(binding=binding, tokens=tokens, logits=logits)

    def _binding(self, cache: OnnxRuntimeCache, row: int | None) -> Any:
        """The binding of all rows or of one, with the cache bound in place."""
        if row in cache.bound:
            return cache.bound[row]
        binding = self._session.io_binding()
        self._bind_cache(binding, cache, row)
        cache.bound[row] = binding
        return binding

    def _bind_cache(self, binding: Any, cache: OnnxRuntimeCache, row: int | None) -> None:
        batch = cache.batch_size if row is None else 1
        for past, present, address in self._cache_addresses(cache, row):
            place = (self._device, 0, np.dtype(past.dtype), _shape(past, batch), address)
            binding.bind_input(past.name, *place)
            binding.bind_output(present.name, *place)

    def _cache_addresses(
        self, cache: OnnxRuntimeCache, row: int | None
    ) -> Iterator[tuple[TensorSpec, TensorSpec, int]]:
        contract = self._contract
        for past, present, buffer in zip(
            contract.past, contract.present, cache.buffers, strict=True
        ):
            row_bytes = prod(_shape(past, 1)) * DTYPE_BYTES[past.dtype]
            yield past, present, buffer.data_ptr() + (row or 0) * row_bytes


def make_session(path: str, threads: int | None) -> Any:
    """An inference session on the model at `path`.

    Raises:
        BackendUnavailableError: onnxruntime is not installed, or refuses the model.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendUnavailableError(
            "onnxruntime is not installed; run: pip install 'doge-tensorrt[cpu]' (or [gpu], never "
            "both: they are the same module)"
        )
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of every node that it moves
    if threads is not None:
        options.intra_op_num_threads = threads
    available = onnxruntime.get_available_providers()
    providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime raises classes of its own that share no base
        raise BackendUnavailableError(f"onnxruntime cannot load {path}: {error}") from error


def _bind_output(binding: Any, name: str, array: Logits) -> None:
    """Let the step write into `array`, which must live as long as the binding."""
    binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)


def _shape(spec: TensorSpec, batch_size: int) -> tuple[int, ...]:
    return tuple(batch_size if isinstance(size, str) else size for size in spec.shape)
