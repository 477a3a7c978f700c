"""What the engine builder calls back: its log, its progress, and Ctrl-C.

The classes derive from the product's own, which is only known once it is imported; hence the
functions around them.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class ProgressSink(Protocol):
    """Where the builder's phases are shown; `rich.progress.Progress` fits through an adapter."""

    def start(self, phase: str, steps: int) -> None:
        """Begin a phase of `steps` steps."""

    def advance(self, phase: str, step: int) -> None:
        """Step number `step` of the phase is done."""

    def finish(self, phase: str) -> None:
        """The phase is over, or was cut short."""


class BuildLog:
    """Messages of one build.

    Attributes:
        errors: what to report when the build fails.
        messages: of the levels INFO and VERBOSE, in order; `export.plan` reads the plan from them.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.messages: list[str] = []


def make_logger(trt: Any, log: BuildLog) -> Any:
    """A logger of the product that keeps what it is told and passes warnings on at debug level."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is untyped
        def log(self, severity: Any, msg: str) -> None:
            if severity in {trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR}:
                log.errors.append(msg)
                return
            if severity in {trt.ILogger.INFO, trt.ILogger.VERBOSE}:
                log.messages.append(msg)
            if severity != trt.ILogger.VERBOSE:
                logger.debug("%s", msg)

    return Logger()


def make_progress_monitor(trt: Any, sink: ProgressSink, cancelled: Callable[[], bool]) -> Any:
    """A monitor that reports phases to `sink` and stops the build once `cancelled()` is true."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base class is untyped
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            sink.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            sink.advance(phase_name, step + 1)
            return not cancelled()

        def phase_finish(self, phase_name: str) -> None:
            sink.finish(phase_name)

    return Monitor()


@contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C into a flag that the monitor reads, and raise KeyboardInterrupt at the end.

    An exception must not fly through the builder's C++ frames. Outside the main thread, where
    Python delivers no signals, the flag stays down.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted.is_set
        return

    def note(signum: int, frame: FrameType | None) -> None:
        interrupted.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupted.is_set():
        raise KeyboardInterrupt
