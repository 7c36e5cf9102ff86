"""Figures that compare arms: what a format costs each optimizer, paired differences as a forest, a map of two factors,
predictions.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import plots
from analysis.figures.drawings import Roles, key
from analysis.figures.saving import NARROW, WIDTH, Drawing, drawn
from analysis.statistics.claims import VERDICTS
from analysis.statistics.tables import BASELINE, higher_is_better, text

ROWS = 30  # rows of a forest or a map at most
TASKS = 4  # panels of the answer's picture at most
LINE = 28  # letters in a line of a row's name on a narrow screen


@dataclass(frozen=True)
class Costs:
    """What formats cost the arms of one task: rows of tables.differences with a `name` for the arm; of tables.pairs,
    a seed each; and how the arms do in float32, in words.
    """

    title: str
    rows: pd.DataFrame
    seeds: pd.DataFrame
    formats: Sequence[str]
    start: str


def forest(
    rows: pd.DataFrame, roles: Roles, title: str, label: str, caption: str, name: str = "forest", most: int = ROWS
) -> Drawing | None:
    """The rows of a table of differences (column `name` says which) with their intervals. None when no row has a
    difference.
    """
    measured = rows[rows["difference"].notna()]
    if measured.empty:
        return None
    if plots.far_apart(measured["difference"]):
        caption += " The axis is logarithmic but for its middle."
    if len(measured) > most:
        kept = measured["difference"].abs().sort_values(ascending=False, kind="stable").index[:most]
        caption += f" The {most} largest of {len(measured)} differences are drawn; the table has all."
        measured = measured.loc[sorted(kept)]
    side = "left" if higher_is_better(measured["metric"].iloc[0]) else "right"
    frame = measured.assign(**{roles.hue: measured[roles.hue].map(text) if roles.hue in measured else ""})

    def build(width: float) -> Figure:
        figure, named = _rows(frame, width)
        below = textwrap.fill(f"{label}; {side} of 0 is worse", LINE + 8 if width == NARROW else 2 * LINE + 8)
        plots.forest(named, figure.subplots(), hue=roles.hue, colours=roles.colours, label=below)
        return figure

    return drawn(name, title, caption, build)


def predictions(rows: pd.DataFrame) -> Drawing | None:
    """The predictions about losses with their intervals and bounds (a table of statistics.claims). None without any."""
    shown = rows[(rows["metric"] == "validation_loss") & rows["mean"].notna()]
    if shown.empty:
        return None
    names = shown["claim"] + ": " + shown["prediction"]
    frame = shown.assign(name=names, difference=shown["mean"], verdict=shown["verdict"].map(VERDICTS))
    colours = dict(zip(VERDICTS.values(), (plots.DISTINCT[2], plots.DISTINCT[4], plots.FAINT), strict=True))

    def build(width: float) -> Figure:
        figure, named = _rows(frame, width)
        ax = plots.forest(named, figure.subplots(), hue="verdict", colours=colours, label="difference of losses (nats)")
        plots.bounds(named, ax)
        key(figure, colours, width)
        return figure

    caption = "Mean over seeds with its 95% interval; the claim predicts that the mean lies left of the tick."
    return drawn("predictions", "What was predicted, and what came", caption, build)


def _rows(frame: pd.DataFrame, width: float) -> tuple[Figure, pd.DataFrame]:
    """An empty figure high enough for the rows, and the rows with names broken to fit the width."""
    letters = LINE if width == NARROW else 3 * LINE
    names = [textwrap.fill(name, letters) for name in frame["name"]]
    lines = max((name.count("\n") for name in names), default=0)
    height = 0.9 + (0.27 + 0.16 * lines) * len(frame)
    return Figure(figsize=(width, height), layout="constrained"), frame.assign(name=names)


def costs(tasks: Sequence[Costs]) -> Drawing | None:
    """What each format costs each arm: a panel a task, in it a line an arm, with intervals. None where a task has no
    measured difference, or more arms than colours can tell apart, or there are more than 4 tasks.
    """
    measured = [task.rows[task.rows["difference"].notna()] for task in tasks]
    arms = list(dict.fromkeys(name for rows in measured for name in rows["name"]))
    if not 1 <= len(tasks) <= TASKS or any(rows.empty for rows in measured) or len(arms) > len(plots.DISTINCT):
        return None
    colours = dict(zip(arms, plots.DISTINCT, strict=False))

    def build(width: float) -> Figure:
        columns = 1 if width == NARROW else min(len(tasks), 2)
        lines = -(-len(tasks) // columns)
        size = (width if columns > 1 else min(width, 0.65 * WIDTH), 0.45 + 2.5 * lines)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for task, rows, ax in zip(tasks, measured, grid.flat, strict=False):
            metric = rows["metric"].iloc[0]
            side, scale = ("down", 100) if higher_is_better(metric) else ("up", 1)
            scaled = rows.assign(**{name: scale * rows[name] for name in ("difference", "low", "high")})
            seeds = task.seeds.assign(difference=scale * task.seeds["difference"])
            label = f"{plots.CHANGES[metric]}\n{side} is worse"
            plots.costs(scaled, seeds, ax, formats=task.formats, colours=colours, label=label)
            ax.set_title(task.title if len(tasks) > 1 else "", loc="left")
        for ax in grid.flat[len(tasks) :]:
            ax.set_visible(False)
        key(figure, colours, width)
        return figure

    caption = (
        f"Mean over seeds of format − {BASELINE}, with its 95% interval (none for one seed); small points are seeds. "
        f"In {BASELINE}: {'; '.join(task.start for task in tasks)}."
    )
    return drawn("costs", "What each format costs", caption, build)


def factor_map(cells: pd.DataFrame, row: str, column: str, metric: str, columns: Sequence[str]) -> Drawing | None:
    """The mean metric of every arm as a map: `cells` has one row an arm, with its labels `row` and `column`, mean, n,
    runs. None unless it has two rows and two columns, half of the cells filled.
    """
    names = list(dict.fromkeys(cells[row]))
    wide = [name for name in columns if (cells[column] == name).any()]
    if len(names) < 2 or len(wide) < 2 or cells["mean"].notna().sum() < len(names) * len(wide) / 2:
        return None
    caption = f"Mean {plots.LABELS[metric]} over the n runs that count; the colour shows it too."
    if len(names) > ROWS:
        caption += f" The first {ROWS} of {len(names)} rows are drawn."
        names = names[:ROWS]
    table = cells.drop_duplicates([row, column]).pivot(index=row, columns=column, values="mean").loc[names, wide]
    texts = cells.drop_duplicates([row, column]).set_index([row, column]).apply(_cell, axis=1).to_dict()

    def build(width: float) -> Figure:
        letters = LINE if width == NARROW else 2 * LINE
        size = (min(width, 2.6 + 1.6 * len(wide)), 0.9 + 0.42 * len(names))
        figure = Figure(figsize=size, layout="constrained")
        ax = figure.subplots()
        shown = table.rename(index={name: textwrap.fill(name, letters) for name in names})
        plots.heat_map(shown, ax, texts=[[texts.get((a, b), "") for b in wide] for a in names], better=metric)
        ax.set(xlabel=column, ylabel="")
        return figure

    return drawn("map", f"Final {plots.LABELS[metric]} by arm and {column}", caption, build)


def _cell(arm: Mapping[str, float]) -> str:
    of = f" of {arm['runs']:.0f}" if arm["n"] < arm["runs"] else ""
    mean = f"{arm['mean']:.3f}" if arm["mean"] == arm["mean"] else "–"
    return f"{mean}\nn = {arm['n']:.0f}{of}"
