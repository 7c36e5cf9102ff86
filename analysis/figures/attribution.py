"""The heat map of an attribution: what the rounding of each role costs at each site; darker is worse.

A panel is a frame with one row for each site and role: site, role, and the measure that is drawn. Grey, since colours
are the levels of a factor; the numbers stand in the cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import plots
from analysis.figures.drawings import PANELS, PANELS_A_ROW
from analysis.figures.saving import NARROW, WIDTH, Drawing, drawn

SITES = 40  # rows of a panel at most
CHANGE, GRADIENT = "change", "gradient_sqnr_db"
TITLES = {CHANGE: "What rounding costs, by site and role", GRADIENT: "Error of the gradients, by site and role"}
READ = {
    CHANGE: "Each number is what rounding this alone adds to the loss, in thousandths; darker is more.",
    GRADIENT: "Each number is the SQNR in dB of all gradients where this alone is rounded; darker is worse.",
}


def drawing(panels: Mapping[str, pd.DataFrame], measure: str = CHANGE) -> Drawing | None:
    """A panel for every name, at most 6, on one scale; None where there is no number. The caption says in words what
    is worst in each.
    """
    made = figure(panels, measure)
    if made is None:
        return None
    name = "attribution" if measure == CHANGE else "attribution-gradients"
    return drawn(name, TITLES[measure], made[1], lambda width: _figure(panels, measure, width)[0])


def save(frame: pd.DataFrame, path: Path) -> str:
    """Draw the "only" rows by site and role of an attribution into a file; returns in words what the drawing shows.

    With a backward pass, the error of the gradients is drawn; else the change of the loss. Raises ValueError for a
    frame without such rows and for an unknown kind of file, OSError where it cannot be written.
    """
    measure = GRADIENT if GRADIENT in frame else CHANGE
    rows = frame[(frame["by"] == "site-role") & (frame["rounded"] == "only")]
    made = figure({str(name): part for name, part in rows.groupby("recipe", sort=False)}, measure)
    if made is None:
        raise ValueError("there is nothing by site and role to draw")
    picture, caption = made
    with matplotlib.rc_context(plots.STYLE):
        picture.savefig(path, dpi=150)
    return f"{TITLES[measure]}. {caption}"


def figure(panels: Mapping[str, pd.DataFrame], measure: str) -> tuple[Figure, str] | None:
    """The figure and its caption; None where there is no number."""
    return _figure(panels, measure, WIDTH) if _tables(panels, measure) else None


def _tables(panels: Mapping[str, pd.DataFrame], measure: str) -> dict[str, pd.DataFrame]:
    tables = {name: _table(frame, measure) for name, frame in panels.items()}
    return {name: table for name, table in tables.items() if np.isfinite(table.to_numpy(dtype=float)).any()}


def _figure(panels: Mapping[str, pd.DataFrame], measure: str, width: float) -> tuple[Figure, str]:
    tables = _tables(panels, measure)
    caption, left_out = READ[measure], list(tables)[PANELS:]
    tables = dict(list(tables.items())[:PANELS])
    sites = list(dict.fromkeys(site for table in tables.values() for site in table.index))
    roles = list(dict.fromkeys(role for table in tables.values() for role in table.columns))
    badness = pd.concat([_badness(table, measure).max(axis=1) for table in tables.values()], axis=1).max(axis=1)
    if len(sites) > SITES:
        worst = set(badness.sort_values(ascending=False, kind="stable").index[:SITES])
        caption += f" The {SITES} worst sites are drawn, of {len(sites)}."
        sites = [site for site in sites if site in worst]
    caption += "".join(f" {_worst(name, table, measure)}" for name, table in tables.items())
    caption += f" Panels for {', '.join(left_out)} are left out." if left_out else ""
    values = np.concatenate([_badness(table, measure).to_numpy(dtype=float).ravel() for table in tables.values()])
    bounds = float(np.nanmin(values)), float(np.nanmax(values))
    columns = min(len(tables), PANELS_A_ROW if len(roles) < 4 and width > NARROW else 1)
    lines = -(-len(tables) // columns)
    with matplotlib.rc_context(plots.STYLE | {"axes.grid": False}):
        picture = Figure(figsize=(width, lines * (1.2 + 0.24 * len(sites))), layout="constrained")
        grid = picture.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for (name, table), ax in zip(tables.items(), grid.flat, strict=False):
            heatmap(table.reindex(index=sites, columns=roles), ax, measure=measure, bounds=bounds)
            ax.set_title(name, loc="left")
        for ax in grid.flat[len(tables) :]:
            ax.set_visible(False)
    return picture, caption


def heatmap(table: pd.DataFrame, ax: Axes, *, measure: str, bounds: tuple[float, float]) -> Axes:
    """The measure of each site (a row) and role (a column), written into the cells; bounds: of the badness."""
    low, high = bounds
    bad = _badness(table, measure).to_numpy(dtype=float)
    ax.pcolormesh(bad, cmap="Greys", vmin=low, vmax=max(high, low + 1e-9))
    for (line, column), value in np.ndenumerate(table.to_numpy(dtype=float)):
        if not np.isnan(value):
            dark = (bad[line, column] - low) / max(high - low, 1e-9) > 0.55
            label = f"{1000 * value:+.1f}".replace("-", "−") if measure == CHANGE else f"{value:.0f}"
            ax.text(
                column + 0.5,
                line + 0.5,
                label,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else plots.INK,
            )
    ax.set_yticks(np.arange(len(table.index)) + 0.5, list(table.index), fontsize=7)
    ax.set_ylim(len(table.index), 0)
    ax.set_xticks(np.arange(len(table.columns)) + 0.5, list(table.columns), fontsize=8)
    ax.tick_params(length=0)
    return ax


def _table(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Sites by roles, both in the order of the frame; the mean where a cell has several rows."""
    sites, roles = (list(dict.fromkeys(frame[name])) for name in ("site", "role"))
    table = frame.pivot_table(index="site", columns="role", values=measure, aggfunc="mean", dropna=False)
    return table.reindex(index=sites, columns=roles)


def _badness(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Larger is worse: an improvement counts as 0, and so does an SQNR that is infinite."""
    if measure == CHANGE:
        return table.clip(lower=0)
    finite = table.where(np.isfinite(table))
    largest = np.nanmax(finite.to_numpy(dtype=float))
    return (largest - table.clip(upper=largest)).where(table.notna())


def _worst(name: str, table: pd.DataFrame, measure: str) -> str:
    site, role = _badness(table, measure).stack().idxmax()
    value = table.loc[site, role]
    unit = f"{value:+.4f}".replace("-", "−") if measure == CHANGE else f"{value:.1f} dB"
    return f"Worst in {name}: {site}, {role} ({unit})."
