"""The installed form of the scripts: `dogetrt build ...` is `python export/build_engine.py ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "build": "export.build_engine",
    "generate": "runtime.generate",
    "score": "runtime.score",
    "compare": "runtime.compare",
    "benchmark": "runtime.benchmark",
    "audit": "runtime.audit",
    "inspect": "runtime.inspect_bundle",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments to the command that the first one names."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    usage = f"usage: dogetrt {{{','.join(COMMANDS)}}} ...; each has --help"
    if arguments and arguments[0] in {"-h", "--help"}:
        print(usage)
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        print(usage, file=sys.stderr)
        return 2
    status: int = importlib.import_module(COMMANDS[arguments[0]]).main(arguments[1:])
    return status
