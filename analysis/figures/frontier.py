"""The picture of frontiers: the final loss over the learning rate for every format, and where it breaks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, StrMethodFormatter

from analysis.figures import plots
from analysis.figures.drawings import PANELS, PANELS_A_ROW, levels
from analysis.figures.saving import NARROW, WIDTH, Drawing, drawn

STYLES = ("-", "--", ":", "-.")  # of the roundings
PANEL = ("model", "data", "optimizer", "noise")  # arms that agree in these share a panel
FEW_DECADES = 300  # an axis of at most this ratio gets ticks at 2 and 5 too
RING: dict[str, Any] = {"marker": "o", "linestyle": "", "markerfacecolor": "white", "markeredgewidth": 1.8}
BESIDE = 1.15  # the axis goes on beyond the rates by this factor
LOWEST, STEP = 0.03, 0.035  # where the brackets stand, as shares of the panel's height


def frontier(arms: pd.DataFrame, runs: pd.DataFrame) -> Drawing:
    """A panel an optimizer (and noise, model, data where they vary), a colour a format, a line style a rounding.

    arms, runs: `load.frontier` and `load.frontier_runs`, with at least one row.
    """
    panels = list(arms.groupby(list(PANEL), dropna=False, sort=False))
    varying = [name for name in PANEL if arms[name].nunique(dropna=False) > 1 and name != "data"]
    colours = plots.colours(levels(arms["format"]))
    roundings = [name for name in dict.fromkeys(arms["rounding"]) if name]
    styles = {"": STYLES[0]} | dict(zip(roundings, STYLES, strict=False))
    caption = (
        "Points are runs, lines join the means over the seeds that did not diverge, × at the top is a run that did. A "
        "ring marks the frontier, the largest rate that holds; the bar below it spans the bracket up to the rate that "
        f"breaks. {_in_words(arms)}"
    )
    if len(panels) > PANELS:
        caption += f" {len(panels) - PANELS} panels are left out; the table has all."

    def build(width: float) -> Figure:
        columns = 1 if width == NARROW else min(len(panels), PANELS_A_ROW)
        rows = -(-min(len(panels), PANELS) // columns)
        size = (width if columns > 1 else min(width, 0.7 * WIDTH), 3.4 * rows + 0.7)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, sharex=False, sharey=True, squeeze=False)
        for (key, mine), ax in zip(panels, grid.flat, strict=False):
            panel(mine, runs, ax, colours=colours, styles=styles)
            name = dict(zip(PANEL, key, strict=True))
            shown = [f"noise {name[n]:g}" if n == "noise" else str(name[n]) for n in varying if not pd.isna(name[n])]
            ax.set_title(", ".join(shown or [str(name["optimizer"])]), loc="left")
            if ax not in grid[:, 0]:
                ax.set_ylabel("")
        most = max(len(mine) for _, mine in panels)
        _room_below(grid.flat[0], LOWEST + STEP * most)  # they share the axis
        for ax in grid.flat[len(panels) :]:
            ax.set_visible(False)
        _legend(figure, colours, {name: styles[name] for name in roundings if len(roundings) > 1})
        return figure

    return drawn("frontier", "Final loss over the learning rate, and the frontier", caption, build)


def panel(arms: pd.DataFrame, runs: pd.DataFrame, ax: Axes, *, colours: Mapping[str, Any], styles: Any) -> Axes:
    """`loss` of the runs of these arms over their `rate`, with each arm's frontier and bracket."""
    place = 0
    drawn = []
    for arm in arms.to_dict("records"):
        mine = runs[runs["arm"] == arm["arm"]]
        how: dict[str, Any] = {"color": colours[arm["format"]]}
        ended = mine[np.isfinite(mine["loss"])]
        means = ended.groupby("rate")["loss"].mean()
        ax.plot(ended["rate"], ended["loss"], ".", alpha=0.45, markersize=4, **how)
        ax.plot(means.index, means, linestyle=styles[arm["rounding"]], linewidth=1.4, **how)
        diverged = mine.loc[mine["status"] == "diverged", "rate"]
        if len(diverged):  # an empty line that is not clipped counts as one at the figure's corner
            ax.plot(diverged, [0.98] * len(diverged), "x", transform=ax.get_xaxis_transform(), clip_on=False, **how)
        drawn.append(ended["loss"])
        if not np.isfinite(arm["frontier"]):
            continue
        ring: dict[str, Any] = {
            "marker": "o",
            "markerfacecolor": "white",
            "markersize": 8,
            "markeredgewidth": 1.8,
            "zorder": 4,
        }
        ax.plot([arm["frontier"]], [means[arm["frontier"]]], **ring, **how)
        height = LOWEST + STEP * place
        place += 1
        upto = arm["breaks"] if np.isfinite(arm["breaks"]) else arm["frontier"]
        marker = "|" if np.isfinite(arm["breaks"]) else ">"  # open: the frontier lies beyond
        bar: dict[str, Any] = {"marker": marker, "linewidth": 2.4, "linestyle": styles[arm["rounding"]]}
        ax.plot([arm["frontier"], upto], [height, height], transform=ax.get_xaxis_transform(), **bar, **how)
    values = pd.concat(drawn)
    plots.value_axis(ax, values)
    low, high = runs.loc[runs["arm"].isin(arms["arm"]), "rate"].agg(["min", "max"])
    ax.set(xscale="log", xlim=(low / BESIDE, high * BESIDE), xlabel="learning rate", ylabel="validation loss (nats)")
    digits = (1, 2, 5) if high / low < FEW_DECADES else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
    ax.set_xticks([tick for tick in ticks if low / BESIDE <= tick <= high * BESIDE])
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    return ax


def _room_below(ax: Axes, share: float) -> None:
    """Lower the value axis by a share of its height, for the brackets."""
    bottom, top = ax.get_ylim()
    if ax.get_yscale() == "log":
        ax.set_ylim(bottom * (bottom / top) ** share, top)
    else:
        ax.set_ylim(bottom - share * (top - bottom), top)


def _in_words(arms: pd.DataFrame) -> str:
    """The frontiers as text, for a reader who does not see the picture."""
    parts = []
    for row in arms.to_dict("records"):
        found = {"none": "none", "open": f"at least {row['frontier']:g}"}.get(row["status"], f"{row['frontier']:g}")
        parts.append(f"{row['arm']}: {found}")
    return f"Frontiers: {'; '.join(parts)}."


def _legend(figure: Figure, colours: Mapping[str, Any], styles: Mapping[str, Any]) -> None:
    handles = [Line2D([], [], color=colour, linewidth=2.5) for colour in colours.values()]
    handles += [Line2D([], [], color=plots.INK, linestyle=style) for style in styles.values()]
    handles += [Line2D([], [], color=plots.INK, **RING), Line2D([], [], color=plots.INK, marker="x", linestyle="")]
    names = [*colours, *(name.replace("_", " ") for name in styles), "frontier", "diverged"]
    figure.legend(handles, names, loc="outside upper left", ncols=min(len(names), 7))
