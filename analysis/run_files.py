"""One file of a run or a grid -> rows, checked: what each file must hold, and which columns are read.

Everything is parsed as JSON or Parquet; nothing found in a folder is executed. `load` puts the rows together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import json as arrow_json

VERSION = 1  # of config.json, env.json, result.json and grid.json; another version is another layout
STATUSES = ("finished", "diverged", "failed", "unfinished")
RUN_FILES = ("config.json", "env.json", "metrics.jsonl", "result.json")
PRINCIPAL = {"model.name": "model", "data.name": "data", "optimizer.name": "optimizer", "recipe.format": "format"}
LEFT_OUT = {"schedule.name": "cosine", "micro_batches": 1, "recompute": False}  # what no mention in a config means
LEFT_OUT_OF = {"lmd-for-model": {"optimizer.others_weight_decay": 0.0}}  # the same, by optimizer
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
METRIC_COLUMNS = {"step": "int64", "split": "str", "metric": "str", "value": "float64"}  # beside the signature
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Unreadable(ValueError):
    """A file or folder that is torn, of another version or not what the layout says; the message is one line."""


def holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in RUN_FILES)


def json_object(path: Path) -> dict[str, Any]:
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


def grid_document(path: Path) -> dict[str, Any]:
    document = json_object(path)
    signatures = document.get("signatures")
    if not isinstance(signatures, list) or not all(
        isinstance(name, str) and Path(name).name == name for name in signatures
    ):
        raise Unreadable(f"{path.name} has no list of signatures")
    return document


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], pd.DataFrame]:
    """The row of `runs`, the rows of `environment` and the numbers of one run folder, as METRIC_COLUMNS. Raises
    Unreadable.
    """
    config = with_left_out(flatten(json_object(folder / "config.json")))
    for name in REQUIRED:
        if config.get(name) is None:
            raise Unreadable(f"config.json does not say the run's {name}")
    taken = sorted(name for name in config if name in RESULT_COLUMNS or name.startswith(FINAL))
    if taken:
        raise Unreadable(f"config.json has the key {taken[0]!r}, which the tables keep for a run's result")
    environment = json_object(folder / "env.json") if (folder / "env.json").exists() else {}
    resumed = environment.pop("resumed", [])
    if not isinstance(resumed, list) or not all(isinstance(session, dict) for session in resumed):
        raise Unreadable("env.json: resumed is no list of environments")
    sessions = [flatten({k: v for k, v in each.items() if k != "version"}) for each in (environment, *resumed)]
    numbers = _numbers(folder / "metrics.jsonl")
    row: dict[str, Any] = {"signature": folder.name, **config}
    if (folder / "result.json").exists():
        result = json_object(folder / "result.json")
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
            "step": int(numbers["step"].max()) if len(numbers) else 0,
            "cause": None,
            "traceback": None,
        }
    return row, [{"signature": folder.name, "session": place} | each for place, each in enumerate(sessions)], numbers


def metric_frame(numbers: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The long frame of the numbers of runs, by their signatures: signature, step, split, metric, value."""
    signatures = pd.Series(list(numbers), dtype="str").repeat([len(each) for each in numbers.values()])
    frame = pd.concat(numbers.values(), ignore_index=True) if numbers else _metric_columns([], [], [], [])
    frame.insert(0, "signature", signatures.reset_index(drop=True))
    return frame


def run_tables(
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


def histograms(
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
            document = json_object(path)
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


def frontier_tables(path: Path, problem_rows: list[dict[str, str]]) -> list[pd.DataFrame]:
    """Both tables that `lpsim frontier` wrote, empty where it did not; an unreadable file is added to the problems."""
    frames = []
    try:
        document = json_object(path) if path.exists() else {}
        for name, wanted in FRONTIER_COLUMNS.items():
            rows = document.get(name, [])
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise Unreadable(f"{path.name} has no table {name}")
            if missing := [column for row in rows for column in wanted if column not in row]:
                raise Unreadable(f"{path.name} has no column {missing[0]} in its table {name}")
            frame = frame_of(rows, list(wanted))
            frames.append(frame.astype({name: "float64" for name in FRONTIER_NUMBERS if name in frame}))
        return frames
    except ValueError as error:  # unreadable, or a text where a number belongs
        problem_rows.append({"folder": ".", "reason": f"{error}; lpsim frontier writes it again"})
        return [frame_of([], list(wanted)) for wanted in FRONTIER_COLUMNS.values()]


def _table(path: Path, wanted: Iterable[str]) -> pd.DataFrame:
    """A Parquet file that has the wanted columns. Raises Unreadable."""
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError):  # pyarrow's are ValueErrors
        raise Unreadable(f"{path.name} cannot be read") from None
    if missing := [column for column in wanted if column not in frame]:
        raise Unreadable(f"{path.name} has no column {', '.join(missing)}")
    return frame


def _numbers(path: Path) -> pd.DataFrame:
    """What metrics.jsonl holds; a last line that does not parse is dropped. Raises Unreadable."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise Unreadable(f"{path.name} cannot be read ({error.strerror})") from None
    plain = _plain_numbers(content)
    return _checked_numbers(content.splitlines(), path.name) if plain is None else plain


def _plain_numbers(content: bytes) -> pd.DataFrame | None:
    """The numbers of lines that are all whole and hold finite numbers alone, as nearly all files do; None for others.

    The same rows as those of `_checked_numbers`, read as columns, which takes less time.
    """
    options = arrow_json.ReadOptions(use_threads=False, block_size=len(content) + 1)
    try:
        table = arrow_json.read_json(pa.BufferReader(content), options)
    except pa.ArrowInvalid:
        return None
    kinds = {name: table.schema.field(name).type for name in table.column_names}
    step, split = kinds.pop("step", None), kinds.pop("split", None)
    numeric = all(pa.types.is_float64(kind) or pa.types.is_int64(kind) for kind in kinds.values())
    keyed = (
        step == pa.int64() and split == pa.string() and not table["step"].null_count and not table["split"].null_count
    )
    if not (keyed and kinds and numeric and len(table) == len(content.splitlines())):
        return None
    present = np.stack([table[name].is_valid().to_numpy() for name in kinds], axis=1)
    values = np.stack([table[name].cast(pa.float64()).to_numpy() for name in kinds], axis=1)
    line, column = np.nonzero(present)
    splits = table["split"].to_pandas().astype("str")
    return _metric_columns(
        table["step"].to_numpy()[line],
        splits.take(line),
        pd.Index(list(kinds), dtype="str").take(column),
        values[present],
    )


def _checked_numbers(lines: list[bytes], name: str) -> pd.DataFrame:
    """The numbers of the lines of a file of that name, one by one. Raises Unreadable."""
    steps, splits, names, values = [], [], [], []
    for index, entry in enumerate(_entries(lines, name)):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("step"), int)
            or not isinstance(entry.get("split"), str)
        ):
            raise Unreadable(f"{name} line {index + 1} is no object with a step and a split")
        step, split = entry.pop("step"), entry.pop("split")
        for metric, value in entry.items():
            if value is not None:
                steps.append(step)
                splits.append(split)
                names.append(metric)
                values.append(_number(value, f"{name} line {index + 1}", metric))
    return _metric_columns(steps, splits, names, values)


def _metric_columns(*columns: Any) -> pd.DataFrame:
    """The frame of METRIC_COLUMNS, of columns of any kind."""
    kinds = METRIC_COLUMNS.items()
    return pd.DataFrame(
        {name: pd.Series(column, dtype=kind) for (name, kind), column in zip(kinds, map(_bare, columns), strict=True)}
    )


def _bare(column: Any) -> Any:
    """Values without an index, which pandas would align by."""
    return column.array if isinstance(column, (pd.Series, pd.Index)) else column


def _entries(lines: list[bytes], name: str) -> Iterator[Any]:
    """What the lines hold."""
    for index, line in enumerate(lines):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            if index == len(lines) - 1:
                return
            raise Unreadable(f"{name} line {index + 1} is torn, and is not the last line") from None


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


def with_left_out(config: dict[str, Any]) -> dict[str, Any]:
    """A flat config with the settings that it leaves out, where their value is that of the time before they existed."""
    meant = LEFT_OUT | LEFT_OUT_OF.get(config.get("optimizer", ""), {})
    return config | {name: value for name, value in meant.items() if name not in config}


def frame_of(rows: list[dict[str, Any]], at_least: list[str]) -> pd.DataFrame:
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
