"""The `lpsim` command. Every command is a module of this folder with `add`, which registers its parser.

A mistake of the user gives one message and exit code 2; a grid with failed runs exits with 1, an interrupted one with
130.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from experiments.command import (
    attribute,
    bench,
    data,
    evaluate,
    export,
    formats,
    frontier,
    new,
    report,
    run,
    runs,
    tune,
)
from experiments.command.shared import UserError

COMMANDS = (formats, evaluate, attribute, new, data, run, tune, frontier, runs, report, export, bench)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="lpsim", description="Low-precision arithmetic, simulated.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    options = parser.parse_args(arguments)
    options.argv = ["lpsim", *arguments]
    try:
        return int(options.function(options))
    except UserError as error:
        print(f"lpsim: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lpsim: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lpsim formats | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
