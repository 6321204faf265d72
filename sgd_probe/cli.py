"""The command line: ``sgd-probe report``, ``sgd-probe compare`` and ``sgd-probe demo``.

What a command needs is imported when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sgd_probe import __version__

_PROGRAM = "sgd-probe"
_USAGE_ERROR = 2


class _Parser(argparse.ArgumentParser):
    """Argparse prints its usage before an error; one line that names the help is enough."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments without the program's name; those of the process if None.

    Returns:
        The exit code: 0, or 2 after an error that was told in one line on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # The demo parses its own arguments, so that "sgd-probe demo --help" is its help.
        return _demo(arguments[1:]) if arguments[:1] == ["demo"] else _run(_parser().parse_args(arguments))
    except (ImportError, OSError, ValueError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{_PROGRAM}: error: {message}", file=sys.stderr)
        return _USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROGRAM, description="How SGD moves along the stiff and the flat directions of a loss."
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    report = commands.add_parser("report", help="write the page of a run", description="Write a run's page.")
    report.add_argument(
        "run_folder", type=Path, metavar="RUN_FOLDER", help="folder that holds run.json and windows.jsonl"
    )
    report.add_argument(
        "--output", type=Path, metavar="PATH", help="file to write (default: report.html in the run folder)"
    )
    compare = commands.add_parser(
        "compare", help="write one page of several runs", description="Write one page of several runs."
    )
    compare.add_argument(
        "run_folders",
        type=Path,
        nargs="+",
        metavar="RUN_FOLDER",
        help="two or more; the first is the reference",
    )
    compare.add_argument(
        "--output", type=Path, default=Path("comparison.html"), metavar="PATH", help="file (%(default)s)"
    )
    commands.add_parser("demo", help="train a small network with the probe (see demo --help)", add_help=False)
    return parser


def _run(options: argparse.Namespace) -> int:
    # The demo never comes here: it parses its own arguments.
    if options.command == "compare":
        from sgd_probe.report.compare import write_comparison

        found = write_comparison(options.run_folders, options.output)
        print(*found.checks(), options.output, sep="\n")
        return 0
    from sgd_probe.report.html import write_report

    print(write_report(options.run_folder, options.output))
    return 0


def _demo(arguments: Sequence[str]) -> int:
    from sgd_probe.demo import main as demo

    return demo(arguments)


if __name__ == "__main__":
    sys.exit(main())
