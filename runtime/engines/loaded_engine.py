"""An engine in the GPU's memory: checked against its manifest, and what contexts are made of.

What one product has and the other lacks is probed with `hasattr` where it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from runtime.backends.base import BackendUnavailableError
from runtime.engines.decode_graph import EngineInterface
from runtime.engines.fit import EngineFit
from runtime.engines.log import EngineLog, make_logger
from runtime.engines.runtime_cache import RuntimeCacheFile
from runtime.gpu.cuda_runtime import CudaRuntime, megabytes
from runtime.kernel_step.variant import LAYER_PLUGIN

if TYPE_CHECKING:
    from runtime.manifest import Variant

logger = logging.getLogger(__name__)

# TensorRT's names of the types that a contract has.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT8": "int8",
    "BOOL": "bool",
}
_LESS = (
    "end other programs on the GPU, or build with a smaller --max-batch-size, --max-input-len or "
    "--max-seq-len"
)


Interface = TypeVar("Interface", bound=EngineInterface)


class LoadedEngine(Generic[Interface]):
    """An engine, and what all its contexts share.

    Attributes:
        trt: the TensorRT module.
        contract: inputs and outputs.
        log: the library's errors.
        context_bytes: device memory that each context takes, for the largest profile.
        captures_graphs: whether the library captures CUDA graphs by itself.
        starts_warm: whether kernels of an earlier start are used; None where the library keeps
            none.
        runtime_cache_bytes: size of what was read of them, or 0.
        verdict: the library's on the engine, e.g. VALID; None where it gives none.
    """

    def __init__(
        self,
        trt: Any,
        cuda: CudaRuntime,
        variant: Variant,
        contract: Interface,
        problems: Callable[[], Iterable[str]],
    ) -> None:
        """Load nothing yet; `close` gives back what `load` did, after errors as well.

        Args:
            trt: the TensorRT module.
            cuda: the GPU.
            variant: the engine.
            contract: what it must take and give.
            problems: what plugins have raised since it was last asked.
        """
        self.trt = trt
        self.contract = contract
        self.log = EngineLog(problems)
        self.context_bytes = 0
        self.captures_graphs = False
        self.starts_warm: bool | None = None
        self.runtime_cache_bytes = 0
        self.verdict: str | None = None
        self._cuda = cuda
        self._variant = variant
        self._cache_file: RuntimeCacheFile | None = None
        # In the order in which they depend on each other; released in the opposite one.
        self._logger: Any = None
        self._runtime: Any = None
        self._engine: Any = None
        self._runtime_cache: Any = None
        self._config: Any = None

    def load(
        self, blob: bytes, fit: EngineFit, cache_file: RuntimeCacheFile, needs: Mapping[str, int]
    ) -> None:
        """Load the engine and check that it is what its manifest says.

        Args:
            blob: the engine.
            fit: what is checked before.
            cache_file: where kernels of an earlier start may be.
            needs: device memory that it and one sequence take, as far as it is known before it is
                loaded, in bytes by what it is for.

        Raises:
            BackendUnavailableError: the library refuses it, or there is too little memory.
            ValueError: its inputs, outputs, profiles or shared buffers are not the manifest's.
        """
        self._logger = make_logger(self.trt, self.log)
        self._runtime = self.trt.Runtime(self._logger)
        if hasattr(self._runtime, "get_engine_validity"):  # standard TensorRT has none
            size = int(self._runtime.engine_header_size)
            state, bits = self._runtime.get_engine_validity(blob[:size])
            # The library's objects go to no function that raises: the traceback would keep them
            # alive beyond what they depend on.
            fit.check_validity(state, int(bits), self.log.said())
            self.verdict = str(state.name)
        self._cuda.require_free(needs, _LESS)
        self._engine = self._runtime.deserialize_cuda_engine(blob)
        if self._engine is None:
            raise fit.not_loaded(self.log.reasons())
        problems = [*self._interface_problems(), *self._profile_problems()]
        if problems:
            raise ValueError(
                f"engine {self._variant.path} is not what its manifest says: "
                f"{'; '.join(problems)}; build it again"
            )
        self.context_bytes = int(self._engine.device_memory_size_v2)
        self._configure(cache_file)

    def profile_index(self, name: str) -> int:
        """Number of the profile called `name`.

        Raises:
            ValueError: the manifest lists none.
        """
        names = [profile.get("name") for profile in self._profiles]
        if name not in names:
            raise ValueError(
                f"engine {self._variant.path} has no profile {name!r}, its manifest lists {names}; "
                "build it again"
            )
        return names.index(name)

    def check_room(self, more: Mapping[str, int]) -> None:
        """Make sure that there is memory for a context and what its owner allocates beside it.

        Args:
            more: the latter, bytes by what they are for.

        Raises:
            BackendUnavailableError: too little memory.
        """
        self._cuda.require_free({"activations": self.context_bytes, **more}, _LESS)

    def new_context(self) -> Any:
        """An execution context of its own for one batch.

        Raises:
            BackendUnavailableError: the library makes none.
            ValueError: the engine is closed.
        """
        if self._engine is None:
            raise ValueError("this engine is closed; open another backend")
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise BackendUnavailableError(
                f"engine {self._variant.path}: no execution context could be made, which takes "
                f"{megabytes(self.context_bytes)} of {megabytes(self._cuda.free_bytes())} free: "
                f"{self.log.reasons()}"
            )
        return context

    def set_input(self, context: Any, name: str, shape: tuple[int, ...], address: int) -> None:
        """Tell a context the shape and the address of an input.

        Raises:
            RuntimeError: it refuses one.
        """
        if not context.set_input_shape(name, shape):
            raise self.failure(f"shape {shape} of {name} is refused")
        self.set_address(context, name, address)

    def set_address(self, context: Any, name: str, address: int) -> None:
        """Tell a context where a tensor lies.

        Raises:
            RuntimeError: it refuses the address.
        """
        if not context.set_tensor_address(name, address):
            raise self.failure(f"the address of {name} is refused")

    def check_shapes(self, context: Any) -> None:
        """Make sure that a context knows every shape.

        Raises:
            RuntimeError: it lacks some.
        """
        if missing := context.infer_shapes():
            raise self.failure(f"shapes of {', '.join(missing)} are missing")

    def failure(self, what: str) -> RuntimeError:
        """The error for a call of a context that failed."""
        return RuntimeError(f"engine {self._variant.path}: {what}: {self.log.reasons()}")

    def save_runtime_cache(self) -> None:
        """Save what was compiled, once; a failure is one line of the log."""
        cache_file, self._cache_file = self._cache_file, None
        if cache_file is None or self._runtime_cache is None:
            return
        try:
            saved = self._runtime_cache.serialize()
            reason = self.log.reasons() if saved is None else ""
        except RuntimeError as error:
            saved, reason = None, str(error)  # the error itself would keep the cache alive
        if saved is None:
            logger.info("the runtime cache is not saved, the next start compiles again: %s", reason)
        else:
            cache_file.write(bytes(saved))

    def close(self) -> None:
        """Release everything; contexts must be gone before."""
        # One by one: each release must have happened before that of what it depends on.
        self._config = None
        self._runtime_cache = None
        self._engine = None
        self._runtime = None
        self._logger = None

    @property
    def _profiles(self) -> list[Mapping[str, Any]]:
        return [*self._variant.details.get("profiles", [])]

    def _interface_problems(self) -> Iterator[str]:
        engine, contract = self._engine, self.contract
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        expected = {spec.name: spec for spec in (*contract.inputs, *contract.outputs)}
        if names != expected.keys():
            yield (
                f"it lacks {sorted(expected.keys() - names) or 'none'} and has "
                f"{sorted(names - expected.keys()) or 'none'} besides"
            )
            return
        outputs = {spec.name for spec in contract.outputs}
        aliases = {present: past for past, present in contract.aliases}
        for name, spec in expected.items():
            kind = engine.get_tensor_dtype(name).name
            if _DTYPES.get(kind, kind) != spec.dtype:
                yield f"{name} is {kind}, expected {spec.dtype}"
            shape = tuple(engine.get_tensor_shape(name))
            wanted = tuple(-1 if isinstance(size, str) else size for size in spec.shape)
            if shape != wanted:
                yield f"{name} has shape {shape}, expected {wanted}"
            is_output = engine.get_tensor_mode(name) == self.trt.TensorIOMode.OUTPUT
            if is_output != (name in outputs):
                yield f"{name} is an {'output' if is_output else 'input'}"
            elif is_output:
                # Only then may both have one address, and only then is the cache never copied.
                # What a plugin writes in place TensorRT does not report; the plugin itself refuses
                # to run where the addresses differ.
                found = engine.get_aliased_input_tensor(name)
                untold = found is None and self._variant.details.get("plugin") == LAYER_PLUGIN
                if found != aliases.get(name) and not untold:
                    yield f"{name} shares the memory of {found}, expected {aliases.get(name)}"

    def _profile_problems(self) -> Iterator[str]:
        engine, listed = self._engine, self._profiles
        if engine.num_optimization_profiles != len(listed):
            yield f"it has {engine.num_optimization_profiles} profiles, expected {len(listed)}"
            return
        for index, profile in enumerate(listed):
            for name, shapes in profile.get("inputs", {}).items():
                try:
                    found = [list(shape) for shape in engine.get_tensor_profile_shape(name, index)]
                except Exception as error:  # the binding's own, for a name that it does not know
                    yield f"profile {index}: {name}: {error}"
                    continue
                if found != [list(shape) for shape in shapes]:
                    yield f"profile {index} of {name} is {found}, expected {shapes}"

    def _configure(self, cache_file: RuntimeCacheFile) -> None:
        trt, config = self.trt, self._engine.create_runtime_config()
        if config is None:
            raise BackendUnavailableError(
                f"engine {self._variant.path}: no runtime configuration could be made: "
                f"{self.log.reasons()}"
            )
        self._config = config
        if hasattr(config, "cuda_graph_strategy"):
            wanted = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            config.cuda_graph_strategy = wanted
            self.captures_graphs = config.cuda_graph_strategy == wanted
            if not self.captures_graphs:
                logger.info("%s does not capture CUDA graphs here", trt.__name__)
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            # The static cache leaves one decode shape a batch size; until its kernels are compiled
            # beside the run, general ones serve.
            lazy = trt.DynamicShapesKernelSpecializationStrategy.LAZY
            config.dynamic_shapes_kernel_specialization_strategy = lazy
        if hasattr(config, "create_runtime_cache"):
            self._load_runtime_cache(cache_file)

    def _load_runtime_cache(self, cache_file: RuntimeCacheFile) -> None:
        self._runtime_cache = self._config.create_runtime_cache()
        saved, self.starts_warm = cache_file.read(), False
        if saved is not None:
            self.starts_warm = bool(self._runtime_cache.deserialize(saved))
            if self.starts_warm:
                self.runtime_cache_bytes = len(saved)
            else:
                cache_file.refused()
        if self._config.set_runtime_cache(self._runtime_cache):
            self._cache_file = cache_file
        else:
            logger.info("no runtime cache is used, every start compiles: %s", self.log.reasons())
