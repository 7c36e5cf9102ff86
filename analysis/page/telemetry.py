"""What rounding did, from the telemetry of the runs that have it: tables, a figure, and their part of the report.

Rows are those of `load.telemetry`: one a run, sampled step, site and role. The sums are the simulation's; here are only
medians and extremes over rows, and nothing is averaged over sites of different size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import plots
from analysis.figures.drawings import PANELS, PANELS_A_ROW, WIDTH, Drawing, svg
from analysis.page import html as page
from analysis.page.html import Column
from analysis.page.summary import arm_name, count
from analysis.statistics.tables import text

SITES = 40  # rows of a panel at most
SHARES = ("clipped", "underflowed", "swallowed", "oscillated")
PRODUCTS = ("fprop", "dgrad", "wgrad")


def origins(runs: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """One row a run that saw a NaN or Inf, the first of them: signature, status, step, site, role, kind.

    step: updates before it; that of a step that was not sampled is known where the run ended in it.
    """
    first = rows[rows["origin"] != ""].rename(columns={"origin": "kind"})
    return runs[["signature", "status"]].merge(
        first[["signature", "step", "site", "role", "kind"]], on="signature", validate="one_to_one"
    )


def rounding(runs: pd.DataFrame, rows: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """One row an arm and role that something rounds: its factors, role, rounded_to, runs, sites, sqnr_db (the median
    over runs, steps and sites), lowest_db and lowest_site (of the sites' medians), clipped, underflowed, swallowed and
    oscillated (the largest of the sites' medians).
    """
    rounded = _with_factors(runs, rows, factors).query("rounded_to != ''")
    out = []
    for key, group in rounded.groupby([*factors, "role", "rounded_to"], dropna=False, sort=False):
        sites = group.groupby("site", sort=False)[["sqnr_db", *SHARES]].median()
        out.append(
            dict(zip([*factors, "role", "rounded_to"], key, strict=True))
            | {"runs": group["signature"].nunique(), "sites": len(sites)}
            | {"sqnr_db": group["sqnr_db"].median(), "lowest_db": sites["sqnr_db"].min()}
            | {"lowest_site": sites["sqnr_db"].idxmin() if sites["sqnr_db"].notna().any() else ""}
            | {name: sites[name].max() for name in SHARES}
        )
    columns = ["role", "rounded_to", "runs", "sites", "sqnr_db", "lowest_db", "lowest_site"]
    return pd.DataFrame(out, columns=[*factors, *columns, *SHARES])


def gradients(runs: pd.DataFrame, cosines: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """One row an arm: its factors, runs, cosine (the median over runs, steps and parameters), lowest and parameter (the
    least of the parameters' medians), norm_ratio (the median).
    """
    out = []
    for key, group in _with_factors(runs, cosines, factors).groupby(list(factors), dropna=False, sort=False):
        each = group.groupby("parameter", sort=False)["cosine"].median()
        out.append(
            dict(zip(factors, key, strict=True))
            | {"runs": group["signature"].nunique(), "cosine": group["cosine"].median(), "lowest": each.min()}
            | {"parameter": each.idxmin() if each.notna().any() else "", "norm_ratio": group["norm_ratio"].median()}
        )
    return pd.DataFrame(out, columns=[*factors, "runs", "cosine", "lowest", "parameter", "norm_ratio"])


def _with_factors(runs: pd.DataFrame, rows: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """The rows of these runs with the factors beside them; a row's own format is `rounded_to`."""
    return runs[["signature", *factors]].merge(rows.rename(columns={"format": "rounded_to"}), on="signature")


def sqnr(runs: pd.DataFrame, rows: pd.DataFrame) -> Drawing | None:
    """SQNR of the products' operands, by site over the sampled steps: a panel a format. None where nothing is rounded.

    Grey, since colours are the levels of a factor.
    """
    frame = _with_factors(runs, rows, ["format"])
    frame = frame[frame["role"].str.split(".").str[0].isin(PRODUCTS) & np.isfinite(frame["sqnr_db"])]
    frame = frame.assign(operand=frame["site"] + " " + frame["role"])
    if frame.empty:
        return None
    caption = "The median over runs of the ratio of a tensor's power to that of its rounding error; lighter is worse."
    order = list(dict.fromkeys(frame["operand"]))
    if len(order) > SITES:
        medians = frame.groupby(["operand", "format"])["sqnr_db"].median()
        places = medians.groupby("format").rank(method="first").groupby("operand").min()  # the best in any format
        lowest = places.sort_values(kind="stable").index[:SITES]
        caption += f" The {SITES} operands of the lowest medians in a format are drawn, of {len(order)}."
        order = [operand for operand in order if operand in set(lowest)]
    names = list(dict.fromkeys(frame["format"]))
    if len(names) > PANELS:
        caption += f" Panels for {', '.join(names[PANELS:])} are left out."
    names, bounds = names[:PANELS], (frame["sqnr_db"].min(), frame["sqnr_db"].max())
    columns = min(len(names), PANELS_A_ROW)
    lines = -(-len(names) // columns)
    with matplotlib.rc_context(plots.STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(WIDTH, lines * (1.1 + 0.17 * len(order))), layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for name, ax in zip(names, grid.flat, strict=False):
            heatmap(frame[frame["format"] == name], ax, order=order, bounds=bounds)
            ax.set_title(f"format = {name}", loc="left")
            ax.label_outer()
        for ax in grid.flat[len(names) :]:
            ax.set_visible(False)
        figure.colorbar(grid.flat[0].collections[0], ax=grid, label="SQNR (dB)", shrink=0.6)
        return Drawing("Signal to rounding noise by site", caption, svg(figure))


def heatmap(frame: pd.DataFrame, ax: Axes, *, order: Sequence[str], bounds: tuple[float, float]) -> Axes:
    """The median `sqnr_db` of each `operand` (a row, in this order) in each sampled `step`."""
    table = frame.pivot_table(index="operand", columns="step", values="sqnr_db", aggfunc="median").reindex(order)
    low, high = bounds
    ax.pcolormesh(table.to_numpy(), cmap="Greys", vmin=low, vmax=max(high, low + 1e-9), rasterized=table.size > 2_000)
    ax.set_yticks(np.arange(len(order)) + 0.5, list(order), fontsize=7)
    ax.set_ylim(len(order), 0)
    shown = range(0, table.shape[1], -(-table.shape[1] // 6))
    ax.set_xticks([i + 0.5 for i in shown], [str(table.columns[i]) for i in shown])
    ax.set_xlabel("step")
    return ax


def section(
    runs: pd.DataFrame, rows: pd.DataFrame, cosines: pd.DataFrame, factors: Sequence[str], names: Sequence[str]
) -> Iterator[str]:
    """The part of a task's section of the report; nothing where none of its runs has telemetry.

    names: the factors that tell the arms apart.
    """
    rows, cosines = (frame[frame["signature"].isin(runs["signature"])] for frame in (rows, cosines))
    if rows.empty:
        return
    observed = count(rows["signature"].nunique(), "run")
    yield page.heading(3, "What rounding did")
    yield page.paragraph(f"Telemetry of {observed}, of the steps that were sampled; a step counts updates.", "note")
    first = origins(runs, rows)
    if first.empty:
        yield page.paragraph("No NaN and no Inf was seen.")
    else:
        named = [
            arm_name(row, [*names, "seed"])
            for row in runs.set_index("signature").loc[first["signature"]].to_dict("records")
        ]
        yield page.paragraph("The first NaN or Inf of each run that saw one:")
        yield page.table(
            [
                Column("run", named),
                *(
                    Column(name, [text(value) for value in first[name]])
                    for name in ("status", "step", "site", "role", "kind")
                ),
            ]
        )
    table = rounding(runs, rows, factors)
    if len(table):
        yield page.table(
            [
                Column("arm", [arm_name(row, names) for row in table.to_dict("records")]),
                Column("role", list(table["role"])),
                Column("rounded to", list(table["rounded_to"])),
                Column("SQNR (dB)", _numbers(table["sqnr_db"], ".1f"), number=True),
                Column("lowest", _numbers(table["lowest_db"], ".1f"), number=True),
                Column("at", list(table["lowest_site"]), wrap=True),
                *(Column(name, _numbers(table[name], ".2%"), number=True) for name in SHARES),
            ]
        )
        yield page.paragraph(
            "Medians over runs and steps. Clipped, underflowed (to zero), swallowed (weights whose update rounding "
            "undid) and oscillated (weights that flipped to a neighbouring value and back in two updates) are the "
            "shares at the worst site.",
            "note",
        )
    drawing = sqnr(runs, rows)
    if drawing is not None:
        yield page.figure(drawing)
    table = gradients(runs, cosines, factors)
    if len(table):
        yield page.paragraph("The simulated gradient against that of the same weights and batch in full precision:")
        yield page.table(
            [
                Column("arm", [arm_name(row, names) for row in table.to_dict("records")]),
                Column("cosine (median)", _numbers(table["cosine"], ".4f"), number=True),
                Column("lowest parameter's", _numbers(table["lowest"], ".4f"), number=True),
                Column("parameter", list(table["parameter"])),
                Column("norm ratio (median)", _numbers(table["norm_ratio"], ".4f"), number=True),
            ]
        )


def _numbers(values: pd.Series, style: str) -> list[str]:
    return ["–" if pd.isna(value) else format(value, style) for value in values]
