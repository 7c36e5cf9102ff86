"""`lpsim report`: one HTML file from run folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.command.shared import UserError


def add(commands: Any) -> None:
    parser = commands.add_parser("report", help="one self-contained HTML file from the runs of one grid or several")
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUNS/GRID")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html in the folder; of A and B, A+B/report.html"
    )
    parser.add_argument("--tables", choices=("latex", "markdown"), help="write the tables for a paper too, in tables/")
    parser.set_defaults(function=lambda options: write_report(options.folders, options.output, options.tables))


def write_report(folders: Sequence[Path], output: Path | None, tables: str | None = None) -> int:
    for folder in folders:
        if not (folder / "grid.json").exists():
            near = (
                sorted(str(path.parent) for path in folder.parent.glob("*/grid.json")) if folder.parent.is_dir() else []
            )
            raise UserError(f"{folder} holds no grid (no grid.json); there are: {', '.join(near) or 'none beside it'}")
    from analysis.page.report import write_report as write

    try:
        print(write(folders, output, tables))
    except (ValueError, OSError) as error:
        raise UserError(f"no report of {', '.join(map(str, folders))}: {error}") from error
    return 0
