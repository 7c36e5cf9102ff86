"""The first screen of a report: what came out, in at most three sentences, and how sure one can be.

Sentences are computed from the tables of differences. What is decided comes first, the surest first; everything
undecided is one line, with the number of further seeds that would decide it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.page import summary
from analysis.page.summary import SAME, arm_name, count, of_task, varying, verdict
from analysis.statistics.power import sd_of_interval, seeds_to_decide
from analysis.statistics.tables import BASELINE, TASK, best_arm, higher_is_better

BULLETS = 6  # decided comparisons that are spelled out, shared among the tasks
ARMS = 3  # that lost all their runs and are named
TABLES = ("differences", "contrasts", "optimizers", "effects", "against_first")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A row of a table of differences in words."""

    decided: bool
    measured: bool  # it has an interval
    paired: bool  # some seed has both runs
    same: bool  # in every pair, exactly
    headline: str  # as the answer of the report: decided or not
    sentence: str  # where it is decided
    phrase: str  # what is asked, where it is not
    strength: float  # |difference| over half its interval
    more: float  # seeds beyond those there are that would decide it; infinity for too many, NaN where nobody can say


@dataclass(frozen=True)
class Answer:
    """What a grid shows. Texts hold `code` and **what matters** in the marks of page.prose."""

    verdict: str  # of several tasks, on which the headline is decided; empty where on all, or where none compares
    sentences: list[str]  # at most three
    decided: list[str]
    undecided: str  # one line; empty where everything is decided
    open: list[str]  # what is undecided, one by one
    apart: list[tuple[str, list[str]]]  # in a line and one by one: what is the same in every pair, what has no pair


@dataclass(frozen=True)
class _OfTask:
    headline: Comparison | None
    ends: Comparison | None  # the optimizers compared in the headline's format
    best: str
    comparisons: list[Comparison]


def answer(frames: Mapping[str, pd.DataFrame]) -> Answer:
    """The answer of a grid; `frames` holds the tables of the report."""
    found = {
        task: _of_task(table, {name: of_task(frames[name], task) for name in TABLES})
        for task, table in frames["arms"].groupby(list(TASK), dropna=False, sort=False)
    }
    names = summary.short_names(found)
    several = len(found) > 1

    def of(task: Any, text: str) -> str:
        return f"{names[task]}: {text}" if several else text

    lost = [*_lost(frames["arms"])]
    sentences = [of(task, text) for task, text in _sentences(found)][: 3 - len(lost)] + lost
    every = [(task, each) for task, mine in found.items() for each in mine.comparisons]
    said = {each.headline for each in _said(found, 3 - len(lost))}
    decided, left = [], 0
    for task, mine in found.items():
        rest = sorted((c for c in mine.comparisons if c.decided and c.headline not in said), key=lambda c: -c.strength)
        shown = max(BULLETS // len(found), 1)
        decided += [of(task, each.sentence) for each in rest[:shown]]
        left += max(len(rest) - shown, 0)
    if left:
        decided.append(f"{left} more are decided; the tables below have them.")
    undecided = [(task, each) for task, each in every if each.paired and not each.decided and not each.same]
    undecided.sort(key=lambda pair: (math.isnan(pair[1].more), pair[1].more))
    each_open = [of(task, f"{each.phrase}{_more(each.more)}") for task, each in undecided]
    paired = sum(each.paired for _, each in every)
    line = _undecided([each for _, each in undecided], paired, of(undecided[0][0], "") if undecided else "")
    apart = [
        (f"{title}: {count(len(phrases), 'comparison')}.", phrases)
        for title, phrases in (
            (SAME[0].upper() + SAME[1:], [of(task, each.phrase) for task, each in every if each.same]),
            ("Without any pair of runs", [of(task, each.phrase) for task, each in every if not each.paired]),
        )
        if phrases
    ]
    headlines = {names[task]: mine.headline for task, mine in found.items() if mine.headline is not None}
    return Answer(_verdict(headlines) if several else "", sentences, decided, line, each_open, apart)


def _verdict(headlines: Mapping[str, Comparison]) -> str:
    """One line before the sentences, of the tasks' headlines by their names."""
    decided = [name for name, each in headlines.items() if each.decided]
    rest = [name for name in headlines if name not in decided]
    if not rest:
        return ""
    if not decided:
        return "Not decided by these runs:"
    if len(headlines) == 2:
        return f"Decided on {decided[0]}, not on {rest[0]}:"
    return f"Decided on {', '.join(decided)}; not on {', '.join(rest)}:"


def _sentences(found: Mapping[Any, _OfTask]) -> Iterator[tuple[Any, str]]:
    """The answer of one or two tasks; of more, the surest."""
    if len(found) > 2:
        chosen = _surest(found)
        yield from [(chosen, _first(found[chosen]))]
        return
    for task, mine in found.items():
        yield task, _first(mine)
    if len(found) == 1:
        task, mine = next(iter(found.items()))
        if mine.headline is not None:
            yield task, mine.ends.headline if mine.ends is not None else mine.best


def _said(found: Mapping[Any, _OfTask], most: int) -> list[Comparison]:
    """The comparisons that the sentences hold."""
    if len(found) > 2:
        found = {"": found[_surest(found)]}
        return [mine.headline for mine in found.values() if mine.headline is not None]
    chosen = [mine.headline for mine in found.values()]
    chosen += [mine.ends for mine in found.values() if len(found) == 1 and mine.headline is not None]
    return [each for each in chosen[:most] if each is not None]


def _surest(found: Mapping[Any, _OfTask]) -> Any:
    def sureness(task: Any) -> tuple[bool, float]:
        headline = found[task].headline
        return (False, -1.0) if headline is None else (headline.decided, headline.strength)

    return max(found, key=sureness)


def _first(mine: _OfTask) -> str:
    return mine.best if mine.headline is None else mine.headline.headline


def _of_task(table: pd.DataFrame, mine: Mapping[str, pd.DataFrame]) -> _OfTask:
    names = varying(table)
    others = [name for name in names if name != "format"]
    contrasts = [_contrast(row, others, mine["differences"]) for row in mine["contrasts"].to_dict("records")]
    ends = [_end(row, others) for row in mine["optimizers"].to_dict("records")]
    costs = [_cost(row, others) for row in mine["differences"].to_dict("records")]
    effects = [_effect(row) for row in mine["effects"].to_dict("records")]
    comparisons = [*contrasts, *ends, *costs, *effects]
    if not comparisons:
        comparisons = [*_against_first(mine["against_first"], names)]
    headline, end = None, None
    if worst := _costliest(mine):
        place = [row["format"] for row in mine["contrasts"].to_dict("records")].index(worst)
        headline = contrasts[place]
        end = next(
            (
                each
                for each, low in zip(ends, mine["optimizers"]["format"], strict=True)
                if low == worst and each.measured
            ),
            None,
        )
    elif measured := [c for c in comparisons if c.measured and not math.isnan(c.strength)]:
        headline = max(measured, key=lambda c: (c.decided, c.strength))
    if headline is not None and not headline.measured:
        headline, end = None, None
    return _OfTask(headline, end, _best(table), comparisons)


def _costliest(mine: Mapping[str, pd.DataFrame]) -> str | None:
    """The format that costs most among those in which optimizers are compared."""
    rows = mine["contrasts"]
    formats = list(dict.fromkeys(rows.loc[rows["difference"].notna(), "format"]))
    costs = mine["differences"].groupby("format", sort=False)["difference"].mean().abs()
    return max(formats, key=lambda name: costs.get(name, 0.0), default=None)


def _contrast(row: Row, others: Sequence[str], costs: pd.DataFrame) -> Comparison:
    who, reference, low = arm_name(row, others), row["reference"], row["format"]
    loses = f"{who} loses **{amount(row)} {'less' if _good(row) else 'more'}**"
    start = f"Training in {low} instead of {BASELINE}"
    both = _both_costs(row, costs)
    if both is None:
        headline = f"{start}, {loses} than {reference}"
    elif min(both) >= 0:
        own, theirs = (_size(value, row["metric"]) for value in both)
        headline = f"{start} costs {reference} {theirs} of {noun(row)} and {who} {own}: {loses}"
    else:
        own, theirs = (_size(-value, row["metric"], signed=True) for value in both)
        better = "" if higher_is_better(row["metric"]) else " (positive is better)"
        headline = f"{start} changes {reference} by {theirs} and {who} by {own}{better}: {loses}"
    sentence = (
        f"{who} loses {amount(row)} {'less' if _good(row) else 'more'} to {low} than {reference} does ({span(row)})."
    )
    return _comparison(row, headline, sentence, f"whether {who} loses less to {low} than {reference}")


def _both_costs(row: Row, costs: pd.DataFrame) -> tuple[float, float] | None:
    """How much worse than in float32 the arm and its reference are in the format, where both rest on the same seeds."""
    in_format = costs[(costs["format"] == row["format"]) & (costs["n"] == row["n"])]
    theirs = in_format[in_format["optimizer"] == row["reference"]]
    own = in_format[in_format["optimizer"] == row["optimizer"]]
    if len(own) != 1 or len(theirs) != 1:
        return None
    sign = -1.0 if higher_is_better(row["metric"]) else 1.0
    return sign * float(own["difference"].iloc[0]), sign * float(theirs["difference"].iloc[0])


def _end(row: Row, others: Sequence[str]) -> Comparison:
    who, reference, low = arm_name(row, others), row["reference"], row["format"]
    word = "better" if _good(row) else "worse"
    return _comparison(
        row,
        f"Trained in {low}, {who} ends **{amount(row)} {word}** than {reference}",
        f"Trained in {low}, {who} ends {amount(row)} {word} than {reference} ({span(row)}).",
        f"whether {who} ends better in {low} than {reference}",
    )


def _cost(row: Row, others: Sequence[str]) -> Comparison:
    who, low = arm_name(row, others), row["format"]
    if _good(row):
        headline = f"Training in {low} instead of {BASELINE} makes {who} **{amount(row)} better**"
        sentence = f"{who} ends {amount(row)} better in {low} than in {BASELINE} ({span(row)})."
    else:
        headline = f"Training in {low} instead of {BASELINE} costs {who} **{amount(row)}** of {noun(row)}"
        sentence = f"{low} costs {who} {amount(row)} ({span(row)})."
    return _comparison(row, headline, sentence, f"what {low} costs {who}")


def _effect(row: Row) -> Comparison:
    setting = summary.short(row["factor"]).replace("_", " ")
    what = f"{setting} from {row['reference']} to {row['level']}"
    word = "better" if _good(row) else "worse"
    return _comparison(
        row,
        f"Changing {what} makes {row['optimizer']} **{amount(row)} {word}**",
        f"Changing {what} makes {row['optimizer']} {amount(row)} {word} ({span(row)}).",
        f"what {setting} {row['level']} instead of {row['reference']} does to {row['optimizer']}",
    )


def _against_first(rows: pd.DataFrame, names: Sequence[str]) -> Iterator[Comparison]:
    first = None
    for row in rows.to_dict("records"):
        who, word = arm_name(row, names), "better" if _good(row) else "worse"
        if first is not None:
            text = f"{who} ends {{}} than {first}"
            yield _comparison(
                row,
                text.format(f"**{amount(row)} {word}**"),
                f"{text.format(f'{amount(row)} {word}')} ({span(row)}).",
                f"{who} against {first}",
            )
        first = first or who


def _comparison(row: Row, headline: str, sentence: str, phrase: str) -> Comparison:
    """headline: with the number that matters in ** **, without the interval."""
    half = (row["high"] - row["low"]) / 2
    needed = seeds_to_decide(row["difference"], sd_of_interval(row["low"], row["high"], row["n"]))
    decided = verdict(row) in ("better", "worse")
    more = max(needed - row["n"], 1.0) if not math.isnan(needed) else math.nan
    same = verdict(row) == SAME
    if decided:
        whole = f"{headline} ({span(row, whole=True)})."
    elif same:
        whole = f"{headline.replace('**', '')}: {SAME} ({count(row['n'], 'seed')})."
    else:
        doubt = f"{span(row, whole=True)}{_more(more, '; ')}"
        whole = f"{headline.replace('**', '')}, **which may be chance** ({doubt})."
    return Comparison(
        decided=decided,
        measured=row["n"] > 1,
        paired=row["n"] > 0,
        same=same,
        headline=whole,
        sentence=sentence,
        phrase=phrase,
        strength=abs(row["difference"]) / half if half > 0 else math.nan,
        more=more,
    )


def _best(table: pd.DataFrame) -> str:
    best = best_arm(table)
    if best is None:
        return "No run has finished with a finite value."
    metric = best["metric"]
    value = f"**{summary.value(best['mean'], metric)}**"
    seeds = f"the mean of {best['n']} seeds" if best["n"] > 1 else "one seed, which says nothing about chance"
    if len(table) == 1:
        return f"The final {metric.replace('_', ' ')} is {value} ({seeds})."
    name = arm_name(best, varying(table))
    return f"The best of {len(table)} arms is {name}: {metric.replace('_', ' ')} {value} ({seeds})."


def _lost(table: pd.DataFrame) -> Iterator[str]:
    """How many runs are in no mean, and the arms that lost all of theirs."""
    counts = {"diverged": "diverged", "failed": "failed", "unfinished": "did not finish"}
    parts = [f"{n} {word}" for name, word in counts.items() if (n := int(table[name].sum()))]
    if parts:
        told = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
        whole = _wholly_lost(table)
        named = "; ".join([*whole[:ARMS], *([f"so did those of {len(whole) - ARMS} more arms"] * (len(whole) > ARMS))])
        start = f"Of {count(int(table['runs'].sum()), 'run')} {told}; they are in no mean."
        yield f"{start} {named[0].upper()}{named[1:]}." if named else start


def _wholly_lost(table: pd.DataFrame) -> list[str]:
    """`all 4 runs of adamw, lr 1e+06 diverged`: of arms in all formats, else in one; none where all are."""
    lost = table["diverged"] + table["failed"]
    tasks = list(table.groupby(list(TASK), dropna=False, sort=False))
    names = summary.short_names([task for task, _ in tasks])
    found = []
    for task, mine in tasks if (lost < table["runs"]).any() else ():
        every = varying(mine)
        others = [name for name in every if name != "format"]
        for _, group in mine.groupby(others, dropna=False, sort=False):
            wholly = (lost[group.index] == group["runs"]).all()
            for part, told in [(group, others)] if wholly else [(group.loc[[at]], every) for at in group.index]:
                diverged, failed, runs = (int(part[name].sum()) for name in ("diverged", "failed", "runs"))
                if diverged + failed == runs:
                    how = " or ".join(["diverged"] * (diverged > 0) + ["failed"] * (failed > 0))
                    which = f"all {runs} runs" if runs > 1 else "the only run"
                    on = f" on {names[task]}" if len(tasks) > 1 else ""
                    found.append(f"{which} of {arm_name(part.iloc[0], told)}{on} {how}")
    return found


def _undecided(comparisons: Sequence[Comparison], total: int, where: str) -> str:
    """One line: how many, and how many more seeds would decide them. `comparisons` are sorted by that number; `where`
    is the task of the first.
    """
    if not comparisons:
        return ""
    line = f"Undecided: {len(comparisons)} of {count(total, 'comparison')}"
    finite = [c for c in comparisons if math.isfinite(c.more)]
    if not finite:
        single = not any(c.measured for c in comparisons)
        return f"{line}; {'two or more seeds are needed to tell' if single else 'even 1000 seeds would hardly decide'}."
    on = f" on {where.removesuffix(': ')}" if where else ""
    line += f"; about {count(int(finite[0].more), 'more seed')} would decide {finite[0].phrase}{on}"
    return f"{line}."


def _more(more: float, before: str = " – ") -> str:
    if math.isnan(more):
        return ""
    number = "more than 1000 seeds" if math.isinf(more) else f"about {count(int(more), 'more seed')}"
    return f"{before}{number} would decide"


def noun(row: Row) -> str:
    return str(row["metric"]).replace("_", " ")


def _good(row: Row) -> bool:
    return bool((row["difference"] > 0) == higher_is_better(row["metric"]))


def amount(row: Row) -> str:
    """How large a difference is, without its sign: `0.110 nats`, `2.7 percentage points`."""
    return _size(abs(row["difference"]), row["metric"])


def _size(value: float, metric: str, signed: bool = False) -> str:
    scale, digits, unit = (100, 1, "percentage points") if higher_is_better(metric) else (1, 3, "nats")
    return f"{scale * value:{'+' if signed else ''}.{digits}f} {unit}".replace("-", "−")


def span(row: Row, whole: bool = False) -> str:
    """`0.092 to 0.128, 3 seeds`: the interval of the size that `amount` tells; `whole` says that it is one of 95%."""
    if row["n"] < 2:
        return "1 seed"
    sign = -1.0 if row["difference"] < 0 else 1.0
    low, high = sorted((sign * row["low"], sign * row["high"]))
    scale, digits = (100, 1) if higher_is_better(row["metric"]) else (1, 3)
    what = "95% interval " if whole else ""
    return f"{what}{_number(scale * low, digits)} to {_number(scale * high, digits)}, {row['n']} seeds"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")
