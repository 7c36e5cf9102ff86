"""How stable training was: divergence, loss spikes, weight growth, gradient noise, the largest stable learning rate.

Every number is defined here once, in words a reader of the report can check.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from scipy.special import ndtri

from analysis.statistics.tables import CONFIDENCE, counted, factors

SPIKE_WINDOW = 50  # logged training losses that a loss is compared to
SPIKE_THRESHOLD = 6.0  # robust standard deviations above their median
SPIKE_FLOOR = 0.02  # and at least this share of the median above it: a flat, converged loss has a spread near 0
SD_PER_MAD = 1.4826  # standard deviation over median absolute deviation, of a normal distribution
LEARNING_RATE = "optimizer.lr"
PER_RUN = ("spikes", "largest_spike", "weight_growth", "gradient_noise")


def by_run(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row a run that has metrics: signature, spikes, largest_spike, weight_growth, gradient_noise (see the
    functions of this module).
    """
    kinds = (("train", "loss"), ("weights", "norm"), ("train", "grad_norm"))
    found = [dict(tuple(series(metrics, *kind).groupby("signature"))) for kind in kinds]
    rows = []
    for signature in metrics["signature"].unique():
        loss, norm, gradient = (each.get(signature, metrics.iloc[:0]) for each in found)
        count, largest = loss_spikes(loss["value"].to_numpy())
        growth = weight_growth(norm["step"].to_numpy(), norm["value"].to_numpy())
        noise = gradient_noise(gradient["value"].to_numpy())
        rows.append((signature, count, largest, growth, noise))
    frame = pd.DataFrame(rows, columns=["signature", *PER_RUN])
    return frame.astype({"signature": "str", "spikes": "int64"} | dict.fromkeys(PER_RUN[1:], "float64"))


def by_arm(runs: pd.DataFrame, per_run: pd.DataFrame) -> pd.DataFrame:
    """One row an arm: factors, runs, diverged, rate, rate_low, rate_high, spikes, largest_spike, weight_growth,
    gradient_noise.

    `runs` counts the finished and diverged ones: a run that failed or is unfinished says nothing about divergence.
    rate_low and rate_high are the 95% Wilson interval of diverged / runs. The other numbers are means over the arm's
    finished runs (largest_spike: their maximum): after a divergence slope and noise describe the wreck.
    """
    columns = factors(runs)
    joined = runs.merge(per_run, on="signature", how="left", validate="one_to_one")
    rows = []
    for key, group in joined.groupby(columns, dropna=False, sort=False):
        finished, diverged = group[group["status"] == "finished"], int((group["status"] == "diverged").sum())
        decided = len(finished) + diverged
        low, high = wilson_interval(diverged, decided)
        rows.append(
            dict(zip(columns, key, strict=True))
            | {"runs": decided, "diverged": diverged, "rate": diverged / decided if decided else math.nan}
            | {"rate_low": low, "rate_high": high}
            | {"spikes": finished["spikes"].mean(), "largest_spike": finished["largest_spike"].max()}
            | {"weight_growth": finished["weight_growth"].mean(), "gradient_noise": finished["gradient_noise"].mean()}
        )
    return pd.DataFrame(rows, columns=[*columns, "runs", "diverged", "rate", "rate_low", "rate_high", *PER_RUN])


def series(metrics: pd.DataFrame, split: str, metric: str) -> pd.DataFrame:
    """The rows of one metric of one split, in the order of steps."""
    return metrics[(metrics["split"] == split) & (metrics["metric"] == metric)].sort_values("step", kind="stable")


def loss_spikes(loss: np.ndarray) -> tuple[int, float]:
    """(count, largest): how often the training loss jumped, and the highest jump above the running median, in the
    loss's unit.

    A logged loss is part of a spike when it exceeds the median of the 50 logged before it by more than 6 robust
    standard deviations (1.4826 × their median absolute deviation) and by more than 2% of the median's magnitude;
    consecutive ones are one spike. Falling losses before it widen the spread and lift the median, so a steep descent is
    not mistaken for a spike. NaN and infinite losses are divergence, not spikes, and are left out. (0, 0.0) for a
    series of at most 50 values.
    """
    _, jump, high, starts = _spikes(loss[np.isfinite(loss)])
    return int(starts.sum()), float(jump[high].max(initial=0.0))


def recoveries(step: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """For every spike of `loss_spikes` the steps from its start until the loss is back; NaN where it never is.

    Back is a logged loss of at most the median of the 50 before the spike began. Empty without spikes.
    """
    step, loss = step[np.isfinite(loss)], loss[np.isfinite(loss)]
    median, _, _, starts = _spikes(loss)
    steps, tail = step[SPIKE_WINDOW:], loss[SPIKE_WINDOW:]
    out = []
    for start in np.flatnonzero(starts):
        back = np.flatnonzero(tail[start:] <= median[start])
        out.append(steps[start + back[0]] - steps[start] if back.size else math.nan)
    return np.array(out, dtype=np.float64)


def _spikes(loss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of every loss after the first 50: the median before it, its jump, whether it is in a spike, or starts one."""
    if loss.size <= SPIKE_WINDOW:
        return np.empty(0), np.empty(0), np.empty(0, bool), np.empty(0, bool)
    before = sliding_window_view(loss, SPIKE_WINDOW)[:-1]  # (n - window, window)
    median = pd.Series(loss).rolling(SPIKE_WINDOW).median().to_numpy()[SPIKE_WINDOW - 1 : -1]  # of each window
    jump = loss[SPIKE_WINDOW:] - median
    high = jump > SPIKE_FLOOR * np.abs(median)
    spread = SD_PER_MAD * np.median(np.abs(before[high] - median[high, None]), axis=1)
    high[high] = jump[high] > SPIKE_THRESHOLD * spread
    return median, jump, high, high & ~np.concatenate(([False], high[:-1]))


def weight_growth(step: np.ndarray, norm: np.ndarray) -> float:
    """The least-squares slope of log(weight norm) against step, per 1000 steps: 0.69 means doubling every 1000 steps.

    Norms that are not finite and positive are left out. NaN when fewer than two steps remain.
    """
    kept = np.isfinite(norm) & (norm > 0)
    x, y = step[kept].astype(np.float64) / 1000, np.log(norm[kept])
    centred = x - x.mean() if x.size else x
    if not np.any(centred):
        return math.nan
    return float(centred @ (y - y.mean()) / (centred @ centred))


def gradient_noise(grad_norm: np.ndarray) -> float:
    """The robust relative fluctuation of the gradient norm over the second half of training: 1.4826 × the median
    absolute deviation of its logarithm from a straight line fitted to it.

    A proxy read off one norm a step, not the gradient noise scale of McCandlish et al. 2018 (arXiv:1812.06162), which
    needs two batch sizes. Norms that are not finite and positive are left out. NaN when fewer than 8 remain.
    """
    tail = grad_norm[grad_norm.size // 2 :]
    logs = np.log(tail[np.isfinite(tail) & (tail > 0)])
    if logs.size < 8:
        return math.nan
    x = np.arange(logs.size) - (logs.size - 1) / 2
    residual = logs - logs.mean() - x * (x @ logs / (x @ x))
    return float(SD_PER_MAD * np.median(np.abs(residual - np.median(residual))))


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927), in [0, 1]; NaN for n = 0."""
    if n == 0:
        return math.nan, math.nan
    z = float(ndtri((1 + CONFIDENCE) / 2))
    share = successes / n
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def largest_stable_learning_rate(runs: pd.DataFrame) -> pd.DataFrame:
    """One row an arm but for its learning rate: the other factors, tried, largest_stable, smallest_unstable.

    A learning rate is stable when at least one of its runs finished with a finite primary metric and none diverged;
    `largest_stable` is the largest below every unstable one (NaN when the smallest decided one is unstable),
    `smallest_unstable` is NaN when no run diverged: then the limit lies beyond what was tried. Failed and unfinished
    runs decide nothing. Empty when the grid varies no rate.
    """
    columns = [name for name in factors(runs) if name != LEARNING_RATE]
    rows = []
    if LEARNING_RATE in factors(runs):
        ok = counted(runs)
        bad = (runs["status"] == "diverged") | ((runs["status"] == "finished") & ~ok)
        rates = runs.assign(ok=ok, bad=bad)
        for key, group in rates.groupby(columns, dropna=False, sort=False):
            by_rate = group.groupby(LEARNING_RATE)[["ok", "bad"]].any()
            if len(by_rate) < 2:
                continue
            unstable = min(by_rate.index[by_rate["bad"]], default=math.nan)
            stable = [rate for rate in by_rate.index[by_rate["ok"] & ~by_rate["bad"]] if not rate >= unstable]
            rows.append(
                dict(zip(columns, key, strict=True))
                | {"tried": ", ".join(f"{rate:g}" for rate in by_rate.index)}
                | {"largest_stable": max(stable, default=math.nan), "smallest_unstable": unstable}
            )
    return pd.DataFrame(rows, columns=[*columns, "tried", "largest_stable", "smallest_unstable"])
