"""What was found, as one JSON file and as tables, and whether it is what was wanted."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from experiments.bench.gpu.machine import Row
from experiments.bench.gpu.parts import Outcome
from experiments.training.record import write_json

VERSION = 1

# What an H100 is to reach: (what it says, the part, which of its rows, the ratio, at most)
WANTED: tuple[tuple[str, str, Callable[[Row], bool], str, float], ...] = (
    (
        "quantize over copy, 64 MiB, to nearest",
        "quantize",
        lambda r: (r["size"], r["dtype"], r["rounding"]) == ("4096 x 4096", "float32", "ties_to_even"),
        "over_copy",
        1.3,
    ),
    (
        "step with MXFP6 forward over plain",
        "step",
        lambda r: r["arm"].startswith("mxfp6_e3m2 forward"),
        "over_plain",
        1.25,
    ),
    (
        "step with MXFP6 in all products over plain",
        "step",
        lambda r: r["arm"].startswith("mxfp6_e3m2 all"),
        "over_plain",
        1.6,
    ),
    ("LMD over fused AdamW", "optimizer", lambda r: r["arm"] == "LMD", "over_fused_adamw", 1.5),
)


def write(path: Path, outcomes: Sequence[Outcome], small: bool) -> None:
    """The JSON file: the device, then the parts with every row."""
    device = outcomes[0].rows[0] if outcomes[0].rows else {}
    parts = [dataclasses.asdict(outcome) for outcome in outcomes[1:]]
    about = {"version": VERSION, "command": sys.argv[1:], "small": small, "device": device}
    write_json(path, about | {"wanted": [] if small else wanted(outcomes), "parts": parts})


def wanted(outcomes: Iterable[Outcome]) -> list[Row]:
    """For each thing that was wanted: the largest ratio that was measured, and whether that is within the bound."""
    rows = []
    for what, part, belongs, ratio, limit in WANTED:
        found = [
            row[ratio] for o in outcomes if o.name == part for row in o.rows if ratio in row and belongs(row)
        ]  # fmt: skip
        if found:
            rows.append({"what": what, "at_most": limit, "largest": max(found), "reached": max(found) <= limit})
    return rows


def text(outcomes: Sequence[Outcome], small: bool) -> str:
    """The tables that are printed."""
    device, *parts = outcomes
    about = device.rows[0]
    named = ("name", "capability", "driver", "torch", "cuda")
    lines = [", ".join(f"{key} {about[key]}" for key in named if about.get(key) is not None)]
    for outcome in parts:
        lines += ["", f"{outcome.name}: {outcome.status}, {outcome.time_s:g} of {outcome.budget_s:g} s"]
        lines += table(SUMMARIES.get(outcome.name, _as_they_are)([row for row in outcome.rows if "error" not in row]))
        broken = [row for row in outcome.rows if "error" in row]
        for row in broken:
            what = ", ".join(f"{value}" for key, value in row.items() if key != "error")
            lines.append(f"  failed: {what}: {_last_line(row['error'])}")
        if outcome.error is not None:
            lines.append(f"  {_last_line(outcome.error)}")
    if not small and (reached := wanted(outcomes)):
        lines += ["", "wanted on an H100", *table(reached)]
    return "\n".join(lines)


def _last_line(error: str) -> str:
    """The line that names the exception, of a traceback with a message of many lines too."""
    lines = [line.strip() for line in error.strip().splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(E +)?[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return (named or lines or ["no message"])[-1][:200]


def table(rows: Sequence[Row]) -> list[str]:
    """Aligned columns, a header first; what a row lacks is a dash."""
    if not rows:
        return ["  nothing"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_shown(row.get(key)) for key in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _as_they_are(rows: Sequence[Row]) -> list[Row]:
    return list(rows)


def _by_file(rows: Sequence[Row]) -> list[Row]:
    """Tests passed and skipped, a file; those that failed are told one by one."""
    files = groupby(sorted(rows, key=lambda row: row["test"]), key=lambda row: row["test"].partition("::")[0])
    return [
        {"file": file, **Counter({"passed": 0, "skipped": 0}), **Counter(row["outcome"] for row in found)}
        for file, found in files
    ]


def _by_preset(rows: Sequence[Row]) -> list[Row]:
    """For each preset and way: the results that differ, a K; and the kinds of inputs on which they do."""
    summed: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if "not_asked" in row:
            summed[row["operands"], "", ""] = {"preset": "not asked", "by": row["operands"], "result": row["not_asked"]}
            continue
        key = row["by"], row["preset"], row["result"]
        entry = summed.setdefault(key, {"preset": key[1], "by": key[0], "result": key[2]})
        depth = f"K={row['K']}"
        before = entry.get(depth, "0 of 0").split(" of ")
        entry[depth] = f"{int(before[0]) + row['differ']} of {int(before[1]) + row['of']}"
        if row["differ"] and row["inputs"] not in entry.setdefault("differs_on", []):
            entry["differs_on"].append(row["inputs"])
    return [
        entry if entry["preset"] == "not asked" else {**entry, "differs_on": entry.get("differs_on", [])}
        for entry in summed.values()
    ]


SUMMARIES: dict[str, Callable[[Sequence[Row]], list[Row]]] = {"claims": _by_file, "silicon": _by_preset}
