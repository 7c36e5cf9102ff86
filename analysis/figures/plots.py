"""(frame, ax) -> ax: one drawing a function, with seaborn where it has it; no reading, no saving, no global state.

Colour means one thing in the whole report, the levels of one factor (`colours`), and every level keeps its colour in
every figure. Every run is drawn, or stands in a band that spans all runs. Labels carry units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from analysis.statistics.tables import BASELINE, higher_is_better, interval

UNITS = {"validation_loss": "nats", "validation_accuracy": "share correct"}
LABELS = {metric: f"{metric.replace('_', ' ')} ({unit})" for metric, unit in UNITS.items()}
CHANGES = {  # as sentences tell them
    "validation_loss": f"change in validation loss\nfrom {BASELINE} (nats)",
    "validation_accuracy": f"change in validation accuracy\nfrom {BASELINE} (percentage points)",
}
DISTINCT = ("#0173b2", "#de8f05", "#029e73", "#cc78bc", "#d55e00", "#56b4e9", "#ca9161")  # of seaborn's "colorblind"
INK, FAINT = "#333333", "#b0b0b0"
LOG_RATIO = 8  # a value axis that spans at least this ratio is logarithmic
FAR = 30  # a difference this many times their median makes a forest's axis logarithmic
MANY_RUNS = 2  # runs of one colour in one panel beyond which they are drawn as median and band
ROOM = 0.05  # of what values span, beyond them
POINTS = 150  # steps of a curve that are drawn at most
FEW_RATES = 5  # learning rates up to which each is a tick
RASTER_POINTS = 5_000  # points in one panel beyond which its lines are an image inside the SVG

STYLE: Any = {
    "svg.hashsalt": "analysis",  # the identifiers inside an SVG are the same in every run
    "svg.fonttype": "none",  # text stays text
    "pdf.fonttype": 42,  # TrueType, which journals take and editors can change
    "text.parse_math": False,  # a name with dollar signs is a name
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titley": 1.0,  # where it is without, too; but then it is looked for, which takes a twentieth of a drawing
    "axes.labelsize": 10,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "legend.frameon": False,
}


def colours(levels: Sequence[str], ordered: bool = False) -> dict[str, Any]:
    """A colour for each level: float32 dark grey, up to 7 others from a palette that colour-blind readers can tell
    apart; more than 7, and `ordered` levels (numbers), run through viridis without its palest end.
    """
    others = [level for level in levels if level != BASELINE]
    through = ordered or len(others) > len(DISTINCT)
    palette = sns.color_palette("viridis", len(others) + 1) if through else DISTINCT
    chosen = dict(zip(others, palette, strict=False))
    return {level: INK if level == BASELINE else chosen[level] for level in levels}


@dataclass(frozen=True)
class Lines:
    """What `curves` draws in a panel, by the levels of its hue: bands (step, median, min, max), single runs (step and
    value), and the ends of diverged ones; `values` are all that are drawn.
    """

    bands: dict[str, pd.DataFrame]
    runs: dict[str, list[pd.DataFrame]]
    ends: dict[str, pd.DataFrame]
    values: pd.Series


def lines(frame: pd.DataFrame, hue: str, smooth: int = 1) -> Lines:
    """Of rows with signature, status, step, value and the label `hue`.

    A run is a line. With more than 2 runs of a colour, a band spans those that did not diverge, from the smallest to
    the largest, about their median; diverged runs keep their own lines, because a median that loses runs on its way
    jumps. `smooth`: each run is replaced by its running mean over so many values. Values that are not finite are left
    out, and of long runs only every so many steps are drawn.
    """
    frame = frame[np.isfinite(frame["value"])]
    ends = frame[frame["status"] == "diverged"].sort_values("step").groupby("signature", sort=False).tail(1)
    if smooth > 1:
        running = frame.groupby("signature")["value"].rolling(smooth, min_periods=1, center=True).mean().droplevel(0)
        frame = frame.assign(value=running)
    frame = _thinned(frame)
    many = len(frame) > 0 and frame.groupby(hue)["signature"].nunique().max() > MANY_RUNS
    together = (frame["status"] != "diverged") & many
    bands = frame[together].groupby([hue, "step"])["value"].agg(["median", "min", "max"]).reset_index("step")
    runs: dict[str, list[pd.DataFrame]] = {}
    for (level, _), run in frame[~together].groupby([hue, "signature"], sort=False):
        runs.setdefault(level, []).append(run)
    return Lines(dict(tuple(bands.groupby(hue))), runs, dict(tuple(ends.groupby(hue))), frame["value"])


def curves(
    drawn: Lines,
    ax: Axes,
    *,
    colours: Mapping[str, Any],
    label: str,
    limits: tuple[float, float] = (-np.inf, np.inf),
) -> Axes:
    """`value` against `step`; × where a diverged run's last finite value is, at the edge where that is beyond limits.

    limits: what the value axis spans, of all panels that share it; infinite ones leave it as it comes. It is
    logarithmic when the values are positive and span a ratio of 8 or more.
    """
    rasterized = len(drawn.values) > RASTER_POINTS
    for level, colour in colours.items():
        if level in drawn.bands:
            band = drawn.bands[level]
            ax.plot(band["step"], band["median"], color=colour, linewidth=1.4, rasterized=rasterized)
            ax.fill_between(band["step"], band["min"], band["max"], color=colour, alpha=0.2, linewidth=0)
        for run in drawn.runs.get(level, ()):
            ax.plot(run["step"], run["value"], color=colour, linewidth=1.2, alpha=0.9, rasterized=rasterized)
        if level in drawn.ends:
            at = drawn.ends[level]
            y = at["value"].clip(*limits)
            ax.plot(at["step"], y, "x", color=colour, markersize=7, markeredgewidth=2, clip_on=False, zorder=3)
    value_axis(ax, drawn.values.clip(*limits))
    if np.all(np.isfinite(limits)):
        ax.set_ylim(*limits)
    ax.set(xlabel="step", ylabel=label)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True))
    return ax


def steady_limits(frame: pd.DataFrame) -> tuple[float, float]:
    """What the `value` of runs that did not diverge spans, with a little room; infinite where a diverged run's lies
    nowhere beyond, or none is left.
    """
    values = frame.loc[np.isfinite(frame["value"]), "value"]
    steady = values[frame["status"] != "diverged"]
    if steady.empty or (values.min() >= steady.min() and values.max() <= steady.max()):
        return -np.inf, np.inf
    low, high = float(steady.min()), float(steady.max())
    if low > 0 and high / low >= LOG_RATIO:
        return low * (low / high) ** ROOM, high * (high / low) ** ROOM
    room = ROOM * (high - low or abs(high) or 1.0)
    return low - room, high + room


def _thinned(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame at no more than 150 of its steps, spread evenly, the last included."""
    steps = np.sort(frame["step"].unique())
    if len(steps) <= POINTS:
        return frame
    return frame[frame["step"].isin(steps[np.linspace(0, len(steps) - 1, POINTS).round().astype(int)])]


def final_metric(
    frame: pd.DataFrame, ax: Axes, *, hue: str, levels: Sequence[str], colours: Mapping[str, Any], intervals: bool
) -> Axes:
    """`primary_metric` of every run as a point over the level of `hue`; with `intervals` the mean and its 95% t
    interval beside them.

    levels: of all panels that share the axis, in their order on it; a panel may lack some. Pass `intervals` only where
    the points over a level differ in seeds alone.
    """
    at = {level: place for place, level in enumerate(levels)}
    x = frame[hue].map(at).astype("float64")
    sns.scatterplot(
        x=x - 0.12 * intervals, y=frame["primary_metric"], hue=frame[hue], hue_order=levels,
        palette={level: colours[level] for level in levels}, ax=ax, legend=False, s=34, alpha=0.75, linewidth=0,
    )  # fmt: skip
    for level in [level for level in levels if intervals and (frame[hue] == level).any()]:
        mean, low, high = interval(frame.loc[frame[hue] == level, "primary_metric"])
        place = at[level] + 0.12
        ax.plot([place], [mean], "_", color=colours[level], markersize=13, markeredgewidth=2)
        ax.plot([place, place], [low, high], "-", color=colours[level], linewidth=1.6)
    value_axis(ax, frame["primary_metric"])
    ax.set_xticks(range(len(levels)), levels)
    if sum(map(len, levels)) > 40:
        ax.tick_params(axis="x", rotation=25)
    name = LABELS[frame["metric"].iloc[0]].replace(" (", "\n(")
    ax.set(xlabel=hue, ylabel=name, xlim=(-0.6, len(levels) - 0.4))
    ax.grid(visible=False, axis="x")
    return ax


def forest(frame: pd.DataFrame, ax: Axes, *, hue: str, colours: Mapping[str, Any], label: str) -> Axes:
    """`difference` with `low` to `high` for each row, named by `name`, top to bottom, n at the right; the line at 0 is
    "no difference".

    A row without an interval (n < 2) is a hollow point.
    """
    for place, row in enumerate(frame.to_dict("records")):
        colour = colours.get(row[hue], INK)
        alone = row["n"] < 2
        ax.plot([row["low"], row["high"]], [place, place], "-", color=colour, linewidth=1.8, solid_capstyle="butt")
        ax.plot(
            [row["difference"]], [place], "o", color=colour, markersize=6, markerfacecolor="white" if alone else colour
        )
        ax.annotate(f"n = {row['n']}", (1.005, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    if far_apart(frame["difference"]):
        middle = float(f"{frame['difference'].abs().median():.1g}")
        ax.set_xscale("symlog", linthresh=middle)
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.axvline(0, color=INK, linewidth=1)
    ax.set_yticks(range(len(frame)), list(frame["name"]))
    ax.set(ylim=(len(frame) - 0.5, -0.5), xlabel=label)
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return ax


def costs(
    frame: pd.DataFrame,
    seeds: pd.DataFrame,
    ax: Axes,
    *,
    formats: Sequence[str],
    colours: Mapping[str, Any],
    label: str,
) -> Axes:
    """`difference` with `low` to `high` against the format, float32 first at 0; a line for each `name`. seeds: the same
    of single seeds, as small points beside.
    """
    places = {name: place for place, name in enumerate([BASELINE, *formats])}
    for number, (name, colour) in enumerate(colours.items()):
        rows = frame[frame["name"] == name].drop_duplicates("format")
        if rows.empty:  # the arm of another task
            continue
        shift = 0.06 * (number - (len(colours) - 1) / 2)
        x = np.array([0, *(places[each] for each in rows["format"])]) + shift
        ax.plot(x, [0, *rows["difference"]], "o-", color=colour, linewidth=1.6, markersize=5)
        for place, low, high in zip(x[1:], rows["low"], rows["high"], strict=True):
            ax.plot([place, place], [low, high], "-", color=colour, linewidth=1.6)
        single = seeds[seeds["name"] == name]
        beside = single["format"].map(places).astype("float64") + shift + (0.04 if shift > 0 else -0.04)
        ax.plot(beside, single["difference"], "o", color=colour, alpha=0.7, markersize=3.5, markeredgewidth=0)
    ax.axhline(0, color=INK, linewidth=1)
    ax.set_xticks(range(len(places)), list(places))
    if sum(map(len, places)) > 40:
        ax.tick_params(axis="x", rotation=25)
    ax.set(ylabel=label, xlim=(-0.4, len(places) - 0.6))
    ax.grid(visible=False, axis="x")
    return ax


def heat_map(table: pd.DataFrame, ax: Axes, *, texts: Sequence[Sequence[str]], better: str) -> Axes:
    """A cell for every number of `table`, with its text; darker is better by the metric `better`."""
    palette = "Blues" if higher_is_better(better) else "Blues_r"
    low, high = float(np.nanmin(table)), float(np.nanmax(table))
    margin = 0.25 * (high - low or 1)  # the ends of the palette are too pale and too dark to read on
    sns.heatmap(
        table, ax=ax, cmap=palette, vmin=low - margin, vmax=high + margin, annot=np.array(texts), fmt="", cbar=False,
        linewidths=1.5, annot_kws={"fontsize": 9},
    )  # fmt: skip
    ax.tick_params(length=0, rotation=0)
    return ax


def bounds(frame: pd.DataFrame, ax: Axes) -> Axes:
    """A tick at `below` in every row of a forest."""
    for place, bound in enumerate(frame["below"]):
        ax.plot([bound, bound], [place - 0.32, place + 0.32], "-", color=INK, linewidth=2.2)
    return ax


def far_apart(differences: pd.Series) -> bool:
    """Whether the largest is so far above the median that a linear axis would show nothing of the others."""
    sizes = differences.abs()
    return bool(0 < FAR * sizes.median() <= sizes.max())


def learning_rates(frame: pd.DataFrame, ax: Axes, *, rate: str, hue: str, colours: Mapping[str, Any]) -> Axes:
    """`primary_metric` of every run against its learning rate (logarithmic), the mean at each rate joined by a line,
    coloured by `hue`; a diverged run is an × at the edge where the metric is bad.
    """
    levels = [level for level in colours if (frame[hue] == level).any()]
    palette = {level: colours[level] for level in levels}
    ok = frame[(frame["status"] == "finished") & np.isfinite(frame["primary_metric"])]
    shared: dict[str, Any] = {
        "x": rate,
        "y": "primary_metric",
        "hue": hue,
        "hue_order": levels,
        "palette": palette,
        "ax": ax,
    }
    if len(ok):
        sns.lineplot(ok, estimator="mean", errorbar=None, legend=False, linewidth=1.2, **shared)
        sns.scatterplot(ok, legend=False, s=26, alpha=0.75, linewidth=0, **shared)
    metric = frame["metric"].iloc[0]
    value_axis(ax, ok["primary_metric"])
    bad = frame[frame["status"] == "diverged"]
    edge = 0.02 if higher_is_better(metric) else 0.98
    for level, group in bad.groupby(hue, sort=False):
        ax.plot(
            group[rate],
            [edge] * len(group),
            "x",
            color=colours[level],
            transform=ax.get_xaxis_transform(),
            markersize=7,
        )
    ax.set(xscale="log", xlabel=f"learning rate ({rate})", ylabel=LABELS[metric].replace(" (", "\n("))
    rates = sorted(frame[rate].dropna().unique())
    if len(rates) <= FEW_RATES:
        ax.set_xticks(rates, [f"{value:g}" for value in rates])
    else:
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3) if rates[-1] / rates[0] < 300 else (1,)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    return ax


def value_axis(ax: Axes, values: pd.Series) -> None:
    """A logarithmic y axis with plain numbers when positive values span a ratio of 8 or more."""
    if len(values) and values.min() > 0 and values.max() / values.min() >= LOG_RATIO:
        ax.set_yscale("log")
        decades = np.log10(values.max() / values.min())
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def strip(frame: pd.DataFrame, ax: Axes, *, value: str, rows: Sequence[str], label: str) -> Axes:
    """`value` of every run as a point in the row of its `arm`, a tick at their median, which is written beside."""
    for place, name in enumerate(rows):
        x = frame.loc[frame["arm"] == name, value].dropna()
        ax.plot(x, [place] * len(x), "o", color=DISTINCT[0], alpha=0.6, markersize=5, markeredgewidth=0)
        if len(x):
            middle = x.median()
            ax.plot([middle, middle], [place - 0.3, place + 0.3], "-", color=INK, linewidth=1.6)
            ax.annotate(f"{middle:.3g}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    ax.set(xlabel=label, xlim=(0, None), ylim=(len(rows) - 0.5, -0.5))
    ax.grid(visible=False, axis="y")
    return ax


def ends(frame: pd.DataFrame, ax: Axes, *, rows: Sequence[str], last: float) -> Axes:
    """× at the last `step` of every run in the row of its `arm`; `where` beside it."""
    for place, name in enumerate(rows):
        for row in frame[frame["arm"] == name].to_dict("records"):
            ax.plot([row["step"]], [place], "x", color=DISTINCT[4], markersize=7, markeredgewidth=2)
            on_the_left = row["step"] > last / 2
            ax.annotate(
                row["where"], (row["step"], place), xytext=(-8 if on_the_left else 8, 0), textcoords="offset points",
                ha="right" if on_the_left else "left", va="center", fontsize=8,
            )  # fmt: skip
    ax.set(xlabel="step", xlim=(0, 1.02 * last), ylim=(len(rows) - 0.5, -0.5))
    ax.grid(visible=False, axis="y")
    return ax
