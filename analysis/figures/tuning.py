"""The picture of a tuning: what was tried for every arm, how good it was, and what was chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from analysis.figures import plots
from analysis.figures.saving import svg
from analysis.statistics.tables import higher_is_better, text

FEW_DECADES = 300  # a range of at most this ratio gets ticks at 2 and 5 too
COLOURS = {"trial": plots.FAINT, "finalist": plots.DISTINCT[0], "chosen": plots.DISTINCT[4]}


def tuning(table: pd.DataFrame, ranges: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> bytes:
    """SVG: a row for every arm, in it a panel for every setting with the mean metric of each trial over its value.

    table: one row a trial, as `lpsim tune` writes it. ranges: by arm and setting, {"low", "high", "log"} or {"values"}.
    Finalists' means are over more seeds than the others'. A trial of which a run diverged is an × at the bad edge.
    """
    columns = max(len(settings) for settings in ranges.values())
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(0.6 + 4.2 * columns, 0.6 + 2.6 * len(ranges)), layout="constrained")
        grid = figure.subplots(len(ranges), columns, sharey="row", squeeze=False)
        for row, (arm, settings) in zip(grid, ranges.items(), strict=True):
            trials = table[table["arm"] == arm]
            for ax, (setting, span) in zip(row, settings.items(), strict=False):
                panel(trials, ax, setting=setting, span=span)
                if ax is row[0]:
                    ax.set_title(arm, loc="left")
                else:
                    ax.set_ylabel("")
            for ax in row[len(settings) :]:
                ax.set_visible(False)
        handles = [Line2D([], [], color=colour, marker="o", linestyle="") for colour in COLOURS.values()]
        handles.append(Line2D([], [], color=plots.INK, marker="x", linestyle=""))
        figure.legend(handles, [*COLOURS, "diverged"], loc="outside upper left", ncols=4)
        return svg(figure)


def panel(trials: pd.DataFrame, ax: Axes, *, setting: str, span: Mapping[str, Any]) -> Axes:
    """`mean` of an arm's trials over a setting, whose axis spans its range; bars are one standard deviation each way,
    for trials of several seeds.
    """
    stage = trials["finalist"].map({True: "finalist", False: "trial"}).where(~trials["chosen"].astype(bool), "chosen")
    places = {_choice(value): place for place, value in enumerate(span.get("values", ()))}
    x = trials[setting].map(_choice).map(places) if places else trials[setting]
    frame = trials.assign(x=x.astype("float64"), stage=stage)
    ended = frame[frame["status"] == "finished"].sort_values("stage", key=lambda names: names.map(list(COLOURS).index))
    if len(ended):
        sns.scatterplot(
            ended, x="x", y="mean", hue="stage", hue_order=list(COLOURS), palette=COLOURS, ax=ax, legend=False, s=36,
            linewidth=0, zorder=3, clip_on=False,
        )  # fmt: skip
        several = ended[ended["sd"].notna()]
        colours = [COLOURS[name] for name in several["stage"]]
        low, high = (several["mean"] + sign * several["sd"] for sign in (-1, 1))
        ax.vlines(several["x"], low, high, colors=colours, linewidth=1.2)
    metric = trials["metric"].iloc[0]
    diverged = frame[frame["status"] == "diverged"]
    edge = 0.02 if higher_is_better(metric) else 0.98
    ax.plot(
        diverged["x"], [edge] * len(diverged), "x", color=plots.INK, transform=ax.get_xaxis_transform(), clip_on=False
    )
    plots.value_axis(ax, ended["mean"])
    if places:
        ax.set_xticks(range(len(places)), list(places))
        ax.set_xlim(-0.5, len(places) - 0.5)
    else:
        low, high = span["low"], span["high"]
        if span["log"]:
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < FEW_DECADES else (1,)))
            ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlim(low, high)
    ax.set(xlabel=setting, ylabel=plots.LABELS[metric])
    return ax


def _choice(value: object) -> str:
    """A value of a range without order, as the table has it or as the range lists it."""
    return text(value if isinstance(value, (int, float, str)) and not isinstance(value, bool) else json.dumps(value))
