"""What the comparisons become if a diverged run counts as the worst: no arm looks better for losing one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from analysis.statistics.tables import (
    TASK,
    against_first,
    contrasts,
    counted,
    differences,
    effects,
    factors,
    higher_is_better,
)

COMPARISONS: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "difference": differences,
    "contrast": contrasts,
    "effect": effects,
    "against_first": against_first,
}
MEASURED = ("n", "difference", "low", "high")


def worst_case(runs: pd.DataFrame) -> pd.DataFrame:
    """`runs` in which every diverged run, and every finished one without a finite metric, has finished with the worst
    primary metric of any counted run of its task. Tasks without a counted run, failed and unfinished runs stay.
    """
    out, ok = runs.copy(), counted(runs)
    lost = (runs["status"] == "diverged") | ((runs["status"] == "finished") & ~ok)
    for _, group in runs.groupby(list(TASK), dropna=False, sort=False):
        values = group.loc[ok[group.index], "primary_metric"]
        if len(values):
            worst = values.min() if higher_is_better(group["metric"].iloc[0]) else values.max()
            here = group.index[lost[group.index]]
            out.loc[here, "primary_metric"] = worst
            out.loc[here, "status"] = "finished"
    return out


def sensitivity(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a comparison of a task in which a run diverged: comparison (difference, contrast, effect or
    against_first, the table that has it), the columns that name it there, metric, n, difference, low, high, and the
    same of `worst_case`: worst_n, worst_difference, worst_low, worst_high.

    A diverged run is never on the better side of its partner there. The first arm is compared with where no format is.
    """
    names = [*factors(runs), "factor", "level", "reference"]
    columns = ["comparison", *names, "metric", *MEASURED, *(f"worst_{name}" for name in MEASURED)]
    replaced = worst_case(runs)
    changed = runs.loc[(replaced["status"] != runs["status"]) | _filled(runs, replaced), list(TASK)]
    tasks = set(changed.itertuples(index=False, name=None))
    rows, compared = [], set()
    for comparison, table in COMPARISONS.items() if tasks else ():
        measured = table(runs)
        keys = [name for name in names if name in measured]  # of no runs it would have other factors
        then = {_key(row, keys): row for row in table(replaced).to_dict("records")}
        for row in measured.to_dict("records"):
            task = tuple(row[name] for name in TASK)
            if comparison == "difference":
                compared.add(task)
            if task in tasks and not (comparison == "against_first" and task in compared) and _key(row, keys) in then:
                worst = then[_key(row, keys)]
                rows.append(
                    {"comparison": comparison, **{name: row[name] for name in [*keys, "metric", *MEASURED]}}
                    | {f"worst_{name}": worst[name] for name in MEASURED}
                )
    return pd.DataFrame(rows, columns=columns)


def _filled(runs: pd.DataFrame, replaced: pd.DataFrame) -> pd.Series:
    return np.isfinite(replaced["primary_metric"]) & ~np.isfinite(runs["primary_metric"])


def _key(row: dict[str, object], keys: list[str]) -> tuple[str, ...]:
    return tuple(repr(row[name]) for name in keys)
