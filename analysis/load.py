"""Run folders -> tidy pandas frames.

Run folders are data: everything is parsed as JSON, nothing found in a folder is executed. A folder that cannot be read
is a row of `problems`, never an exception and never a silent gap. Runs keep the order of grid.json, so that tables and
figures follow the order in which the grid's author listed the arms.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

VERSION = 1  # of config.json, env.json, result.json and grid.json; another version is another layout
STATUSES = ("finished", "diverged", "failed", "unfinished")
RUN_FILES = ("config.json", "env.json", "metrics.jsonl", "result.json")
PRINCIPAL = {"model.name": "model", "data.name": "data", "optimizer.name": "optimizer", "recipe.format": "format"}
SCHEDULE, USUAL_SCHEDULE = "schedule.name", "cosine"  # a config leaves the usual one out
REQUIRED = (*PRINCIPAL.values(), "seed")
DEFINITION = "_definition"  # ends the names of complete definitions of formats
RESULT_COLUMNS = ("signature", "status", "step", "cause", "traceback", "metric", "primary_metric")
FINAL = "final."
SHIPPED_FINALS = tuple(FINAL + name for name in ("train_loss", "validation_loss", "validation_accuracy"))
TABLES = {  # Parquet files of a run, where telemetry was on or `lpsim attribute` ran, and the columns that are read
    "telemetry": ("step", "site", "role", "format", "sqnr_db", "clipped", "underflowed", "swallowed", "origin"),
    "telemetry_cosines": ("step", "parameter", "cosine", "norm_ratio"),
    "attribution": ("recipe", "by", "part", "site", "role", "rounded", "loss", "change", "logits_sqnr_db"),
}
WEIGHTS = ("signature", "step", "of", "log2", "width", "count")
VALUES = ("signature", "value")
LATER = ("oscillated",)  # columns that telemetry of earlier versions does not have
FRONTIER = "frontier.json"
FRONTIER_COLUMNS = {  # of its two tables, those that are read
    "arms": (
        *("arm", "model", "data", "optimizer", "format", "rounding", "noise", "low", "high", "status"),
        *("frontier", "breaks", "best", "best_loss", "best_edge", "share", "broke", "monotone", "contradicting"),
        *("margin", "required_share", "resolution", "seeds"),
    ),
    "runs": ("arm", "rate", "seed", "signature", "status", "loss", "excess", "holds", "rate_holds", "place"),
}
FRONTIER_NUMBERS = (  # that an arm or run may lack, and so all of a grid
    *("noise", "frontier", "breaks", "best", "best_loss"),
    *("frontier_loss", "share", "excess_above", "loss", "excess"),
)
METRIC_COLUMNS = ("signature", "step", "split", "metric", "value")
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Unreadable(ValueError):
    """A file or folder that is torn, of another version or not what the layout says; the message is one line."""


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

    A number that is missing or not finite stays NaN or infinite; a run without result.json is "unfinished". Times stand
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


def read(folder: str | Path) -> Results:
    """Everything in a grid folder, each file read once. Raises ValueError when `folder` is no grid folder."""
    folder = Path(folder)
    if not (folder / "grid.json").is_file():
        raise ValueError(_no_grid_folder(folder))
    problem_rows: list[dict[str, str]] = []
    grid: dict[str, Any] = {}
    signatures: list[str] | None = None
    try:
        grid = _grid(folder / "grid.json")
        signatures = grid["signatures"]
    except Unreadable as error:
        problem_rows.append({"folder": ".", "reason": f"{error}; every run folder found is taken to be the grid's"})

    found = sorted(child.name for child in folder.iterdir() if child.is_dir() and _holds_a_run(child))
    listed = found if signatures is None else list(dict.fromkeys(signatures))
    run_rows, environment_rows, metric_rows = [], [], []
    for signature in [name for name in listed if _holds_a_run(folder / name)]:
        try:
            run, sessions, numbers = _read_run(folder / signature)
        except Unreadable as error:
            problem_rows.append({"folder": signature, "reason": str(error)})
            continue
        run_rows.append(run)
        environment_rows.extend(sessions)
        metric_rows.extend(numbers)
    weights, values = _histograms(folder, listed, problem_rows)
    pushed = _frontier(folder / FRONTIER, problem_rows)
    observed = [_tables(folder, listed, f"{name}.parquet", wanted, problem_rows) for name, wanted in TABLES.items()]
    long = pd.DataFrame(metric_rows, columns=list(METRIC_COLUMNS)).astype({"step": "int64", "value": "float64"})
    for column in ("signature", "split", "metric"):
        long[column] = long[column].astype("str")
    return Results(
        folder=folder,
        grid=grid,
        runs=_with_primary_metric(_with_schedule(_frame(run_rows, [*REQUIRED, *RESULT_COLUMNS]))),
        metrics=long,
        environment=_frame(environment_rows, ["signature", "session"]),
        problems=pd.DataFrame(problem_rows, columns=["folder", "reason"]).astype("str"),
        not_started=[name for name in listed if not _holds_a_run(folder / name)],
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
        part = _without(read(folder), seen)
        part.runs["grid"] = part.runs.get("grid", part.folder.name)
        seen |= set(part.runs["signature"])
        parts.append(part)
    names = [str(part.grid.get("grid", part.folder.name)) for part in parts]
    return Results(
        folder=parts[0].folder.parent / "+".join(part.folder.name for part in parts),
        grid={"grid": " + ".join(names), "source": ", ".join(str(part.grid.get("source")) for part in parts)},
        runs=_with_primary_metric(
            _with_schedule(_together([part.runs.drop(columns=["metric", "primary_metric"]) for part in parts]))
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
    return _frame(rows, list(dict.fromkeys(name for frame in frames for name in frame.columns)))


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


def _holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in RUN_FILES)


def _document(path: Path) -> dict[str, Any]:
    """The JSON object in a file, without its version. Raises Unreadable."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Unreadable(f"no {path.name}") from None
    except OSError as error:
        raise Unreadable(f"{path.name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise Unreadable(f"{path.name} is torn or not JSON") from None
    if not isinstance(document, dict):
        raise Unreadable(f"{path.name} holds no JSON object")
    version = document.pop("version", None)
    if version != VERSION:
        raise Unreadable(f"{path.name} is of version {version!r}; this analysis reads version {VERSION}")
    return document


def _grid(path: Path) -> dict[str, Any]:
    document = _document(path)
    signatures = document.get("signatures")
    if not isinstance(signatures, list) or not all(
        isinstance(name, str) and Path(name).name == name for name in signatures
    ):
        raise Unreadable(f"{path.name} has no list of signatures")
    return document


def _read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[tuple[str, int, str, str, float]]]:
    """The row of `runs`, the rows of `environment` and the rows of `metrics` of one run folder. Raises Unreadable."""
    config = flatten(_document(folder / "config.json"))
    for name in REQUIRED:
        if config.get(name) is None:
            raise Unreadable(f"config.json does not say the run's {name}")
    taken = sorted(name for name in config if name in RESULT_COLUMNS or name.startswith(FINAL))
    if taken:
        raise Unreadable(f"config.json has the key {taken[0]!r}, which the tables keep for a run's result")
    environment = _document(folder / "env.json") if (folder / "env.json").exists() else {}
    resumed = environment.pop("resumed", [])
    if not isinstance(resumed, list) or not all(isinstance(session, dict) for session in resumed):
        raise Unreadable("env.json: resumed is no list of environments")
    sessions = [flatten(session) for session in (environment, *resumed)]
    numbers = _numbers(folder / "metrics.jsonl")
    row: dict[str, Any] = {"signature": folder.name, **config}
    if (folder / "result.json").exists():
        result = _document(folder / "result.json")
        if result.get("status") not in STATUSES:
            raise Unreadable(
                f"result.json has the status {result.get('status')!r}; expected one of {', '.join(STATUSES)}"
            )
        final = result.get("final") or {}
        if not isinstance(final, dict) or not isinstance(result.get("step"), int):
            raise Unreadable("result.json does not say the last step and the final metrics")
        row |= {name: result.get(name) for name in ("status", "step", "cause", "traceback")}
        row |= {FINAL + name: _number(value, "result.json", name) for name, value in final.items()}
        sessions[0] |= {name: result.get(name) for name in ("time_s", "peak_memory_mb") if name in result}
    else:
        row |= {
            "status": "unfinished",
            "step": max((step for _, step, *_ in numbers), default=0),
            "cause": None,
            "traceback": None,
        }
    return row, [{"signature": folder.name, "session": place} | each for place, each in enumerate(sessions)], numbers


def _tables(
    folder: Path, signatures: Iterable[str], name: str, wanted: Iterable[str], problem_rows: list[dict[str, str]]
) -> pd.DataFrame:
    """The Parquet files of that name of all runs, one below the other; an unreadable one is added to the problems."""
    frames = []
    for signature in signatures:
        path = folder / signature / name
        if path.exists():
            try:
                frame = _table(path, wanted)
            except Unreadable as error:
                problem_rows.append({"folder": signature, "reason": f"{error}; the rest of the run is used"})
                continue
            frame.insert(0, "signature", signature)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["signature"])


def _histograms(
    folder: Path, signatures: Iterable[str], problem_rows: list[dict[str, str]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of every weights.json, and the values of the formats; an unreadable one is added to the problems."""
    rows: list[tuple[Any, ...]] = []
    values: list[tuple[str, float]] = []
    for signature in signatures:
        path = folder / signature / "weights.json"
        if not path.exists():
            continue
        try:
            document = _document(path)
            mine = [
                (signature, each["step"], each["of"], float(low), float(document["width"]), int(n))
                for each in document["histograms"]
                for low, n in zip([-math.inf, *each["log2"]], [each["zeros"], *each["count"]], strict=True)
            ]
            held = [(signature, float(value)) for value in document["values"]]
        except Unreadable as error:
            problem_rows.append({"folder": signature, "reason": f"{error}; the rest of the run is used"})
        except (KeyError, TypeError, ValueError):
            reason = "weights.json holds no histograms; the rest of the run is used"
            problem_rows.append({"folder": signature, "reason": reason})
        else:
            rows += mine
            values += held
    return pd.DataFrame(rows, columns=list(WEIGHTS)), pd.DataFrame(values, columns=list(VALUES))


def _frontier(path: Path, problem_rows: list[dict[str, str]]) -> list[pd.DataFrame]:
    """Both tables that `lpsim frontier` wrote, empty where it did not; an unreadable file is added to the problems."""
    frames = []
    try:
        document = _document(path) if path.exists() else {}
        for name, wanted in FRONTIER_COLUMNS.items():
            rows = document.get(name, [])
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise Unreadable(f"{path.name} has no table {name}")
            if missing := [column for row in rows for column in wanted if column not in row]:
                raise Unreadable(f"{path.name} has no column {missing[0]} in its table {name}")
            frame = _frame(rows, list(wanted))
            frames.append(frame.astype({name: "float64" for name in FRONTIER_NUMBERS if name in frame}))
        return frames
    except ValueError as error:  # unreadable, or a text where a number belongs
        problem_rows.append({"folder": ".", "reason": f"{error}; lpsim frontier writes it again"})
        return [_frame([], list(wanted)) for wanted in FRONTIER_COLUMNS.values()]


def _table(path: Path, wanted: Iterable[str]) -> pd.DataFrame:
    """A Parquet file that has the wanted columns. Raises Unreadable."""
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError):  # pyarrow's are ValueErrors
        raise Unreadable(f"{path.name} cannot be read") from None
    if missing := [column for column in wanted if column not in frame]:
        raise Unreadable(f"{path.name} has no column {', '.join(missing)}")
    return frame


def _numbers(path: Path) -> list[tuple[str, int, str, str, float]]:
    """The lines of metrics.jsonl as rows of the long frame; a last line that does not parse is dropped. Raises
    Unreadable.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Unreadable(f"{path.name} cannot be read ({error.strerror})") from None
    rows = []
    for index, entry in enumerate(_entries(lines, path.name)):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("step"), int)
            or not isinstance(entry.get("split"), str)
        ):
            raise Unreadable(f"{path.name} line {index + 1} is no object with a step and a split")
        step, split = entry.pop("step"), entry.pop("split")
        for name, value in entry.items():
            if type(value) is not float:  # as nearly all are: the rest of this loop is what reading a grid takes
                if value is None:
                    continue
                value = _number(value, f"{path.name} line {index + 1}", name)
            rows.append((path.parent.name, step, split, name, value))
    return rows


def _entries(lines: list[bytes], name: str) -> list[Any]:
    """What the lines hold; all at once where they are whole, which takes half the time."""
    try:
        entries = json.loads(b"[" + b",".join(lines) + b"]")
        if len(entries) == len(lines):
            return list(entries)
    except (ValueError, RecursionError):
        pass
    entries = []
    for index, line in enumerate(lines):
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError):
            if index == len(lines) - 1:
                break
            raise Unreadable(f"{name} line {index + 1} is torn, and is not the last line") from None
    return entries


def _number(value: object, where: str, name: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if value is None:
        return math.nan
    if isinstance(value, str) and value in NON_FINITE:
        return NON_FINITE[value]
    raise Unreadable(f"{where}: {name} is {value!r}, not a number")


def flatten(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optimizer": {"name": "lmd", "lr": 0.03}}` -> `{"optimizer": "lmd", "optimizer.lr": 0.03}`.

    Lists, and the definition of a format, become JSON text: a cell holds one value, and two values are equal when their
    texts are.
    """
    flat: dict[str, Any] = {}
    for key, value in document.items():
        name = prefix + key
        if isinstance(value, dict) and not name.endswith(DEFINITION):
            flat |= flatten(value, name + ".")
        elif isinstance(value, (dict, list)):
            flat[name] = json.dumps(value, sort_keys=True)
        else:
            flat[PRINCIPAL.get(name, name)] = value
    return flat


def _frame(rows: list[dict[str, Any]], at_least: list[str]) -> pd.DataFrame:
    """Rows -> frame with one type a column: numbers as float64 (int64 when all are whole and none is missing), else
    text.

    Truth values are text too: a nullable column type would be a second kind of missing value.
    """
    names = list(dict.fromkeys([*(name for row in rows for name in row), *at_least]))
    return pd.DataFrame({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: Iterable[Any]) -> pd.Series:
    values = list(values)
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in present):
        whole = len(present) == len(values) and all(isinstance(value, int) and abs(value) < 2**63 for value in values)
        return pd.Series(values, dtype="int64" if whole else "float64")
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    # JSON can hold half a surrogate pair, which neither UTF-8 nor Parquet can
    return pd.Series([text and text.encode("utf-8", "replace").decode() for text in texts], dtype="str")


def _with_schedule(frame: pd.DataFrame) -> pd.DataFrame:
    """Names the usual schedule where some runs have another."""
    if SCHEDULE in frame:
        frame[SCHEDULE] = frame[SCHEDULE].fillna(USUAL_SCHEDULE)
    return frame


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
