"""The first screen of a report: what a grid without claims shows, in at most three sentences a task, decided things
first.

Sentences are computed from the tables of differences. Undecided comparisons are one line, with the number of seeds that
would decide them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.page.summary import arm_name, count, effect_name, of_task, plain, task_title, varying, verdict
from analysis.statistics.power import sd_of_interval, seeds_to_decide
from analysis.statistics.tables import BASELINE, TASK, best_arm, higher_is_better

BULLETS = 5  # decided comparisons that are spelled out
NAMED = 3  # undecided ones that are named
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A row of a table of differences in words: the sentence where it is decided, a phrase where it is not."""

    decided: bool
    sentence: str
    phrase: str
    strength: float  # |difference| over half its interval
    seeds: float  # that would decide it
    measured: bool  # it has an interval


@dataclass(frozen=True)
class Answer:
    """What one task shows."""

    title: str
    sentences: list[str]  # at most three
    decided: list[str]
    undecided: str  # empty where everything is decided


def answers(frames: Mapping[str, pd.DataFrame]) -> Iterator[Answer]:
    """The answer of every task; `frames` holds the tables of the report."""
    for task, table in frames["arms"].groupby(list(TASK), dropna=False, sort=False):
        title = task_title(task, table["metric"].iloc[0])
        mine = {name: of_task(frames[name], task) for name in ("differences", "contrasts", "effects", "against_first")}
        comparisons = [*_comparisons(mine, varying(table))]
        sentences = [*_headline(mine, comparisons), *_best(table), *_lost(table)]
        rest = [c for c in comparisons if c.decided and c.sentence not in sentences]
        rest.sort(key=lambda c: -c.strength)
        decided = [c.sentence for c in rest[:BULLETS]]
        if len(rest) > BULLETS:
            decided.append(f"{len(rest) - BULLETS} more are decided; the tables below have them.")
        yield Answer(title, sentences[:3], decided, _undecided(comparisons))


def _comparisons(mine: Mapping[str, pd.DataFrame], names: Sequence[str]) -> Iterator[Comparison]:
    """Every comparison that the tables make: of optimizers, with float32, of settings; with the first arm where there
    is nothing else.
    """
    others = [name for name in names if name != "format"]
    for row in mine["contrasts"].to_dict("records"):
        who, reference = arm_name(row, others), row["reference"]
        low = row["format"]
        word = "less" if verdict(row) == "better" else "more"
        yield _comparison(
            row,
            f"{who} loses {amount(row)} {word} to {low} than {reference} does {span(row)}",
            f"whether {who} loses less to {low} than {reference}",
        )
    for row in mine["differences"].to_dict("records"):
        who, low = arm_name(row, others), row["format"]
        costs = f"{low} costs {who} {amount(row)} {span(row)}"
        gains = f"{who} ends {amount(row)} better in {low} than in {BASELINE} {span(row)}"
        yield _comparison(row, gains if verdict(row) == "better" else costs, f"what {low} costs {who}")
    for row in mine["effects"].to_dict("records"):
        change = f"{row['optimizer']}, {effect_name(row)}"
        yield _comparison(row, f"{change}: {amount(row)} {verdict(row)} {span(row)}", f"what {change} does")
    if not any(len(mine[name]) for name in ("contrasts", "differences", "effects")):
        first = None
        for row in mine["against_first"].to_dict("records"):
            who = arm_name(row, names)
            if first is not None:
                text = f"{who} ends {amount(row)} {verdict(row)} than {first} {span(row)}"
                yield _comparison(row, text, f"{who} against {first}")
            first = first or who


def _comparison(row: Row, sentence: str, phrase: str) -> Comparison:
    half = (row["high"] - row["low"]) / 2
    seeds = seeds_to_decide(row["difference"], sd_of_interval(row["low"], row["high"], row["n"]))
    return Comparison(
        decided=verdict(row) in ("better", "worse"),
        sentence=f"{sentence}.",
        phrase=phrase,
        strength=abs(row["difference"]) / half if half > 0 else math.nan,
        seeds=seeds,
        measured=row["n"] > 1,
    )


def _headline(mine: Mapping[str, pd.DataFrame], comparisons: Sequence[Comparison]) -> Iterator[str]:
    """The comparison that matters: of optimizers in the format that costs most, else the surest one."""
    rows = mine["contrasts"]
    if len(rows) and rows["difference"].notna().any():
        costs = mine["differences"].groupby("format", sort=False)["difference"].mean().abs()
        formats = rows.loc[rows["difference"].notna(), "format"]
        worst = max(formats.unique(), key=lambda name: costs.get(name, 0.0))
        place = rows.index.get_loc(rows[(rows["format"] == worst) & rows["difference"].notna()].index[0])
        chosen = comparisons[place]
    else:
        measured = [c for c in comparisons if c.measured and not math.isnan(c.strength)]
        if not measured:
            return
        chosen = max(measured, key=lambda c: (c.decided, c.strength))
    if chosen.decided:
        yield chosen.sentence
    elif chosen.measured:
        yield f"Undecided: {chosen.phrase}{_seeds(chosen)}."


def _best(table: pd.DataFrame) -> Iterator[str]:
    best = best_arm(table)
    if best is None:
        yield "No run has finished with a finite value."
    else:
        among = f"Best of {len(table)} arms" if len(table) > 1 else "The one arm"
        yield f"{among}: {arm_name(best, varying(table))}, {plain(best['mean'])} ({count(best['n'], 'seed')})."


def _lost(table: pd.DataFrame) -> Iterator[str]:
    diverged, failed = int(table["diverged"].sum()), int(table["failed"].sum() + table["unfinished"].sum())
    parts = [f"{diverged} diverged"] * (diverged > 0) + [f"{failed} did not finish"] * (failed > 0)
    if parts:
        yield f"Of {count(int(table['runs'].sum()), 'run')} {' and '.join(parts)}; they are in no mean."


def _undecided(comparisons: Sequence[Comparison]) -> str:
    """One line: how many, and the nearest to be decided with the seeds that would do it."""
    undecided = [c for c in comparisons if not c.decided]
    if not undecided:
        return ""
    nearest = sorted((c for c in undecided if not math.isnan(c.seeds)), key=lambda c: c.seeds)[:NAMED]
    named = [f"{c.phrase}{_seeds(c)}" for c in nearest]
    others = len(undecided) - len(nearest)
    if others:
        named.append(
            f"{others} more" if nearest else f"{count(others, 'comparison')}, too few seeds to say how many more"
        )
    return f"Undecided: {'; '.join(named)}."


def _seeds(comparison: Comparison) -> str:
    if math.isnan(comparison.seeds):
        return ""
    number = "more than 1000" if math.isinf(comparison.seeds) else f"about {comparison.seeds:.0f}"
    return f" ({number} seeds would decide)"


def amount(row: Row) -> str:
    """How large a difference is, without its sign: `0.110 nats`, `2.7 points of accuracy`."""
    value = abs(row["difference"])
    if higher_is_better(row["metric"]):
        return f"{100 * value:.1f} points of accuracy"
    return f"{value:.3f} nats"


def span(row: Row) -> str:
    """`[0.092 to 0.128, 3 seeds]`: the interval of the size that `amount` tells."""
    if row["n"] < 2:
        return "[1 seed]"
    sign = -1.0 if row["difference"] < 0 else 1.0
    low, high = sorted((sign * row["low"], sign * row["high"]))
    scale, digits = (100, 1) if higher_is_better(row["metric"]) else (1, 3)
    return f"[{_number(scale * low, digits)} to {_number(scale * high, digits)}, {row['n']} seeds]"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")
