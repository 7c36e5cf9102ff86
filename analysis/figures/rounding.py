"""Maps of what rounding did, by site and role over the sampled steps: SQNR, clipped, underflowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.drawings import PANELS, PANELS_A_ROW
from analysis.figures.saving import NARROW, WIDTH, Drawing, drawn

SITES = 40  # rows of a panel at most
PRODUCTS = ("fprop", "dgrad", "wgrad")


@dataclass(frozen=True)
class Quantity:
    """A column of the telemetry that is drawn. sign: +1 where low is bad, −1 where high is bad."""

    column: str
    title: str
    label: str
    what: str
    sign: int


QUANTITIES = (
    Quantity(
        "sqnr_db",
        "Signal to rounding noise by site",
        "SQNR (dB)",
        "the ratio of a tensor's power to that of its rounding error",
        1,
    ),
    Quantity(
        "clipped", "Clipped by site", "clipped (%)", "the share of elements too large for their block's scale", -1
    ),
    Quantity("underflowed", "Underflowed by site", "underflowed (%)", "the share of elements that became zero", -1),
)


def maps(runs: pd.DataFrame, rows: pd.DataFrame) -> Iterator[Drawing]:
    """A figure for SQNR, and for clipped and underflowed elements where there are any: operands of the products, a
    panel a format. Nothing where nothing is rounded. rows: telemetry whose format is `rounded_to`.
    """
    frame = runs[["signature", "format"]].merge(rows, on="signature")
    frame = frame[(frame["rounded_to"] != "") & frame["role"].str.split(".").str[0].isin(PRODUCTS)]
    frame = frame.assign(operand=frame["site"] + " " + frame["role"])
    for quantity in QUANTITIES:
        shown = frame[np.isfinite(frame[quantity.column])]
        if len(shown) and (quantity.sign > 0 or shown[quantity.column].max() > 0):
            yield _map(shown.assign(value=shown[quantity.column] * (1 if quantity.sign > 0 else 100)), quantity)


def _map(frame: pd.DataFrame, quantity: Quantity) -> Drawing:
    """Grey, since colours are the levels of a factor; what is bad is dark."""
    caption = f"The median over runs of {quantity.what}; darker is worse."
    order = list(dict.fromkeys(frame["operand"]))
    if len(order) > SITES:
        medians = frame.assign(value=quantity.sign * frame["value"]).groupby(["operand", "format"])["value"].median()
        places = medians.groupby("format").rank(method="first").groupby("operand").min()  # the best in any format
        worst = places.sort_values(kind="stable").index[:SITES]
        which = "lowest" if quantity.sign > 0 else "highest"
        caption += f" The {SITES} operands of the {which} medians in a format are drawn, of {len(order)}."
        order = [operand for operand in order if operand in set(worst)]
    names = list(dict.fromkeys(frame["format"]))
    if len(names) > PANELS:
        caption += f" Panels for {', '.join(names[PANELS:])} are left out."
    names = names[:PANELS]
    cells = frame[frame["format"].isin(names) & frame["operand"].isin(order)].groupby(["format", "operand", "step"])
    bounds = (cells["value"].median().min(), cells["value"].median().max())  # of what is drawn

    def build(width: float) -> Figure:
        columns = 1 if width == NARROW else min(len(names), PANELS_A_ROW)
        lines = -(-len(names) // columns)
        size = (width if columns > 1 else min(width, 0.7 * WIDTH), lines * (1.1 + 0.17 * len(order)))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for name, ax in zip(names, grid.flat, strict=False):
            heatmap(frame[frame["format"] == name], ax, order=order, bounds=bounds, dark_is_low=quantity.sign > 0)
            ax.set_title(f"format = {name}", loc="left")
            ax.label_outer()
        for ax in grid.flat[len(names) :]:
            ax.set_visible(False)
        figure.colorbar(grid.flat[0].collections[0], ax=grid, label=quantity.label, shrink=0.6)
        return figure

    return drawn(quantity.column.replace("_", "-"), quantity.title, caption, build)


def heatmap(
    frame: pd.DataFrame, ax: Axes, *, order: Sequence[str], bounds: tuple[float, float], dark_is_low: bool
) -> Axes:
    """The median `value` of each `operand` (a row, in this order) in each sampled `step`."""
    table = frame.pivot_table(index="operand", columns="step", values="value", aggfunc="median").reindex(order)
    low, high = bounds
    palette = "Greys_r" if dark_is_low else "Greys"
    ax.pcolormesh(table.to_numpy(), cmap=palette, vmin=low, vmax=max(high, low + 1e-9), rasterized=table.size > 2_000)
    ax.grid(visible=False)
    ax.set_yticks(np.arange(len(order)) + 0.5, list(order), fontsize=7)
    ax.set_ylim(len(order), 0)
    shown = range(0, table.shape[1], -(-table.shape[1] // 6))
    ax.set_xticks([i + 0.5 for i in shown], [str(table.columns[i]) for i in shown])
    ax.set_xlabel("step")
    return ax
