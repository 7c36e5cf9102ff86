"""`lpsim report`: one HTML file from run folders."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.command.shared import UserError
from experiments.command.watch import watch


def add(commands: Any) -> None:
    parser = commands.add_parser("report", help="one self-contained HTML file from the runs of one grid or several")
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUNS/GRID")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html in the folder; of A and B, A+B/report.html"
    )
    parser.add_argument("--tables", choices=("latex", "markdown"), help="write the tables for a paper too, in tables/")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=30.0,
        metavar="SECONDS",
        help="write it anew while runs go on, at most every so many seconds (30), until all have ended",
    )
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> int:
    if options.watch is None:
        return write_report(options.folders, options.output, options.tables)
    if not options.watch > 0:
        raise UserError(f"--watch takes a positive number of seconds, not {options.watch:g}")
    _must_be_grids(options.folders)
    said: list[str] = []

    def write() -> None:
        path = written(options.folders, options.output, options.tables)
        if not said:
            said.append(str(path))
            print(f"{path}; it is written anew until all runs have ended, or until Ctrl-C", flush=True)

    try:
        watch(options.folders, write, options.watch)
    except KeyboardInterrupt:
        print("lpsim: the report stays as it was last written", file=sys.stderr)
        return 130
    return 0


def write_report(folders: Sequence[Path], output: Path | None, tables: str | None = None) -> int:
    print(written(folders, output, tables))
    return 0


def written(folders: Sequence[Path], output: Path | None, tables: str | None) -> Path:
    """Where the report was written. Raises UserError."""
    _must_be_grids(folders)
    from analysis.page.report import write_report as write

    try:
        return write(folders, output, tables)
    except (ValueError, OSError) as error:
        raise UserError(f"no report of {', '.join(map(str, folders))}: {error}") from error


def _must_be_grids(folders: Sequence[Path]) -> None:
    """Raises UserError where one holds no grid, or none yet."""
    for folder in folders:
        if not (folder / "grid.json").exists():
            near = sorted(str(path.parent) for place in (folder, folder.parent) for path in place.glob("*/grid.json"))
            raise UserError(f"{folder} holds no grid (no grid.json); there are: {', '.join(near) or 'none near it'}")
