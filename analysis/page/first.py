"""The first screen of a report: what was asked, what came out, one picture of it, and how sure one can be."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import pandas as pd

from analysis.figures import comparisons, drawings
from analysis.figures.plots import LABELS
from analysis.figures.saving import Drawing
from analysis.load import Results
from analysis.page import claims, frontier, summary
from analysis.page import html as page
from analysis.page.answer import answer
from analysis.page.summary import of_task, task_name
from analysis.statistics import tables
from analysis.statistics.tables import TASK

ROWS = 12  # of a forest that is the answer's picture
ARMS = 3  # whose value in float32 stands below that picture, one by one


def screen(results: Results, frames: dict[str, pd.DataFrame], written_at: datetime) -> Iterator[str | Drawing]:
    name = str(results.grid.get("grid", results.folder.name))
    asked, rest = summary.question(results)
    source = results.grid.get("source") or "not recorded"
    stamp = written_at.strftime("%Y-%m-%d %H:%M UTC")
    if asked:
        yield page.paragraph(f"Grid {name}", "meta eyebrow")
    yield page.heading(1, asked or f"Grid {name}")
    if rest:
        yield page.prose(rest)
    if summary.is_twin(results):
        yield page.prose(
            "These runs are the grid's twin: the same path with a small model on small data. They show that it works; "
            "the question is about the real size, and they do not answer it."
        )
    yield page.paragraph(summary.lead(results), "meta" if summary.complete(results) else "warn")
    if "claims" in frames:
        yield from claims.section(frames["claims"], frames["predictions"])
    yield from frontier.section(frames)
    if results.parts or not ("claims" in frames or "frontier" in frames):
        yield from _answer(results, frames)
    if len(results.runs):
        yield page.paragraph(summary.words(results), "note")
    yield page.paragraph(
        "A difference is decided where its 95% interval over seeds leaves out 0, and every statement is about these "
        "runs, at these settings and this number of steps. Terms are explained at the end. Beside this file lie its "
        f"tables (tables/) and its figures as SVG and PDF (figures/). Grid file {source}; report written at {stamp}.",
        "note",
    )
    statements = "".join(
        page.heading(4, title) + page.bullets(sentences) for title, sentences in summary.statements(frames)
    )
    yield page.folded("Every comparison in words", statements)


def _answer(results: Results, frames: dict[str, pd.DataFrame]) -> Iterator[str | Drawing]:
    found = answer(frames)
    if found.sentences:
        yield page.answer([*([f"**{found.verdict}**"] if found.verdict else []), *found.sentences])
    if drawing := _picture(results, frames):
        yield drawing
    if found.decided or found.undecided or found.apart:
        yield page.heading(2, "How sure is it?", style="small")
    if found.decided:
        yield page.paragraph("Decided, the surest first; in brackets the 95% interval:")
        yield page.bullets(found.decided)
    if found.undecided:
        yield page.folded(found.undecided, page.bullets(found.open), style="open")
    for line, each in found.apart:
        yield page.folded(line, page.bullets(each), style="open")


def _picture(results: Results, frames: dict[str, pd.DataFrame]) -> Drawing | None:
    """What formats cost, of all tasks; where formats do not vary: settings, the first arm or rates, of the first task
    that has them.
    """
    pairs = tables.pairs(results.runs)
    arms = dict(iter(frames["arms"].groupby(list(TASK), dropna=False, sort=False)))
    names = summary.short_names(arms)
    tasks = [
        _costs(task, names[task], mine, of_task(frames["differences"], task), of_task(pairs, task))
        for task, mine in arms.items()
    ]
    if drawing := comparisons.costs(tasks):
        return drawing
    for task, runs in results.runs.groupby(list(TASK), dropna=False, sort=False):
        mine = {name: of_task(frames[name], task) for name in ("differences", "effects", "against_first")}
        roles = drawings.roles(runs, tables.factors(results.runs), results.runs)
        label = f"change in {LABELS[runs['metric'].iloc[0]]}"
        for name, title in (("effects", "What each setting does"), ("differences", f"Difference to {tables.BASELINE}")):
            if (mine[name]["n"] > 1).any():
                caption = f"{task_name(task)}: mean over seeds with its 95% interval; hollow: one seed."
                return comparisons.forest(named(mine[name]), roles, title, label, caption, "answer", ROWS)
        first = mine["against_first"].iloc[1:]
        if (first["n"] > 1).any() and mine["differences"].empty:
            caption = f"{task_name(task)}: mean over seeds of the arm − the first, with its 95% interval."
            return comparisons.forest(named(first), roles, "Against the first arm", label, caption, "answer", ROWS)
        if drawing := drawings.learning_rates(runs, roles) or drawings.final_metric(runs, roles):
            return drawing
    return None


def _costs(
    task: tuple[str, str], short: str, arms: pd.DataFrame, rows: pd.DataFrame, seeds: pd.DataFrame
) -> comparisons.Costs:
    names = [name for name in summary.varying(arms) if name != "format"]

    def labelled(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(name=[summary.arm_name(row, names) for row in frame.to_dict("records")])

    start = f"{short}, {_start(arms, names)}"
    return comparisons.Costs(
        task_name(task), labelled(rows), labelled(seeds), list(dict.fromkeys(rows["format"])), start
    )


def _start(arms: pd.DataFrame, names: list[str]) -> str:
    """How the arms of a task do in float32: `adamw 2.051 nats, lmd 2.062 nats`; of many, the range."""
    plain = arms[arms["format"] == tables.BASELINE]
    if len(plain) <= ARMS:
        rows = plain.to_dict("records")
        return ", ".join(f"{summary.arm_name(row, names)} {summary.value(row['mean'], row['metric'])}" for row in rows)
    ends = (summary.value(end, plain["metric"].iloc[0]) for end in (plain["mean"].min(), plain["mean"].max()))
    return " to ".join(ends)


def named(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table of differences with `name`: the arm, or the setting that is changed."""
    if "factor" in rows:
        return rows.assign(name=[f"{row['optimizer']}: {summary.effect_name(row)}" for row in rows.to_dict("records")])
    names = summary.varying(rows)
    return rows.assign(name=[summary.arm_name(row, names) for row in rows.to_dict("records")])
