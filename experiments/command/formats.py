"""`lpsim formats`: the formats as a table, drawn, proved, compared."""

import argparse
import sys
from pathlib import Path
from typing import Any

from experiments.command import compare
from experiments.command.shared import UserError, add_define, define, user_errors


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "formats",
        help="the number formats that exist, as a table; drawn; proved",
        usage="lpsim formats [--plot FILE] [--define FILE] [NAME ...]\n"
        "       lpsim formats check NAME [--define FILE] [--exhaustive]\n"
        "       lpsim formats compare NAME ... [--tensors FILE | --run RUN | --distribution NAME] [--plot FILE]",
    )
    parser.add_argument("words", nargs="*", metavar="NAME", help="formats (default: all of them, some to draw)")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw value lines and relative errors (.png, .svg, .pdf)"
    )
    parser.add_argument("--exhaustive", action="store_true", help="check: walk all 2^32 float32 inputs, in minutes")
    compare.add_options(parser)
    add_define(parser)
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> int:
    from experiments.command import formats_table
    from lpsim.conformance import ConformanceError

    define(options.define)
    if options.words[:1] == ["compare"]:
        with user_errors():
            return compare.run(options)
    if misplaced := compare.misplaced(options):
        raise UserError(misplaced)
    checked = options.words[:1] == ["check"]
    if checked and len(options.words) != 2:
        raise UserError("check takes the name of one format: lpsim formats check NAME")
    if options.exhaustive and not checked:
        raise UserError("--exhaustive goes with check: lpsim formats check NAME --exhaustive")
    try:
        if checked:
            result = formats_table.check(options.words[1], options.exhaustive)
        elif options.plot:
            from experiments.command.formats_plot import plot

            plot(options.words, options.plot)
            result = str(options.plot)
        else:
            result = formats_table.text(formats_table.table(options.words))
    except ConformanceError as error:
        print(f"lpsim: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(result)
    return 0
