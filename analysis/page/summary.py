"""What a grid shows, in sentences computed from its tables: n and an interval with every difference, and no claim
beyond them.

The words for numbers stand here too, so that a sentence and a table write the same number the same way.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

from analysis.figures.plots import LABELS
from analysis.load import Results
from analysis.run_files import STATUSES
from analysis.statistics.tables import ALWAYS_FACTORS, BASELINE, TASK, best_arm, factors, higher_is_better, text

METRICS = {
    "validation_loss": "Validation loss is the mean cross-entropy on held-out data, in nats; lower is better.",
    "validation_accuracy": "Validation accuracy is the share of held-out examples that are classified correctly.",
}
OPTIMIZERS = {
    "adamw": "AdamW as in torch",
    "lmd": "Log-Normal Multiplicative Dynamics, an optimizer with multiplicative updates, for all weights",
    "lmd-for-model": "LMD (Log-Normal Multiplicative Dynamics, an optimizer with multiplicative updates) for hidden "
    "matrices, AdamW for all other weights",
    "madam": "Madam, an optimizer with multiplicative updates",
}
PASSES = {
    "forward": "Only the operands of products in the forward pass are rounded to the format; weights are kept, and "
    "gradients computed, in float32.",
    "all": "The operands of all products, forward and backward, are rounded to the format; weights are kept in "
    "float32.",
}
SAME = "the same in every pair"
FORMATS = 4  # whose meaning the first screen tells at most
SENTENCES = 4  # differences that are spelled out; of more, the number and the largest


def lead(results: Results) -> str:
    """The shape of the grid, how many runs there are, and what became of them."""
    runs = results.runs
    counts = runs["status"].value_counts()
    parts = [f"{counts[status]} {status}" for status in STATUSES if status in counts]
    ended = f"all {parts[0].split()[1]}" if len(parts) == 1 and len(runs) > 1 else ", ".join(parts)
    sentence = f"{count(len(runs), 'run')} ({_shape(runs)}): {ended}." if parts else "No run can be read yet."
    left_out = (
        [f"{count(len(results.problems), 'folder')} could not be used (listed below)"] if len(results.problems) else []
    )
    left_out += [f"{count(len(results.not_started), 'run')} not started"] if results.not_started else []
    return sentence + (f" {'; '.join(left_out)}." if left_out else "")


def question(results: Results) -> tuple[str, str]:
    """What the grid asks, and the rest of that paragraph: the first sentence of its file's docstring where that ends in
    a question mark, else nothing and the whole first paragraph. Of several grids, one after the other.
    """
    paragraphs = []
    for part in results.parts or (results,):
        try:
            text = ast.get_docstring(ast.parse(str(part.grid.get("source_text") or "")))
        except (SyntaxError, ValueError):  # of a file that is no Python, or holds null bytes
            continue
        paragraphs += [" ".join(text.split("\n\n")[0].split())] if text else []
    paragraphs = list(dict.fromkeys(paragraphs))
    asked = [re.match(r"[^.?!]*\?(?=\s|$)", text) for text in paragraphs]
    if not paragraphs or not all(asked):
        return "", " ".join(paragraphs)
    questions = [found.group() for found in asked if found]
    rest = [text[len(first) :].strip() for first, text in zip(questions, paragraphs, strict=True)]
    return " ".join(dict.fromkeys(questions)), " ".join(text for text in dict.fromkeys(rest) if text)


def is_twin(results: Results) -> bool:
    """Whether some of the runs are of a grid's small twin (`lpsim run GRID --twin`)."""
    grids = [part.grid for part in results.parts or (results,)]
    return any(str(grid.get("grid")) == f"{PurePath(str(grid.get('source'))).stem}_twin" for grid in grids)


def words(results: Results) -> str:
    """What the metric, the optimizers and the formats of the grid are, for who has never met them."""
    runs = results.runs
    told = [METRICS[name] for name in dict.fromkeys(runs["metric"])]
    known = [f"{name}: {OPTIMIZERS[name]}" for name in dict.fromkeys(runs["optimizer"]) if name in OPTIMIZERS]
    told += [f"{'; '.join(known)}."] if known else []
    names = list(dict.fromkeys(runs["format"]))
    definitions = runs.get("recipe.format_definition", pd.Series(index=runs.index, dtype="str"))
    formats = []
    for name in names[:FORMATS]:
        defined = definitions[runs["format"] == name].dropna()
        meaning = _meaning(defined.iloc[0]) if len(defined) else ""
        formats += [f"{name}: {meaning}"] if meaning else []
    told += [f"{'; '.join(formats)}."] if formats else []
    lowered = runs[runs["format"] != BASELINE]
    passes = lowered["recipe.passes"].unique() if "recipe.passes" in runs else []
    otherwise = ("recipe.vector", "autocast")  # settings by which more is rounded, or computed in another type
    if len(passes) == 1 and not any(name in runs and runs[name].notna().any() for name in otherwise):
        told += [PASSES[passes[0]]] if passes[0] in PASSES else []
    return " ".join(told)


def _meaning(definition: str) -> str:
    """`4-bit numbers, 32 to a scale`; nothing for a definition that says neither."""
    try:
        found = json.loads(definition)
        element = found.get("element", found)
        bits = element["exponent_bits"] + element["mantissa_bits"] + bool(element.get("signed", True))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    size = found.get("block_size")
    return f"{bits}-bit numbers{f', {size} to a scale' if isinstance(size, int) else ''}"


def complete(results: Results) -> bool:
    """Whether every run of the grid has finished and every folder could be used."""
    return bool((results.runs["status"] == "finished").all()) and results.problems.empty and not results.not_started


def _shape(runs: pd.DataFrame) -> str:
    """`2 models, 2 optimizers, 3 formats, 2 seeds`: the factors that vary and how many levels an optimizer sees of
    each.
    """
    names = [
        name for name in [*factors(runs), "seed"] if name != "data" or runs.groupby("model")["data"].nunique().max() > 1
    ]
    within = {name: runs if name == "optimizer" else runs.groupby("optimizer") for name in names}
    levels = {name: int(np.max(group[name].nunique(dropna=False))) for name, group in within.items()}
    return ", ".join(_levels(name, n) for name, n in levels.items() if n > 1) or "one arm"


def _levels(name: str, n: int) -> str:
    nouns = {"model": "models", "data": "data sets", "optimizer": "optimizers", "format": "formats", "seed": "seeds"}
    return f"{n} {nouns[name]}" if name in nouns else f"{n} values of {name.split('.')[-1].replace('_', ' ')}"


def task_name(task: Sequence[Any]) -> str:
    return f"{task[0]} on {task[1]}"


def short_names(tasks: Iterable[Any]) -> dict[Any, str]:
    """The model of each (model, data), and the data where another has the same model."""
    every = list(tasks)
    models = [task[0] for task in every]
    return {task: task[0] if models.count(task[0]) == 1 else task_name(task) for task in every}


def task_title(task: Sequence[Any], metric: str) -> str:
    better = "higher" if higher_is_better(metric) else "lower"
    return f"{task_name(task)}: {LABELS[metric]}, {better} is better"


def statements(frames: Mapping[str, pd.DataFrame]) -> Iterator[tuple[str, list[str]]]:
    """For each task its name, and in sentences: the best arm; what each optimizer changes by in each format; which
    optimizer loses less to a format; what its settings change. `frames` holds the tables of the report.
    """
    for task, table in frames["arms"].groupby(list(TASK), dropna=False, sort=False):
        names = varying(table)
        metric = table["metric"].iloc[0]
        title = task_title(task, metric)
        best = best_arm(table)
        if best is None:
            yield title, ["No run has finished with a finite value."]
            continue
        spread = f", sd {plain(best['sd'])}" if best["n"] > 1 else ""
        among = f", the best of {len(table)} arms" if len(table) > 1 else ""
        sentences = [f"Mean {plain(best['mean'])} with {arm_name(best, names)} (n = {best['n']}{spread}){among}."]
        for optimizer, rows in of_task(frames["differences"], task).groupby("optimizer", sort=False):
            sentences += _changes(str(optimizer), rows, [name for name in names if name != "optimizer"])
        for optimizer, rows in of_task(frames["contrasts"], task).groupby("optimizer", sort=False):
            sentences += _comparison(str(optimizer), rows, [name for name in names if name != "optimizer"])
        for optimizer, rows in of_task(frames["effects"], task).groupby("optimizer", sort=False):
            sentences += _settings(str(optimizer), rows)
        yield title, sentences


def of_task(frame: pd.DataFrame, task: Sequence[Any]) -> pd.DataFrame:
    """The rows of one (model, data)."""
    return frame[(frame[list(TASK)] == list(task)).all(axis=1)]


def _changes(optimizer: str, rows: pd.DataFrame, names: list[str]) -> Iterator[str]:
    """What an optimizer changes by in each format, arms without a pair included."""
    start = f"{optimizer}, against its own {BASELINE} with the same seeds: "
    if len(rows) <= SENTENCES:
        words = {"better": ": better", "worse": ": worse", "undecided": ": undecided", SAME: f": {SAME}"}
        parts = [
            f"{arm_name(row, names)} {change(row)}{words.get(verdict(row), '')}" for row in rows.to_dict("records")
        ]
        yield f"{start}{'; '.join(parts)}."
        return
    harm = -rows["difference"] if higher_is_better(rows["metric"].iloc[0]) else rows["difference"]
    furthest = ""
    if harm.notna().any():
        worst = rows.loc[harm.idxmax()]
        furthest = f" Furthest to the worse side is {arm_name(worst, names)}: {change(worst)}."
    verdicts = rows.apply(verdict, axis=1)
    yield (
        f"{start}of {len(rows)} arms, {(verdicts == 'worse').sum()} have an interval wholly on the worse side of 0, "
        f"{(verdicts == 'better').sum()} wholly on the better side, {_no_interval(rows)}.{furthest}"
    )


def _comparison(optimizer: str, rows: pd.DataFrame, names: list[str]) -> Iterator[str]:
    """Whether an optimizer loses less to each format than the reference, arms without a pair included."""
    reference = rows["reference"].iloc[0]
    settings = rows["reference_settings"].iloc[0]
    start = f"{optimizer}'s change from {BASELINE} minus {reference}'s{f' ({settings})' if settings else ''}: "
    words = {"better": f": {optimizer} loses less", "worse": f": {optimizer} loses more", "undecided": ": undecided"}
    words[SAME] = f": {SAME}"
    if len(rows) <= SENTENCES:
        parts = [
            f"{arm_name(row, names)} {change(row)}{words.get(verdict(row), '')}" for row in rows.to_dict("records")
        ]
        yield f"{start}{'; '.join(parts)}."
        return
    verdicts = rows.apply(verdict, axis=1)
    yield (
        f"{start}of {len(rows)} arms, {(verdicts == 'better').sum()} lose less and {(verdicts == 'worse').sum()} lose "
        f"more with an interval that excludes 0, {_no_interval(rows)}."
    )


def _settings(optimizer: str, rows: pd.DataFrame) -> Iterator[str]:
    """What each setting of an optimizer changes, all else equal: those whose interval excludes 0."""
    verdicts = rows.apply(verdict, axis=1)
    decided = rows[verdicts.isin(["better", "worse"])]
    named = [f"{effect_name(row)} {change(row)}" for row in decided.head(SENTENCES).to_dict("records")]
    more = f" and {len(decided) - SENTENCES} more" if len(decided) > SENTENCES else ""
    yield (
        f"{optimizer}, one setting changed and all else equal: {len(decided)} of {count(len(rows), 'change')} "
        f"{'has' if len(decided) == 1 else 'have'} an interval that excludes "
        f"0{': ' if named else ''}{'; '.join(named)}{more}."
    )
    if same := [effect_name(row) for row in rows[verdicts == SAME].to_dict("records")]:
        yield f"{optimizer} ends {SAME} after {'; '.join(same)}."


def effect_name(row: Mapping[str, Any] | pd.Series) -> str:
    """`noise_scale 0 → 0.1`."""
    return f"{short(row['factor'])} {row['reference']} → {row['level']}"


def _no_interval(rows: pd.DataFrame) -> str:
    return f"{(rows['n'] < 2).sum()} have no interval"


def varying(table: pd.DataFrame) -> list[str]:
    """The factors (columns before `metric`) that vary in a table of one task, with optimizer, and format where any
    arm has another than float32.
    """
    columns = list(table.columns[: table.columns.get_loc("metric")])
    columns = [name for name in columns if name not in (*TASK, "reference", "reference_settings")]
    lowered = "format" in columns and (table["format"] != BASELINE).any()
    shown = ("optimizer", "format") if lowered else ("optimizer",)
    return [name for name in columns if name in shown or table[name].nunique(dropna=False) > 1]


def arm_name(row: Mapping[str, Any] | pd.Series, names: Sequence[str]) -> str:
    """`lmd, mxfp6_e3m2, noise_scale 0.05`; settings that an arm does not have are left out."""
    parts = []
    for name in names:
        value = row[name]
        if not pd.isna(value):
            parts.append(text(value) if name in ALWAYS_FACTORS else f"{short(name)} {text(value)}")
    return ", ".join(parts)


def short(factor: str) -> str:
    """A factor without the part of the config that it stands in."""
    return factor.removeprefix("optimizer.").removeprefix("recipe.")


def verdict(row: Mapping[str, Any] | pd.Series) -> str:
    """What a difference says: "worse", "better", "undecided" or, where it is exactly 0 throughout, SAME; "n = 1" or "no
    pair" when it has no interval.
    """
    if row["n"] < 2:
        return "n = 1" if row["n"] else "no pair"
    every_pair = "same" not in row or row["same"] == row["runs"] - row["excluded"]
    if row["difference"] == row["low"] == row["high"] == 0 and every_pair:
        return SAME
    without_width = row["high"] - row["low"] <= 1e-9 * abs(row["difference"])  # a coarse metric, not a sure effect
    if row["low"] <= 0 <= row["high"] or without_width:
        return "undecided"
    return "better" if (row["difference"] > 0) == higher_is_better(row["metric"]) else "worse"


def change(row: Mapping[str, Any] | pd.Series) -> str:
    """`+0.0231 [−0.0308, +0.0770], n = 2`; no interval for n = 1; runs that are excluded are counted."""
    excluded = f", {count(row['excluded'], 'run')} excluded" if row["excluded"] else ""
    if not row["n"]:
        return f"no pair{excluded}"
    return f"{signed(row['difference'])}{' ' + bracket(row) if row['n'] > 1 else ''}, n = {row['n']}{excluded}"


def bracket(row: Mapping[str, Any] | pd.Series) -> str:
    return f"[{signed(row['low'])}, {signed(row['high'])}]"


def signed(value: float) -> str:
    """A difference to 4 decimals with its sign; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:+.4f}".replace("-", "−")


def value(number: float, metric: str) -> str:
    """A metric with its unit: `2.051 nats`, `97.2%`; in words for NaN."""
    if math.isnan(number):
        return "without a value"
    return f"{100 * number:.1f}%" if higher_is_better(metric) else f"{number:.3f} nats"


def plain(value: float, digits: int = 4) -> str:
    """A number to `digits` decimals, to as many significant digits where that is too long or says nothing; a dash for
    NaN.
    """
    if math.isnan(value):
        return "–"
    if value != 0 and not 10.0**-digits <= abs(value) < 1e5:
        return f"{value:.{digits}g}".replace("-", "−")
    return f"{value:.{digits}f}".replace("-", "−")


def count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
