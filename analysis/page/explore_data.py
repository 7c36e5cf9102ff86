"""What the page's script knows of every run: curves, settings, telemetry, outcome, and the command that repeats it.

Lists instead of objects, a list of steps that many runs share once, 5 digits a number, and at most 40,000 points a
metric and task: so a report of 200 runs keeps below 5 MB, and one of 2,000 does not grow tenfold.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import to_hex

from analysis import load
from analysis.figures import drawings as figures
from analysis.figures import interactive, plots
from analysis.load import FINAL, Results
from analysis.page import summary
from analysis.statistics import tables
from analysis.statistics.tables import TASK, text

POINTS, MOST, LEAST = 40_000, 200, 20  # of a metric of a task; of a run at most, and at least
DIGITS = 5
OPERANDS = 40  # of a run's telemetry that are listed
NUMBERS = ("sqnr_db", "clipped", "underflowed", "swallowed")  # that are told of each
DULL = {("train", "time_ms"), ("train", "lr")}  # of which no curve is offered
FIRST = (("validation", "loss"), ("validation", "accuracy"), ("train", "loss"))  # the order of those that are
COLOURS = ("#0173b2", "#de8f05", "#029e73", "#cc78bc", "#d55e00", "#56b4e9", "#ca9161", "#949494")  # of roles
ONCE = {  # options of one session, and whether a value follows
    "--only": True,
    "--retry-failed": False,
    "--dry-run": False,
    "--report": False,
}
LEAST_LETTERS = 4  # more letters of an option than these, its dashes included, tell which is meant
Data = dict[str, Any]


def data(results: Results, arms: pd.DataFrame) -> Data:
    """All of it: `charts`, and for each task in the order of the report what `_task` gives. `arms` is tables.arms."""
    everything = [
        _task(results, runs, summary.of_task(arms, task))
        for task, runs in results.runs.groupby(list(TASK), dropna=False, sort=False)
    ]
    return {"charts": interactive.charts(), "colours": list(COLOURS), "tasks": everything}


def _task(results: Results, runs: pd.DataFrame, arms: pd.DataFrame) -> Data:
    """`metric` and whether higher is better; `constant`, the settings of every run, and `columns`, the names of those
    that vary; `colourings`; `curves`; and the `runs`, to whose order all lists of curves keep.
    """
    metric = runs["metric"].iloc[0]
    factors = summary.varying(arms)
    named = [summary.arm_name(row, factors) for row in runs.to_dict("records")]
    columns = load.config_columns(runs)
    varying = [name for name in columns if runs[name].nunique(dropna=False) > 1]
    chosen, levels = colourings(results, runs, factors, named)
    sites = list(dict.fromkeys(operand for operand in _operands(_of(runs, results.telemetry))["operand"]))
    return {
        "metric": plots.LABELS[metric],
        "higher_is_better": tables.higher_is_better(metric),
        "constant": [[name, text(runs[name].iloc[0])] for name in columns if name not in varying],
        "columns": varying,
        "colourings": chosen,
        "default": _first_colouring(chosen, figures.roles(runs, tables.factors(results.runs), results.runs).hue),
        "curves": list(curves(runs, results.metrics)),
        "operands": sites,
        "runs": _runs(results, runs, named, varying, levels, sites),
    }


def colourings(
    results: Results, runs: pd.DataFrame, factors: Sequence[str], named: Sequence[str]
) -> tuple[list[Data], list[list[int]]]:
    """By what the runs can be coloured: the arm, each factor that varies, the seed. Each has its levels, their colours,
    and their numbers where they are positive numbers. And of every run the index of its level in each.
    """
    roles = figures.roles(runs, tables.factors(results.runs), results.runs)
    columns: dict[str, pd.Series] = {"arm": pd.Series(list(named), index=runs.index, dtype="str")}
    columns |= {name: runs[name] for name in [*factors, "seed"] if runs[name].nunique(dropna=False) > 1}
    chosen: list[Data] = []
    places = []
    for name, column in columns.items():
        levels = figures.levels(column)
        numeric = pd.api.types.is_numeric_dtype(column.dtype)
        ordered = numeric and len(levels) > 2
        colours = roles.colours if name == roles.hue else plots.colours(levels, ordered=ordered)
        shown = [
            interactive.page_colour(colours[level] if colours[level] == plots.INK else to_hex(colours[level]))
            for level in levels
        ]
        numbers = sorted(column.unique().tolist()) if numeric and bool((column > 0).all()) else []
        chosen.append(
            {"name": _short(name), "levels": levels, "colours": shown}
            | ({"numbers": numbers} if len(numbers) == len(levels) else {})
        )
        places.append([levels.index(text(value)) for value in column])
    return chosen, [list(each) for each in zip(*places, strict=True)]


def _first_colouring(chosen: Sequence[Data], hue: str) -> int:
    """The arm where few enough are to be told apart, else the factor that colours the printed figures."""
    names = [each["name"] for each in chosen]
    few = len(chosen[0]["levels"]) <= len(plots.DISTINCT) + 1
    return 0 if few or _short(hue) not in names else names.index(_short(hue))


def curves(runs: pd.DataFrame, metrics: pd.DataFrame) -> Iterable[Data]:
    """Every metric that was recorded more than once in some run: its `name`; `mean_of`, how many neighbouring values a
    point is the mean of; `steps`, lists of steps; and `lines`, for every run null or [index in steps, values].

    Values that are not finite are left out. A line's steps are the start of its list.
    """
    mine = metrics[metrics["signature"].isin(runs["signature"]) & np.isfinite(metrics["value"])]
    found = dict(tuple(mine.groupby(["split", "metric"], sort=False)))
    for key in sorted(found, key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST)):
        group = found[key].sort_values("step", kind="stable")
        longest = int(group.groupby("signature").size().max())
        if key in DULL or longest < 2:
            continue
        most = min(MOST, max(LEAST, POINTS // len(runs)))
        block = -(-longest // most)
        by_run = dict(tuple(group.groupby("signature", sort=False)))
        pool: list[list[float]] = []
        lines = [_line(by_run.get(name), block, pool) for name in runs["signature"]]
        split, metric = key
        yield {"name": f"{'training' if split == 'train' else split} {metric.replace('_', ' ')}"} | {
            "mean_of": block,
            "steps": pool,
            "lines": lines,
        }


def _line(group: pd.DataFrame | None, block: int, pool: list[list[float]]) -> list[Any] | None:
    """The curve of a run in blocks of so many values; its steps join the pool where no list there begins with them."""
    if group is None:
        return None
    part = np.arange(len(group)) // block
    counts = np.bincount(part)
    steps = [_number(x) for x in np.bincount(part, weights=group["step"].to_numpy()) / counts]
    values = [_number(x) for x in np.bincount(part, weights=group["value"].to_numpy()) / counts]
    for place, known in enumerate(pool):
        if known[: len(steps)] == steps:
            return [place, values]
    pool.append(steps)
    return [len(pool) - 1, values]


def _runs(
    results: Results,
    runs: pd.DataFrame,
    named: Sequence[str],
    varying: Sequence[str],
    levels: Sequence[Sequence[int]],
    sites: Sequence[str],
) -> list[Data]:
    """Of every run: signature, arm, seed, status, step, cause, value (null where not finite), final metrics, levels,
    settings (those that vary), seconds, command, and telemetry where it has any.
    """
    observed = telemetry(results, runs, sites)
    first = results.environment[results.environment["session"] == 0].set_index("signature")
    seconds = first["time_s"].to_dict() if "time_s" in first else {}
    sessions = results.environment.groupby("signature").size()
    rows = []
    for row, arm, mine in zip(runs.to_dict("records"), named, levels, strict=True):
        signature = row["signature"]
        final = [
            [name.removeprefix(FINAL).replace("_", " "), summary.plain(value)]
            for name, value in row.items()
            if name.startswith(FINAL) and not pd.isna(value)
        ]
        rows.append(
            {
                "signature": signature,
                "arm": arm,
                "seed": text(row["seed"]),
                "status": row["status"],
                "step": int(row["step"]),
                "cause": None if pd.isna(row["cause"]) else row["cause"],
                "value": _finite(row["primary_metric"]),
                "final": final,
                "levels": mine,
                "settings": [text(row[name]) for name in varying],
                "seconds": _finite(seconds.get(signature) or math.nan),
                "sessions": int(sessions.get(signature, 0)),
                "command": command(results, signature),
            }
            | observed.get(signature, {})
        )
    return rows


def command(results: Results, signature: str) -> str | None:
    """What runs this one run anew, and nothing else: its folder is set aside, then the grid's own command finds it
    missing. Of that command without what chooses runs or does something else beside running them (ONCE). None where
    grid.json does not say how the grid was run.
    """
    folder, grid = results.grid_of(signature)
    argv = grid.get("argv")
    if not isinstance(argv, list) or not argv:
        return None
    run, aside = shlex.quote(str(folder / signature)), shlex.quote(f"{folder}.{signature}")
    return f"mv {run} {aside} && {shlex.join(_lasting(map(str, argv)))}"


def _lasting(argv: Iterable[str]) -> Iterator[str]:
    """The command without the options of ONCE and their values."""
    words = iter(argv)
    for word in words:
        name, has_value, _ = word.partition("=")
        meant = [option for option in ONCE if len(name) > LEAST_LETTERS and option.startswith(name)]
        if not meant:
            yield word
        elif ONCE[meant[0]] and not has_value:
            next(words, None)


def telemetry(results: Results, runs: pd.DataFrame, sites: Sequence[str]) -> dict[str, Data]:
    """By signature, of runs that have it: `roles`, the median SQNR over sites by role and step; `rounded`, the operands
    of the lowest SQNR: index in `sites`, SQNR, clipped, underflowed, swallowed, medians over steps; `origin` of the
    first NaN or Inf; `gradient`: the medians of cosine and norm ratio, and the parameter of the lowest cosine.
    """
    rows, cosines = _of(runs, results.telemetry), _of(runs, results.cosines)
    found: dict[str, Data] = {
        name: {"observed": True} for name in dict.fromkeys([*rows["signature"], *cosines["signature"]])
    }
    place = {operand: index for index, operand in enumerate(sites)}
    if len(rows):
        rounded = _operands(rows)
        finite = rounded[np.isfinite(rounded["sqnr_db"])]
        by_operand = rounded.groupby(["signature", "operand"], sort=False)[list(NUMBERS)].median().reset_index()
        by_role = finite.groupby(["signature", "role", "step"])["sqnr_db"].median().reset_index()
        roles = dict(tuple(by_role.groupby("signature")))
        for signature, operands in by_operand.groupby("signature"):
            found[str(signature)] |= _rounding(operands, roles.get(signature, by_role.iloc[:0]), place)
        for row in rows[rows["origin"] != ""].to_dict("records"):
            where = f"{row['origin']} at step {row['step']}, {row['site']}, {row['role']}"
            found[row["signature"]]["origin"] = where
    for signature, group in cosines.groupby("signature"):
        by_parameter = group.groupby("parameter", sort=False)["cosine"].median().dropna()
        lowest = [str(by_parameter.idxmin()), _finite(by_parameter.min())] if len(by_parameter) else ["", None]
        medians = [_finite(group["cosine"].median()), _finite(group["norm_ratio"].median())]
        found[str(signature)]["gradient"] = [*medians, *lowest]
    return found


def _rounding(operands: pd.DataFrame, by_role: pd.DataFrame, place: dict[str, int]) -> Data:
    """Of a run's medians by operand, and by role and step: roles, rounded, and how many operands there are."""
    lowest = operands.sort_values("sqnr_db", kind="stable")
    listed = zip(lowest["operand"][:OPERANDS], lowest[list(NUMBERS)].to_numpy(), strict=False)
    return {
        "operands": len(operands),
        "rounded": [[place[operand], *map(_finite, values)] for operand, values in listed],
        "roles": [
            [role, part["step"].tolist(), [_number(value) for value in part["sqnr_db"]]]
            for role, part in by_role.groupby("role")
        ],
    }


def _operands(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of telemetry that something rounds, with `operand`, their site, role and format in words."""
    if rows.empty:
        return rows.assign(operand="")
    rounded = rows[rows["format"] != ""]
    return rounded.assign(operand=rounded["site"] + " " + rounded["role"] + " → " + rounded["format"])


def _of(runs: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["signature"].isin(runs["signature"])]


def _short(name: str) -> str:
    return name.removeprefix("optimizer.").removeprefix("recipe.")


def _number(value: float) -> float:
    """To 5 digits; a whole number without a point."""
    rounded = float(f"{value:.{DIGITS}g}") if abs(value) < 10**DIGITS else float(round(value))
    return int(rounded) if rounded.is_integer() else rounded


def _finite(value: float) -> float | None:
    return _number(value) if math.isfinite(value) else None
