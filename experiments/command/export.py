"""`lpsim export`: the runs of a grid for TensorBoard, MLflow or Weights & Biases, from their folders."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.command import sinks, where
from experiments.command.shared import UserError

if TYPE_CHECKING:  # pandas takes half a second to import
    from analysis.load import Results


def add(commands: Any) -> None:
    parser = commands.add_parser("export", help="a grid's runs for TensorBoard, MLflow or Weights & Biases (offline)")
    parser.add_argument("folder", type=Path, metavar="RUNS/GRID")
    parser.add_argument("--to", choices=sinks.SINKS, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="an empty or a new folder")
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> int:
    from analysis import load

    try:
        runs = exported(load.read(options.folder, plain=True))
        for name, value in sinks.ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        importlib.import_module(options.to)
        options.output.mkdir(parents=True, exist_ok=True)
        if any(options.output.iterdir()):
            raise ValueError(f"{options.output} is not empty; give another --output, or delete it")
        print(f"{len(runs)} runs; see them with: {sinks.SINKS[options.to](runs, options.output)}")
    except ImportError:
        package = sinks.PACKAGES[options.to]
        raise UserError(f"--to {options.to} needs the package {package}: pip install {package}") from None
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    return 0


def exported(results: Results) -> list[sinks.Exported]:
    """Every readable run of a grid, in its order. Raises ValueError where there is none."""
    runs = results.runs
    if runs.empty:
        raise ValueError(f"no run of {results.folder} can be read yet")
    numbers = {str(signature): frame for signature, frame in results.metrics.groupby("signature")}
    first = results.environment[results.environment["session"] == 0].set_index("signature").to_dict("index")
    names = _names(runs)
    return [
        _exported(row, name, str(results.grid.get("grid", results.folder.name)), numbers, first)
        for row, name in zip(runs.to_dict("records"), names, strict=True)
    ]


def _exported(
    row: Mapping[str, Any], name: str, grid: str, numbers: Mapping[str, Any], first: Mapping[Any, Mapping[Any, Any]]
) -> sinks.Exported:
    from analysis.run_files import DEFINITION, FINAL, RESULT_COLUMNS

    known = {field: value for field, value in row.items() if not where.is_missing(value)}
    session = {field: value for field, value in first.get(row["signature"], {}).items() if not where.is_missing(value)}
    mine: list[tuple[int, str, float]] = []
    if row["signature"] in numbers:
        frame = numbers[row["signature"]].sort_values("step", kind="stable")
        columns = (frame[field].tolist() for field in ("step", "split", "metric", "value"))
        mine = [(step, f"{split}/{metric}", value) for step, split, metric, value in zip(*columns, strict=True)]
    started = session.get("started_at")
    return sinks.Exported(
        signature=row["signature"],
        name=name,
        grid=grid,
        config={
            field: value
            for field, value in known.items()
            if field not in RESULT_COLUMNS and not field.startswith(FINAL) and not field.endswith(DEFINITION)
        },
        status=row["status"],
        final={field.removeprefix(FINAL): value for field, value in known.items() if field.startswith(FINAL)},
        numbers=mine,
        started=datetime.fromisoformat(started).timestamp() if isinstance(started, str) else 0.0,
        time_s=float(session.get("time_s", 0.0)),
    )


def _names(runs: Any) -> list[str]:
    """For each run what tells it from the others, then the start of its signature: `lmd-mxfp4_e2m1-seed_0-1a2b3c4d`."""
    from analysis.statistics import tables

    fields = [*tables.factors(runs), *tables.replicates(runs)]
    varying = [field for field in fields if runs[field].nunique(dropna=False) > 1]
    names = []
    for row in runs.to_dict("records"):
        words = [
            tables.text(row[field]) if field in tables.ALWAYS_FACTORS else f"{field}_{tables.text(row[field])}"
            for field in varying
            if not where.is_missing(row[field])
        ]
        names.append(re.sub(r"[^\w.+-]+", "_", "-".join([*words, row["signature"][:8]])))
    return names
