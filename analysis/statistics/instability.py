"""Signs of instability: spikes and their recovery, growth of weights and of attention logits, swallowed updates,
oscillating weights, gradients that turn away. By run, and at an arm's best rate, its frontier, and just above.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from analysis.statistics.stability import recoveries, series, weight_growth

LOGITS = ".scores"  # ends the sites of attention's scaled and masked logits
WEIGHTS = "fprop.rhs"  # the role of weights in a product
FROM_TELEMETRY = ("largest_logit", "logit_growth", "swallowed", "oscillated", "cosine")
SIGNS = ("spikes", "unrecovered", "recovery", "weight_growth", *FROM_TELEMETRY)
PLACES = {"best": "best", "frontier": "frontier", "breaks": "just above"}


def by_run(metrics: pd.DataFrame, telemetry: pd.DataFrame, cosines: pd.DataFrame) -> pd.DataFrame:
    """One row a run that has metrics: signature, spikes, unrecovered, recovery, weight_growth, largest_logit,
    logit_growth, swallowed, oscillated, cosine.

    unrecovered: how many of the spikes the loss never came back from; recovery: the median steps that the others took.
    largest_logit: the largest magnitude of an attention logit, scaled and masked, in any sampled step; logit_growth:
    that of the last sampled step over that of the first. swallowed, oscillated, cosine: medians over the sampled steps
    and sites (parameters) of what telemetry says. What needs telemetry is NaN without.
    """
    rows = []
    for signature, group in metrics.groupby("signature", sort=False):
        loss, norm = series(group, "train", "loss"), series(group, "weights", "norm")
        back = recoveries(loss["step"].to_numpy(np.float64), loss["value"].to_numpy())
        growth = weight_growth(norm["step"].to_numpy(), norm["value"].to_numpy())
        recovery = float(np.nanmedian(back)) if np.isfinite(back).any() else math.nan
        rows.append((signature, back.size, int(np.isnan(back).sum()), recovery, growth))
    frame = pd.DataFrame(rows, columns=["signature", *SIGNS[:4]])
    frame = frame.astype({"signature": "str", "spikes": "int64", "unrecovered": "int64"})
    for part in (_logits(telemetry), _weights(telemetry), cosines.reindex(columns=["signature", "cosine"])):
        medians = part.groupby("signature", sort=False).median() if len(part) else part.set_index("signature")
        frame = frame.merge(medians, left_on="signature", right_index=True, how="left", validate="one_to_one")
    return frame.astype(dict.fromkeys(FROM_TELEMETRY, "float64"))


def by_place(frontier_runs: pd.DataFrame, per_run: pd.DataFrame) -> pd.DataFrame:
    """One row an arm and place ("best", "frontier", "just above"): arm, place, rate, runs, diverged, and the means over
    the runs of what `by_run` says.

    Diverged runs count, up to where they ended. A frontier that is the best rate has one row, "best".
    """
    rows = []
    joined = frontier_runs.merge(per_run, on="signature", how="left", validate="many_to_one")
    for arm, mine in joined.groupby("arm", sort=False):
        for place, name in PLACES.items():
            group = mine[mine["place"].map(lambda text, place=place: text.split(", ")[0] == place)]
            if len(group):
                rows.append(
                    {"arm": arm, "place": name, "rate": group["rate"].iloc[0], "runs": len(group)}
                    | {"diverged": int((group["status"] == "diverged").sum())}
                    | {sign: group[sign].mean() for sign in SIGNS}
                )
    return pd.DataFrame(rows, columns=["arm", "place", "rate", "runs", "diverged", *SIGNS])


def _logits(telemetry: pd.DataFrame) -> pd.DataFrame:
    """One row a run: signature, largest_logit, logit_growth."""
    columns = ["signature", "largest_logit", "logit_growth"]
    rows = telemetry.reindex(columns=["signature", "step", "site", "role", "amax"]).dropna(subset=["amax"])
    rows = rows[rows["site"].str.endswith(LOGITS) & (rows["role"] == "vector")] if len(rows) else rows
    largest = rows.groupby(["signature", "step"], sort=True)["amax"].max().reset_index()
    out = []
    for signature, mine in largest.groupby("signature", sort=False):
        first, last = mine["amax"].iloc[0], mine["amax"].iloc[-1]
        out.append((signature, mine["amax"].max(), last / first if first > 0 else math.nan))
    return pd.DataFrame(out, columns=columns)


def _weights(telemetry: pd.DataFrame) -> pd.DataFrame:
    """signature, swallowed and oscillated of the rows that are about weights."""
    rows = telemetry.reindex(columns=["signature", "role", "swallowed", "oscillated"])
    return rows.loc[rows["role"] == WEIGHTS, ["signature", "swallowed", "oscillated"]]
