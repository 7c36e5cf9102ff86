"""The part of a report's first screen that answers a grid's claims: verdicts, and the predictions they rest on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from analysis.figures import drawings
from analysis.page import html as page
from analysis.page.html import Column
from analysis.page.summary import bracket, plain, signed
from analysis.statistics.claims import FALSE, STEADY, TRUE, UNDECIDED

SIGN = {TRUE: "came true", FALSE: "came out false", UNDECIDED: "undecided"}


def section(verdicts: pd.DataFrame, predictions: pd.DataFrame) -> Iterator[str]:
    """The table of claims, a picture of the predictions, the table of predictions (folded)."""
    yield page.heading(3, "Claims, made before the runs")
    columns = [
        Column("claim", list(verdicts["claim"])),
        Column("verdict", list(verdicts["verdict"])),
        Column("what it says", list(verdicts["statement"]), wrap=True),
        Column("on what it rests", [_grounds(predictions, name) for name in verdicts["claim"]], wrap=True),
    ]
    yield page.table(columns, best=list(verdicts["verdict"] != "undecided"))
    if more := _more_seeds(predictions):
        yield page.paragraph(more, "note")
    if drawing := drawings.predictions(predictions):
        yield page.figure(drawing)
    yield page.folded("The predictions in numbers", _predictions(predictions))


def _grounds(predictions: pd.DataFrame, claim: str) -> str:
    """`for_model − AdamW, float32: −0.0031 [−0.0102, +0.0040], n = 8: undecided; ...`."""
    parts = []
    for row in predictions[predictions["claim"] == claim].to_dict("records"):
        if row["metric"] == STEADY:
            diverged = round(row["mean"] * row["n"]) if row["n"] else 0
            parts.append(f"{diverged} of {row['n']} runs diverged")
        else:
            span = f"{signed(row['mean'])} {bracket(row)}" if row["n"] > 1 else signed(row["mean"])
            parts.append(f"{row['prediction']}: {span}, n = {row['n']}, {SIGN[row['verdict']]}")
    return "; ".join(parts)


def _more_seeds(predictions: pd.DataFrame) -> str:
    """How many seeds would decide what is undecided."""
    open_ones = predictions[(predictions["verdict"] == UNDECIDED) & predictions["seeds_needed"].notna()]
    if open_ones.empty:
        return ""
    parts = [f"{row['claim']}, {row['prediction']}: {seeds(row['seeds_needed'])}" for _, row in open_ones.iterrows()]
    start = "Seeds that would decide, with a chance of 80%, if the means and spreads are the true ones"
    return f"{start}: {'; '.join(parts)}."


def _predictions(rows: pd.DataFrame) -> str:
    records = rows.to_dict("records")
    columns = [
        Column("claim", list(rows["claim"])),
        Column("prediction", list(rows["prediction"])),
        Column("metric", [name.replace("_", " ") for name in rows["metric"]]),
        Column("mean", [_mean(row) for row in records], number=True),
        Column("95% interval", [_interval(row) for row in records], number=True),
        Column("is to be below", ["–" if math.isnan(x) else f"{x:g}" for x in rows["below"]], number=True),
        Column("n", [str(n) for n in rows["n"]], number=True),
        Column("missing", [str(n) for n in rows["missing"]], number=True),
        Column("p, corrected", [plain(p, 3) for p in rows["p_holm"]], number=True),
        Column("came", [SIGN[name].removeprefix("came ") for name in rows["verdict"]]),
        Column("seeds to decide", [seeds(n) if n else "–" for n in rows["seeds_needed"]], number=True),
    ]
    changes = [index > 0 and row["claim"] != records[index - 1]["claim"] for index, row in enumerate(records)]
    return page.table(columns, new=changes)


def _mean(row: dict[str, Any]) -> str:
    if row["metric"] != STEADY:
        return signed(row["mean"])
    return "–" if math.isnan(row["mean"]) else f"{row['mean']:.0%} diverged"


def _interval(row: dict[str, Any]) -> str:
    if row["metric"] == STEADY:
        return "–" if math.isnan(row["low"]) else f"[{row['low']:.0%}, {row['high']:.0%}]"
    return bracket(row) if row["n"] > 1 else "–"


def seeds(n: float) -> str:
    return "–" if math.isnan(n) else "more than 1000" if math.isinf(n) else f"{n:.0f}"
