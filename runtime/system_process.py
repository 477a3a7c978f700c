"""A system under measurement in a process of its own, so that memory and threads are its own."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import resource
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Protocol, Self

from runtime.backends.base import Ids

# How long a process may take to close its system before it is ended.
_GRACE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One generation of a batch, in seconds.

    Attributes:
        ttft_s: from the prompt to the first token of every row.
        step_s: one number for each later token, from the token before it.
    """

    ttft_s: float
    step_s: tuple[float, ...]

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first, None where there is none."""
        return fmean(self.step_s) if self.step_s else None


class System(Protocol):
    """What can be measured: it generates greedily from a batch of prompts, again and again."""

    @property
    def backend(self) -> str:
        """What runs the model."""

    @property
    def variant(self) -> str:
        """Which of its models, e.g. `fp32`."""

    def run(self, prompts: Ids, output_len: int) -> Timing:
        """Generate `output_len` tokens from prompts [B, S], starting from an empty cache."""

    def close(self) -> None:
        """Give back what the system holds."""


Opener = Callable[[], System]


class SystemProcessError(Exception):
    """The process of a system ended by itself."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a process says once its system is ready.

    Attributes:
        backend: what runs the model.
        variant: which of its models.
        load_s: seconds that opening took, the import of the backend's packages included.
        device: what the system tells of the GPU that it uses, JSON-ready; None without one.
    """

    backend: str
    variant: str
    load_s: float
    device: Mapping[str, Any] | None = None


class SystemProcess:
    """Opens a system in a new process, runs it on demand, and ends with this one.

    The process waits at a pipe between runs. It ends when the pipe is closed, which also happens
    when this process is killed; Ctrl-C reaches this process alone, and leaving the `with` block by
    an exception ends the other at once.

    Attributes:
        label: names the system in errors.
        opened: what is running.
    """

    def __init__(self, label: str, open_system: Opener) -> None:
        """Start the process and wait until its system is open.

        Args:
            label: names the system in errors.
            open_system: picklable; what it needs is imported in the new process.

        Raises:
            SystemProcessError: the process died.
            Exception: whatever `open_system` raised.
        """
        self.label = label
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        level = logging.getLogger("runtime").getEffectiveLevel()
        self._process = context.Process(
            target=_serve, args=(theirs, open_system, level), name=label, daemon=True
        )
        # The tracker is started by the first process and would lift the mask set here.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            self.opened: Opened = self._receive()
        except BaseException:
            self.close(grace_s=0)
            raise

    def run(self, prompts: Ids, output_len: int) -> Timing:
        """As `System.run`, in the process."""
        self._send((prompts, output_len))
        timing: Timing = self._receive()
        return timing

    def peak_rss_mb(self) -> float:
        """Largest resident memory of the process so far, in MiB."""
        self._send(None)
        peak: float = self._receive()
        return peak

    def close(self, *, grace_s: float = _GRACE_S) -> None:
        """End the process; closing twice does no harm.

        Args:
            grace_s: seconds that the system has for closing itself.
        """
        self._pipe.close()
        self._process.join(grace_s)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(_GRACE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(grace_s=_GRACE_S if error is None else 0)

    def _send(self, request: object) -> None:
        try:
            self._pipe.send(request)
        except OSError as error:
            raise self._death() from error

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._death() from error
        if isinstance(answer, Exception):
            if answer.args == (str(answer),):
                answer.args = (f"{self.label}: {answer}",)
            raise answer
        return answer

    def _death(self) -> SystemProcessError:
        self._process.join(_GRACE_S)
        code = self._process.exitcode
        hint = ""
        if code == -signal.SIGKILL:
            hint = "; it was killed, probably for want of memory: measure fewer systems at once"
        return SystemProcessError(f"{self.label}: its process ended with exit code {code}{hint}")


def describe_opened(system: System, load_s: float) -> Opened:
    """What is told of a system that is ready; one without a GPU need not know of `device`."""
    return Opened(
        backend=system.backend,
        variant=system.variant,
        load_s=load_s,
        device=getattr(system, "device", None),
    )


def _serve(pipe: Connection, open_system: Opener, log_level: int) -> None:
    """What the process does: open, then answer until the pipe is closed."""
    os.dup2(2, 1)  # stdout belongs to the result, and some libraries print to it
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("runtime").setLevel(log_level)
    try:
        begin = time.perf_counter()
        system = open_system()
        load_s = time.perf_counter() - begin
        pipe.send(describe_opened(system, load_s))
        try:
            while True:
                request = pipe.recv()
                pipe.send(_peak_rss_mb() if request is None else system.run(*request))
        finally:
            system.close()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # nobody is listening any more
    except Exception as error:
        _report(pipe, error)


def _report(pipe: Connection, error: Exception) -> None:
    """Send an error, as text where it cannot travel by itself."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling calls code of the exception's class, which may raise anything
        error = RuntimeError("".join(traceback.format_exception(error)))
    try:
        pipe.send(error)
    except OSError:
        return  # nobody is listening any more


def _peak_rss_mb() -> float:
    """Largest resident memory of this process, in MiB.

    Linux counts `ru_maxrss` on from the process that started this one, so its own mark is read.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
