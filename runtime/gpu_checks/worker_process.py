"""A measurement in a process of its own, whose death or silence ends nothing else."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.gpu_checks.machine_paths import without_machine_paths
from runtime.gpu_checks.section import Verdict

# What a process said is kept from its end, where the reason stands.
_SAID_CHARACTERS = 4000


@dataclass(frozen=True, kw_only=True)
class WorkerResult:
    """What is known of a process that has ended.

    Attributes:
        found: what it wrote; empty where it wrote nothing.
        ended: how it ended, None where it ended well.
        said: what it printed and the error that ended it, folders of the machine replaced; None
            where that is nothing.
    """

    found: Mapping[str, Any]
    ended: str | None
    said: str | None

    @property
    def verdict(self) -> Verdict:
        """Its own; a process that died has failed, whatever it wrote before."""
        verdict: Verdict = "fail" if self.ended else self.found["verdict"]
        return verdict


def run_worker(module: str, arguments: Sequence[str], seconds: float) -> WorkerResult | None:
    """Run a module that writes JSON with a `verdict`, and perhaps an `error`, to `--output`.

    Args:
        module: its name.
        arguments: of its command line, without `--output`.
        seconds: that it may take.

    Returns:
        None where it took longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", module, *arguments, "--output", str(result)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, timeout=seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
        found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    printed = done.stdout.decode("utf-8", errors="replace").strip()
    ended = _ended(done.returncode)
    said = "\n".join(text for text in (printed, found.get("error"), ended) if text)
    said = without_machine_paths(said)[-_SAID_CHARACTERS:]
    return WorkerResult(found=found, ended=ended, said=said or None)


def _ended(status: int) -> str | None:
    """How a process ended, None where it ended well."""
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process ended with status {status}" if status else None
