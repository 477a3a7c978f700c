"""Systems for the tests of measuring, to be opened in processes of their own."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.backends.base import Ids
from runtime.system_process import Timing


class FakeSystem:
    """Writes down each run in a file and reports round times.

    Attributes:
        backend: what it calls itself.
        variant: always `fp32`.
    """

    variant = "fp32"

    def __init__(self, name: str, log: Path) -> None:
        self.backend = name
        self._log = log

    def run(self, prompts: Ids, output_len: int) -> Timing:
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{self.backend} {','.join(map(str, prompts.ravel()))}\n")
        print("a library that prints")
        return Timing(ttft_s=0.5, step_s=(0.25,) * (output_len - 1))

    def close(self) -> None:
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{self.backend} closed\n")


class DyingSystem(FakeSystem):
    """Its process ends in the middle of a run."""

    def run(self, prompts: Ids, output_len: int) -> Timing:
        os._exit(7)


class StrangeError(Exception):
    """Cannot be unpickled."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


def open_fake(name: str, log: Path) -> FakeSystem:
    return FakeSystem(name, log)


def open_dying(name: str, log: Path) -> FakeSystem:
    return DyingSystem(name, log)


def refuse() -> FakeSystem:
    raise ValueError("nothing to open")


def fail_strangely() -> FakeSystem:
    raise StrangeError("odd", "ness")


def die() -> FakeSystem:
    os._exit(3)
