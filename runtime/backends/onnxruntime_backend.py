"""ONNX Runtime: the CPU, or CUDA where the build of onnxruntime that has it is installed.

The cache is never copied: each cache tensor is one buffer, bound as the step's input and as its
output. Buffers are bound by address, so one row of a batch is bound as a batch of one.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from model.contract import DTYPE_BYTES, StepContract, TensorSpec
from runtime.backends.base import (
    Backend,
    BackendUnavailableError,
    Cache,
    Ids,
    Limits,
    Logits,
    Observer,
)
from runtime.backends.narrow_cache import PromptModel, fill_narrow, load_scales, widen
from runtime.backends.tapped_model import tapped_session
from runtime.cpu_features import warn_of_missing_instructions
from runtime.cpu_threads import THE_BACKENDS_CHOICE, CpuThreads, default_threads
from runtime.sampling import SamplingParams
from runtime.sampling_tail import TailInputs, tail_covers

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.manifest import Variant
    from runtime.token_chooser import TokenChooser

logger = logging.getLogger(__name__)

# Of weights; their products take activations of 8 bits.
NARROW_PRECISIONS = ("int8", "int4")


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


@dataclass(frozen=True)
class _ChoiceBinding:
    """The choice of a token behind a step, bound once: it reads and writes the step's arrays.

    Attributes:
        binding: everything bound by address; the next id goes where the step reads its token.
        inputs: what is written before each step.
        fits: [B, 1] bool, whether the choice is certain; where not, the host chooses.
    """

    binding: Any
    inputs: TailInputs
    fits: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TokenChoice:
    """The model that chooses a token from logits.

    Attributes:
        session: an inference session on it.
        width: candidates that it sorts.
    """

    session: Any
    width: int


class OnnxRuntimeBackend(Backend):
    """Runs an ONNX model of the bundle with ONNX Runtime.

    Attributes:
        host_choices: tokens that the host chose because the graph was not certain.
    """

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
        token_choice: TokenChoice | None = None,
        prompt_model: PromptModel | None = None,
    ) -> None:
        self._choice = token_choice
        self._prompt_model = prompt_model
        self._prompt_backend: OnnxRuntimeBackend | None = None
        self.host_choices = 0
        self._told: set[str] = set()
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
    def open(cls, bundle: Bundle, variant: Variant, threads: CpuThreads) -> Self:
        """Load the variant's model, and the one that chooses tokens, into sessions.

        Raises:
            BackendUnavailableError: onnxruntime is not installed, or refuses a model.
        """
        session = make_session(str(bundle.path / variant.path), threads)
        return cls._on(session, bundle, variant, threads)

    @classmethod
    def open_tapped(
        cls, bundle: Bundle, variant: Variant, threads: CpuThreads, names: Sequence[str]
    ) -> Self:
        """Open a copy of the model that has the named values, where it has them, as outputs.

        Raises:
            BackendUnavailableError: onnx or onnxruntime is not installed, or refuses a model.
        """
        session, given = tapped_session(bundle.path / variant.path, names, threads)
        backend = cls._on(session, bundle, variant, threads)
        backend.taps = given
        return backend

    @classmethod
    def _on(cls, session: Any, bundle: Bundle, variant: Variant, threads: CpuThreads) -> Self:
        config = bundle.config
        if variant.precision in NARROW_PRECISIONS:
            warn_of_missing_instructions()
        choice = variant.details.get("token_choice")
        return cls(
            session,
            bundle.contract_of(variant),
            limits=bundle.limits,
            variant=variant.name,
            vocab_size=config.vocab_size,
            router_mode=config.router_mode if config.is_moe else None,
            rows_alone=bool(variant.details.get("rows_alone", False)),
            chunk_length=variant.details.get("chunk_length"),
            token_choice=None if choice is None else _open_choice(bundle, choice),
            prompt_model=cls._prompt_model_of(bundle, variant, threads),
        )

    @classmethod
    def _prompt_model_of(
        cls, bundle: Bundle, variant: Variant, threads: CpuThreads
    ) -> PromptModel | None:
        details = dict(variant.details)
        prompt = details.pop("prompt_model", None)
        if prompt is None:
            return None
        details.pop("token_choice", None)
        alone = replace(variant, path=prompt["path"], details={**details, "cache_dtype": "float32"})
        bundle.file(alone.path)
        return PromptModel(
            open=partial(cls.open, bundle, alone, replace(threads, spinning_between=False)),
            scales=load_scales(bundle.file(prompt["scales"])),
            from_tokens=prompt["from_tokens"],
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

    def cached(self, cache: Cache) -> dict[str, npt.NDArray[Any]]:
        """What the cache holds, by the names of the step's inputs; copies where a GPU has it."""
        if not isinstance(cache, OnnxRuntimeCache):
            raise TypeError(f"a cache of {type(cache).__name__} does not belong to this backend")
        names = [spec.name for spec in self._contract.past]
        return {n: buffer.numpy() for n, buffer in zip(names, cache.buffers, strict=True)}

    def close(self) -> None:
        """Drop the sessions."""
        self._session = None
        self._prompt_backend = None

    def _append_rows(
        self,
        tokens: Ids,
        lengths: Ids,
        logits_index: Ids,
        wanted: npt.NDArray[np.bool_],
        cache: Cache,
        row: int | None,
        result: Logits,
    ) -> None:
        """As in the base class, but a long prompt is computed in float32 and rounded once."""
        prompts, longest = self._prompt_model, int(lengths.max())
        in_place = self._device == "cpu" and self._session is not None
        if prompts is None or longest < prompts.from_tokens or not in_place:
            super()._append_rows(tokens, lengths, logits_index, wanted, cache, row, result)
            return
        if not isinstance(cache, OnnxRuntimeCache):
            raise TypeError(f"a cache of {type(cache).__name__} does not belong to this backend")
        if self.observer is not None:
            raise ValueError(
                f"variant {self.variant} computes prompts from {prompts.from_tokens} tokens on by "
                f"another model, inside which nothing is named; {longest} tokens were given, "
                "compare shorter prompts or without --taps"
            )
        if self._prompt_backend is None:
            self._prompt_backend = prompts.open()
        backend, number = self._prompt_backend, row or 0
        floats = backend.new_cache(1)
        start = int(cache.lengths[number])
        narrow_cached, float_cached = self.cached(cache), backend.cached(floats)
        widen(narrow_cached, float_cached, number, slice(0, start), prompts.scales)
        floats.lengths[:] = start
        backend._append_rows(tokens, lengths, logits_index, wanted, floats, None, result)
        filled = slice(start, start + longest)
        fill_narrow(float_cached, narrow_cached, number, filled, prompts.scales)
        cache.lengths[number] = start + longest

    def _step(
        self, input_ids: Ids, write_index: Ids, logits_index: Ids, cache: Cache, row: int | None
    ) -> Logits:
        if not isinstance(cache, OnnxRuntimeCache):
            raise TypeError(f"a cache of {type(cache).__name__} does not belong to this backend")
        if self._session is None:
            raise ValueError("this backend is closed; open another")
        if input_ids.shape[1] == 1 and logits_index.shape[1] == 1 and self.observer is None:
            return self._decode_step(input_ids, write_index, cache, row)
        binding = self._binding(cache, row)
        position_ids = write_index[:, None] + np.arange(input_ids.shape[1])
        tokens = (input_ids, position_ids, write_index, logits_index)
        for spec, array in zip(self._contract.tokens, tokens, strict=True):
            binding.bind_cpu_input(spec.name, np.ascontiguousarray(array))
        logits = np.empty((*logits_index.shape, self.vocab_size), np.float32)
        _bind_output(binding, self._contract.logits.name, logits)
        if self.observer is None:
            self._session.run_with_iobinding(binding)
        else:
            self._run_observed(binding, self.observer)
        return logits

    def _run_observed(self, binding: Any, observer: Observer) -> None:
        for name in self.taps:
            binding.bind_output(name, "cpu")  # anew at each pass: its shape changes
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()[-len(self.taps) :] if self.taps else []
        values = {n: value.numpy() for n, value in zip(self.taps, outputs, strict=True)}
        observer({name: array.astype(np.float32) for name, array in values.items()})

    def _decode_step(
        self, input_ids: Ids, write_index: Ids, cache: OnnxRuntimeCache, row: int | None
    ) -> Logits:
        """One token of each row; nothing is bound anew."""
        if row not in cache.decoding:
            cache.decoding[row] = self._bind_decoding(cache, row)
        bound = cache.decoding[row]
        ids, positions, slots, _ = bound.tokens
        ids[:] = input_ids
        slots[:] = write_index
        positions[:, 0] = write_index
        self._session.run_with_iobinding(bound.binding)
        return bound.logits.copy()

    def decode_many(
        self,
        input_ids: Ids,
        cache: Cache,
        choice: TokenChooser,
        active: npt.NDArray[np.bool_],
    ) -> Iterator[Ids]:
        """As in the base class; where the graph can choose, ids and logits stay where they are."""
        if not isinstance(cache, OnnxRuntimeCache):
            raise TypeError(f"a cache of {type(cache).__name__} does not belong to this backend")
        reason = self._why_host_chooses(choice)
        if reason is None:
            return self._choose_in_graph(input_ids, cache, choice, active)
        if reason not in self._told:
            self._told.add(reason)
            logger.info("tokens are chosen by the host: %s", reason)
        return super().decode_many(input_ids, cache, choice, active)

    def _why_host_chooses(self, choice: TokenChooser) -> str | None:
        if self._choice is None:
            return "this model has no graph that chooses"
        if self._device != "cpu":
            return "the graph that chooses runs on the CPU"
        return tail_covers(
            choice.sampler.params, vocab_size=self.vocab_size, width=self._choice.width
        )

    def _choose_in_graph(
        self,
        input_ids: Ids,
        cache: OnnxRuntimeCache,
        choice: TokenChooser,
        active: npt.NDArray[np.bool_],
    ) -> Iterator[Ids]:
        if self._choice is None or self._session is None:
            raise AssertionError("an open backend with a graph that chooses")
        if None not in cache.decoding:
            cache.decoding[None] = self._bind_decoding(cache, None)
        step = cache.decoding[None]
        chosen = self._bind_choice(step, choice.sampler.params)
        tokens = step.tokens[0][:, 0]
        tokens[:] = np.where(active, input_ids, 0)
        choice.logits = step.logits[:, 0]
        # By their own names: this loop is Python's whole share of a token. Positions and slots are
        # bound to the cache's lengths, so one addition moves all three on.
        run, run_choice = self._session.run_with_iobinding, self._choice.session.run_with_iobinding
        step_binding, choice_binding = step.binding, chosen.binding
        lengths, greedy = cache.lengths, choice.sampler.greedy
        uniform, certain = chosen.inputs.uniform, chosen.fits[:, 0]
        count = 0
        while True:
            self.check_decoding(tokens, cache, active, 1)
            for _ in range(cache.capacity - int(lengths.max())):
                count += 1
                if not greedy:
                    uniform[:] = choice.uniform(count)
                run(step_binding)
                run_choice(choice_binding)
                if False in certain.tolist():
                    self._choose_on_host(step, chosen, choice, count, active)
                np.add(lengths, active, out=lengths)
                yield tokens

    def _choose_on_host(
        self,
        step: _DecodeBinding,
        chosen: _ChoiceBinding,
        choice: TokenChooser,
        count: int,
        active: npt.NDArray[np.bool_],
    ) -> None:
        """Choose for the rows of which the graph was not certain."""
        rows = np.flatnonzero(active & ~chosen.fits[:, 0])
        if rows.size:
            self.host_choices += rows.size
            step.tokens[0][rows, 0] = choice.choose_rows(step.logits[rows, 0], count, rows)

    def _bind_choice(self, step: _DecodeBinding, params: SamplingParams) -> _ChoiceBinding:
        if self._choice is None:
            raise AssertionError("there is a graph that chooses")
        ids = step.tokens[0]
        inputs, fits = TailInputs.make(params, len(ids)), np.zeros(ids.shape, bool)
        binding = self._choice.session.io_binding()
        for name, array in {"logits": step.logits, **inputs.feeds()}.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, array in {"next_id": ids, "fits": fits}.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return _ChoiceBinding(binding=binding, inputs=inputs, fits=fits)

    def _bind_decoding(self, cache: OnnxRuntimeCache, row: int | None) -> _DecodeBinding:
        batch = cache.batch_size if row is None else 1
        binding = self._session.io_binding()
        self._bind_cache(binding, cache, row)
        ids, wanted = (np.zeros((batch, 1), np.int64) for _ in range(2))
        # A token's position is its slot, and its slot is the row's length.
        slots = cache.lengths if row is None else np.zeros(batch, np.int64)
        tokens = (ids, slots[:, None], slots, wanted)
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


def _open_choice(bundle: Bundle, choice: Mapping[str, Any]) -> TokenChoice:
    session = make_session(str(bundle.file(choice["path"])), CpuThreads(1))
    return TokenChoice(session, choice["width"])


def make_session(
    path: str,
    threads: CpuThreads = THE_BACKENDS_CHOICE,
    *,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    """An inference session on the model at `path`.

    Args:
        path: the model.
        threads: how many, and how they wait.
        settings: further session configuration entries by name.

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
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads.count or default_threads()
    for setting, value in {
        "session.intra_op.allow_spinning": threads.spinning,
        "session.force_spinning_stop": not threads.spinning_between,
    }.items():
        options.add_session_config_entry(setting, str(int(value)))
    for setting, text in settings.items():
        options.add_session_config_entry(setting, text)
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
