"""What runs took, and where they ended: time a step and memory by arm, and the steps at which runs diverged."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from analysis.figures import plots
from analysis.figures.comparisons import LINE, ROWS
from analysis.figures.saving import NARROW, Drawing, drawn

COSTS = {"time_ms": "time a step (ms)", "peak_memory_mb": "peak memory (MB)"}


def costs(runs: pd.DataFrame) -> Drawing | None:
    """Time a step and peak memory of every run, by `arm`. None where neither is known.

    runs: arm, and time_ms and peak_memory_mb where they were recorded.
    """
    shown = [name for name in COSTS if name in runs and runs[name].notna().any()]
    arms = list(dict.fromkeys(runs["arm"]))
    if not shown:
        return None
    caption = "A point is a run, the tick their median. Runs that shared a machine slowed each other down."
    if "peak_memory_mb" in shown:
        caption += " Memory is that of the whole process, its libraries included."
    if len(arms) > ROWS:
        caption += f" The first {ROWS} of {len(arms)} arms are drawn."
        arms = arms[:ROWS]

    def build(width: float) -> Figure:
        lines = len(shown) if width == NARROW else 1
        size = (width, (0.8 + 0.24 * len(arms)) * lines)
        room = ConstrainedLayoutEngine(wspace=0.06)  # beside the numbers of the medians
        figure = Figure(figsize=size, layout=room)
        grid = figure.subplots(lines, len(shown) // lines, sharey=True, squeeze=False)
        for name, ax in zip(shown, grid.flat, strict=True):
            plots.strip(runs, ax, value=name, rows=arms, label=COSTS[name])
            ax.set_yticks(range(len(arms)), _broken(arms, width))
            ax.label_outer()
            ax.tick_params(axis="y", length=0)
            ax.xaxis.label.set_visible(True)
        return figure

    return drawn("time-and-memory", "Time and memory", caption, build)


def divergences(runs: pd.DataFrame) -> Drawing | None:
    """The step at which each diverged run ended, by `arm`; beside it the column `where`, the site of the first value
    that was not finite, if it is known. None where no run diverged.
    """
    lost = runs[runs["status"] == "diverged"]
    if lost.empty:
        return None
    arms = list(dict.fromkeys(lost["arm"]))[:ROWS]
    end = float(runs["step"].max())

    def build(width: float) -> Figure:
        figure = Figure(figsize=(width, 0.9 + 0.3 * len(arms)), layout="constrained")
        ax = figure.subplots()
        plots.ends(lost, ax, rows=arms, last=end)
        ax.set_yticks(range(len(arms)), _broken(arms, width))
        return figure

    known = " The site is that of the first NaN or Inf, from telemetry." if (lost["where"] != "").any() else ""
    caption = f"The last step of every diverged run; runs that did not diverge are not drawn.{known}"
    return drawn("divergences", "Where runs diverged", caption, build)


def _broken(names: Sequence[str], width: float) -> list[str]:
    return [textwrap.fill(name, LINE if width == NARROW else 2 * LINE) for name in names]
