"""`lpsim runs`: the runs of a grid as a table, also while it is running."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.command import where
from experiments.command.shared import UserError

if TYPE_CHECKING:  # pandas takes half a second to import
    from analysis.load import Results

Row = Mapping[str, Any]
NOT_STARTED = "not started"


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "runs", help="the runs of a grid as a table: status, the fields that vary, final metrics, folder"
    )
    parser.add_argument("folder", type=Path, metavar="RUNS/GRID")
    parser.add_argument("--where", action="append", default=[], metavar="FIELD=VALUE", help=where.HELP)
    parser.add_argument("--sort", metavar="FIELD", help="from the smallest value on; runs without one come last")
    parser.add_argument("--descending", action="store_true", help="with --sort: from the largest value on")
    parser.add_argument("--columns", nargs="+", metavar="FIELD", help="in place of the usual ones")
    parser.add_argument("--csv", action="store_true", help="as CSV, with all digits")
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> int:
    from analysis import load

    try:
        results = load.read(options.folder, plain=True)
        rows, unknown = all_rows(results), 0
        columns = options.columns or usual_columns(results)
        if rows:
            check_fields([*columns, *([] if options.sort is None else [options.sort])], rows)
            rows, unknown = chosen(rows, options.where)
    except ValueError as error:
        raise UserError(str(error)) from error
    if options.sort is not None:
        rows = in_order(rows, options.sort, options.descending)
    if options.csv:
        write = csv.writer(sys.stdout, lineterminator="\n")
        write.writerow(columns)
        write.writerows(["" if where.is_missing(row.get(name)) else row[name] for name in columns] for row in rows)
    else:
        print(as_text(rows, columns))
        print(counts(rows))
    if unknown:
        print(f"lpsim: {left_out(unknown)}", file=sys.stderr)
    for problem in results.problems.to_dict("records"):
        print(f"lpsim: {problem['folder']} is left out: {problem['reason']}", file=sys.stderr)
    return 0


def all_rows(results: Results) -> list[Row]:
    """One row a run, in the order of the grid: the columns of `load.runs` and `path`. A run that has not started has
    its signature, status and path alone.
    """
    waiting: list[Row] = [{"signature": name, "status": NOT_STARTED} for name in results.not_started]
    known: list[Row] = results.runs.to_dict("records")
    return [{**row, "path": str(results.folder / row["signature"])} for row in [*known, *waiting]]


def chosen(rows: Sequence[Row], conditions: Sequence[str]) -> tuple[list[Row], int]:
    """The rows that meet the conditions, and how many runs, not started, have none of the fields that they name.

    Raises ValueError as `where.meets` does.
    """
    if not conditions:
        return list(rows), 0
    fields = {where.parts_of(condition, "--where")[0] for condition in conditions}
    known = [row for row in rows if row["status"] != NOT_STARTED or fields <= row.keys()]
    unknown = len(rows) - len(known)
    try:
        if not known:
            raise ValueError(f"--where {conditions[0]}: no run has started")
        met = where.meets(known, conditions, "--where")
    except ValueError as error:
        raise ValueError(f"{error}; {left_out(unknown)}" if unknown else str(error)) from None
    return [row for row, is_met in zip(known, met, strict=True) if is_met], unknown


def left_out(unknown: int) -> str:
    return (
        f"{unknown} runs that have not started are left out, since only their status is known here; "
        "`lpsim run GRID --only ... --dry-run` knows their settings"
    )


def usual_columns(results: Results) -> list[str]:
    """Status, step, the fields that vary and do not follow from others, the final metrics, the path."""
    from analysis.load import FINAL
    from analysis.statistics import tables

    runs = results.runs
    varying = [
        name
        for name in [*tables.factors(runs), *tables.replicates(runs)]
        if len(runs) and runs[name].nunique(dropna=False) > 1
    ]
    final = [name for name in runs.columns if name.startswith(FINAL) and runs[name].notna().any()]
    return ["status", "step", *varying, *final, "path"] if len(runs) else ["status", "path"]


def check_fields(names: Sequence[str], rows: Sequence[Row]) -> None:
    """Raises ValueError for a field that no row has, naming the near ones."""
    from experiments.training.settings import names_near

    known = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        if name not in known:
            raise ValueError(f"no field {name!r}; there are: {names_near(name, known)}")


def in_order(rows: Sequence[Row], field: str, descending: bool = False) -> list[Row]:
    """The rows by a field, numbers before text; those without a value last."""
    present = [row for row in rows if not where.is_missing(row.get(field))]
    missing = [row for row in rows if where.is_missing(row.get(field))]

    def key(row: Row) -> tuple[bool, Any]:
        return isinstance(row[field], str), row[field]

    return [*sorted(present, key=key, reverse=descending), *missing]


def as_text(rows: Sequence[Row], columns: Sequence[str]) -> str:
    from tabulate import tabulate

    cells = [[_cell(row.get(name)) for name in columns] for row in rows]
    numbers = [any(isinstance(row.get(name), (int, float)) for row in rows) for name in columns]
    align = ["right" if number else "left" for number in numbers]
    return tabulate(cells, columns, tablefmt="simple", disable_numparse=True, colalign=align if cells else None)


def _cell(value: Any) -> str:
    if where.is_missing(value):
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def counts(rows: Sequence[Row]) -> str:
    status = [row["status"] for row in rows]
    return f"{len(rows)} runs: " + ", ".join(f"{status.count(name)} {name}" for name in dict.fromkeys(status))
