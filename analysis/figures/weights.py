"""Histograms of the weights over a logarithmic axis, with the values of their format, at start, middle and end."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from analysis.figures.drawings import PANELS, PANELS_A_ROW, key
from analysis.figures.plots import DISTINCT, FAINT, INK
from analysis.figures.saving import NARROW, WIDTH, Drawing, drawn

TIMES = {"start": FAINT, "middle": DISTINCT[1], "end": DISTINCT[0]}
MARKS = 64  # values of a format that are marked at most; else only the smallest and the largest
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
FEW = 1e-4  # bins below this share of the weights at both ends are not drawn


def histograms(runs: pd.DataFrame, weights: pd.DataFrame, values: pd.DataFrame) -> Drawing | None:
    """A panel for every `arm` (a column of runs), over all its runs; None where no run recorded its weights.

    weights: signature, step, of, log2 (a bin's lower edge, −inf for zeros), width, count. Of a run that rounds its
    weights those are drawn, each over the scale of its block. values: signature, value, the positive values that their
    format has.
    """
    rounded = set(weights.loc[weights["of"] == "rounded", "signature"])
    kept = weights[(weights["of"] == "rounded") | ~weights["signature"].isin(rounded)]
    frame = runs[["signature", "arm"]].merge(kept, on="signature")
    if frame.empty:
        return None
    frame["time"] = frame.groupby("signature")["step"].transform(_times)
    arms, caption = list(dict.fromkeys(frame["arm"])), ""
    if len(arms) > PANELS:
        caption = f" The first {PANELS} of {len(arms)} arms are drawn."
        arms = arms[:PANELS]
    marks = runs[["signature", "arm"]].merge(values, on="signature").groupby("arm")["value"].unique()

    def build(width: float) -> Figure:
        columns = 1 if width == NARROW else min(len(arms), PANELS_A_ROW)
        lines = -(-len(arms) // columns)
        size = (width if columns > 1 else min(width, 0.7 * WIDTH), 0.4 + 2.5 * lines)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for arm, ax in zip(arms, grid.flat, strict=False):
            histogram(frame[frame["arm"] == arm], ax, values=marks.get(arm, np.array([])))
            ax.set_title(arm, loc="left")
            if ax not in grid[:, 0]:
                ax.set_ylabel("")
        for ax in grid.flat[len(arms) :]:
            ax.set_visible(False)
        key(figure, TIMES, width)
        return figure

    text = (
        "Shares of the weights by magnitude, on a logarithmic axis; the share that is exactly zero is not drawn. Where "
        "weights are rounded: those that a product rounds, over the scale of their block. Ticks are the values that "
        "the format has; weights left of half the first tick become zero."
    )
    return drawn("weights", "Weights, and the values of their format", text + caption, build)


def _times(steps: pd.Series) -> pd.Series:
    """start, middle and end by the order of a run's recorded steps."""
    found = sorted(steps.unique())
    names = {step: "middle" for step in found} | {found[-1]: "end"} | {found[0]: "start"}
    return steps.map(names)


def histogram(frame: pd.DataFrame, ax: Axes, *, values: np.ndarray) -> Axes:
    """The share of the weights (`count` over their sum) in each bin from 2^`log2` on, a line for each `time`; a tick at
    each of `values`.
    """
    totals = frame.groupby("time")["count"].sum()
    finite = frame[np.isfinite(frame["log2"])]
    shares = finite.groupby(["time", "log2"])["count"].sum().div(totals, level="time")
    width = float(finite["width"].iloc[0]) if len(finite) else 1.0
    seen = shares[shares >= FEW].index.get_level_values("log2")
    for name, colour in TIMES.items():
        if name in shares.index.get_level_values("time"):
            bins = shares[name]
            edges = np.arange(bins.index.min(), bins.index.max() + 1.5 * width, width)
            heights = bins.reindex(edges[:-1], fill_value=0.0)
            ax.stairs(heights, edges, color=colour, linewidth=1.4)
    for value in values if len(values) <= MARKS else (values.min(), values.max()):
        ax.axvline(np.log2(value), ymax=0.06, color=INK, linewidth=1)
    places = [*seen, *(seen + width), *np.log2(values)] if len(seen) else [0.0, 1.0]
    low = min(seen, default=0.0)
    ax.set(xlim=(max(min(places), low - 2), max(places) + width), ylim=(0, None))
    ax.set(xlabel="magnitude" + (" / scale of its block" if (frame["of"] == "rounded").any() else ""), ylabel="share")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(_power_of_two))
    ax.yaxis.set_major_formatter(FuncFormatter(_percent))
    return ax


def _power_of_two(exponent: float, position: int) -> str:
    return "2" + str(round(exponent)).translate(SUPERSCRIPTS)


def _percent(share: float, position: int) -> str:
    return f"{100 * share:.3g}%"
