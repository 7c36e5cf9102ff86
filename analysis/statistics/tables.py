"""Tables of a grid: n, mean and sd of every arm, and paired differences with their intervals.

An arm is a combination of the grid's factors; its runs differ in nothing but seeds. Intervals are two-sided 95% Student
t intervals of the mean over seeds. Runs that did not finish, or that have no finite primary metric, cannot enter a
mean; every table counts them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from analysis.load import config_columns, own_metrics

CONFIDENCE = 0.95
BASELINE = "float32"  # the format that the others are compared to
REFERENCE_OPTIMIZER = "adamw"  # the optimizer that the others are compared to, where the grid has it
ALWAYS_FACTORS = ("model", "data", "optimizer", "format")
TASK = ("model", "data")  # runs are compared within a task only: another task has another metric
MACHINE = "recipe."  # factors that belong to the simulated machine, as the format does
SETTING = "optimizer."  # factors that belong to the optimizer


def replicates(runs: pd.DataFrame) -> list[str]:
    """The columns in which replicates of an arm differ: `seed`, and every other seed of the config that varies
    (`data.seed`, ...).
    """
    seeds = [
        name for name in config_columns(runs) if name.split(".")[-1] == "seed" and runs[name].nunique(dropna=False) > 1
    ]
    return list(dict.fromkeys(["seed", *seeds]))


def factors(runs: pd.DataFrame) -> list[str]:
    """The columns that tell the arms of a grid apart: model, data, optimizer and format, then every config column that
    varies among runs which agree in all factors before it.

    So a column that follows from the others (a learning rate chosen for each optimizer, the definition of a format, a
    warm-up that is a share of the steps) is no factor, and one that does not (two definitions under one format name)
    is. Seeds are replicates.
    """
    chosen = list(ALWAYS_FACTORS)
    columns = [name for name in config_columns(runs) if name not in chosen and name.split(".")[-1] != "seed"]
    # a setting of the whole run before one of its parts; of which grid a run is, only where nothing else tells
    for name in sorted(columns, key=lambda name: (name == "grid", "." in name)):
        if (
            runs[name].nunique(dropna=False) > 1
            and runs.groupby(chosen, dropna=False)[name].nunique(dropna=False).max() > 1
        ):
            chosen.append(name)
    return chosen


def derived(runs: pd.DataFrame) -> list[str]:
    """The config columns that vary but follow from the factors."""
    known = {*factors(runs), *replicates(runs), "seed"}
    return [name for name in config_columns(runs) if name not in known and runs[name].nunique(dropna=False) > 1]


def counted(runs: pd.DataFrame) -> pd.Series:
    """True for the runs that enter a mean: finished, with a finite primary metric."""
    return (runs["status"] == "finished") & np.isfinite(runs["primary_metric"])


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its 95% t interval; low and high are NaN for n < 2, all three for n = 0."""
    x = np.asarray(list(values), dtype=np.float64)  # (n,)
    if x.size == 0:
        return math.nan, math.nan, math.nan
    mean = float(x.mean())
    if x.size == 1:
        return mean, math.nan, math.nan
    half = float(stdtrit(x.size - 1, (1 + CONFIDENCE) / 2) * x.std(ddof=1) / math.sqrt(x.size))
    return mean, mean - half, mean + half


def arms(runs: pd.DataFrame) -> pd.DataFrame:
    """One row an arm: its factors, metric, runs, n, mean, low, high, sd, diverged, failed, unfinished, excluded, and
    the mean of each metric of the author's own, `final.NAME`, over the same n runs.

    `n` runs enter mean and sd, `excluded` = runs − n do not: the diverged, failed and unfinished ones, and finished
    ones whose metric is not finite. sd has n − 1 in its denominator and is NaN for n < 2.
    """
    columns, own = factors(runs), own_metrics(runs)
    rows = []
    for key, group in runs.groupby(columns, dropna=False, sort=False):
        values = group.loc[counted(group), "primary_metric"]
        mean, low, high = interval(values)
        rows.append(
            dict(zip(columns, key, strict=True))
            | {"metric": group["metric"].iloc[0], "runs": len(group), "n": len(values)}
            | {"mean": mean, "low": low, "high": high, "sd": float(values.std(ddof=1)) if len(values) > 1 else math.nan}
            | {status: int((group["status"] == status).sum()) for status in ("diverged", "failed", "unfinished")}
            | {"excluded": len(group) - len(values)}
            | {name: float(group.loc[counted(group), name].mean(skipna=False)) for name in own}
        )
    statistics = ["metric", "runs", "n", "mean", "low", "high", "sd", "diverged", "failed", "unfinished", "excluded"]
    return pd.DataFrame(rows, columns=[*columns, *statistics, *own])


def pairs(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a run in another format than float32: its factors and seeds, its primary metric, its float32 partner's,
    their difference.

    The partner has the same seeds and the same factors, the machine's (`format`, `recipe.*`) apart. Where the grid has
    several float32 machines for an arm, the partner is the one that agrees in all `recipe.*`; when none does, the run
    has no partner. The difference is NaN when there is no partner, or when one of the two is not counted.
    """
    columns, seeds = factors(runs), replicates(runs)
    machine = [name for name in columns if name.startswith(MACHINE)]
    rest = [name for name in columns if name != "format" and name not in machine]
    ours = runs[[*columns, *seeds, "metric", "primary_metric"]].copy()
    ours.loc[~counted(runs), "primary_metric"] = math.nan
    baseline = ours[ours["format"] == BASELINE].rename(columns={"primary_metric": "baseline"})
    low = ours[ours["format"] != BASELINE]
    exact = low.merge(baseline[[*rest, *machine, *seeds, "baseline"]], on=[*rest, *machine, *seeds], how="left")
    only = baseline.drop_duplicates([*rest, *seeds], keep=False)[[*rest, *seeds, "baseline"]]
    lone = low.merge(only, on=[*rest, *seeds], how="left")
    exact["baseline"] = exact["baseline"].fillna(lone["baseline"])
    exact["difference"] = exact["primary_metric"] - exact["baseline"]
    return exact


def differences(runs: pd.DataFrame) -> pd.DataFrame:
    """One row an arm in another format than float32: factors, metric, runs, n, difference, low, high, excluded.

    `difference` is the mean of format − float32 over the n seeds that have both (`pairs`), in the unit of the metric;
    low and high are NaN for n < 2. `excluded` = runs − n have no counted partner or are not counted themselves.
    """
    columns = factors(runs)
    return _means(pairs(runs), columns, "difference")


def against_first(
    runs: pd.DataFrame, value: str = "primary_metric", per_run: pd.DataFrame | None = None
) -> pd.DataFrame:
    """One row an arm, the first of its task included: factors, metric, runs, n, mean, difference, low, high, excluded.

    The first arm is the one whose run the grid lists first for the task: a grid of variations lists its base there.
    `difference` is the mean over the n seeds that have both of (`value` of the arm − `value` of the first arm), `mean`
    that of `value` over the same runs; `value` is a column of `runs`, or of `per_run` by signature. `excluded` = runs −
    n are not counted themselves or have no counted partner.
    """
    columns, seeds = factors(runs), replicates(runs)
    ours = runs if per_run is None else runs.merge(per_run, on="signature", how="left", validate="one_to_one")
    ours = ours.assign(value=ours[value].where(counted(ours)))
    if per_run is not None:
        ours["metric"] = value
    parts = []
    for _, group in ours.groupby(list(TASK), dropna=False, sort=False):
        first = group[columns].apply(lambda row, base=group.iloc[0]: all(map(_equal, row, base[columns])), axis=1)
        base = group.loc[first, [*seeds, "value"]].rename(columns={"value": "base"})
        parts.append(group.merge(base, on=seeds, how="left", validate="many_to_one"))
    together = pd.concat(parts) if parts else ours.assign(base=math.nan)
    together["difference"] = together["value"] - together["base"]
    table = _means(together, columns, "difference")
    paired = together[together["difference"].notna()].groupby(columns, dropna=False, sort=False)["value"].mean()
    table = table.merge(paired.rename("mean").reset_index(), on=columns, how="left", validate="one_to_one")
    return table[[*columns, "metric", "runs", "n", "mean", "difference", "low", "high", "excluded"]]


def contrasts(runs: pd.DataFrame) -> pd.DataFrame:
    """Does one optimizer lose less to a format than another? One row an arm of the other optimizers in another format
    than float32: factors, metric, reference, reference_settings, runs, n, difference, low, high, excluded.

    `difference` is the mean over seeds of (format − float32 of this optimizer) − (format − float32 of the reference
    optimizer). The reference is AdamW where the grid has it, else the first optimizer listed; where it has several
    settings, the one that is best in float32 (chosen on these very runs, which flatters its float32 arm). Empty when
    the task has one optimizer.
    """
    return _against_reference(runs, pairs(runs))


def optimizers(runs: pd.DataFrame) -> pd.DataFrame:
    """Does one optimizer end better than another in the same format, float32 included? One row an arm of the other
    optimizers, columns as of `contrasts`, of tasks in which formats vary.

    `difference` is the mean over seeds of (metric of this optimizer − metric of the reference), which is chosen as
    `contrasts` does; where that chose among settings, its float32 arm is flattered.
    """
    columns, seeds = factors(runs), replicates(runs)
    rows = runs[[*columns, *seeds, "metric"]].assign(difference=runs["primary_metric"].where(counted(runs)))
    lowered = rows.groupby(list(TASK), dropna=False)["format"].transform("nunique") > 1
    return _against_reference(runs, rows[lowered])


def _against_reference(runs: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of the column `difference` of `rows`, less that of the reference optimizer; see `contrasts`."""
    columns, seeds = factors(runs), replicates(runs)
    settings = [name for name in columns if name.startswith(SETTING)]
    shared = [name for name in columns if name != "optimizer" and name not in settings]
    table = arms(runs)
    parts = []
    for task, group in rows.groupby(list(TASK), dropna=False, sort=False):
        of_task = table[(table[list(TASK)] == list(task)).all(axis=1)]
        names = list(dict.fromkeys(of_task["optimizer"]))
        reference = REFERENCE_OPTIMIZER if REFERENCE_OPTIMIZER in names else names[0]
        best = best_arm(of_task[(of_task["optimizer"] == reference) & (of_task["format"] == BASELINE)])
        theirs = group[group["optimizer"] == reference]
        if best is None or group["optimizer"].nunique() < 2:
            continue
        for name in settings:
            theirs = theirs[_same(theirs[name], best[name])]
        theirs = theirs[[*shared, *seeds, "difference"]].rename(columns={"difference": "reference_difference"})
        part = group[group["optimizer"] != reference].merge(theirs, on=[*shared, *seeds], how="left")
        part["difference"] -= part.pop("reference_difference")
        part["reference"] = reference
        part["reference_settings"] = ", ".join(
            f"{name.removeprefix(SETTING)} {text(best[name])}" for name in settings if pd.notna(best[name])
        )
        parts.append(part)
    together = pd.concat(parts) if parts else rows.iloc[:0].assign(reference="", reference_settings="")
    return _means(together, [*columns, "reference", "reference_settings"], "difference")


def effects(runs: pd.DataFrame) -> pd.DataFrame:
    """What each setting does, all else equal. One row a level of a factor beyond model, data, optimizer and format:
    model, data, optimizer, factor, level, reference, metric, runs, n, difference, low, high, excluded, same.

    A setting that an optimizer does not have has no level there; one that is None has the level "none" (`load.runs`).
    `reference` is the level that the grid lists first for this task and optimizer. A run at `level` is paired with the
    run at `reference` that agrees in every other factor and in the seeds; the differences are averaged within a seed
    first, because arms of one seed are not independent, so n is the number of seeds. `excluded` runs have no counted
    partner or are not counted themselves; of the others `same` differ by exactly 0.
    """
    columns, seeds = factors(runs), replicates(runs)
    group_columns = [*TASK, "optimizer"]
    rows = []
    kept = runs.assign(primary_metric=runs["primary_metric"].where(counted(runs)))
    for key, group in kept.groupby(group_columns, dropna=False, sort=False):
        for name in [name for name in columns if name not in ALWAYS_FACTORS]:
            levels = list(dict.fromkeys(group[name].dropna()))
            keys = [*(other for other in columns if other != name), *seeds]
            partner = group.loc[group[name] == levels[0], [*keys, "primary_metric"]] if levels else None
            for level in levels[1:]:
                both = group[group[name] == level].merge(partner, on=keys, how="left", suffixes=("", "_reference"))
                change = both["primary_metric"] - both["primary_metric_reference"]
                by_seed = change.groupby([both[seed] for seed in seeds]).mean().dropna()
                mean, low, high = interval(by_seed)
                rows.append(
                    dict(zip(group_columns, key, strict=True))
                    | {
                        "factor": name,
                        "level": text(level),
                        "reference": text(levels[0]),
                        "metric": group["metric"].iloc[0],
                    }
                    | {"runs": len(both), "n": len(by_seed), "difference": mean, "low": low, "high": high}
                    | {"excluded": int(change.isna().sum()), "same": int((change == 0).sum())}
                )
    statistics = [
        "factor",
        "level",
        "reference",
        "metric",
        "runs",
        "n",
        "difference",
        "low",
        "high",
        "excluded",
        "same",
    ]
    return pd.DataFrame(rows, columns=[*group_columns, *statistics])


def text(level: object) -> str:
    """A level as a label: a float to 6 digits, a missing one as a dash, a long text (a format's definition) as its
    start and a hash.
    """
    if isinstance(level, float):
        return "–" if math.isnan(level) else f"{level:.6g}"
    whole = str(level)
    return whole if len(whole) <= 40 else f"{whole[:24]}… {hashlib.sha256(whole.encode()).hexdigest()[:6]}"


def higher_is_better(metric: str) -> bool:
    return metric == "validation_accuracy"


def best_arm(table: pd.DataFrame) -> pd.Series | None:
    """The row of `arms` with the best mean; arms with excluded runs come after all complete ones. None when no arm has
    a mean.
    """
    measured = table[table["mean"].notna()]
    if measured.empty:
        return None
    badness = -measured["mean"] if higher_is_better(measured["metric"].iloc[0]) else measured["mean"]
    order = pd.DataFrame({"incomplete": measured["excluded"] > 0, "badness": badness}).sort_values(
        ["incomplete", "badness"], kind="stable"
    )
    return measured.loc[order.index[0]]


def _same(column: pd.Series, value: object) -> pd.Series:
    return column.isna() if pd.isna(value) else column == value


def _equal(left: object, right: object) -> bool:
    return bool(left == right) or (pd.isna(left) and pd.isna(right))


def _means(rows: pd.DataFrame, columns: list[str], value: str) -> pd.DataFrame:
    out = []
    for key, group in rows.groupby(columns, dropna=False, sort=False):
        values = group.loc[group[value].notna(), value]
        mean, low, high = interval(values)
        out.append(
            dict(zip(columns, key, strict=True))
            | {"metric": group["metric"].iloc[0], "runs": len(group), "n": len(values)}
            | {value: mean, "low": low, "high": high, "excluded": len(group) - len(values)}
        )
    return pd.DataFrame(out, columns=[*columns, "metric", "runs", "n", value, "low", "high", "excluded"])
