"""The section in which runs are explored: for every task a place for the figures that the script makes, and a table of
all runs, plain HTML that the script makes sortable and lets filter the figures.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from analysis.load import Results
from analysis.page import html as page
from analysis.page import summary
from analysis.page.html import Column
from analysis.page.summary import count, plain
from analysis.statistics.tables import TASK, text


def section(results: Results, arms: pd.DataFrame) -> Iterator[str]:
    """The tasks in the order of `explore_data.data`; `arms` is tables.arms."""
    yield page.paragraph(
        "A click on a run, in the table or in a figure, opens its settings as differences to its arm, its curves, its "
        "telemetry, its outcome, and the command that repeats it. The table's filter filters the figures, too.",
        "note",
    )
    yield "<noscript>" + page.paragraph("Figures, sorting and filtering need JavaScript.", "note") + "</noscript>"
    seconds = _seconds(results)
    tasks = list(results.runs.groupby(list(TASK), dropna=False, sort=False))
    for number, (task, runs) in enumerate(tasks):
        if len(tasks) > 1:
            yield page.heading(3, summary.task_name(task))
        yield f'<div class="explorer" data-task="{number}" hidden></div>'
        yield f'<div data-runs="{number}">'
        yield page.heading(4, f"All {count(len(runs), 'run')}" if len(runs) > 1 else "Its run")
        yield _runs(runs, summary.varying(summary.of_task(arms, task)), seconds)
        yield "</div>"


def _runs(runs: pd.DataFrame, factors: list[str], seconds: dict[str, float]) -> str:
    signatures = list(runs["signature"])
    columns = [
        Column("run", signatures, anchors=[f"run-{signature}" for signature in signatures]),
        *(
            Column(
                name.removeprefix("optimizer.").removeprefix("recipe."),
                [text(value) for value in runs[name]],
                number=pd.api.types.is_numeric_dtype(runs[name].dtype),
            )
            for name in factors
        ),
        Column("seed", [text(seed) for seed in runs["seed"]], number=True),
        Column("status", list(runs["status"])),
        Column("step", [f"{step:.0f}" for step in runs["step"]], number=True),
        Column(runs["metric"].iloc[0].replace("_", " "), [plain(x) for x in runs["primary_metric"]], number=True),
    ]
    if seconds:
        times = [seconds.get(signature) for signature in signatures]
        columns.append(Column("time (s)", ["–" if each is None else f"{each:.1f}" for each in times], number=True))
    return page.table(columns)


def _seconds(results: Results) -> dict[str, float]:
    """What the runs took by their signatures, where that is known."""
    if "time_s" not in results.environment:
        return {}
    known = results.environment.dropna(subset="time_s")
    return dict(zip(known["signature"], known["time_s"].astype("float64"), strict=True))
