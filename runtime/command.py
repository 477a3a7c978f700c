"""What every command shares: `--json`, `--quiet`, `--verbose`, exit statuses, one-line errors.

Results go to stdout; progress and messages go to stderr. Exit status: 0 success, 1 an error told in
one line, 2 wrong usage, 3 a check with a negative verdict, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

SUCCESS, FAILURE, USAGE, NEGATIVE, INTERRUPTED = 0, 1, 2, 3, 130


class UsageError(Exception):
    """The command line asks for something that makes no sense together."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends defaults, except None, whose meaning each flag's help says in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """An argument parser with the flags that all commands have."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=_HelpFormatter,
        )
        self.add_argument("--json", action="store_true", help="print one JSON object to stdout")
        volume = self.add_mutually_exclusive_group()
        volume.add_argument("--quiet", action="store_true", help="no progress and no messages")
        volume.add_argument("--verbose", action="store_true", help="messages of every stage")

    def error(self, message: str) -> NoReturn:
        """Report wrong usage instead of exiting from inside the parser."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def run_command(
    parser: CommandParser,
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
    errors: tuple[type[Exception], ...],
) -> int:
    """Parse, run, and turn what goes wrong into a line and an exit status.

    Args:
        parser: the command's parser.
        run: does the work and returns the exit status.
        argv: arguments, the process's own when None.
        errors: what is told in one line; anything else is a bug and keeps its traceback.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    as_json = "--json" in arguments
    try:
        namespace = parser.parse_args(arguments)
        _set_up_messages(namespace)
        return run(namespace)
    except UsageError as error:
        return _report(parser.prog, "usage", str(error), as_json, USAGE)
    except BrokenPipeError:
        # The reader of our output has left (`| head`). Nothing more can be told to it; closing
        # stderr keeps the interpreter from complaining about stdout at exit.
        sys.stderr.close()
        return FAILURE
    except errors as error:
        return _report(parser.prog, type(error).__name__, str(error), as_json, FAILURE)
    except KeyboardInterrupt:
        return _report(parser.prog, "interrupted", "interrupted", as_json, INTERRUPTED)


def print_json(result: dict[str, Any]) -> None:
    """Print the command's one JSON object to stdout."""
    json.dump(result, sys.stdout, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def _set_up_messages(namespace: argparse.Namespace) -> None:
    level = logging.INFO
    if namespace.quiet:
        level = logging.ERROR
    if namespace.verbose:
        level = logging.DEBUG
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    for package in ("plugins", "model", "runtime", "export"):
        logging.getLogger(package).setLevel(level)


def _report(prog: str, kind: str, message: str, as_json: bool, status: int) -> int:
    if as_json:
        print_json({"error": {"kind": kind, "message": message}})
    print(f"{prog}: {message}", file=sys.stderr)
    return status
