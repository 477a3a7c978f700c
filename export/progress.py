"""Progress of a build on stderr, and how long each stage took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class BuildProgress:
    """Shows stages and the engine builder's phases; collects seconds per stage.

    It is a `ProgressSink` for the builder's phases.

    Attributes:
        timings: seconds by stage, in the order in which stages ended.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.timings: dict[str, float] = {}
        self._quiet = quiet
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=quiet,
            transient=True,
        )

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show progress while the block runs."""
        with self._progress:
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage and show it while it runs."""
        task = self._progress.add_task(name, total=None)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = time.perf_counter() - begin
            self._progress.remove_task(task)
            if not self._quiet:
                seconds = f"{self.timings[name]:.1f} s"
                self._progress.console.print(f"{name}: {seconds}", highlight=False)

    def start(self, phase: str, steps: int) -> None:
        """Begin a phase of the engine builder."""
        self._tasks[phase] = self._progress.add_task(f"  {phase}", total=steps)

    def advance(self, phase: str, step: int) -> None:
        """A phase has done `step` steps."""
        if phase in self._tasks:
            self._progress.update(self._tasks[phase], completed=step)

    def finish(self, phase: str) -> None:
        """A phase is over."""
        if phase in self._tasks:
            self._progress.remove_task(self._tasks.pop(phase))
