"""The figures of a report: which plots of a grid to make, on how many panels, as SVG.

A grid's factors get roles here. The first that varies is the colour, the second the panels; the rest is told apart in
the tables. So a grid of 24 runs and one of 200 get figures of the same size, and what a figure leaves out its caption
says.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures import plots
from analysis.statistics.claims import VERDICTS
from analysis.statistics.stability import LEARNING_RATE
from analysis.statistics.tables import BASELINE, TASK, counted, higher_is_better, text

WIDTH = 11.0  # inches, 1056 CSS pixels: the width of the page
PANELS_A_ROW, PANELS, ROWS, LEVELS = 3, 6, 30, 12  # what one figure shows at most
SMOOTH = 30  # a smoothed training loss is the mean over this part of the longest run


@dataclass(frozen=True)
class Drawing:
    """One figure of the page: what it is called, what it shows and leaves out, and the SVG."""

    title: str
    caption: str
    svg: bytes


@dataclass(frozen=True)
class Roles:
    """Which factor is the colour and which makes the panels; both columns hold labels in the frames that are drawn."""

    hue: str
    colours: dict[str, Any]
    facet: str | None
    facet_levels: list[str]
    others: list[str]  # factors that vary and that neither colour nor panels show

    def label(self, frame: pd.DataFrame) -> pd.DataFrame:
        """`frame` with the values of hue and facet as the labels of the figures."""
        columns = [name for name in (self.hue, self.facet) if name]
        return frame.assign(**{name: frame[name].map(text).astype("str") for name in columns})


def roles(runs: pd.DataFrame, factors: list[str], grid: pd.DataFrame) -> Roles:
    """The roles of the factors in a task's `runs`: format, optimizer, then the others, as far as each varies there and
    has at most 12 levels. Colours are those of the whole `grid`, so that a level looks the same in every task.
    """
    varying = {name: levels(runs[name]) for name in factors if name not in TASK}
    varying = {name: found for name, found in varying.items() if len(found) > 1}
    shown = sorted(varying, key=lambda name: (name != "format", name != "optimizer"))
    shown = [name for name in shown if len(varying[name]) <= LEVELS] or ["format"]
    hue, facet = shown[0], shown[1] if len(shown) > 1 else None
    known = levels(grid[hue])
    numbers = pd.api.types.is_numeric_dtype(grid[hue].dtype) and len(known) > 2
    return Roles(
        hue=hue,
        colours=plots.colours(known, ordered=numbers),
        facet=facet,
        facet_levels=varying[facet] if facet else [],
        others=[name for name in varying if name not in (hue, facet)],
    )


def levels(column: pd.Series) -> list[str]:
    """The labels of a factor's levels: float32 first, numbers by size, else in the order of the grid; missing last."""
    present = list(dict.fromkeys(column.dropna()))
    present = (
        sorted(present) if pd.api.types.is_numeric_dtype(column.dtype) else sorted(present, key=lambda x: x != BASELINE)
    )
    return list(dict.fromkeys(map(text, [*present, *([math.nan] if column.isna().any() else [])])))


def curves(
    runs: pd.DataFrame, metrics: pd.DataFrame, roles: Roles, split: str, metric: str, label: str
) -> Drawing | None:
    """`metric` of `split` against the step for the runs of a task; training metrics, of one batch each, are smoothed.
    None when no run has such numbers.
    """
    numbers = metrics[(metrics["split"] == split) & (metrics["metric"] == metric)]
    frame = numbers[["signature", "step", "value"]].merge(
        runs[["signature", "status", roles.hue, *([roles.facet] if roles.facet else [])]],
        on="signature",
        validate="many_to_one",
    )
    if frame.empty:
        return None
    smooth = 1 + int(frame.groupby("signature").size().max()) // SMOOTH if split == "train" else 1
    line = (
        f"One line a run, the mean of {smooth} neighbouring values over the values themselves"
        if smooth > 1
        else "One line a run"
    )
    return _panels(
        roles.label(frame),
        roles,
        lambda part, ax: plots.curves(part, ax, hue=roles.hue, colours=roles.colours, label=label, smooth=smooth),
        title=label[0].upper() + label[1:],
        caption=f"{line}; × marks the last finite value of a diverged run. With more than {plots.MANY_RUNS} runs of a "
        "colour in a panel: the median of those that did not diverge, and a band over all of them.",
        legend=True,
    )


def weight_growth(runs: pd.DataFrame, metrics: pd.DataFrame, roles: Roles) -> Drawing | None:
    """The norm of all weights over its first recorded value, against the step. None when no run recorded norms."""
    norm = metrics[(metrics["split"] == "weights") & (metrics["metric"] == "norm")].sort_values("step", kind="stable")
    first = norm.groupby("signature")["value"].transform("first")
    relative = norm.assign(value=norm["value"] / first)
    return curves(runs, relative, roles, "weights", "norm", "weight norm / its first value")


def final_metric(runs: pd.DataFrame, roles: Roles) -> Drawing | None:
    """Every counted run's primary metric. None when no run has one."""
    points = runs[counted(runs)]
    if points.empty:
        return None
    replicates_only = not roles.others
    caption = "Each point is one finished run; bars are the mean and its 95% t interval over seeds (none for n = 1)."
    if not replicates_only:
        caption = f"Each point is one finished run. A column mixes {', '.join(roles.others)}, so no mean is drawn."
    return _panels(
        roles.label(points),
        roles,
        lambda part, ax: plots.final_metric(part, ax, hue=roles.hue, colours=roles.colours, intervals=replicates_only),
        title=f"Final {plots.LABELS[runs['metric'].iloc[0]]}",
        caption=caption,
        legend=False,
    )


def learning_rates(runs: pd.DataFrame, roles: Roles) -> Drawing | None:
    """The primary metric against the learning rate. None when the factors hold no rate, or no run finished."""
    others = [name for name in roles.others if name != LEARNING_RATE]
    if LEARNING_RATE not in {roles.hue, roles.facet, *roles.others} or not (runs["status"] == "finished").any():
        return None
    if roles.hue == LEARNING_RATE or roles.facet == LEARNING_RATE:
        flat = Roles("format", plots.colours(levels(runs["format"])), None, [], others)
        roles = flat if roles.hue == LEARNING_RATE else Roles(roles.hue, roles.colours, None, [], others)
    mixed = f" The runs at one rate differ in {', '.join(others)} too." if others else ""
    return _panels(
        roles.label(runs),
        roles,
        lambda part, ax: plots.learning_rates(part, ax, rate=LEARNING_RATE, hue=roles.hue, colours=roles.colours),
        title="Learning rates",
        caption=f"Points are finished runs, the line joins their means; × at the edge marks a diverged run.{mixed}",
        legend=True,
    )


def forest(rows: pd.DataFrame, roles: Roles, title: str, label: str, caption: str) -> Drawing | None:
    """The rows of a table of differences (column `name` says which) with their intervals. None when no row has a
    difference.
    """
    measured = rows[rows["difference"].notna()]
    if measured.empty:
        return None
    if plots.far_apart(measured["difference"]):
        caption += " The axis is logarithmic but for its middle."
    if len(measured) > ROWS:
        kept = measured["difference"].abs().sort_values(ascending=False, kind="stable").index[:ROWS]
        caption += f" The {ROWS} largest of {len(measured)} differences are drawn; the table has all."
        measured = measured.loc[sorted(kept)]
    side = "left" if higher_is_better(measured["metric"].iloc[0]) else "right"
    frame = measured.assign(**{roles.hue: measured[roles.hue].map(text) if roles.hue in measured else ""})
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.27 * len(measured)), layout="constrained")
        plots.forest(
            frame, figure.subplots(), hue=roles.hue, colours=roles.colours, label=f"{label}; {side} of 0 is worse"
        )
        return Drawing(title, caption, svg(figure))


def costs(rows: pd.DataFrame, names: Sequence[str]) -> Drawing | None:
    """What each format costs each optimizer (rows of tables.differences): a line an arm, named by `name`, with
    intervals. None where there are no or too many arms to be told apart.
    """
    measured = rows[rows["difference"].notna()]
    arms = list(dict.fromkeys(measured["name"]))
    if not arms or len(arms) > len(plots.DISTINCT):
        return None
    metric = measured["metric"].iloc[0]
    side = "down" if higher_is_better(metric) else "up"
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(0.7 * WIDTH, 3.1), layout="constrained")
        colours = dict(zip(arms, plots.DISTINCT, strict=False))
        label = f"change from {BASELINE} ({plots.UNITS[metric]})\n{side} is worse"
        plots.costs(measured, figure.subplots(), formats=names, colours=colours, label=label)
        caption = f"Mean over seeds of format − {BASELINE} with its 95% interval, none for n = 1."
        return Drawing("What each format costs", caption, svg(figure))


def predictions(rows: pd.DataFrame) -> Drawing | None:
    """The predictions about losses with their intervals and bounds (a table of statistics.claims). None without any."""
    shown = rows[(rows["metric"] == "validation_loss") & rows["mean"].notna()]
    if shown.empty:
        return None
    names = shown["claim"] + ": " + shown["prediction"]
    frame = shown.assign(name=names, difference=shown["mean"], verdict=shown["verdict"].map(VERDICTS))
    colours = dict(zip(VERDICTS.values(), (plots.DISTINCT[2], plots.DISTINCT[4], plots.FAINT), strict=True))
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * len(frame)), layout="constrained")
        ax = plots.forest(frame, figure.subplots(), hue="verdict", colours=colours, label="difference of losses (nats)")
        plots.bounds(frame, ax)
        handles = [Line2D([], [], color=colour, linewidth=2.5) for colour in colours.values()]
        figure.legend(handles, list(colours), loc="outside upper left", ncols=3)
        caption = "Mean over seeds with its 95% interval; the claim predicts that the mean lies left of the tick."
        return Drawing("What was predicted, and what came", caption, svg(figure))


def _panels(
    frame: pd.DataFrame,
    roles: Roles,
    draw: Callable[[pd.DataFrame, Axes], Axes],
    *,
    title: str,
    caption: str,
    legend: bool,
) -> Drawing:
    """One panel for each level of the facet, on shared axes, at most 6; the caption names the levels left out."""
    panels: list[tuple[str | None, pd.DataFrame]] = [(None, frame)]
    if roles.facet:
        panels = [(level, frame[frame[roles.facet] == level]) for level in roles.facet_levels]
        panels = [(level, part) for level, part in panels if len(part)]
    if len(panels) > PANELS:
        left_out = ", ".join(str(level) for level, _ in panels[PANELS:])
        caption += f" Panels for {roles.facet} = {left_out} are left out."
        panels = panels[:PANELS]
    columns = min(len(panels), PANELS_A_ROW)
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(
            figsize=(WIDTH if columns > 1 else 0.7 * WIDTH, 2.9 * rows + 0.55 * legend), layout="constrained"
        )
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for index, (level, part) in enumerate(panels):
            ax = draw(part, grid.flat[index])
            if level is not None:
                ax.set_title(f"{roles.facet} = {level}", loc="left")
            ax.label_outer()
        for ax in grid.flat[len(panels) :]:
            ax.set_visible(False)
        if legend:
            present = [level for level in roles.colours if (frame[roles.hue] == level).any()]
            handles = [Line2D([], [], color=roles.colours[level], linewidth=2.5) for level in present]
            figure.legend(
                handles,
                present,
                loc="outside upper left",
                ncols=min(len(present), 6),
                title=roles.hue,
                alignment="left",
            )
        return Drawing(title, caption, svg(figure))


def svg(figure: Figure) -> bytes:
    """The figure's file: the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
