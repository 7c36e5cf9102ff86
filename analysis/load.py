"""Run folders -> tidy pandas frames.

Run folders are data: everything is parsed as JSON, nothing found in a folder is executed. A folder that cannot be read
is a row of `problems`, never an exception and never a silent gap. Runs keep the order of grid.json, so that tables and
figures follow the order in which the grid's author listed the arms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.run_files import (
    DEFINITION,
    FINAL,
    FRONTIER,
    LATER,
    REQUIRED,
    RESULT_COLUMNS,
    SHIPPED_FINALS,
    TABLES,
    Unreadable,
    frame_of,
    frontier_tables,
    grid_document,
    histograms,
    holds_a_run,
    metric_frame,
    read_run,
    run_tables,
)

NONE = "none"  # the level of a setting that is None
RECIPE = "recipe."
OWNERS = {"optimizer": "optimizer", "model": "model", "data": "data", "schedule": "schedule.name"}  # of x.*: its name


@dataclass(frozen=True)
class Results:
    """All that a grid folder holds. `runs` has one row a run, `metrics` one a number, `environment` one a session of a
    run: a resumed run has several, the first of which holds its `time_s` and `peak_memory_mb`.
    """

    folder: Path
    grid: dict[str, Any]  # grid.json; empty when that file is unreadable
    runs: pd.DataFrame
    metrics: pd.DataFrame
    environment: pd.DataFrame
    problems: pd.DataFrame
    not_started: list[str]  # signatures the grid lists that have no folder yet
    not_listed: list[str]  # folders of runs that the grid does not list: of other formats, or an earlier version
    telemetry: pd.DataFrame  # signature, and the columns of lpsim's telemetry; empty where no run has any
    cosines: pd.DataFrame  # signature, step, parameter, cosine, norm_ratio
    attribution: pd.DataFrame  # signature, and the columns that `lpsim attribute` keeps; empty where no run has any
    weights: pd.DataFrame  # signature, step, of, log2 (a bin's lower edge; −inf for zeros), width, count
    weight_values: pd.DataFrame  # signature, value: the positive values of the format that the weights are rounded to
    frontier: pd.DataFrame  # of `lpsim frontier`: one row an arm; empty where the grid sought none
    frontier_runs: pd.DataFrame  # one row a run
    parts: tuple[Results, ...] = ()  # the grids that `read_all` put together

    def grid_of(self, signature: str) -> tuple[Path, dict[str, Any]]:
        """The folder and the grid.json of the grid that a run comes from."""
        holds = [part for part in self.parts if (part.runs["signature"] == signature).any()]
        return (holds[0].folder, holds[0].grid) if holds else (self.folder, self.grid)


def runs(folder: str | Path) -> pd.DataFrame:
    """One row a run: signature, the flattened config (`model`, `data`, `optimizer`, `format`, `seed`, `optimizer.lr`,
    ...), status, step, cause, traceback, `metric` (the name of the primary metric), `primary_metric` (its value),
    `final.*`.

    A number that is missing or not finite stays NaN or infinite; a run without result.json is "unfinished". A setting
    that is None in some runs and a value in others is text, "none" and the values to 6 digits. Times stand
    in `environment`, so that this frame of a resumed grid equals an uninterrupted one's. Raises ValueError when
    `folder` is no grid folder.
    """
    return read(folder).runs


def metrics(folder: str | Path) -> pd.DataFrame:
    """Every number of every readable run, long: signature, step, split, metric, value. A torn last line of
    metrics.jsonl is dropped.

    "NaN", "Infinity", "-Infinity" come back as floats. Raises ValueError when `folder` is no grid folder.
    """
    return read(folder).metrics


def problems(folder: str | Path) -> pd.DataFrame:
    """The folders that are not, or not wholly, in the tables, with a one-line reason: folder, reason. Raises
    ValueError when `folder` is no grid folder.
    """
    return read(folder).problems


def telemetry(folder: str | Path) -> pd.DataFrame:
    """Every row of every run's telemetry: signature, then step (updates before it), site, role, format, sqnr_db, ...

    Empty where no run has any. Raises ValueError when `folder` is no grid folder.
    """
    return read(folder).telemetry


def attribution(folder: str | Path) -> pd.DataFrame:
    """Every row that `lpsim attribute` kept of every run: signature, then recipe, by, part, rounded, loss, change, ...

    Empty where no run has any. Raises ValueError when `folder` is no grid folder.
    """
    return read(folder).attribution


def frontier(folder: str | Path) -> pd.DataFrame:
    """What `lpsim frontier` found, one row an arm: arm, model, data, optimizer, format, rounding, noise, `status`
    ("bracketed"; "open": it lies beyond what was tried; "none": every rate breaks), `frontier` and `breaks` (the
    largest rate that holds, the one above it that does not), `best` and `best_loss`, `share` (of the seeds that hold at
    the frontier), `broke`, `monotone` ("true" or "false"), ...

    Empty where the grid sought none. Raises ValueError when `folder` is no grid folder.
    """
    return read(folder).frontier


def frontier_runs(folder: str | Path) -> pd.DataFrame:
    """The runs that frontiers rest on: arm, rate, seed, signature, status, loss, `excess` (nats over the same seed at
    the arm's best rate), holds (the seed), rate_holds, place ("best", "frontier", "breaks").

    Empty where the grid sought none. Raises ValueError when `folder` is no grid folder.
    """
    return read(folder).frontier_runs


def read(folder: str | Path, plain: bool = False) -> Results:
    """Everything in a grid folder, each file read once; `plain`: settings that are None stay missing, and numbers
    beside them numbers. Raises ValueError when `folder` is no grid folder.
    """
    folder = Path(folder)
    if not (folder / "grid.json").is_file():
        raise ValueError(_no_grid_folder(folder))
    problem_rows: list[dict[str, str]] = []
    grid: dict[str, Any] = {}
    signatures: list[str] | None = None
    try:
        grid = grid_document(folder / "grid.json")
        signatures = grid["signatures"]
    except Unreadable as error:
        problem_rows.append({"folder": ".", "reason": f"{error}; every run folder found is taken to be the grid's"})

    found = sorted(child.name for child in folder.iterdir() if child.is_dir() and holds_a_run(child))
    listed = found if signatures is None else list(dict.fromkeys(signatures))
    run_rows, environment_rows, numbers = [], [], {}
    for signature in [name for name in listed if holds_a_run(folder / name)]:
        try:
            run, sessions, numbers[signature] = read_run(folder / signature)
        except Unreadable as error:
            problem_rows.append({"folder": signature, "reason": str(error)})
            continue
        run_rows.append(run)
        environment_rows.extend(sessions)
    weights, values = histograms(folder, listed, problem_rows)
    pushed = frontier_tables(folder / FRONTIER, problem_rows)
    observed = [run_tables(folder, listed, f"{name}.parquet", wanted, problem_rows) for name, wanted in TABLES.items()]
    runs = _with_primary_metric(frame_of(run_rows, [*REQUIRED, *RESULT_COLUMNS]))
    return Results(
        folder=folder,
        grid=grid,
        runs=runs if plain else _with_none(runs),
        metrics=metric_frame(numbers),
        environment=frame_of(environment_rows, ["signature", "session"]),
        problems=pd.DataFrame(problem_rows, columns=["folder", "reason"]).astype("str"),
        not_started=[name for name in listed if not holds_a_run(folder / name)],
        not_listed=[name for name in found if name not in set(listed)],
        telemetry=observed[0].assign(**{c: math.nan for c in LATER if len(observed[0]) and c not in observed[0]}),
        cosines=observed[1],
        attribution=observed[2],
        weights=weights,
        weight_values=values,
        frontier=pushed[0],
        frontier_runs=pushed[1],
    )


def read_all(folders: Sequence[str | Path]) -> Results:
    """Several grids as one, in the order given; one folder is `read`.

    A run that two grids share, with the same signature, is taken from the first. `runs` has the column `grid`, which
    tells apart what nothing else does. Claims stay with their own grids. Raises ValueError when a folder is no grid
    folder.
    """
    if len(folders) == 1:
        return read(folders[0])
    parts: list[Results] = []
    seen: set[str] = set()
    for folder in folders:
        part = _without(read(folder, plain=True), seen)
        part.runs["grid"] = part.runs.get("grid", part.folder.name)
        seen |= set(part.runs["signature"])
        parts.append(part)
    names = [str(part.grid.get("grid", part.folder.name)) for part in parts]
    return Results(
        folder=parts[0].folder.parent / "+".join(part.folder.name for part in parts),
        grid={"grid": " + ".join(names), "source": ", ".join(str(part.grid.get("source")) for part in parts)},
        runs=_with_none(
            _with_primary_metric(_together([part.runs.drop(columns=["metric", "primary_metric"]) for part in parts]))
        ),
        metrics=pd.concat([part.metrics for part in parts], ignore_index=True),
        environment=_together([part.environment for part in parts]),
        problems=pd.concat(
            [part.problems.assign(folder=part.folder.name + "/" + part.problems["folder"]) for part in parts],
            ignore_index=True,
        ),
        not_started=[name for part in parts for name in part.not_started if name not in seen],
        not_listed=[name for part in parts for name in part.not_listed],
        telemetry=_below([part.telemetry for part in parts]),
        cosines=_below([part.cosines for part in parts]),
        attribution=_below([part.attribution for part in parts]),
        weights=_below([part.weights for part in parts]),
        weight_values=_below([part.weight_values for part in parts]),
        frontier=_below([part.frontier for part in parts]),
        frontier_runs=_below([part.frontier_runs for part in parts]),
        parts=tuple(parts),
    )


def _without(part: Results, signatures: set[str]) -> Results:
    """The results without these runs."""
    tables = ("runs", "metrics", "environment", "telemetry", "cosines", "weights", "weight_values", "attribution")
    frames = {name: getattr(part, name) for name in tables}
    return replace(part, **{name: frame[~frame["signature"].isin(signatures)].copy() for name, frame in frames.items()})


def _together(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One frame below the other, with one type a column."""
    records = [row for frame in frames for row in frame.to_dict("records")]
    rows = [{name: None if pd.isna(value) else value for name, value in row.items()} for row in records]
    return frame_of(rows, list(dict.fromkeys(name for frame in frames for name in frame.columns)))


def _below(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else frames[0]


def config_columns(runs: pd.DataFrame) -> list[str]:
    """The columns of `runs` that come from config.json, in its order."""
    return [name for name in runs.columns if name not in RESULT_COLUMNS and not name.startswith(FINAL)]


def own_metrics(runs: pd.DataFrame) -> list[str]:
    """The columns of `runs` with metrics that a grid's author defined: every `final.*` that is not shipped."""
    return [name for name in runs.columns if name.startswith(FINAL) and name not in SHIPPED_FINALS]


def _no_grid_folder(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder; expected a grid folder, runs/<grid>, as `lpsim run` writes it"
    inside = sorted(str(child.parent) for child in folder.glob("*/grid.json"))
    hint = f"; did you mean {' or '.join(inside[:3])}?" if inside else ""
    return f"{folder}: no grid folder (it holds no grid.json; expected runs/<grid>, as `lpsim run` writes it){hint}"


def _with_none(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with None as the level "none" of every setting that has other levels too.

    What an optimizer (model, data set, schedule) does not have at all stays missing in its runs: it is no level there.
    """
    out = runs.copy()
    for name in config_columns(runs):
        owner = OWNERS.get(name.split(".")[0]) if "." in name else None
        known = owner in runs or name.startswith(RECIPE) or "." not in name
        column = runs[name]
        if not known or name in REQUIRED or name.endswith(DEFINITION) or not column.isna().any():
            continue
        has = column.notna()
        owned = has.groupby(runs[owner], dropna=False).transform("any") if owner else has.any()
        none = ~has & owned
        if none.any():
            values = [_text(value) if there else None for value, there in zip(column, has, strict=True)]
            out[name] = pd.Series(values, index=runs.index, dtype="str").mask(none, NONE)
    return out


def _text(value: object) -> str:
    """A setting as text; a number to 6 digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _with_primary_metric(frame: pd.DataFrame) -> pd.DataFrame:
    """Adds `metric` and `primary_metric`: validation accuracy where the model and data have one, else validation loss.

    Decided for a (model, data) together, so that a diverged run without a final accuracy stays in the column of its
    siblings.
    """
    accuracy, loss = FINAL + "validation_accuracy", FINAL + "validation_loss"
    for name in (accuracy, loss):
        if name not in frame:
            frame[name] = math.nan
        frame[name] = frame[name].astype("float64")
    counted = frame[accuracy].notna().groupby([frame["model"], frame["data"]]).transform("any").astype(bool)
    frame["metric"] = counted.map({True: "validation_accuracy", False: "validation_loss"}).astype("str")
    frame["primary_metric"] = frame[accuracy].where(counted, frame[loss]).astype("float64")
    return frame
