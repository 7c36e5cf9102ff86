"""Claims of a grid, read off its runs: a prediction a row, with its interval and what it says, and the verdicts.

The claims stand in grid.json, as `experiments.grids.claims` wrote them before the runs. Statistics are SciPy's and
statsmodels'; both are imported when there are claims.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics.power import seeds_to_decide
from analysis.statistics.stability import wilson_interval
from analysis.statistics.tables import CONFIDENCE, TASK, counted, interval

TRUE, FALSE, UNDECIDED = "true", "false", "undecided"
VERDICTS = {TRUE: "supported", FALSE: "refuted", UNDECIDED: "undecided"}
PREDICTIONS = ("claim", *TASK, "prediction", "metric", "below", "runs", "n", "missing", "mean", "low", "high", "sd")
TESTS = ("p", "p_holm", "verdict", "seeds_needed")
STEADY = "diverged"  # the metric of the prediction that no run diverges: mean is their share, low and high Wilson's


def predictions(claims: Sequence[Mapping[str, Any]], runs: pd.DataFrame, per_run: pd.DataFrame) -> pd.DataFrame:
    """One row a prediction: claim, model, data, prediction, metric, below, runs, n, missing, mean, low, high, sd, p,
    p_holm, verdict, seeds_needed.

    A contrast is measured on the n seeds of which every run finished with a finite metric; `missing` seeds are left
    out. mean and sd are over seeds, low and high the 95% t interval. p: two-sided t test of the mean against `below`;
    p_holm: corrected for all contrasts of a task (Holm 1979). The prediction that the mean lies below is true or false
    by its side when p_holm < 0.05, else undecided, as it is when it would be true but a run diverged. seeds_needed:
    with how many seeds the corrected test would decide with a chance of 80%, were mean and sd the true ones (0 where it
    is decided, NaN where nothing can be said). A row of the metric `diverged` says how many of `runs` did: true when
    none did, false when one did, undecided while runs are missing.

    per_run: stability.by_run. Columns that claims do not need are not looked at.
    """
    values = _values(runs, per_run)
    status = runs.set_index("signature")["status"]
    tasks = runs.set_index("signature")[list(TASK)]
    rows = [row for claim in claims for row in _rows(claim, values, status, tasks)]
    table = pd.DataFrame(rows, columns=[*PREDICTIONS, "p", "verdict"])
    table["p_holm"] = math.nan
    for _, group in table[table["p"].notna()].groupby(list(TASK), dropna=False):
        table.loc[group.index, "p_holm"] = holm(group["p"].to_numpy())
    needed = []
    for index, row in table.iterrows():
        if row["metric"] != STEADY:
            table.loc[index, "verdict"] = _verdict(row)
        same = (table[list(TASK)] == row[list(TASK)]).all(axis=1) & table["p"].notna()
        needed.append(_seeds_needed(row, table.loc[index, "verdict"], int(same.sum())))
    table["seeds_needed"] = np.asarray(needed, dtype=np.float64)
    return table[[*PREDICTIONS, *TESTS]]


def verdicts(claims: Sequence[Mapping[str, Any]], predictions: pd.DataFrame) -> pd.DataFrame:
    """One row a claim: claim, statement, verdict ("supported", "refuted" or "undecided"), predictions, true, false.

    Supported: every prediction is true. Refuted: one is false.
    """
    rows = []
    for claim in claims:
        found = list(predictions.loc[predictions["claim"] == claim["name"], "verdict"])
        outcome = FALSE if FALSE in found else TRUE if found and set(found) == {TRUE} else UNDECIDED
        rows.append(
            {"claim": claim["name"], "statement": claim["statement"], "verdict": VERDICTS[outcome]}
            | {"predictions": len(found), "true": found.count(TRUE), "false": found.count(FALSE)}
        )
    return pd.DataFrame(rows, columns=["claim", "statement", "verdict", "predictions", "true", "false"])


def _values(runs: pd.DataFrame, per_run: pd.DataFrame) -> pd.DataFrame:
    """The metrics that a contrast may be about, by signature; NaN for a run that is not counted."""
    frame = runs.set_index("signature")
    finals = {name: frame.get(f"final.{name}") for name in ("validation_loss", "validation_accuracy")}
    values = pd.DataFrame({name: column for name, column in finals.items() if column is not None}, index=frame.index)
    values["weight_growth"] = per_run.set_index("signature")["weight_growth"].reindex(values.index)
    values.loc[~counted(runs).to_numpy()] = math.nan
    return values


def _rows(
    claim: Mapping[str, Any], values: pd.DataFrame, status: pd.Series, tasks: pd.DataFrame
) -> Iterator[dict[str, Any]]:
    from scipy.stats import ttest_1samp

    for contrast in claim["contrasts"]:
        terms, metric, below = contrast["terms"], contrast["metric"], contrast["below"]
        by_seed = [
            sum(term["weight"] * _value(values, term["runs"].get(seed), metric) for term in terms)
            for seed in dict.fromkeys(seed for term in terms for seed in term["runs"])
        ]
        measured = np.asarray([value for value in by_seed if math.isfinite(value)])
        signatures = [signature for term in terms for signature in term["runs"].values()]
        mean, low, high = interval(measured)
        sd = float(measured.std(ddof=1)) if measured.size > 1 else math.nan
        yield (
            _common(claim, signatures, tasks)
            | {"prediction": contrast["name"], "metric": metric, "below": below, "runs": len(set(signatures))}
            | {"n": measured.size, "missing": len(by_seed) - measured.size, "mean": mean, "low": low, "high": high}
            | {"sd": sd, "p": float(ttest_1samp(measured, below).pvalue) if sd > 0 else math.nan}
            | {"verdict": "diverged" if (status.reindex(signatures) == "diverged").any() else ""}
        )
    if claim["steady"]:
        found = status.reindex(claim["steady"])
        diverged, decided = int((found == "diverged").sum()), int(found.isin(["finished", "diverged"]).sum())
        low, high = wilson_interval(diverged, decided)
        outcome = FALSE if diverged else TRUE if decided == len(found) else UNDECIDED
        yield (
            _common(claim, claim["steady"], tasks)
            | {"prediction": "no run diverges", "metric": STEADY, "below": math.nan, "runs": len(found), "n": decided}
            | {"missing": len(found) - decided, "mean": diverged / decided if decided else math.nan}
            | {"low": low, "high": high, "sd": math.nan, "p": math.nan, "verdict": outcome}
        )


def _common(claim: Mapping[str, Any], signatures: Sequence[str], tasks: pd.DataFrame) -> dict[str, Any]:
    task = tasks.reindex(signatures).dropna()
    return {"claim": claim["name"]} | {name: task[name].iloc[0] if len(task) else None for name in TASK}


def _value(values: pd.DataFrame, signature: str | None, metric: str) -> float:
    known = signature in values.index and metric in values
    return float(values.at[signature, metric]) if known else math.nan


def _verdict(row: pd.Series) -> str:
    if not row["p_holm"] < 1 - CONFIDENCE:
        return UNDECIDED
    if row["mean"] > row["below"]:
        return FALSE
    return UNDECIDED if row["verdict"] == "diverged" else TRUE


def holm(p: np.ndarray) -> np.ndarray:
    from statsmodels.stats.multitest import multipletests

    return np.asarray(multipletests(p, method="holm")[1])


def _seeds_needed(row: pd.Series, verdict: str, tests: int) -> float:
    """See `predictions`; the level is that of the strictest of the corrected tests."""
    if verdict != UNDECIDED:
        return 0.0
    return seeds_to_decide(row["mean"] - row["below"], row["sd"], (1 - CONFIDENCE) / max(tests, 1))
