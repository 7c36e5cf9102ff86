"""The parts of a report about the runs themselves: which were left out and why, what ran where, and every setting."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pandas as pd

from analysis import load
from analysis.load import Results
from analysis.page import html as page
from analysis.page import summary
from analysis.page.html import Column
from analysis.page.summary import count
from analysis.page.task import factor_columns, texts
from analysis.statistics import tables

TIMES = ("started_at", "time_s", "peak_memory_mb")  # of the environment; they differ in every run


def left_out(results: Results) -> Iterator[str]:
    """The runs that are in no mean, each with its cause, and the folders and runs that are in no table."""
    runs = results.runs[~tables.counted(results.runs)]
    names = [name for name in tables.factors(results.runs) if results.runs[name].nunique(dropna=False) > 1]
    if runs.empty:
        yield page.paragraph(
            "Every run that could be read has finished, and is in its mean."
            if len(results.runs)
            else "No run could be read."
        )
    else:
        yield page.paragraph(
            f"{count(len(runs), 'run')} of {len(results.runs)} {'is' if len(runs) == 1 else 'are'} in no mean; a pair "
            "of which one run is missing is in no difference. The tables count them as excluded.",
            "note",
        )
        causes = runs["cause"].where(runs["status"] != "finished", "its metric is not finite")
        columns = [
            Column("status", list(runs["status"])),
            *factor_columns(runs, names),
            Column("seed", texts(runs["seed"], str), number=True),
            Column("step", texts(runs["step"], lambda step: f"{step:.0f}"), number=True),
            Column("cause", texts(causes, lambda cause: "–" if pd.isna(cause) else cause), wrap=True),
            Column("signature", list(runs["signature"])),
        ]
        yield page.table(columns)
        for row in runs[runs["traceback"].notna()].to_dict("records"):
            title = f"Traceback of {summary.arm_name(row, [*names, 'seed'])} ({row['signature']})"
            yield page.folded(title, page.preformatted(row["traceback"]))
    if len(results.problems):
        yield page.heading(3, "Folders that could not be used")
        columns = [
            Column("folder", list(results.problems["folder"])),
            Column("reason", list(results.problems["reason"]), wrap=True),
        ]
        yield page.table(columns)
    if results.not_listed:
        yield page.paragraph(
            f"{count(len(results.not_listed), 'run')} in this folder that grid.json does not list, of other formats or "
            "an earlier version of the grid file, left out."
        )
    if results.not_started:
        listing = page.preformatted("\n".join(results.not_started))
        yield page.folded(f"{count(len(results.not_started), 'run')} of the grid not started yet", listing)


def provenance(results: Results) -> Iterator[str]:
    environment, runs = results.environment, results.runs
    names, values = [], []
    for name in [name for name in environment.columns if name not in ("signature", "session", *TIMES)]:
        found = environment["signature"].groupby(environment[name].map(_text_or_dash), sort=False).nunique()
        each = [f"{value} ({count(n, 'run')})" for value, n in found.items()]
        names.append(name)
        values.append("; ".join(each) if len(each) > 1 else found.index[0])
    resumed = environment.loc[environment["session"] > 0, "signature"].nunique()
    if resumed:
        names.append("resumed")
        values.append(f"{count(resumed, 'run')}, in {count(int((environment['session'] > 0).sum()), 'session')}")
    for name, line in (("started_at", _span), ("time_s", _total), ("peak_memory_mb", _most)):
        if name in environment and environment[name].notna().any():
            names.append(name)
            values.append(line(environment[name].dropna()))
    if names:
        yield page.table([Column("what", names), Column("value", values, wrap=True)])
    else:
        yield page.paragraph("No run recorded its environment.")
    factors, derived = tables.factors(runs), tables.derived(runs)
    if derived:
        followed = [_follows(runs, name, factors) for name in derived]
        content = page.table([Column("setting", derived), Column("value", followed, wrap=True)])
        yield page.folded("Settings that follow from the factors", content)
    constant = [name for name in load.config_columns(runs) if runs[name].nunique(dropna=False) == 1]
    if constant:
        same = [tables.text(runs[name].iloc[0]) for name in constant]
        content = page.table([Column("setting", constant), Column("value", same, wrap=True)])
        yield page.folded("Settings that are the same in every run", content)
    for part in results.parts or (results,):
        if part.grid:
            command = page.paragraph(f"Command: {' '.join(map(str, part.grid.get('argv') or ['not recorded']))}")
            source = page.preformatted(str(part.grid.get("source_text") or "not recorded"))
            which = f" of {part.grid.get('grid', part.folder.name)}" if results.parts else ""
            yield page.folded(f"The grid file{which}, as it was run", command + source)


def _follows(runs: pd.DataFrame, name: str, factors: list[str]) -> str:
    """`adamw: 0.006; lmd: 0.03`: the values of a derived setting by the fewest factors that decide it."""
    varying = [factor for factor in factors if runs[factor].nunique(dropna=False) > 1]
    for chosen in (some for size in range(1, len(varying) + 1) for some in combinations(varying, size)):
        groups = runs.groupby(list(chosen), dropna=False, sort=False)[name]
        if groups.nunique(dropna=False).max() == 1:
            firsts = [(", ".join(map(tables.text, key)), group.iloc[0]) for key, group in groups]
            return "; ".join(f"{key}: {tables.text(value)}" for key, value in firsts)
    return "differs within arms"


def _text_or_dash(value: object) -> str:
    return "–" if pd.isna(value) else tables.text(value)


def _span(times: pd.Series) -> str:
    return times.iloc[0] if len(times) == 1 else f"{min(times)} to {max(times)}"


def _total(seconds: pd.Series) -> str:
    return f"{seconds.sum():.0f} s together, {seconds.min():.1f} to {seconds.max():.1f} s a run"


def _most(megabytes: pd.Series) -> str:
    return f"{megabytes.min():.0f} to {megabytes.max():.0f} MB a process"
