"""The stand-in refuses what the real libraries' documentation forbids: each rule, broken once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.tensorrt_module import load_tensorrt
from tests.fake_tensorrt import FakeGpu
from tests.fake_tensorrt.cuda import PATTERN, CaptureMode, CopyKind, FakeCuda, Status
from tests.fake_tensorrt.engine_file import add_fake_engine
from tests.fake_tensorrt.ledger import MisuseError

UP, DOWN = CopyKind.cudaMemcpyHostToDevice, CopyKind.cudaMemcpyDeviceToHost
ON_DEVICE = CopyKind.cudaMemcpyDeviceToDevice
SMALL = {"input_ids": 1, "position_ids": 1, "write_index": 0, "logits_index": 1}


@dataclass
class Machine:
    """A context that is ready to run one decode step of one row, by the rules."""

    cuda: FakeCuda
    trt: Any
    logger: Any
    runtime: Any
    engine: Any
    config: Any
    context: Any
    said: list[str]
    stream: Any
    addresses: dict[str, int]

    def prepare(self) -> None:
        assert self.context.set_optimization_profile_async(0, int(self.stream))
        self.cuda.cudaStreamSynchronize(self.stream)
        for name in self.engine.inputs:
            shape = [1 if isinstance(n, str) else n for n in self.engine.specs[name]["shape"]]
            assert self.context.set_input_shape(name, tuple(shape))
        for name, address in self.addresses.items():
            assert self.context.set_tensor_address(name, address)

    def run(self) -> bool:
        done: bool = self.context.execute_async_v3(int(self.stream))
        return done

    def wait(self) -> None:
        self.cuda.cudaStreamSynchronize(self.stream)


@pytest.fixture
def machine(
    engine_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    bundle = add_fake_engine(engine_source, tmp_path / "bundle")
    blob = bundle.executable_file(bundle.variant("tensorrt_rtx")).read_bytes()
    gpu = FakeGpu.install(monkeypatch)
    said: list[str] = []

    class Logger(gpu.trt.ILogger):  # type: ignore[name-defined, misc]
        def log(self, severity: Any, text: str) -> None:
            said.append(text)

    logger = Logger()
    runtime = gpu.trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(blob)
    config = engine.create_runtime_config()
    context = engine.create_execution_context(config)
    stream = gpu.cuda.cudaStreamCreateWithFlags(1)[1]
    addresses = {}
    for name, spec in engine.specs.items():
        shape = [1 if isinstance(n, str) else n for n in spec["shape"]]
        size = 8 * int(np.prod(shape))
        addresses[name] = gpu.cuda.cudaMalloc(size)[1]
        gpu.cuda.cudaMemsetAsync(addresses[name], 0, size, stream)
    addresses |= {present: addresses[past] for present, past in engine.aliases.items()}
    made = Machine(
        gpu.cuda, gpu.trt, logger, runtime, engine, config, context, said, stream, addresses
    )
    del logger, runtime, engine, config, context
    yield made


def test_a_step_by_the_rules_runs_when_the_stream_is_synchronized(machine: Machine) -> None:
    machine.prepare()
    host = machine.cuda.cudaHostAlloc(8, 0)[1]
    assert machine.run()
    machine.cuda.cudaMemcpyAsync(host, machine.addresses["logits"], 8, DOWN, machine.stream)
    seen = machine.cuda.find("pinned memory", host, 8, "a test").part(host, 8)
    assert (seen == PATTERN).all(), "nothing is there before the stream has passed"
    machine.wait()
    assert np.isfinite(seen.view(np.float32)).all()
    assert machine.cuda.ledger.violations == []


# What the real library notices: it answers False and tells its logger.
NOTICED: dict[str, tuple[Callable[[Machine], object], str]] = {
    "shape outside the profile": (
        lambda m: m.context.set_input_shape("input_ids", (1, 2)),
        r"input_ids: \(1, 2\) is outside",
    ),
    "unknown input": (lambda m: m.context.set_input_shape("ids", (1, 1)), "ids is no input"),
    "unknown tensor": (lambda m: m.context.set_tensor_address("ids", 256), "ids is no tensor"),
    "address not aligned": (
        lambda m: m.context.set_tensor_address("logits", m.addresses["logits"] + 128),
        "not aligned to 256",
    ),
    "unknown profile": (
        lambda m: m.context.set_optimization_profile_async(2, int(m.stream)),
        "profile 2 does not exist",
    ),
    "shapes not set again after a switch": (
        lambda m: m.context.set_optimization_profile_async(1, int(m.stream)) and m.run(),
        "shapes are missing",
    ),
    "an address not set": (
        lambda m: m.context.set_tensor_address("logits", 0) and m.run(),
        r"addresses are missing: \['logits'\]",
    ),
    "capture of a shape that has not run": (
        lambda m: m.cuda.cudaStreamBeginCapture(m.stream, CaptureMode(1)) and m.run(),
        "cannot be captured",
    ),
}


@pytest.mark.parametrize("what", NOTICED)
def test_what_the_library_notices_is_false_and_told(machine: Machine, what: str) -> None:
    machine.prepare()
    act, text = NOTICED[what]
    assert act(machine) is False
    assert any(re.search(text, line) for line in machine.said)


def _two_streams(m: Machine) -> None:
    m.run()
    m.context.execute_async_v3(int(m.cuda.cudaStreamCreateWithFlags(1)[1]))


def _overwrite(m: Machine) -> None:
    host = m.cuda.cudaHostAlloc(8, 0)[1]
    m.cuda.cudaMemcpyAsync(m.addresses["logits"], host, 8, UP, m.stream)
    m.cuda.find("pinned memory", host, 8, "a test").part(host, 8)[:] = 1
    m.wait()


def _pageable(m: Machine) -> None:
    array = np.zeros(2)
    m.cuda.cudaMemcpyAsync(m.addresses["logits"], array.ctypes.data, 8, UP, m.stream)


def _free_in_use(m: Machine) -> None:
    m.run()
    m.cuda.cudaFree(m.addresses["logits"])


def _freed(m: Machine) -> None:
    m.wait()
    m.cuda.cudaFree(m.addresses["logits"])
    m.run()


def _small(m: Machine) -> None:
    address = m.cuda.cudaMalloc(16)[1]
    assert m.context.set_tensor_address("logits", address)
    m.run()


def _apart(m: Machine) -> None:
    past, present = "past_key_values.0.key", "present.0.key"
    other = m.cuda.cudaMalloc(m.cuda.find("device memory", m.addresses[past], 1, past).size)[1]
    m.context.set_tensor_address(present, other)
    m.run()


def _output_over_an_input(m: Machine) -> None:
    assert m.context.set_tensor_address("logits", m.addresses["input_ids"])
    m.run()


def _event_of_a_destroyed_one(m: Machine) -> None:
    event = m.cuda.cudaEventCreateWithFlags(2)[1]
    m.cuda.cudaEventDestroy(event)
    m.cuda.cudaEventRecord(event, m.stream)


def _event_in_a_graph(m: Machine) -> None:
    m.wait()
    event = m.cuda.cudaEventCreateWithFlags(2)[1]
    m.cuda.cudaStreamBeginCapture(m.stream, CaptureMode(1))
    m.cuda.cudaEventRecord(event, m.stream)


def _past_the_end(m: Machine) -> None:
    slots = m.cuda.find("device memory", m.addresses["write_index"], 8, "a test")
    m.wait()
    slots.part(slots.address, 8).view(np.int64)[:] = 420
    m.run()
    m.wait()


def _unordered(m: Machine) -> None:
    m.run()
    other = m.cuda.cudaStreamCreateWithFlags(1)[1]
    m.cuda.cudaMemsetAsync(m.addresses["logits"], 0, 8, other)


def _early_shape(m: Machine) -> None:
    m.context.set_optimization_profile_async(1, int(m.stream))
    m.context.set_input_shape("input_ids", (1, 1))


def _switch_elsewhere(m: Machine) -> None:
    m.context.set_optimization_profile_async(0, int(m.cuda.cudaStreamCreateWithFlags(1)[1]))
    m.run()


def _free_twice(m: Machine) -> None:
    address = m.cuda.cudaMalloc(8)[1]
    m.cuda.cudaFree(address)
    m.cuda.cudaFree(address)


def _graph_of_freed_memory(m: Machine) -> None:
    m.run()
    m.wait()
    m.cuda.cudaStreamBeginCapture(m.stream, CaptureMode(1))
    m.run()
    graph = m.cuda.cudaGraphInstantiate(m.cuda.cudaStreamEndCapture(m.stream)[1], 0)[1]
    m.cuda.cudaFree(m.addresses["logits"])
    m.cuda.cudaGraphLaunch(graph, m.stream)


def _graph_of_a_released_context(m: Machine) -> None:
    m.run()
    m.wait()
    m.cuda.cudaStreamBeginCapture(m.stream, CaptureMode(1))
    m.run()
    graph = m.cuda.cudaGraphInstantiate(m.cuda.cudaStreamEndCapture(m.stream)[1], 0)[1]
    m.context = None
    m.cuda.cudaGraphLaunch(graph, m.stream)


def test_two_contexts_on_one_stream_share_a_cache_and_an_event_waits_for_its_part_alone(
    machine: Machine,
) -> None:
    cuda = machine.cuda
    machine.prepare()
    second = machine.engine.create_execution_context(machine.config)
    assert machine.run()
    event = cuda.cudaEventCreateWithFlags(2)[1]
    cuda.cudaEventRecord(event, machine.stream)
    assert second.set_optimization_profile_async(0, int(machine.stream))
    host = cuda.cudaHostAlloc(8, 0)[1]
    cuda.cudaMemcpyAsync(host, machine.addresses["logits"], 8, DOWN, machine.stream)
    cuda.cudaEventSynchronize(event)
    seen = cuda.find("pinned memory", host, 8, "a test").part(host, 8)
    assert (seen == PATTERN).all(), "the copy came behind the event"
    machine.wait()
    assert np.isfinite(seen.view(np.float32)).all()
    machine.context, second = second, None
    machine.prepare()
    assert machine.run()
    machine.wait()
    assert cuda.ledger.violations == []


# What it does not notice: the outcome is undefined, so the stand-in raises.
UNDEFINED: dict[str, tuple[Callable[[Machine], object], str]] = {
    "the default stream": (lambda m: m.context.execute_async_v3(0), "default stream"),
    "one context on two streams": (_two_streams, "two streams"),
    "work on two streams that nothing orders": (_unordered, "that nothing orders"),
    "pinned memory overwritten too early": (_overwrite, "written to before the stream"),
    "a copy from memory that is not pinned": (_pageable, "is in no live pinned memory"),
    "memory freed in use": (_free_in_use, "freed that work on a stream still uses"),
    "an address of freed memory": (_freed, "is in no live device memory"),
    "a buffer that is too small": (_small, "pass the end of the device memory"),
    "an output at an input's address": (
        _output_over_an_input,
        "logits has the address of input_ids, which the engine does not allow",
    ),
    "an event that was destroyed": (_event_of_a_destroyed_one, "was destroyed or never made"),
    "an event of the host in a graph": (_event_in_a_graph, "recorded into a graph"),
    "past and present apart": (_apart, "must have one address"),
    "a write past the cache": (_past_the_end, "pass the end of a cache of 420"),
    "a shape before the switch is done": (_early_shape, "before the switch of profiles"),
    "a switch on another stream": (_switch_elsewhere, "another stream switches its profile"),
    "a graph of freed memory": (_graph_of_freed_memory, "a graph uses memory that was freed"),
    "a graph of a released context": (_graph_of_a_released_context, "whose context was released"),
    "memory freed twice": (
        _free_twice,
        "which is no live device memory",
    ),
    "a stream destroyed with work on it": (
        lambda m: m.run() and m.cuda.cudaStreamDestroy(m.stream),
        "destroyed with work on it",
    ),
    "a stream used after its end": (
        lambda m: m.wait() or (m.cuda.cudaStreamDestroy(m.stream) and m.run()),
        "was destroyed or never made",
    ),
}


@pytest.mark.parametrize("what", UNDEFINED)
def test_what_is_undefined_raises_with_the_rule(machine: Machine, what: str) -> None:
    machine.prepare()
    act, rule = UNDEFINED[what]
    with pytest.raises(MisuseError, match=rule):
        act(machine)
    assert len(machine.cuda.ledger.violations) == 1


@pytest.mark.parametrize(
    ("first", "needed_by"),
    [
        ("logger", "runtime"),
        ("runtime", "engine"),
        ("engine", "runtime config"),
        ("config", "execution context"),
    ],
)
def test_release_before_what_needs_it_is_noted(
    machine: Machine, first: str, needed_by: str
) -> None:
    setattr(machine, first, None)
    if first in {"logger", "runtime"}:
        # In the stand-in later objects hold the logger only to speak to it.
        machine.engine.logger = machine.context.logger = None
        if machine.runtime is not None:
            machine.runtime.logger = None
    notes = machine.cuda.ledger.violations
    assert any(f"before the {needed_by} that needs it" in note for note in notes), notes


def test_a_context_released_while_it_runs_is_noted(machine: Machine) -> None:
    machine.prepare()
    machine.run()
    machine.context = None
    assert "a context was released while it runs" in machine.cuda.ledger.violations


def test_names_of_the_stand_in_are_those_of_tensorrt_rtx(machine: Machine) -> None:
    """Where its package is installed: a call that only the stand-in has would prove nothing."""
    pytest.importorskip("tensorrt_rtx")
    real = load_tensorrt("tensorrt_rtx")
    kinds = {
        "Runtime": machine.runtime,
        "ICudaEngine": machine.engine,
        "IRuntimeConfig": machine.config,
        "IExecutionContext": machine.context,
        "IRuntimeCache": machine.config.create_runtime_cache(),
    }
    checked = 0
    for kind, fake in kinds.items():
        called = [name for name in dir(type(fake)) if not name.startswith("_") and name != "trt"]
        assert called, kind
        for name in called:
            assert hasattr(getattr(real, kind), name), f"{kind}.{name}"
            checked += 1
    for name in ("device_memory_size_v2", "num_io_tensors", "num_optimization_profiles"):
        assert hasattr(real.ICudaEngine, name)
        assert hasattr(machine.engine, name)
    assert checked > 20
    for name in (
        "EngineValidity",
        "EngineInvalidityDiagnostics",
        "CudaGraphStrategy",
        "DynamicShapesKernelSpecializationStrategy",
        "ComputeCapability",
        "TensorIOMode",
    ):
        fake_members = getattr(machine.trt, name).__members__
        assert fake_members.keys() <= getattr(real, name).__members__.keys(), name
    for name, member in machine.trt.EngineInvalidityDiagnostics.__members__.items():
        assert int(getattr(real.EngineInvalidityDiagnostics, name)) == int(member)


def test_a_stream_in_capture_cannot_be_waited_for(machine: Machine) -> None:
    machine.wait()
    machine.cuda.cudaStreamBeginCapture(machine.stream, CaptureMode(1))
    status = machine.cuda.cudaStreamSynchronize(machine.stream)
    assert status == (Status.cudaErrorStreamCaptureUnsupported,)


def test_memory_is_never_zero_by_itself_and_runs_out(machine: Machine) -> None:
    cuda = machine.cuda
    address = cuda.cudaMalloc(16)[1]
    assert (cuda.find("device memory", address, 16, "a test").part(address, 16) == PATTERN).all()
    cuda.total_bytes = cuda.used_bytes + 10
    assert cuda.cudaMalloc(11) == (Status.cudaErrorMemoryAllocation, None)
