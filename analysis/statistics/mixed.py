"""All runs of a task in one model: a linear mixed model (REML, statsmodels) with a random intercept by seed.

A check of the paired tables, which look at two arms at a time: here all arms share one residual variance. statsmodels
is imported when there is something to fit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.linalg import null_space, qr
from scipy.special import stdtr, stdtrit

from analysis.statistics import design
from analysis.statistics.claims import holm
from analysis.statistics.tables import CONFIDENCE, TASK, counted, replicates

NAMES = ("factor", "level", "against", "within", "metric")
COUNTS = ("runs", "n", "seeds", "diverged", "excluded")
NUMBERS = ("estimate", "se", "df", "low", "high", "p", "p_holm", "seed_share")
EXACT = 1e-10  # a spread, relative to the largest value, or a weight, that is rounding alone
GRADIENT = 1e-8  # of the likelihood where its maximum is taken to be found
GRID = (0.0, *np.logspace(-4, 6, 16).tolist())  # the variance of seeds, in units of that within seeds
APART = "seeds that both sides share do not tell it from the other effects"


class NotFittedError(ValueError):
    """The model cannot be fitted; the text says why, in a report's words."""


@dataclass(frozen=True)
class Fit:
    """Of k coefficients: estimate and standard error (NaN where seeds that both sides share do not tell it), the
    degrees of freedom of all, and the seeds' share of the variance.
    """

    estimate: np.ndarray  # (k,)
    se: np.ndarray  # (k,)
    df: int
    seed_share: float


def effects(runs: pd.DataFrame, value: str = "primary_metric", fewest: int = 2) -> pd.DataFrame:
    """One row an effect of a task in which at least `fewest` factors vary: model, data, factor, level, against, within,
    metric, runs, n, seeds, diverged, excluded, estimate, se, df, low, high, p, p_holm, seed_share, not_fitted.

    `estimate` is what `level` adds to `value` (a column of `runs`) over `against`; `within` is where, empty for
    everywhere (`design.effects`). The n counted runs of a task enter its one model, `excluded` = runs − n do not.
    low to high is the 95% t interval, p the two-sided t test of 0, p_holm corrected for all effects of the task (Holm).
    df = n − rank of (fixed effects, seeds): the degrees of freedom within seeds, as nlme's lme has them; exact where
    every seed has every arm. seed_share is the seeds' part of the variance that the effects leave, 0 where REML finds
    none: the fit is that of least squares then, still with the df within seeds. `not_fitted` says in words why a row
    has no numbers (NaN), and is empty where it has.
    """
    rows = []
    for key, group in runs.groupby(list(TASK), dropna=False, sort=False):
        names = design.varying(group)
        if len(names) >= fewest:
            rows += [dict(zip(TASK, key, strict=True)) | row for row in _rows(group, names, value)]
    return pd.DataFrame(rows, columns=[*TASK, *NAMES, *COUNTS, *NUMBERS, "not_fitted"])


def fit(values: np.ndarray, columns: np.ndarray, seeds: np.ndarray) -> Fit:
    """The model of values (n,) with fixed effects columns (n, k), an intercept, and a random intercept of seeds (n,).

    Raises NotFittedError where there are too few runs or seeds, no spread, or REML does not converge.
    """
    number = np.unique(seeds, return_inverse=True)[1]
    intercepts = np.eye(number.max() + 1)[number] if len(number) else np.empty((0, 0))  # (n, seeds)
    if intercepts.shape[1] < 2:
        raise NotFittedError("it needs at least two seeds with a counted run")
    fixed = np.column_stack([np.ones(len(values)), columns])
    both = np.column_stack([fixed, intercepts])
    df = len(values) - int(np.linalg.matrix_rank(both))
    if df < 1:
        raise NotFittedError(f"{len(values)} counted runs leave no degree of freedom beside the effects and the seeds")
    told = np.all(np.abs(null_space(both)[1 : fixed.shape[1]]) < EXACT**0.5, axis=1)  # (k,) apart from all others
    if not told.any():
        raise NotFittedError(APART)
    spread = math.sqrt(_squares(values, both) / df)
    if not spread > EXACT * np.abs(values).max():
        raise NotFittedError("the runs do not scatter about the model: there is no spread to compare effects with")
    independent = np.sort(qr(fixed, mode="r", pivoting=True)[1][: np.linalg.matrix_rank(fixed)])
    estimate, se, seed_share = _reml((values - values.mean()) / spread, fixed[:, independent], number)
    out = np.full((2, fixed.shape[1]), math.nan)
    out[:, independent] = np.stack([estimate, se]) * spread
    out[:, 1:][:, ~told] = math.nan
    return Fit(out[0, 1:], out[1, 1:], df, seed_share)


def _reml(values: np.ndarray, fixed: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(estimates, standard errors, seeds' share); values have a standard deviation of about 1 within seeds.

    MixedLM finds the variances, GLS the effects under them: in unbalanced designs MixedLM's own standard errors, from
    the observed information, are not those of lme, lmer and PROC MIXED. The restricted likelihood can have two maxima,
    and MixedLM finds one with certainty only from nearby, so it starts from the best of a grid.
    """
    from statsmodels.regression.linear_model import GLS
    from statsmodels.regression.mixed_linear_model import MixedLM, MixedLMParams

    best = min(GRID, key=lambda ratio: _deviance(ratio, values, fixed, seeds))
    ratio, converged = best, True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is looked at below
        try:
            if best:
                model = MixedLM(values, fixed, seeds, exog_re=np.full((len(values), 1), math.sqrt(best)))
                start = MixedLMParams.from_components(fe_params=np.zeros(fixed.shape[1]), cov_re=np.eye(1))
                found = model.fit(start_params=start, reml=True, method=["bfgs", "lbfgs"], gtol=GRADIENT)
                ratio, converged = best * float(found.cov_re_unscaled[0, 0]), found.converged
            under = GLS(values, fixed, sigma=np.eye(len(values)) + ratio * (seeds[:, None] == seeds)).fit()
        except (ValueError, np.linalg.LinAlgError) as error:
            raise NotFittedError("its likelihood is singular") from error
    if not converged or not np.all(np.isfinite(under.bse) & (under.bse > 0)):
        raise NotFittedError("REML did not converge")
    return under.params, under.bse, ratio / (1 + ratio)


def _deviance(ratio: float, values: np.ndarray, fixed: np.ndarray, seeds: np.ndarray) -> float:
    """−2 · the restricted log-likelihood, up to a constant, where seeds have `ratio` times the variance within them."""
    size = np.bincount(seeds)
    both = np.column_stack([fixed, values])
    means = np.stack([np.bincount(seeds, column) / size for column in both.T], axis=1)  # (seeds, k + 1)
    white = both - ((1 - 1 / np.sqrt(1 + ratio * size))[:, None] * means)[seeds]
    diagonal = np.abs(np.diag(np.linalg.qr(white, mode="r")))  # its last: the root of the sum of squares left
    left = len(values) - fixed.shape[1]
    return float(np.log1p(ratio * size).sum() + 2 * np.log(diagonal[:-1]).sum() + 2 * left * np.log(diagonal[-1]))


def _squares(values: np.ndarray, columns: np.ndarray) -> float:
    """The sum of squares that a least-squares fit of columns leaves of values."""
    return float(np.sum((values - columns @ np.linalg.lstsq(columns, values, rcond=None)[0]) ** 2))


def _rows(runs: pd.DataFrame, varying: Sequence[str], value: str) -> list[dict[str, object]]:
    """The rows of one task."""
    ok = (counted(runs) & np.isfinite(runs[value])).to_numpy()
    seeds = runs.groupby(replicates(runs), dropna=False, sort=False).ngroup().to_numpy()
    wanted = design.effects(runs, varying)
    common = {"metric": runs["metric"].iloc[0] if value == "primary_metric" else value.removeprefix("final.")}
    common |= {"runs": len(runs), "n": int(ok.sum()), "seeds": len(set(seeds[ok].tolist()))}
    common |= {"diverged": int((runs["status"] == "diverged").sum()), "excluded": int((~ok).sum())}
    reasons = [_lost(effect, ok) for effect in wanted]
    try:
        found = fit(
            runs.loc[ok, value].to_numpy(dtype=np.float64), np.stack([x.column for x in wanted], axis=1)[ok], seeds[ok]
        )
    except NotFittedError as error:
        none = np.full(len(wanted), math.nan)
        found = Fit(none, none, 0, math.nan)
        reasons = [reason or str(error) for reason in reasons]
    fitted = np.isfinite(found.estimate)
    p = np.full(len(wanted), math.nan)
    p[fitted] = 2 * stdtr(found.df, -np.abs(found.estimate[fitted] / found.se[fitted]))
    p_holm = p.copy()
    if fitted.any():
        p_holm[fitted] = holm(p[fitted])
        half = stdtrit(found.df, (1 + CONFIDENCE) / 2) * found.se
    else:
        half = found.se
    rows: list[dict[str, object]] = []
    for index, effect in enumerate(wanted):
        names = {"factor": effect.factor, "level": effect.level, "against": effect.against, "within": effect.within}
        numbers = dict.fromkeys(NUMBERS, math.nan)
        if fitted[index]:
            estimate = found.estimate[index]
            bounds = (found.df, estimate - half[index], estimate + half[index])
            every = (estimate, found.se[index], *bounds, p[index], p_holm[index], found.seed_share)
            numbers = dict(zip(NUMBERS, every, strict=True))
        reason = "" if fitted[index] else reasons[index] or APART
        rows.append(names | common | numbers | {"not_fitted": reason})
    if gaps := design.missing_cells(runs, varying):
        names = {"factor": design.BOTH, "level": "", "against": "", "within": ""}
        reason = f"the grid has no {gaps[0]}{f' and {len(gaps) - 1} more' if len(gaps) > 1 else ''}"
        rows.append(names | common | dict.fromkeys(NUMBERS, math.nan) | {"not_fitted": reason})
    return rows


def _lost(effect: design.Effect, ok: np.ndarray) -> str:
    """Why an effect cannot be seen where all runs of one of its sides were excluded."""
    for runs in effect.compared:
        if not (runs & ok).any():
            return f"none of the {int(runs.sum())} runs of one of its sides is counted"
    return ""
