"""A stand-in for `cuda.bindings.runtime` over host memory.

What is put on a stream is done when the stream is synchronized, not before: results are not there
earlier (pinned memory that is copied to holds a pattern until then), and pinned memory that is
copied from must not have changed by then. Memory is never zero by itself.
"""

from __future__ import annotations

import enum
import hashlib
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests.fake_tensorrt.ledger import Ledger

PATTERN = 0xA5
_ALIGNMENT = 512  # what cudaMalloc gives


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorIllegalAddress = 700


class CopyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class CaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


@dataclass
class Memory:
    """One allocation."""

    kind: str
    address: int
    size: int
    array: Any
    handle: int

    def part(self, address: int, size: int) -> Any:
        begin = address - self.address + self.offset
        return self.array[begin : begin + size]

    @property
    def offset(self) -> int:
        return self.address - int(self.array.ctypes.data)


@dataclass
class Work:
    """One thing on a stream."""

    what: str
    run: Callable[[], None]
    memory: list[Memory]
    on_enqueue: Callable[[], None] = lambda: None
    context: int | None = None
    check: Callable[[], None] = lambda: None


@dataclass
class FakeStream:
    handle: int
    pending: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None
    done: int = 0  # how much was on it and is no more

    def __int__(self) -> int:
        return self.handle


@dataclass
class FakeEvent:
    handle: int
    stream: int = 0
    number: int = 0

    def __int__(self) -> int:
        return self.handle


@dataclass
class FakeGraph:
    handle: int
    work: list[Work]

    def __int__(self) -> int:
        return self.handle


class FakeCuda(ModuleType):
    """The module; its GPU is described by attributes that tests set.

    Attributes:
        ledger: live handles and broken rules.
        failures: what the call of a name gives instead of its result, once.
        captures: whether streams can be captured; if not, the end of a capture says so.
        calls: how often each function was called.
    """

    cudaError_t = Status
    cudaMemcpyKind = CopyKind
    cudaStreamCaptureMode = CaptureMode
    cudaHostAllocDefault = 0
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.ledger = Ledger()
        self.name_of_gpu = b"NVIDIA GeForce RTX 4090\0"
        self.capability = (8, 9)
        self.driver = 13000
        self.gpus = 1
        self.total_bytes = 24 * 10**9
        self.used_bytes = 0
        self.failures: dict[str, Status] = {}
        self.captures = True
        self.calls: dict[str, int] = {}
        self._memory: dict[int, Memory] = {}
        self._sorted: list[int] = []
        self.streams: dict[int, FakeStream] = {}
        self._graphs: dict[int, FakeGraph] = {}
        self._events: dict[int, FakeEvent] = {}

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(value) or isinstance(value, type):
            return value

        def call(*arguments: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            if name in self.failures:
                return (self.failures.pop(name), None)
            return value(*arguments)

        return call

    # What there is.

    def cudaGetDeviceCount(self) -> tuple[Status, int | None]:
        if self.driver < 13000:
            return Status.cudaErrorInsufficientDriver, None
        return (Status.cudaSuccess if self.gpus else Status.cudaErrorNoDevice), self.gpus

    def cudaGetDevice(self) -> tuple[Status, int]:
        return Status.cudaSuccess, 0

    def cudaDriverGetVersion(self) -> tuple[Status, int]:
        return Status.cudaSuccess, self.driver

    def cudaGetDeviceProperties(self, device: int) -> tuple[Status, Any]:
        assert device == 0
        major, minor = self.capability
        return Status.cudaSuccess, SimpleNamespace(name=self.name_of_gpu, major=major, minor=minor)

    def cudaMemGetInfo(self) -> tuple[Status, int, int]:
        return Status.cudaSuccess, self.total_bytes - self.used_bytes, self.total_bytes

    # Memory.

    def reserve(self, size: int) -> bool:
        """Memory that the library takes for itself."""
        if self.used_bytes + size > self.total_bytes:
            return False
        self.used_bytes += size
        return True

    def cudaMalloc(self, size: int) -> tuple[Status, int | None]:
        if size <= 0 or not self.reserve(size):
            return Status.cudaErrorMemoryAllocation, None
        return Status.cudaSuccess, self._allocate("device memory", size)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Status, int]:
        assert flags == 0
        return Status.cudaSuccess, self._allocate("pinned memory", size)

    def cudaFree(self, address: int) -> tuple[Status]:
        self.used_bytes -= self._free("device memory", address)
        return (Status.cudaSuccess,)

    def cudaFreeHost(self, address: int) -> tuple[Status]:
        self._free("pinned memory", address)
        return (Status.cudaSuccess,)

    def find(self, kind: str, address: int, size: int, what: str) -> Memory:
        """The live allocation that has all of `size` bytes from `address`."""
        place = bisect_right(self._sorted, address)
        memory = self._memory[self._sorted[place - 1]] if place else None
        if memory is None or address >= memory.address + memory.size or memory.kind != kind:
            raise self.ledger.misuse(f"{what}: {address:#x} is in no live {kind}")
        if address + size > memory.address + memory.size:
            raise self.ledger.misuse(
                f"{what}: {size} bytes from {address:#x} pass the end of the {kind}"
            )
        return memory

    def _allocate(self, kind: str, size: int) -> int:
        array = np.full(size + _ALIGNMENT, PATTERN, np.uint8)
        address = -(-int(array.ctypes.data) // _ALIGNMENT) * _ALIGNMENT
        memory = Memory(kind, address, size, array, self.ledger.born(kind))
        self._memory[address] = memory
        self._sorted.insert(bisect_right(self._sorted, address), address)
        return address

    def _free(self, kind: str, address: int) -> int:
        memory = self._memory.get(address)
        if memory is None or memory.kind != kind:
            raise self.ledger.misuse(f"freeing {address:#x}, which is no live {kind}")
        for stream in self.streams.values():
            if any(used is memory for work in stream.pending for used in work.memory):
                raise self.ledger.misuse(f"{kind} was freed that work on a stream still uses")
        del self._memory[address]
        self._sorted.remove(address)
        self.ledger.died(memory.handle)
        return memory.size

    def drop_leaked(self) -> None:
        """Forget what a test has leaked on purpose."""
        for memory in self._memory.values():
            self.ledger.died(memory.handle)
            self.used_bytes -= memory.size if memory.kind == "device memory" else 0
        for stream in self.streams.values():
            self.ledger.died(stream.handle)
        self._memory, self._sorted, self.streams = {}, [], {}

    # Streams.

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Status, FakeStream]:
        assert flags in (0, self.cudaStreamNonBlocking)
        stream = FakeStream(self.ledger.born("stream"))
        self.streams[stream.handle] = stream
        return Status.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: Any) -> tuple[Status]:
        found = self.stream(stream)
        if found.pending:
            raise self.ledger.misuse("a stream was destroyed with work on it")
        del self.streams[found.handle]
        self.ledger.died(found.handle)
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Status]:
        found = self.stream(stream)
        if found.captured is not None:
            return (Status.cudaErrorStreamCaptureUnsupported,)
        self._run(found, len(found.pending))
        return (Status.cudaSuccess,)

    def _run(self, stream: FakeStream, count: int) -> None:
        """Do the first things that are on a stream."""
        for _ in range(count):
            work = stream.pending[0]
            work.check()
            work.run()
            stream.pending.pop(0)
            stream.done += 1

    def stream(self, handle: Any) -> FakeStream:
        """The live stream of a handle, which is not the default one."""
        if int(handle) == 0:
            raise self.ledger.misuse("the default stream makes the library synchronize the device")
        if int(handle) not in self.streams:
            raise self.ledger.misuse(f"stream {int(handle)} was destroyed or never made")
        return self.streams[int(handle)]

    def put(self, stream: Any, work: Work) -> None:
        """Put work on a stream, or into the graph that it captures."""
        found = self.stream(stream)
        if found.captured is not None:
            found.captured.append(work)
            return
        for other in self.streams.values():
            if other is found:
                continue
            for pending in other.pending:
                shared = [used.kind for used in pending.memory if used in work.memory]
                if shared:
                    raise self.ledger.misuse(
                        f"{work.what} and {pending.what} use the same {shared[0]} on two streams "
                        "that nothing orders"
                    )
                if work.context is not None and pending.context == work.context:
                    raise self.ledger.misuse(
                        "one execution context was enqueued on two streams at once"
                    )
        work.on_enqueue()
        found.pending.append(work)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: CopyKind, stream: Any
    ) -> tuple[Status]:
        from_host = kind == CopyKind.cudaMemcpyHostToDevice
        to_host = kind == CopyKind.cudaMemcpyDeviceToHost
        ends = ["pinned memory" if host else "device memory" for host in (to_host, from_host)]
        into = self.find(ends[0], target, size, "the target of a copy")
        out_of = self.find(ends[1], source, size, "the source of a copy")
        given, taken = into.part(target, size), out_of.part(source, size)
        seen = [""]

        def note() -> None:
            if from_host:
                seen[0] = _digest(taken)
            if to_host:
                given[:] = PATTERN

        def check() -> None:
            if from_host and _digest(taken) != seen[0]:
                raise self.ledger.misuse(
                    "pinned memory was written to before the stream had copied it"
                )

        def run() -> None:
            given[:] = taken

        self.put(stream, Work("a copy", run, [into, out_of], note, check=check))
        return (Status.cudaSuccess,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Any) -> tuple[Status]:
        memory = self.find("device memory", address, size, "filling memory")
        part = memory.part(address, size)

        def run() -> None:
            part[:] = value

        self.put(stream, Work("filling", run, [memory]))
        return (Status.cudaSuccess,)

    # Events.

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Status, FakeEvent]:
        assert flags == self.cudaEventDisableTiming
        event = FakeEvent(self.ledger.born("event"))
        self._events[event.handle] = event
        return Status.cudaSuccess, event

    def cudaEventRecord(self, event: Any, stream: Any) -> tuple[Status]:
        found, on = self._event(event), self.stream(stream)
        if on.captured is not None:
            raise self.ledger.misuse("an event of the host was recorded into a graph")
        found.stream = on.handle
        found.number = on.done + len(on.pending)
        return (Status.cudaSuccess,)

    def cudaEventSynchronize(self, event: Any) -> tuple[Status]:
        found = self._event(event)
        on = self.streams.get(found.stream)
        if on is not None:
            self._run(on, found.number - on.done)
        return (Status.cudaSuccess,)

    def cudaEventDestroy(self, event: Any) -> tuple[Status]:
        self.ledger.died(self._events.pop(self._event(event).handle).handle)
        return (Status.cudaSuccess,)

    def _event(self, handle: Any) -> FakeEvent:
        if int(handle) not in self._events:
            raise self.ledger.misuse(f"event {int(handle)} was destroyed or never made")
        return self._events[int(handle)]

    # Graphs.

    def cudaStreamBeginCapture(self, stream: Any, mode: CaptureMode) -> tuple[Status]:
        assert isinstance(mode, CaptureMode)
        found = self.stream(stream)
        if found.captured is not None:
            raise self.ledger.misuse("the stream is being captured already")
        found.captured = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Status, FakeGraph | None]:
        found = self.stream(stream)
        if found.captured is None:
            return Status.cudaErrorInvalidValue, None
        captured, found.captured = found.captured, None
        if not self.captures:
            return Status.cudaErrorStreamCaptureUnsupported, None
        graph = FakeGraph(self.ledger.born("graph"), captured)
        self._graphs[graph.handle] = graph
        return Status.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Status, FakeGraph]:
        assert flags == 0
        made = FakeGraph(self.ledger.born("executable graph"), self._graphs[int(graph)].work)
        self._graphs[made.handle] = made
        return Status.cudaSuccess, made

    def cudaGraphDestroy(self, graph: Any) -> tuple[Status]:
        self.ledger.died(self._graphs.pop(int(graph)).handle)
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Status]:
        return self.cudaGraphDestroy(graph)

    def cudaGraphLaunch(self, graph: Any, stream: Any) -> tuple[Status]:
        if int(graph) not in self._graphs:
            raise self.ledger.misuse("a graph was launched that was destroyed")
        if self.stream(stream).captured is not None:
            raise self.ledger.misuse("a graph was launched on a stream that is being captured")
        for work in self._graphs[int(graph)].work:
            if work.context is not None and not self.ledger.lives(work.context):
                raise self.ledger.misuse("a graph was launched whose context was released")
            for memory in work.memory:
                if self._memory.get(memory.address) is not memory:
                    raise self.ledger.misuse("a graph uses memory that was freed")
            self.put(stream, work)
        return (Status.cudaSuccess,)


def _digest(part: Any) -> str:
    return hashlib.sha256(part.tobytes()).hexdigest()
