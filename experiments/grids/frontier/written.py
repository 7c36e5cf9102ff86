"""What is kept of frontiers: the table of arms, the table of runs, and the document that the analysis reads."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from experiments.grids.frontier.judge import TINY, Found, Trial
from experiments.grids.frontier.search import Arm, Frontier

VERSION = 1  # of the document
BRACKETED, OPEN, NONE = "bracketed", "open", "none"


def table(sought: Frontier, found: Sequence[Found]) -> pd.DataFrame:
    """One row an arm: arm, model, data, optimizer, format, rounding, noise; low, high (the bounds) and rates, how many
    were tried; status, frontier, breaks; best, best_loss, best_edge; frontier_loss, share; diverged_above, worse_above,
    excess_above, broke; monotone, contradicting; margin, required_share, resolution, seeds.

    status: "bracketed"; "open" where the largest rate tried holds too, so that the frontier lies beyond it; "none"
    where every rate breaks. Losses are means over seeds, in nats. share: of the seeds that hold at the frontier. The
    `_above` columns are about the rate that breaks: how many seeds diverge, how many finish and end too high, and by
    how much the worst of these; `broke` says so in words. best_edge: "lower" or "upper" where the best rate is a bound:
    a better one may lie beyond. monotone: false where a trial contradicts that what has broken stays broken.
    """
    return pd.DataFrame([_row(sought, arm, each) for arm, each in zip(sought.arms, found, strict=True)])


def runs(sought: Frontier, found: Sequence[Found]) -> pd.DataFrame:
    """One row a run: arm, rate, seed, signature, status, loss, excess (over the same seed at the best rate), holds (the
    seed), rate_holds, place ("best", "frontier", "breaks", both "best" and "frontier" as "best, frontier", or empty).
    """
    rows = []
    for arm, each in zip(sought.arms, found, strict=True):
        for trial in each.trials:
            excess = trial.excess(each.best) if each.best else [math.nan] * len(trial.outcomes)
            columns = zip(trial.outcomes, trial.losses, excess, each.holding(trial), strict=True)
            for outcome, loss, worse, holds in columns:
                rows.append(
                    {"arm": arm.name, "rate": trial.rate, "seed": outcome.config.seed, "signature": outcome.signature}
                    | {"status": "diverged" if math.isinf(loss) else "finished"}
                    | {"loss": _finite(loss), "excess": _finite(worse), "holds": holds}
                    | {"rate_holds": each.holds(trial), "place": _place(each, trial)}
                )
    return pd.DataFrame(rows)


def document(sought: Frontier, found: Sequence[Found], grid: str) -> dict[str, Any]:
    """Both tables as JSON, a missing number as null: {"version", "grid", "arms": [...], "runs": [...]}."""
    return {
        "version": VERSION,
        "grid": grid,
        "arms": _records(table(sought, found)),
        "runs": _records(runs(sought, found)),
    }


def _row(sought: Frontier, arm: Arm, found: Found) -> dict[str, Any]:
    best, frontier, breaks = found.best, found.frontier, found.breaks
    excess = breaks.excess(best) if breaks is not None and best is not None else []
    worse = [each for each in excess if sought.margin + TINY < each < math.inf]
    diverged = breaks.diverged if breaks is not None else 0
    ends = {found.trials[0].rate: "lower", found.trials[-1].rate: "upper"}
    holding = found.holding(frontier) if frontier is not None else []
    return {
        "arm": arm.name,
        "model": arm.config.model.name,
        "data": arm.config.data.name,
        "optimizer": arm.config.optimizer.name,
        "format": arm.config.recipe.name,
        "rounding": arm.rounding,
        "noise": math.nan if arm.noise is None else arm.noise,
        "low": arm.rates.low,
        "high": arm.rates.high,
        "rates": len(found.trials),
        "status": NONE if frontier is None else OPEN if breaks is None else BRACKETED,
        "frontier": _rate(frontier),
        "breaks": _rate(breaks),
        "best": _rate(best),
        "best_loss": math.nan if best is None else best.mean,
        "best_edge": "" if best is None else ends.get(best.rate, ""),
        "frontier_loss": math.nan if frontier is None else frontier.mean,
        "share": sum(holding) / len(holding) if holding else math.nan,
        "diverged_above": diverged,
        "worse_above": len(worse),
        "excess_above": max(worse, default=math.nan),
        "broke": _broke(diverged, worse, len(sought.seeds)),
        "monotone": not found.contradicting,
        "contradicting": ", ".join(f"{trial.rate:g}" for trial in found.contradicting),
        "margin": sought.margin,
        "required_share": sought.share,
        "resolution": sought.resolution,
        "seeds": len(sought.seeds),
    }


def _broke(diverged: int, worse: Sequence[float], seeds: int) -> str:
    """`1 of 3 diverges, 2 of 3 end up to 0.54 nats worse`."""
    parts = [f"{diverged} of {seeds} diverge{'s' if diverged == 1 else ''}"] if diverged else []
    if len(worse) == 1:
        parts.append(f"1 of {seeds} ends {worse[0]:.2f} nats worse")
    elif worse:
        parts.append(f"{len(worse)} of {seeds} end up to {max(worse):.2f} nats worse")
    return ", ".join(parts)


def _place(found: Found, trial: Trial) -> str:
    places = {"best": found.best, "frontier": found.frontier, "breaks": found.breaks}
    return ", ".join(name for name, at in places.items() if at is trial)


def _rate(trial: Trial | None) -> float:
    return math.nan if trial is None else trial.rate


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    rows = frame.to_dict("records")
    return [{str(k): None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
