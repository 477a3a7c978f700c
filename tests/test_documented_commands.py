"""Every command that README and documents show is one that the command line takes."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.test_readme import DOCUMENTS

ROOT = Path(__file__).parents[1]
# A whole line of a code block, or a span of code; `...` and `…` stand for what is left out there.
SHOWN = re.compile(r"(?:^|`|\| )python (export|runtime)/(\w+)\.py( [^`\n]*)?(?:`|$)", re.MULTILINE)


def commands():
    for document in DOCUMENTS:
        # A backslash ends a line whose command goes on; behind two spaces and # is a remark.
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for folder, name, arguments in SHOWN.findall(text):
            line = re.split(r"\s+#|\s*[|&>] ", arguments)[0]
            # A name without arguments may be one of a file rather than a command.
            if line.strip() and "…" not in line and "..." not in line:
                yield pytest.param(folder, name, line, id=f"{document.name}: {name}{line}"[:120])


@pytest.mark.parametrize(("folder", "name", "line"), [*commands()])
def test_a_command_is_taken(folder, name, line, capsys):
    module = importlib.import_module(f"{folder}.{name}")
    # `a|b`, `A[,A...]` and `[FLAGS]` describe a choice rather than show a command.
    arguments = [word.split("|")[0] for word in shlex.split(line) if not word.startswith("[")]
    try:
        module.make_parser().parse_args(arguments)
    except SystemExit as ended:
        assert ended.code == 0, capsys.readouterr().err  # --help
