"""The figures of a report: which plots of a grid to make, on how many panels, as SVG.

A grid's factors get roles here. The first that varies is the colour, the second the panels; the rest is told apart in
the tables. So a grid of 24 runs and one of 200 get figures of the same size, and what a figure leaves out its caption
says.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from analysis.figures import plots
from analysis.figures.saving import NARROW, WIDTH, Drawing, drawn
from analysis.statistics.stability import LEARNING_RATE
from analysis.statistics.tables import BASELINE, TASK, counted, text

PANELS_A_ROW, PANELS, LEVELS = 3, 6, 12  # what one figure shows at most
LETTERS, LEAST_LETTERS = 80, 12  # of a line of a name in the key, which are tried
KEY_HEIGHT = 0.55  # inches that figures keep for it
SMOOTH = 30  # a smoothed training loss is the mean over this part of the longest run


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
    by_colour = [roles.hue, *([roles.facet] if roles.facet else [])]
    labelled = roles.label(runs)[["signature", "status", *by_colour]]
    frame = numbers[["signature", "step", "value"]].merge(labelled, on="signature", validate="many_to_one")
    if frame.empty:
        return None
    smooth = 1 + int(frame.groupby("signature").size().max()) // SMOOTH if split == "train" else 1
    many = frame.groupby(by_colour)["signature"].nunique().max() > plots.MANY_RUNS
    line = "Median over runs, in a band from the lowest to the highest; of one or two runs a line each"
    line = line if many else "One line a run"
    mixed = f" The runs of a colour differ in {', '.join(roles.others)} too." if roles.others else ""
    mean = f" Each run is smoothed, the mean of {smooth} neighbouring values." if smooth > 1 else ""
    lost = (frame["status"] == "diverged").any()
    mark = f" × is the last finite value of a diverged run{', drawn alone' if many else ''}." if lost else ""
    limits = plots.steady_limits(frame)
    if math.isfinite(limits[0]):
        mark += " Diverged curves leave the figure, with × at its edge: the axis spans the other runs."
    return _panels(
        f"{split}-{metric}".replace("_", "-"),
        frame,
        roles,
        lambda lines, ax: plots.curves(lines, ax, colours=roles.colours, label=label, limits=limits),
        prepare=lambda part: plots.lines(part, roles.hue, smooth),
        title=label[0].upper() + label[1:],
        caption=f"{line}.{mixed}{mean}{mark}",
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
    labelled = roles.label(points)
    present = [level for level in roles.colours if (labelled[roles.hue] == level).any()]
    return _panels(
        "final-metric",
        labelled,
        roles,
        lambda part, ax: plots.final_metric(
            part, ax, hue=roles.hue, levels=present, colours=roles.colours, intervals=replicates_only
        ),
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
        "learning-rates",
        roles.label(runs),
        roles,
        lambda part, ax: plots.learning_rates(part, ax, rate=LEARNING_RATE, hue=roles.hue, colours=roles.colours),
        title="Learning rates",
        caption=f"Points are finished runs, the line joins their means; × at the edge marks a diverged run.{mixed}",
        legend=True,
    )


def _panels(
    name: str,
    frame: pd.DataFrame,
    roles: Roles,
    draw: Callable[[Any, Axes], Axes],
    *,
    prepare: Callable[[pd.DataFrame], Any] = lambda part: part,
    title: str,
    caption: str,
    legend: bool,
) -> Drawing:
    """One panel for each level of the facet, on shared axes, at most 6; the caption names the levels left out.

    `draw` gets what `prepare` makes of a panel's rows, once for both widths.
    """
    panels: list[tuple[str | None, pd.DataFrame]] = [(None, frame)]
    if roles.facet:
        panels = [(level, frame[frame[roles.facet] == level]) for level in roles.facet_levels]
        panels = [(level, part) for level, part in panels if len(part)]
    if len(panels) > PANELS:
        left_out = ", ".join(str(level) for level, _ in panels[PANELS:])
        caption += f" Panels for {roles.facet} = {left_out} are left out."
        panels = panels[:PANELS]
    prepared = [(level, prepare(part)) for level, part in panels]

    def build(width: float) -> Figure:
        columns = 1 if width == NARROW else min(len(panels), PANELS_A_ROW)
        rows = -(-len(panels) // columns)
        size = (width if columns > 1 else min(width, 0.7 * WIDTH), 2.9 * rows + 0.55 * legend)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for index, (level, part) in enumerate(prepared):
            ax = draw(part, grid.flat[index])
            if level is not None:
                ax.set_title(f"{roles.facet} = {level}", loc="left")
            ax.label_outer()
        for ax in grid.flat[len(panels) :]:
            ax.set_visible(False)
        if legend:
            present = [level for level in roles.colours if (frame[roles.hue] == level).any()]
            key(figure, {level: roles.colours[level] for level in present}, width, title=roles.hue)
        return figure

    return drawn(name, title, caption, build)


def key(figure: Figure, colours: dict[str, Any], width: float, title: str | None = None) -> None:
    """What the colours mean, above the panels: in as many columns as the figure has room for, names too long for it
    broken, and the figure higher by the lines that takes.
    """
    handles = [Line2D([], [], color=colour, linewidth=2.5) for colour in colours.values()]
    renderer, room = FigureCanvasAgg(figure).get_renderer(), figure.bbox.width - 0.1 * figure.dpi

    def legend(names: list[str], columns: int) -> Bbox:
        for earlier in figure.legends:
            earlier.remove()
        made = figure.legend(handles, names, loc="outside upper left", ncols=columns, title=title, alignment="left")
        return made.get_window_extent(renderer)

    columns, letters, names = min(len(colours), 2 if width == NARROW else 6), LETTERS, list(colours)
    while (size := legend(names, columns)).width > room and (columns > 1 or letters > LEAST_LETTERS):
        if columns > 1:
            columns -= 1
        else:
            letters -= 4
            names = [textwrap.fill(name, letters, break_on_hyphens=False) for name in colours]
    figure.set_figheight(figure.get_figheight() + max(size.height / figure.dpi - KEY_HEIGHT, 0))
