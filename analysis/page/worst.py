"""The section that says what comparisons become if diverged runs count as the worst (`statistics.sensitivity`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from analysis.page import html as page
from analysis.page import summary
from analysis.page.html import Column
from analysis.page.summary import signed
from analysis.statistics.tables import BASELINE

NAMING = ("factor", "level", "reference")  # of a row of effects


def section(rows: pd.DataFrame) -> Iterator[str]:
    """What each comparison becomes if diverged runs count as the worst."""
    yield page.heading(3, "If diverged runs counted as the worst")
    yield page.paragraph(
        "The comparisons above, and what they become if every diverged run had ended with the worst value that any "
        "run of this task ended with (bold: the verdict changes). Intervals take that value as if it were measured: "
        "read the second half as a check of the first, not as a result of its own.",
        "note",
    )
    names = [name for name in summary.varying(rows.drop(columns="comparison")) if name not in NAMING]
    kept = rows.to_dict("records")
    then_rows = [
        row | {name: row[f"worst_{name}"] for name in ("n", "difference", "low", "high")} | {"excluded": 0}
        for row in kept
    ]
    now, then = [summary.verdict(row) for row in kept], [summary.verdict(row) for row in then_rows]
    # that a value stands on both sides was not measured
    then = ["undecided" if b == summary.SAME != a else b for a, b in zip(now, then, strict=True)]
    columns = [
        Column("comparison", [_compared(row, names) for row in kept], wrap=True),
        Column("n", [str(n) for n in rows["n"]], number=True),
        Column("difference", [_with_interval(row) for row in kept], number=True),
        Column("reads as", now),
        Column("n, worst", [str(n) for n in rows["worst_n"]], number=True),
        Column("difference, worst", [_with_interval(row) for row in then_rows], number=True),
        Column("reads as, worst", then),
    ]
    yield page.table(columns, best=[a != b for a, b in zip(now, then, strict=True)])


def _compared(row: Mapping[str, Any], names: list[str]) -> str:
    who = summary.arm_name(row, names)
    if row["comparison"] == "effect":
        return f"{row['optimizer']}: {summary.effect_name(row)}"
    if row["comparison"] == "contrast":
        return f"{who}: loss to the format, less that of {row['reference']}"
    return f"{who} − {BASELINE}" if row["comparison"] == "difference" else f"{who} − the first arm"


def _with_interval(row: Mapping[str, Any]) -> str:
    return f"{signed(row['difference'])} {summary.bracket(row)}" if row["n"] > 1 else signed(row["difference"])
