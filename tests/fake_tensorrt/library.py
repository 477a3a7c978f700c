"""A stand-in for `tensorrt_rtx` or `tensorrt`, whose engines run an ONNX model with ONNX Runtime.

What the real library notices it answers as that does: False, None or an empty list, and a message
to the logger. What it answers with undefined behaviour raises `MisuseError`. The rules are those of
the API's documentation (docs/tensorrt_runtime.md lists them); where that is silent, the stricter
reading holds.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from functools import cache, partial
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime

from model.contract import DTYPE_BYTES
from runtime.engines.header import MAGIC, EngineHeader, EngineHeaderError, read_engine_header
from tests.fake_tensorrt.cuda import FakeCuda, Work
from tests.fake_tensorrt.engine_file import STANDARD_MAGIC, VERSION
from tests.fake_tensorrt.enums import (
    ComputeCapability,
    CudaGraphStrategy,
    DataType,
    EngineInvalidityDiagnostics,
    EngineValidity,
    Severity,
    Specialization,
    TensorIOMode,
)

ADDRESS_ALIGNMENT = 256


class FakeTensorRt(ModuleType):
    """The module of one product on one fake GPU.

    Attributes:
        compiled: shapes for which kernels had to be compiled, since no runtime cache had them.
        validity: what `get_engine_validity` gives instead of its own finding.
        refuse: names of calls that fail as the library's own do.
    """

    def __init__(self, cuda: FakeCuda, name: str = "tensorrt_rtx") -> None:
        super().__init__(name)
        self.cuda = cuda
        self.ledger = cuda.ledger
        self.compiled: list[Any] = []
        self.validity: tuple[EngineValidity, int] | None = None
        self.refuse: set[str] = set()
        self.__version__ = VERSION
        self.DataType = DataType
        self.TensorIOMode = TensorIOMode
        self.is_rtx = name == "tensorrt_rtx"
        self.ILogger = type("ILogger", (_ILogger,), {"ledger": self.ledger})
        self.Runtime = type("Runtime", (_RtxRuntime if self.is_rtx else _Runtime,), {"trt": self})
        if self.is_rtx:
            self.EngineValidity = EngineValidity
            self.EngineInvalidityDiagnostics = EngineInvalidityDiagnostics
            self.CudaGraphStrategy = CudaGraphStrategy
            self.DynamicShapesKernelSpecializationStrategy = Specialization
            self.ComputeCapability = ComputeCapability


class _Handle:
    """Something that lives until nothing refers to it."""

    def _born(self, trt: FakeTensorRt, kind: str, *needs: _Handle | None) -> None:
        self.trt = trt
        self.handle = trt.ledger.born(kind, [need.handle for need in needs if need is not None])

    def __del__(self) -> None:
        if "handle" in vars(self):
            self.trt.ledger.died(vars(self).pop("handle"))


class _ILogger:
    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING
    INFO, VERBOSE = Severity.INFO, Severity.VERBOSE
    ledger: Any

    def __init__(self) -> None:
        self.handle = self.ledger.born("logger")

    def __del__(self) -> None:
        self.ledger.died(self.handle)


class _Runtime(_Handle):
    trt: FakeTensorRt

    def __init__(self, logger: Any) -> None:
        self._born(self.trt, "runtime", logger)
        self.logger = logger

    def deserialize_cuda_engine(self, blob: bytes) -> _Engine | None:
        wrong = self._wrong(blob)
        if "deserialize_cuda_engine" in self.trt.refuse:
            wrong = "the engine was refused"
        if wrong is None and not self.trt.cuda.reserve(self._header(blob).weight_bytes):
            wrong = "out of memory"
        if wrong is not None:
            message = f"deserializeCudaEngine: {wrong}"
            self.logger.log(Severity.ERROR, message)
            return None
        return _Engine(self, blob, self._header(blob).weight_bytes)

    def _header(self, blob: bytes) -> EngineHeader:
        return read_engine_header(blob.replace(STANDARD_MAGIC, MAGIC, 2))

    def _wrong(self, blob: bytes) -> str | None:
        try:
            header = self._header(blob)
        except EngineHeaderError:
            return "magic tag does not match"
        capability = "sm{}{}".format(*self.trt.cuda.capability)
        if header.version != self.trt.__version__:
            return "version does not match"
        if header.file_bytes != len(blob):
            return "size does not match"
        return None if capability in header.targets else "compute capability does not match"


class _RtxRuntime(_Runtime):
    engine_header_size = 64

    def _header(self, blob: bytes) -> EngineHeader:
        return read_engine_header(blob)

    def get_engine_validity(self, blob: bytes) -> tuple[EngineValidity, int]:
        assert len(blob) >= self.engine_header_size
        if self.trt.validity is not None:
            return self.trt.validity
        bits = 0
        try:
            header = read_engine_header(blob)
        except EngineHeaderError:
            return EngineValidity.INVALID, int(EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        if header.version != self.trt.__version__:
            bits |= EngineInvalidityDiagnostics.VERSION_MISMATCH
        if "sm{}{}".format(*self.trt.cuda.capability) not in header.targets:
            bits |= EngineInvalidityDiagnostics.UNSUPPORTED_CC
        return (EngineValidity.INVALID if bits else EngineValidity.VALID), int(bits)


@cache
def _session(path: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class _Engine(_Handle):
    def __init__(self, runtime: _Runtime, blob: bytes, weight_bytes: int) -> None:
        self._born(runtime.trt, "engine", runtime)
        self.logger = runtime.logger
        self.weight_bytes = weight_bytes
        said = json.loads(blob[64:])
        self.onnx: str = said["onnx"]
        self.specs = {spec["name"]: spec for spec in (*said["inputs"], *said["outputs"])}
        self.inputs = [spec["name"] for spec in said["inputs"]]
        self.aliases: dict[str, str] = said["aliases"]
        # Those that plugins asked for, of which the library says nothing.
        self.plugin_aliases: dict[str, str] = said.get("plugin_aliases", {})
        self.profiles = said["profiles"]
        self.device_memory_size_v2 = said["activation_bytes"]
        self.num_io_tensors = len(self.specs)
        self.num_optimization_profiles = len(self.profiles)

    def __del__(self) -> None:
        self.trt.cuda.used_bytes -= self.weight_bytes
        super().__del__()

    def get_tensor_name(self, index: int) -> str:
        return [*self.specs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.specs[name]["dtype"])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(n, str) else n for n in self.specs[name]["shape"])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.profiles[index]["inputs"][name]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_runtime_config(self) -> Any:
        return _RtxConfig(self) if self.trt.is_rtx else _Config(self)

    def create_execution_context(self, config: _Config) -> _Context | None:
        refused = "create_execution_context" in self.trt.refuse
        if refused or not self.trt.cuda.reserve(self.device_memory_size_v2):
            self.logger.log(Severity.ERROR, "createExecutionContext: out of device memory")
            return None
        return _Context(self, config)


class _Config(_Handle):
    def __init__(self, engine: _Engine) -> None:
        self._born(engine.trt, "runtime config", engine)
        self.cache: _Cache | None = None


class _RtxConfig(_Config):
    cuda_graph_strategy = CudaGraphStrategy.DISABLED
    dynamic_shapes_kernel_specialization_strategy = Specialization.LAZY

    def create_runtime_cache(self) -> _Cache:
        return _Cache(self.trt)

    def set_runtime_cache(self, cache: _Cache) -> bool:
        assert self.trt.ledger.lives(cache.handle)
        self.cache = cache
        return True


class _Cache(_Handle):
    def __init__(self, trt: FakeTensorRt) -> None:
        self._born(trt, "runtime cache")
        self.entries: list[str] = []

    def _machine(self) -> list[Any]:
        cuda = self.trt.cuda
        return [self.trt.__version__, cuda.name_of_gpu.decode(), [*cuda.capability], cuda.driver]

    def deserialize(self, blob: bytes) -> bool:
        try:
            machine, entries = json.loads(bytes(blob))
        except ValueError:
            return False
        if machine != self._machine() or "deserialize" in self.trt.refuse:
            return False
        self.entries = entries
        return True

    def serialize(self) -> memoryview:
        if "serialize" in self.trt.refuse:
            raise RuntimeError("the cache could not be serialized")
        return memoryview(json.dumps([self._machine(), self.entries]).encode())


class _Context(_Handle):
    """An execution context; what it enqueues is done when the stream is synchronized."""

    def __init__(self, engine: _Engine, config: _Config) -> None:
        self._born(engine.trt, "execution context", engine, config, config.cache)
        # Not the engine itself: the context must not be what keeps it alive.
        self.bytes = engine.device_memory_size_v2
        self.logger, self.onnx, self.specs = engine.logger, engine.onnx, engine.specs
        self.inputs, self.profiles = engine.inputs, engine.profiles
        self.aliases = engine.aliases | engine.plugin_aliases
        self.entries = [] if config.cache is None else config.cache.entries
        self.cuda = engine.trt.cuda
        self.profile = 0
        self.switched_on: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.prepared: dict[str, tuple[int, ...]] | None = None

    def __del__(self) -> None:
        for stream in self.cuda.streams.values():
            if any(work.context == self.handle for work in stream.pending):
                self.cuda.ledger.violations.append("a context was released while it runs")
        self.cuda.used_bytes -= self.bytes
        super().__del__()

    def _refuse(self, reason: str) -> bool:
        self.logger.log(Severity.ERROR, reason)
        return False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        found = self.cuda.stream(stream)
        if found.captured is not None:
            raise self.cuda.ledger.misuse("a profile was switched in a capture")
        if not 0 <= index < len(self.profiles):
            return self._refuse(f"profile {index} does not exist")
        self.profile, self.shapes, self.prepared = index, {}, None
        self.switched_on = found.handle

        context = weakref.ref(self)

        def done() -> None:
            if (switched := context()) is not None:
                switched.switched_on = None

        # Plain work: it may copy, so other streams must not run the context until it is done.
        self.cuda.put(stream, Work("a switch of profiles", done, []))
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        assert isinstance(shape, tuple | list)
        if self.switched_on is not None:
            raise self.cuda.ledger.misuse("a shape was set before the switch of profiles was done")
        if name not in self.inputs:
            return self._refuse(f"{name} is no input")
        least, _, most = self.profiles[self.profile]["inputs"][name]
        fits = len(shape) == len(least) and all(
            type(n) is int and low <= n <= high
            for low, n, high in zip(least, shape, most, strict=True)
        )
        if not fits:
            return self._refuse(f"{name}: {tuple(shape)} is outside {least} to {most}")
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.specs:
            return self._refuse(f"{name} is no tensor")
        if address % ADDRESS_ALIGNMENT:
            return self._refuse(f"the address of {name} is not aligned to {ADDRESS_ALIGNMENT}")
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.inputs if name not in self.shapes]

    def execute_async_v3(self, stream: int) -> bool:
        found = self.cuda.stream(stream)
        if "execute_async_v3" in self.trt.refuse:
            return self._refuse("a kernel could not be launched")
        if self.switched_on not in (None, found.handle):
            raise self.cuda.ledger.misuse(
                "a context was enqueued while another stream switches its profile"
            )
        if missing := self.infer_shapes():
            return self._refuse(f"shapes are missing: {missing}")
        if missing := [name for name in self.specs if not self.addresses.get(name)]:
            return self._refuse(f"addresses are missing: {missing}")
        if found.captured is not None and self.prepared != self.shapes:
            return self._refuse("new shapes cannot be captured: enqueue them once before")
        for present, past in self.aliases.items():
            if self.addresses[present] != self.addresses[past]:
                raise self.cuda.ledger.misuse(f"{present} and {past} must have one address")
        self._check_apart()
        self._compile()
        self.prepared = dict(self.shapes)
        shapes = self.shapes | self._output_shapes()
        memory, places = [], []
        for name, spec in self.specs.items():
            size = prod(shapes[name]) * DTYPE_BYTES[spec["dtype"]]
            memory.append(self.cuda.find("device memory", self.addresses[name], size, name))
            places.append((name, spec["dtype"], shapes[name], self.addresses[name]))
        inputs, outputs = places[: len(self.inputs)], places[len(self.inputs) :]
        # Neither may keep the context alive: it could not be released too early then.
        run = partial(_run, self.cuda, self.onnx, inputs, outputs)
        self.cuda.put(stream, Work("an engine", run, memory, context=self.handle))
        return True

    def _check_apart(self) -> None:
        """Outputs share memory with inputs only where the engine says so."""
        inputs = {self.addresses[name]: name for name in self.inputs}
        for name in self.specs.keys() - set(self.inputs) - self.aliases.keys():
            if self.addresses[name] in inputs:
                raise self.cuda.ledger.misuse(
                    f"{name} has the address of {inputs[self.addresses[name]]}, which the engine "
                    "does not allow"
                )

    def _compile(self) -> None:
        """Kernels are compiled for each new shape, unless the runtime cache has them."""
        entry = json.dumps([self.profile, sorted(self.shapes.items())])
        if entry not in self.entries:
            self.entries.append(entry)
            self.trt.compiled.append(entry)

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        batch, wanted = self.shapes["logits_index"]
        sizes = {"B": batch, "M": wanted}
        return {
            name: tuple(sizes.get(size, size) for size in spec["shape"])
            for name, spec in self.specs.items()
            if name not in self.inputs
        }


def _run(cuda: FakeCuda, onnx: str, inputs: list[Any], outputs: list[Any]) -> None:
    session = _session(onnx)
    binding = session.io_binding()
    for bind, places in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, dtype, shape, address in places:
            bind(name, "cpu", 0, np.dtype(dtype), shape, address)
    _check_slots(cuda, {name: place for name, *place in inputs})
    session.run_with_iobinding(binding)


def _check_slots(cuda: FakeCuda, inputs: dict[str, list[Any]]) -> None:
    """That writes stay inside the cache is the caller's duty."""
    dtype, shape, address = inputs["write_index"]
    size = prod(shape) * DTYPE_BYTES[dtype]
    part = cuda.find("device memory", address, size, "an input").part(address, size)
    slots = part.view(dtype).reshape(shape)
    length = inputs["input_ids"][1][1]
    capacity = next(shape[2] for n, (_, shape, _) in inputs.items() if n.startswith("past"))
    if (slots < 0).any() or (slots + length > capacity).any():
        raise cuda.ledger.misuse(
            f"{length} tokens from slots {slots.tolist()} pass the end of a cache of {capacity}"
        )
