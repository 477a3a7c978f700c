"""Show what a bundle holds: python runtime/inspect_bundle.py BUNDLE [--verify].

With `--verify` every file is hashed and every model is looked at for whether it can run here; the
exit status is 3 when a file is not as the manifest says, or when nothing can run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.bundle import Bundle
from runtime.bundle_report import bundle_report, printed_report
from runtime.bundle_verification import printed_verification, verify_bundle
from runtime.command import NEGATIVE, SUCCESS, CommandParser, print_json, run_command

ERRORS = (OSError, ValueError)


def make_parser() -> CommandParser:
    """The command's arguments."""
    parser = CommandParser("inspect_bundle", __doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="hash every file and say which models can run on this machine; exit status 3 when a "
        "file was altered or nothing can run",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Report, verify when asked to, print."""
    bundle = Bundle.open(arguments.bundle)
    report = bundle_report(bundle)
    verified = verify_bundle(bundle) if arguments.verify else None
    if arguments.json:
        print_json({**report, "verify": None if verified is None else verified.as_dict()})
    else:
        lines = printed_report(report)
        if verified is not None:
            lines += ["", *printed_verification(verified)]
        print("\n".join(lines))
    return SUCCESS if verified is None or verified.passed else NEGATIVE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(make_parser(), run, argv, ERRORS)


if __name__ == "__main__":
    sys.exit(main())
