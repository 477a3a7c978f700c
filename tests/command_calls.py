"""Commands as tests call them: arguments in, exit status and what was printed out."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.command import SUCCESS

Main = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        result: dict[str, Any] = json.loads(self.out)
        return result


@dataclass(frozen=True)
class Built:
    """A bundle and what the build printed about it; not to be changed."""

    path: Path
    report: dict[str, Any]

    def __str__(self) -> str:
        return str(self.path)


Call = Callable[..., Outcome]


def build_bundle(*arguments: object) -> dict[str, Any]:
    """What the build command says about the bundle that it made."""
    # Here, because conftest.py imports this module before it chooses how kernels run.
    from export import build_engine

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = build_engine.main([*map(str, arguments), "--json", "--quiet"])
    assert status == SUCCESS, printed.getvalue()
    report: dict[str, Any] = json.loads(printed.getvalue())
    return report
