"""The statistics give the answers that were published for well-known data."""

import math

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from analysis.statistics import claims, power, stability, tables

# Extra hours of sleep of ten patients under two drugs (Cushny & Peebles 1905, in Student 1908); R's data set `sleep`
SLEEP = (
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)


def sleep() -> pd.DataFrame:
    """As runs: a patient is a seed, the first drug is float32."""
    rows = [
        {"signature": f"{format} {seed}", "model": "m", "data": "d", "optimizer": "o", "format": format, "seed": seed}
        | {"status": "finished", "metric": "validation_loss", "primary_metric": hours, "final.validation_loss": hours}
        for format, drug in zip(("float32", "other"), SLEEP, strict=True)
        for seed, hours in enumerate(drug)
    ]
    return pd.DataFrame(rows)


def test_means_and_paired_differences_are_those_of_students_sleep_data() -> None:
    """R 4.3: t.test(sleep2$extra, sleep1$extra, paired = TRUE): t = 4.0621, df = 9, p-value = 0.002833, 95% interval
    0.7001142 to 2.4598858; the drugs' means and deviations 0.75, 1.789010 and 2.33, 2.002249.
    """
    arms = tables.arms(sleep())
    np.testing.assert_allclose(arms[["mean", "sd"]], [[0.75, 1.789010], [2.33, 2.002249]], rtol=1e-6)
    row = tables.differences(sleep()).iloc[0]
    np.testing.assert_allclose(
        row[["difference", "low", "high"]].astype(float), [1.58, 0.7001142, 2.4598858], rtol=1e-6
    )
    terms = [
        {"weight": weight, "runs": {str(seed): f"{format} {seed}" for seed in range(10)}}
        for weight, format in ((1, "other"), (-1, "float32"))
    ]
    contrast = {"name": "c", "metric": "validation_loss", "below": 0.0, "terms": terms}
    made = [{"name": "a", "statement": "s", "contrasts": [contrast], "steady": []}]
    growth = pd.DataFrame({"signature": sleep()["signature"], "weight_growth": math.nan})
    assert claims.predictions(made, sleep(), growth)["p"].iloc[0] == pytest.approx(0.002833, abs=5e-7)


def test_intervals_are_those_of_statsmodels() -> None:
    for values in (*SLEEP, np.subtract(*SLEEP)):
        np.testing.assert_allclose(tables.interval(values)[1:], DescrStatsW(values).tconfint_mean(0.05), rtol=1e-12)
    for k, n in ((0, 3), (2, 5), (7, 7), (1, 40)):
        expected = proportion_confint(k, n, 0.05, method="wilson")
        np.testing.assert_allclose(stability.wilson_interval(k, n), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_is_that_of_newcombe(k: int, n: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    np.testing.assert_allclose(stability.wilson_interval(k, n), (low, high), atol=5e-5)


def test_the_correction_of_four_p_values_is_holms() -> None:
    """The example of Wikipedia's article on the Holm-Bonferroni method, 2024: at 5% the first and the last hold."""
    np.testing.assert_allclose(claims.holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02], rtol=1e-12)


@pytest.mark.parametrize(("effect", "n"), [(0.2, 198.1507), (0.5, 33.36713), (0.8, 14.30276)])
def test_the_seeds_to_decide_are_those_of_pwr(effect: float, n: float) -> None:
    """R's pwr 1.3: pwr.t.test(d = effect, power = 0.8, type = "paired") for Cohen's small, medium and large effects."""
    assert power.seeds_to_decide(effect, 1.0) == math.ceil(n)
