"""The folded section that puts all runs of a task into one model (`statistics.mixed`), a check of the paired tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.page import html as page
from analysis.page import summary
from analysis.page.html import Column
from analysis.page.summary import count, plain, signed


def section(rows: pd.DataFrame) -> str:
    """What the model is for, in its heading; the effects, and why one has no number, inside."""
    records = rows.to_dict("records")
    columns = [
        Column("effect", [_effect(row) for row in records], wrap=True),
        Column("estimate", [signed(row["estimate"]) for row in records], number=True),
        Column("standard error", [plain(row["se"]) for row in records], number=True),
        Column("95% interval", [_bracket(row) for row in records], number=True),
        Column("p", [plain(row["p"], 3) for row in records], number=True),
        Column("p, corrected", [plain(row["p_holm"], 3) for row in records], number=True),
        Column("reads as", [_verdict(row) for row in records], wrap=True),
    ]
    factors = list(rows["factor"])
    new = [index > 0 and name != factors[index - 1] for index, name in enumerate(factors)]
    return page.folded(
        "All runs of this task in one model, with every factor and the seed: a check of the paired tables above.",
        page.paragraph(_basis(rows), "note") + page.table(columns, new=new),
    )


def _basis(rows: pd.DataFrame) -> str:
    """What the numbers rest on."""
    first = rows.iloc[0]
    fitted = rows[rows["not_fitted"] == ""]
    excluded = f" ({first['excluded']} excluded, {first['diverged']} of them diverged)" if first["excluded"] else ""
    start = f"{count(first['n'], 'run')}{excluded}, {count(first['seeds'], 'seed')}"
    found = (
        f"; seeds make {fitted['seed_share'].iloc[0]:.0%} of the variance that the effects leave; "
        f"intervals are Student's with {fitted['df'].iloc[0]:.0f} degrees of freedom"
        if len(fitted)
        else ""
    )
    return (
        f"{start}{found}. A linear mixed model (REML) with a random intercept by seed. It takes all arms as equally "
        "spread, a seed to do the same to all of them, and no factors but optimizer and format to interact. The "
        "paired tables take none of this: where the two disagree, trust them."
    )


def _effect(row: Mapping[str, Any]) -> str:
    """`format mxfp4_e2m1 against float32, in adamw`."""
    name = summary.short(row["factor"])
    levels = f" {row['level']} against {row['against']}" if row["level"] else ""
    return f"{name}{levels}" + (f", in {row['within']}" if row["within"] else "")


def _bracket(row: Mapping[str, Any]) -> str:
    return "–" if row["not_fitted"] else summary.bracket(row)


def _verdict(row: Mapping[str, Any]) -> str:
    if row["not_fitted"]:
        return f"not fitted: {row['not_fitted']}"
    return summary.verdict({**row, "difference": row["estimate"]})
