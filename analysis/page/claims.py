"""The part of a report's first screen that answers a grid's claims: verdicts, and the predictions they rest on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from analysis.figures import comparisons
from analysis.figures.saving import Drawing
from analysis.page import html as page
from analysis.page.html import Column
from analysis.page.summary import bracket, plain, signed
from analysis.statistics.claims import FALSE, STEADY, TRUE, UNDECIDED, VERDICTS

SIGN = {TRUE: "came true", FALSE: "came out false", UNDECIDED: "undecided"}


def section(verdicts: pd.DataFrame, predictions: pd.DataFrame) -> Iterator[str | Drawing]:
    """The verdicts in words, a picture of the predictions, the decided claims with what decided them, the undecided
    ones in one line, and everything as tables (folded).
    """
    yield page.answer(_sentences(verdicts, predictions))
    if drawing := comparisons.predictions(predictions):
        yield drawing
    decided = verdicts[verdicts["verdict"] != VERDICTS[UNDECIDED]]
    if len(decided):
        yield page.heading(2, "How sure is it?", style="small")
        yield page.paragraph("Decided, by claims that were made before the runs; in brackets the 95% interval:")
        yield page.bullets(
            f"{row['verdict'].capitalize()}: {row['statement']} {_grounds(predictions, row)}"
            for row in decided.to_dict("records")
        )
    undecided = verdicts[verdicts["verdict"] == VERDICTS[UNDECIDED]]
    if len(undecided):
        rows = undecided.to_dict("records")
        open_ones = [f"{row['statement']} {_grounds(predictions, row)}" for row in rows]
        line = _undecided(undecided, predictions, len(verdicts))
        yield page.folded(line, page.bullets(open_ones), style="open")
    columns = [
        Column("claim", list(verdicts["claim"])),
        Column("verdict", list(verdicts["verdict"])),
        Column("what it says", list(verdicts["statement"]), wrap=True),
    ]
    tables = page.table(columns, best=list(verdicts["verdict"] != VERDICTS[UNDECIDED])) + _predictions(predictions)
    yield page.folded("Claims and predictions in numbers", tables)


def _sentences(verdicts: pd.DataFrame, predictions: pd.DataFrame) -> Iterator[str]:
    """How many claims came out how; and the prediction that is decided most surely, with its number."""
    counts = verdicts["verdict"].value_counts()
    if len(counts) == 1:
        which = "The claim" if len(verdicts) == 1 else f"All {len(verdicts)} claims"
        yield f"{which} made before the runs {'is' if len(verdicts) == 1 else 'are'} **{counts.index[0]}**."
    else:
        found = [(counts[name], name) for name in VERDICTS.values() if name in counts]
        parts = [f"**{n} {'is' if n == 1 else 'are'} {name}**" for n, name in found]
        yield f"Of {len(verdicts)} claims made before the runs, {', '.join(parts[:-1])} and {parts[-1]}."
    tested = predictions[predictions["p"].notna()]
    settled = tested[tested["verdict"] != UNDECIDED]
    if len(tested):
        shown = settled if len(settled) else tested
        row = shown.loc[shown["p"].idxmin()].to_dict()
        statement = verdicts.loc[verdicts["claim"] == row["claim"], "statement"].iloc[0].rstrip(".")
        kind = {TRUE: "Surest is what came true", FALSE: "Surest is what came out false"}
        start = kind.get(row["verdict"], "Nearest to a verdict is a prediction")
        yield f"{start} of “{statement}”: {_measured(row, strong=True)}."
    diverged = predictions[(predictions["metric"] == STEADY) & (predictions["mean"] > 0)]
    if len(diverged):
        lost = round((diverged["mean"] * diverged["n"]).sum())
        yield f"Of the {diverged['n'].sum():.0f} runs that were to be steady {lost} diverged."


def _measured(row: dict[str, Any], strong: bool = False) -> str:
    """`for_model − AdamW, float32 is −0.049 nats (−0.058 to −0.040, 8 seeds), predicted below 0.01`."""
    if row["metric"] == STEADY:
        diverged = round(row["mean"] * row["n"]) if row["n"] else 0
        return f"{diverged} of {row['n']} runs diverged, predicted none"
    unit = {"validation_loss": " nats"}.get(row["metric"], "")
    number = f"{row['mean']:+.3f}".replace("-", "−") + unit
    inside = f"{'95% interval ' if strong else ''}{row['low']:+.3f} to {row['high']:+.3f}, ".replace("-", "−")
    inside = inside if row["n"] > 1 else ""
    value = f"**{number}**" if strong else number
    seeds_word = "seed" if row["n"] == 1 else "seeds"
    return f"{row['prediction']} is {value} ({inside}{row['n']} {seeds_word}), predicted below {row['below']:g}"


def _grounds(predictions: pd.DataFrame, claim: dict[str, Any]) -> str:
    """What the verdict rests on: all predictions of a supported or undecided claim, the false ones of a refuted one."""
    mine = predictions[predictions["claim"] == claim["claim"]]
    if claim["verdict"] == VERDICTS[FALSE]:
        mine = mine[mine["verdict"] == FALSE]
    parts = []
    for row in mine.to_dict("records"):
        if row["metric"] != STEADY and not row["n"]:
            parts.append(f"{row['prediction']}: not measured")
        else:
            parts.append(f"{_measured(row)}{_needed(row)}")
    return "; ".join(parts) + "."


def _needed(row: dict[str, Any]) -> str:
    if row["verdict"] != UNDECIDED or not row["seeds_needed"] > 0:
        return ""
    return f" – {seeds(row['seeds_needed'])} seeds would decide"


def _undecided(undecided: pd.DataFrame, predictions: pd.DataFrame, total: int) -> str:
    """One line: how many claims, and with how many more seeds they would be decided."""
    mine = predictions[predictions["claim"].isin(undecided["claim"]) & (predictions["verdict"] == UNDECIDED)]
    more = (mine["seeds_needed"] - mine["n"]).where(mine["seeds_needed"] > 0).dropna().clip(lower=1)
    line = f"Undecided: {len(undecided)} of {total} claims"
    finite = more[more.map(math.isfinite)]
    if finite.empty:
        return f"{line}."
    few, many = int(finite.min()), int(finite.max())
    span = f"about {few}" if few == many else f"between {few} and {many}"
    beyond = ", for others even 1000 would hardly do" if len(finite) < len(more) else ""
    return f"{line}; {span} more seed{'s' if many > 1 else ''} would decide their predictions{beyond}."


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
