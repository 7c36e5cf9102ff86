"""How often the intervals hold the truth, on made-up runs whose truth is known.

The number that do is binomial, so it must lie in the band that holds all but one in ten thousand of its values.
"""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.statistics import stability, tables
from analysis.statistics.sensitivity import worst_case

TRUTH = 0.3  # what the format costs, in nats
MANY = pytest.param(4000, marks=pytest.mark.full)


def assert_nominal(covered: int, of: int) -> None:
    low, high = stats.binom.interval(0.9999, of, tables.CONFIDENCE)
    assert low <= covered <= high, (covered, of)


def world(experiments: int, seeds: int, random: np.random.Generator) -> pd.DataFrame:
    """Runs of many small grids: each is an arm in float32 and one in another format, which costs TRUTH on average.

    Seeds differ far more than formats do. `luck` is what a seed does to both runs of a pair.
    """
    shape = (experiments, 2, seeds)  # float32 first
    luck = np.broadcast_to(random.normal(0, 5, (experiments, 1, seeds)), shape)
    loss = 10 + luck + TRUTH * np.arange(2)[:, None] + random.normal(0, [[0.1], [0.5]], shape)
    experiment, format, seed = np.indices(shape)
    frame = pd.DataFrame({"experiment": experiment.ravel(), "seed": seed.ravel(), "primary_metric": loss.ravel()})
    frame["format"] = np.where(format.ravel() == 0, "float32", "mxfp4_e2m1")
    frame["luck"] = luck.ravel()
    names = {"model": "m", "data": "d", "optimizer": "adamw", "status": "finished", "metric": "validation_loss"}
    return frame.assign(**names, signature=frame.index.astype(str))


def compared(runs: pd.DataFrame) -> pd.DataFrame:
    return tables.differences(runs.drop(columns="luck"))


@pytest.mark.parametrize("experiments", [200, MANY])
def test_intervals_of_paired_differences_hold_the_truth_at_their_rate(experiments: int) -> None:
    random = np.random.default_rng(1)
    for n in range(2, 11):
        table = compared(world(experiments, n, random))
        assert (len(table), set(table["n"])) == (experiments, {n})
        assert_nominal(int(table["low"].le(TRUTH).mul(table["high"].ge(TRUTH)).sum()), experiments)


@pytest.mark.parametrize("repeats", [1000, pytest.param(50_000, marks=pytest.mark.full)])
def test_intervals_of_means_hold_the_truth_at_their_rate(repeats: int) -> None:
    random = np.random.default_rng(2)
    for n in range(2, 11):
        bounds = np.array([tables.interval(values) for values in random.normal(7, 2, (repeats, n))])
        assert_nominal(int(((bounds[:, 1] <= 7) & (bounds[:, 2] >= 7)).sum()), repeats)


@pytest.mark.parametrize("experiments", [800, MANY])
def test_they_do_where_unlucky_seeds_diverge(experiments: int) -> None:
    """Divergence that depends on the seed's luck, which a pair shares, and not on what the format costs it."""
    random = np.random.default_rng(3)
    runs = world(experiments, 6, random)
    lost = (runs["luck"] > 3) & (runs["format"] != "float32") | (random.random(len(runs)) < 0.1)
    runs.loc[lost, "status"] = "diverged"
    table = compared(runs)
    assert (table["n"] + table["excluded"] == 6).all() and set(range(7)) == set(table["n"])
    assert table.loc[table["n"] < 2, ["low", "high"]].isna().all(axis=None)
    known = table[table["n"] >= 2]
    assert_nominal(int(known["low"].le(TRUTH).mul(known["high"].ge(TRUTH)).sum()), len(known))


def test_where_the_format_makes_them_diverge_the_worst_case_flatters_no_arm() -> None:
    """A mean over the runs that are left is then too good, as it says by what it excludes; the worst case is not."""
    runs = world(100, 6, np.random.default_rng(4)).drop(columns="luck")
    cost = compared(runs.assign(luck=0.0))
    low = runs["format"] != "float32"
    partner = runs.loc[~low].set_index(["experiment", "seed"])["primary_metric"]
    change = runs["primary_metric"] - partner.loc[list(zip(runs["experiment"], runs["seed"], strict=True))].to_numpy()
    lost = runs.assign(status=np.where(low & (change > TRUTH + 0.25), "diverged", "finished"))
    left = compared(lost.assign(luck=0.0))
    assert (left["difference"] <= cost["difference"] + 1e-12)[left["n"] > 0].all() and (left["excluded"] > 0).any()
    arms, worst = tables.arms(lost), tables.arms(worst_case(lost))
    assert (worst["n"] == 6).all() and (worst["mean"] >= arms["mean"] - 1e-12)[arms["n"] > 0].all()
    assert (worst["mean"] >= tables.arms(runs)["mean"] - 1e-12).all()


def test_wilsons_interval_holds_a_rate_as_often_as_is_known_of_it() -> None:
    """Computed exactly: nominal on average over all rates, less at some of them (Brown, Cai & DasGupta 2001), but
    never less than 0.8.
    """
    rates = np.linspace(0.0005, 0.9995, 1000)
    for n in range(2, 11):
        bounds = np.array([stability.wilson_interval(k, n) for k in range(n + 1)])  # (n + 1, 2)
        holds = (bounds[:, :1] <= rates) & (rates <= bounds[:, 1:])
        coverage = (stats.binom.pmf(np.arange(n + 1)[:, None], n, rates) * holds).sum(axis=0)
        assert math.isclose(coverage.mean(), tables.CONFIDENCE, abs_tol=0.015), (n, coverage.mean())
        assert coverage.min() > 0.8, (n, coverage.min())
