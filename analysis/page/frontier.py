"""The part of a report's first screen that says how far the learning rate of every arm can be pushed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from analysis.figures.frontier import frontier as picture
from analysis.figures.saving import Drawing
from analysis.load import Results
from analysis.page import html as page
from analysis.page.html import Column
from analysis.page.summary import count, plain
from analysis.statistics import instability
from analysis.statistics.tables import text

NAMING = ("model", "data", "optimizer", "format", "rounding", "noise")
ALWAYS = ("optimizer", "format")


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """The frontiers that the grid sought, the runs they rest on, and the signs of instability; nothing without any."""
    if results.frontier.empty:
        return {}
    signs = instability.by_run(results.metrics, results.telemetry, results.cosines)
    return {
        "frontier": results.frontier,
        "frontier_runs": results.frontier_runs,
        "frontier_instability": instability.by_place(results.frontier_runs, signs),
        "instability_by_run": signs,
    }


def section(frames: Mapping[str, pd.DataFrame]) -> Iterator[str | Drawing]:
    """The table, the picture and the signs of instability, from the report's tables; nothing without frontiers."""
    if "frontier" not in frames:
        return
    arms, places = frames["frontier"], frames["frontier_instability"]
    yield page.heading(3, "How far the learning rate can be pushed")
    first = arms.iloc[0]
    yield page.paragraph(
        f"The frontier is the largest rate that holds for at least {first['required_share']:.0%} of "
        f"{count(int(first['seeds']), 'seed')}: they neither diverge nor end more than {first['margin']:g} nats above "
        "their own run at the arm's best rate. It was sought by halving until the rate that breaks was at most "
        f"{first['resolution']:g} times the one that holds: the point itself lies between the two.",
        "note",
    )
    yield _table(arms)
    for row in arms.to_dict("records"):
        if row["monotone"] == "false":
            yield page.paragraph(
                f"{row['arm']}: trials at {row['contradicting']} contradict the assumption that what has broken stays "
                "broken. Its frontier is the one below the first break.",
                "warn",
            )
        if isinstance(row["best_edge"], str) and row["best_edge"]:
            yield page.paragraph(
                f"{row['arm']}: the best rate is the {row['best_edge']} bound of those tried. A better one may lie "
                "beyond, and would move the frontier.",
                "warn",
            )
    yield picture(arms, frames["frontier_runs"])
    yield page.heading(4, "Signs of instability, at the best rate, at the frontier and just above")
    yield _signs(places)
    yield page.paragraph(
        "Means over the runs, diverged ones up to where they ended. Spikes a run, those the loss never came back from, "
        "and the steps that the others took; weight growth as in the table of stability. With telemetry: the largest "
        "attention logit and its growth from the first sampled step to the last; weight updates swallowed by rounding; "
        "weights that flip to a neighbouring value and back in two updates; the cosine of the gradients to full "
        "precision.",
        "note",
    )


def _table(arms: pd.DataFrame) -> str:
    names = [name for name in NAMING if name in ALWAYS or arms[name].nunique(dropna=False) > 1]
    records = arms.to_dict("records")
    columns = [
        *(Column(name, [_cell(row[name]) for row in records]) for name in names),
        Column("frontier", [_frontier(row) for row in records], number=True),
        Column("breaks at", [_rate(row["breaks"]) for row in records], number=True),
        Column("best rate", [_rate(row["best"]) for row in records], number=True),
        Column("loss there (nats)", [plain(row["best_loss"]) for row in records], number=True),
        Column("seeds that hold", ["–" if pd.isna(row["share"]) else f"{row['share']:.0%}" for row in records]),
        Column("what broke just above (seeds)", [_cell(row["broke"]) for row in records], wrap=True),
        Column("monotone", ["yes" if row["monotone"] == "true" else "no" for row in records]),
    ]
    firsts = [row[names[0]] for row in records]
    return page.table(columns, new=[place > 0 and firsts[place] != firsts[place - 1] for place in range(len(firsts))])


def _signs(places: pd.DataFrame) -> str:
    def numbers(name: str, digits: int) -> list[str]:
        return [plain(value, digits) for value in places[name]]

    arms = list(places["arm"])
    columns = [
        Column("arm", arms, wrap=True),
        Column("at", list(places["place"])),
        Column("rate", [_rate(rate) for rate in places["rate"]], number=True),
        Column("diverged", [f"{n} of {of}" for n, of in zip(places["diverged"], places["runs"], strict=True)]),
        Column("spikes", numbers("spikes", 1), number=True),
        Column("never back", numbers("unrecovered", 1), number=True),
        Column("back after (steps)", numbers("recovery", 0), number=True),
        Column("weight growth", numbers("weight_growth", 2), number=True),
        Column("largest logit", numbers("largest_logit", 1), number=True),
        Column("its growth", numbers("logit_growth", 1), number=True),
        *(
            Column(name, ["–" if pd.isna(value) else f"{value:.1%}" for value in places[name]], number=True)
            for name in ("swallowed", "oscillated")
        ),
        Column("gradient cosine", numbers("cosine", 3), number=True),
    ]
    return page.table(columns, new=[place > 0 and arms[place] != arms[place - 1] for place in range(len(arms))])


def _frontier(row: dict[str, Any]) -> str:
    return f"≥ {row['frontier']:g}" if row["status"] == "open" else _rate(row["frontier"])


def _rate(rate: float) -> str:
    return "–" if pd.isna(rate) else f"{rate:g}"


def _cell(value: object) -> str:
    return "–" if pd.isna(value) or value == "" else text(value)
