"""Tables and figures of a grid folder -> one HTML file that needs nothing else.

The same folders give the same bytes, the date of writing apart. Files are written beside their final name and renamed,
so a reader never sees half a report, and a full disk leaves the previous one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from analysis import load
from analysis.figures.printing import Printer
from analysis.figures.saving import FORMS, PAGE_FORMS, Drawing, no_garbage_search
from analysis.load import Results
from analysis.page import explore, explore_data, first, paper, provenance, scripts, task, terms
from analysis.page import frontier as frontier_part
from analysis.page import html as page
from analysis.page.files import replace
from analysis.page.summary import task_name
from analysis.page.task import Part
from analysis.statistics import claims, mixed, stability, tables
from analysis.statistics.sensitivity import sensitivity
from analysis.statistics.tables import TASK

LONG = ("metrics", "telemetry", "telemetry_cosines", "attribution")  # tables that are written as Parquet alone
MANY = 50  # runs, from which on figures are printed in a process of their own; it takes a second to start


def write_report(
    grid_folder: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    tables_as: str | None = None,
    figures: bool = True,
) -> Path:
    """Writes the report of a grid folder and returns its path: `<grid_folder>/report.html`, or `output`. Several
    folders are one report, `A+B/report.html` beside the first.

    Beside it, in `tables/`, the tables as CSV and Parquet (metrics and telemetry as Parquet alone), and for a paper
    where `tables_as` is "latex" or "markdown"; in `figures/` every figure as SVG and PDF, unless `figures` is False.

    Only `environment` and the metric `time_ms` hold times: the other tables of a resumed grid equal those of an
    uninterrupted one. Raises ValueError when a folder is no grid folder, `output` is a folder or `tables_as` is another
    word, OSError when the files cannot be written.
    """
    folders = [grid_folder] if isinstance(grid_folder, (str, Path)) else list(grid_folder)
    if tables_as is not None and tables_as not in paper.ENDINGS:
        raise ValueError(f"no kind of table {tables_as!r}; there are: {', '.join(paper.ENDINGS)}")
    with Printer(FORMS if figures else PAGE_FORMS) as printer, no_garbage_search():
        many = sum(1 for folder in folders for _ in Path(folder).glob("*/config.json")) >= MANY
        if many:
            printer.start()
        results = load.read_all(folders)
        target = results.folder / "report.html" if output is None else Path(output)
        if target.is_dir():
            raise ValueError(
                f"{target} is a folder; say the name of the HTML file to write, such as {target / 'report.html'}"
            )
        frames = all_tables(results)
        text, drawings = compose(results, frames, datetime.now(UTC), printer if many else None)
        try:
            _write_beside(target.parent, frames, drawings if figures else {})
            if tables_as is not None:
                paper.write(frames, target.parent / "tables", tables_as)
            replace(target, text.encode())
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(f"cannot write the report to {target}: {reason}") from error
    return target


def _write_beside(folder: Path, frames: dict[str, pd.DataFrame], drawings: dict[str, Drawing]) -> None:
    """The tables and figures of a page in that folder. Raises OSError."""
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        replace(folder / "tables" / f"{name}.parquet", frame.to_parquet(index=False))
        if name not in LONG:
            replace(folder / "tables" / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n").encode())
    if drawings:
        (folder / "figures").mkdir(exist_ok=True)
    for name, drawing in drawings.items():
        replace(folder / "figures" / f"{name}.svg", drawing.svg)
        replace(folder / "figures" / f"{name}.pdf", drawing.pdf)


def all_tables(results: Results) -> dict[str, pd.DataFrame]:
    """Every table of the report by the name of its file."""
    runs, per_run = results.runs, stability.by_run(results.metrics)
    return {
        "runs": runs,
        "metrics": results.metrics,
        "environment": results.environment,
        "problems": results.problems,
        "arms": tables.arms(runs),
        "differences": tables.differences(runs),
        "contrasts": tables.contrasts(runs),
        "optimizers": tables.optimizers(runs),
        "effects": tables.effects(runs),
        "against_first": tables.against_first(runs),
        "growth_against_first": tables.against_first(runs, "weight_growth", per_run),
        "sensitivity": sensitivity(runs),
        "mixed": mixed.effects(runs),
        "stability": stability.by_arm(runs, per_run),
        "stability_by_run": per_run,
        "learning_rates": stability.largest_stable_learning_rate(runs),
        **_claims(results, per_run),
        **frontier_part.tables(results),
        **({"telemetry": results.telemetry} if len(results.telemetry) else {}),
        **({"telemetry_cosines": results.cosines} if len(results.cosines) else {}),
        **({"attribution": results.attribution} if len(results.attribution) else {}),
    }


def _claims(results: Results, per_run: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables of the claims that the grid made, where it made any."""
    made = results.grid.get("claims", [])
    if not made:
        return {}
    predicted = claims.predictions(made, results.runs, per_run)
    return {"predictions": predicted, "claims": claims.verdicts(made, predicted)}


def render(results: Results, frames: dict[str, pd.DataFrame], written_at: datetime) -> str:
    """The whole page as HTML."""
    return compose(results, frames, written_at)[0]


def compose(
    results: Results,
    frames: dict[str, pd.DataFrame],
    written_at: datetime,
    printer: Printer | None = None,
) -> tuple[str, dict[str, Drawing]]:
    """The whole page as HTML, and its figures by the names of their files; `printer` prints them meanwhile."""
    name = str(results.grid.get("grid", results.folder.name))
    sections: list[tuple[str, str, Iterable[Part]]] = []  # anchor, title, parts
    for number, (where, runs) in enumerate(results.runs.groupby(list(TASK), dropna=False, sort=False)):
        sections.append((f"task-{number}", task_name(where), task.section(results, frames, where, runs)))
    if len(results.runs):
        sections.append(("explore", "Explore the runs", explore.section(results, frames["arms"])))
    sections.append(("incomplete", "What was left out, and why", provenance.left_out(results)))
    sections.append(("where", "What ran where", provenance.provenance(results)))
    sections.append(("legend", "Terms, and how intervals are computed", [page.definitions(terms.LEGEND)]))
    drawings: dict[str, Drawing] = {}
    body: list[str | Drawing] = [*_named("answer", first.screen(results, frames, written_at), drawings, printer)]
    body.append(page.contents((anchor, title) for anchor, title, _ in sections))
    for anchor, title, parts in sections:
        body += [page.heading(2, title, anchor), *_named(title, parts, drawings, printer)]
    explored = explore_data.data(results, frames["arms"]) if len(results.runs) else None
    end = scripts.scripts(explored)
    if printer is not None:
        printer.finish(list(drawings.values()))
    written = [page.figure(part) if isinstance(part, Drawing) else part for part in body]
    return page.document(f"Grid {name}", written, style=scripts.style(), end=end), drawings


def _named(
    title: str, parts: Iterable[Part], drawings: dict[str, Drawing], printer: Printer | None
) -> Iterator[str | Drawing]:
    """The parts; each drawing among them joins `drawings`, by its section's title and its own name."""
    section = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60]
    for part in parts:
        if isinstance(part, Drawing):
            name = f"{section}-{part.name}" if part.name != section else section
            while name in drawings:
                name += "-again"
            drawings[name] = part
            if printer is not None:
                printer.begin(part)
        yield part
