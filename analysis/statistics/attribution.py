"""Which rounding costs what: attributions of trained runs by arm, and leave-one-in, leave-one-out runs by part.

An attribution (`lpsim attribute`) has a row for each part of a machine's rounding; here they are averaged over seeds.
In training a part is a recipe of its own, whose name says which: "mxfp4_e2m1, only fprop.weight" rounds this alone,
"mxfp4_e2m1, all but fprop.weight" everything else (experiments/grids/leave_one.py writes these names).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.statistics.tables import BASELINE, counted, interval

ONLY, ALL_BUT = ", only ", ", all but "  # between the name of a format and that of a part


def by_part(runs: pd.DataFrame, rows: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """One row an arm, recipe and part: its factors, recipe, by, part, n (runs), change with its 95% interval low to
    high where only this part is rounded, absent (what the loss has less where all but this is rounded; NaN where that
    was not measured), logits_sqnr_db (the median).

    rows: load.attribution's. The whole recipe is the part "everything".
    """
    measured = rows[rows["rounded"] != "nothing"].copy()
    measured.loc[measured["rounded"] == "all", "part"] = "everything"
    frame = runs[["signature", *factors]].merge(measured, on="signature")
    out = []
    keys = [*factors, "recipe", "by", "part"]
    for key, group in frame.groupby(keys, dropna=False, sort=False):
        alone, absent = group[group["rounded"] != "all but"], group[group["rounded"] == "all but"]
        mean, low, high = interval(alone["change"])
        out.append(
            dict(zip(keys, key, strict=True))
            | {"n": len(alone), "change": mean, "low": low, "high": high, "absent": absent["change"].mean()}
            | {"logits_sqnr_db": alone["logits_sqnr_db"].median()}
        )
    return pd.DataFrame(out, columns=[*keys, "n", "change", "low", "high", "absent", "logits_sqnr_db"])


def additivity(parts: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """One row an arm, recipe and kind of part: the sum of its parts' mean changes, that of everything, and the gap.

    parts: of `by_part`.
    """
    out = []
    for key, group in parts.groupby([*factors, "recipe"], dropna=False, sort=False):
        whole = group.loc[group["part"] == "everything", "change"]
        for by, some in group[group["part"] != "everything"].groupby("by", sort=False):
            row: dict[str, Any] = dict(zip([*factors, "recipe"], key, strict=True))
            together = float(whole.iloc[0]) if len(whole) else math.nan
            total = float(some["change"].sum())
            out.append(
                row | {"by": by, "parts": len(some), "sum": total, "everything": together, "gap": together - total}
            )
    return pd.DataFrame(out, columns=[*factors, "recipe", "by", "parts", "sum", "everything", "gap"])


def in_training(runs: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """One row an arm, format and part that runs were trained with alone or without: its factors but the format, format,
    part, n, alone with low to high (only this rounded − float32, paired by seed), n_absent, absent with absent_low to
    absent_high (everything rounded − all but this). The part "everything" has everything rounded − float32.

    Of runs that finished with a number. A part stands once, also where it was only left in or only left out; then the
    other is NaN.
    """
    ended = runs[counted(runs)]
    others = [name for name in factors if name != "format"]
    names = [re.split(f"{ONLY}|{ALL_BUT}", str(name)) for name in ended["format"]]
    wholes = list(dict.fromkeys(name[0] for name in names if len(name) == 2))
    out = []
    for key, group in ended.groupby(others, dropna=False, sort=False) if others else [((), ended)]:
        values = {name: rows.groupby("seed")["primary_metric"].mean() for name, rows in group.groupby("format")}
        for whole in wholes:
            found = [re.split(f"{ONLY}|{ALL_BUT}", str(name)) for name in dict.fromkeys(group["format"])]
            parts = dict.fromkeys(name[1] for name in found if len(name) == 2 and name[0] == whole)
            for part in ("everything", *parts) if parts else ():
                alone = _paired(values, whole if part == "everything" else whole + ONLY + part, BASELINE)
                absent = _paired(values, whole, whole + ALL_BUT + part)
                out.append(
                    dict(zip(others, key, strict=True))
                    | {"format": whole, "part": part}
                    | dict(zip(("n", "alone", "low", "high"), alone, strict=True))
                    | dict(zip(("n_absent", "absent", "absent_low", "absent_high"), absent, strict=True))
                )
    columns = ["n", "alone", "low", "high", "n_absent", "absent", "absent_low", "absent_high"]
    return pd.DataFrame(out, columns=[*others, "format", "part", *columns])


def _paired(values: dict[str, pd.Series], one: str, other: str) -> tuple[int, float, float, float]:
    """(n, mean, low, high) of one − other over the seeds that both have."""
    if one not in values or other not in values:
        return 0, math.nan, math.nan, math.nan
    differences = (values[one] - values[other]).dropna()
    return len(differences), *interval(differences)
