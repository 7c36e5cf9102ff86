"""Laws of the mixed model: it is the paired comparison where both say the same, and never a wrong number elsewhere."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.optimize import minimize_scalar

from analysis.statistics import claims, mixed, tables
from tests.analysis import run_folders as made

NUMBERS = ["estimate", "se", "low", "high"]

# Effort (Borg's scale) to rise from four types of stool, by nine subjects: Wretenberg, Arborelius & Lindberg 1993;
# R's data set nlme::ergoStool
STOOLS = {
    "T1": [12, 10, 7, 7, 8, 9, 8, 7, 9],
    "T2": [15, 14, 14, 11, 11, 11, 12, 11, 13],
    "T3": [12, 13, 13, 10, 8, 11, 12, 8, 10],
    "T4": [10, 12, 9, 9, 7, 10, 11, 7, 8],
}


@pytest.fixture(autouse=True)
def uncollected(monkeypatch: pytest.MonkeyPatch) -> None:
    """statsmodels collects garbage in every correction, which takes most of a test's time."""
    monkeypatch.setattr("gc.collect", lambda: 0)


def frame(losses: dict[tuple[str, str], list[float]], **settings: Any) -> pd.DataFrame:
    """As runs: losses by (optimizer, format), the n-th of seed n; NaN diverged."""
    rows = [
        {"model": "m", "data": "d", "optimizer": optimizer, "format": format, **settings, "seed": seed}
        | {"status": "diverged" if math.isnan(loss) else "finished", "metric": "validation_loss"}
        | {"primary_metric": loss, "final.validation_loss": loss}
        for (optimizer, format), values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return pd.DataFrame(rows).assign(signature=lambda rows: [str(index) for index in rows.index])


def draws(seeds: int, key: int, arms: int = 4, luck: float = 1.0) -> np.ndarray:
    """(arms, seeds): what a seed does to all its runs, and what chance does to each."""
    random = np.random.default_rng((seeds, key))
    return 3 + 0.05 * (random.normal(0, luck, seeds) + random.normal(0, 1, (arms, seeds)))


def grid(seeds: int = 5, key: int = 0) -> pd.DataFrame:
    """Two optimizers × three formats."""
    arms = [(optimizer, format) for optimizer in ("adamw", "lmd") for format in made.FORMATS]
    return frame(dict(zip(arms, draws(seeds, key, 6, luck=3).tolist(), strict=True)))


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_of_two_arms_it_is_the_paired_comparison(seeds: int) -> None:
    compared = 0
    for key in range(5):
        arms = dict(zip((("adamw", "float32"), ("adamw", "low")), draws(seeds, key, 2, luck=3).tolist(), strict=True))
        row = mixed.effects(frame(arms), fewest=1).iloc[0]
        pair = tables.differences(frame(arms)).iloc[0]
        assert row["estimate"] == pytest.approx(pair["difference"], rel=1e-6)
        if row["seed_share"] > 0:
            compared += 1
            assert row["df"] == pair["n"] - 1
            assert list(row[["low", "high"]]) == pytest.approx(list(pair[["low", "high"]]), rel=1e-6)
            differences = np.subtract(*reversed(arms.values()))
            assert row["se"] == pytest.approx(stats.sem(differences), rel=1e-6)
            assert row["p"] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=1e-6)
    assert compared >= 3


def test_of_a_full_grid_the_estimates_are_those_of_the_paired_tables() -> None:
    table = mixed.effects(grid())
    assert (table["not_fitted"] == "").all()
    of = {name: rows for name, rows in table.groupby("factor")}
    formats = tables.differences(grid())
    expected = formats.loc[formats["optimizer"] == "adamw", "difference"]
    np.testing.assert_allclose(of["format"]["estimate"], expected, rtol=1e-9)
    np.testing.assert_allclose(of["optimizer × format"]["estimate"], tables.contrasts(grid())["difference"], rtol=1e-9)
    optimizers = tables.optimizers(grid())
    expected = optimizers.loc[optimizers["format"] == "float32", "difference"]
    np.testing.assert_allclose(of["optimizer"]["estimate"], expected, rtol=1e-9)
    assert set(table["df"]) == {(6 - 1) * (5 - 1)}


def test_the_published_answer_for_the_stools() -> None:
    """Pinheiro & Bates, Mixed-Effects Models in S and S-PLUS (2000), section 1.2: lme(effort ~ Type, random = ~ 1 |
    Subject) has Type T2 3.888889, T3 2.222222, T4 0.666667, standard errors 0.5186838, 24 df, t values 7.497609,
    4.284348, 1.285304, p below 0.0001, 0.0003 and 0.2110, and standard deviations 1.332465 of subjects, 1.100295 of
    residuals.
    """
    runs = frame({("o", name): [float(value) for value in effort] for name, effort in STOOLS.items()})
    table = mixed.effects(runs, fewest=1)
    assert list(table["level"]) == ["T2", "T3", "T4"]
    np.testing.assert_allclose(table["estimate"], [3.888889, 2.222222, 0.666667], atol=5e-7)
    np.testing.assert_allclose(table["se"], 0.5186838, atol=5e-8)
    np.testing.assert_allclose(table["estimate"] / table["se"], [7.497609, 4.284348, 1.285304], atol=2e-6)
    assert set(table["df"]) == {24}
    np.testing.assert_allclose(table["p"][1:], [0.0003, 0.2110], atol=5e-5)
    np.testing.assert_allclose(table["seed_share"], 1.332465**2 / (1.332465**2 + 1.100295**2), rtol=1e-6)
    np.testing.assert_allclose(table["p_holm"], claims.holm(table["p"].to_numpy()), rtol=1e-12)


def by_hand(values: np.ndarray, fixed: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """REML by its definition: estimates, standard errors and the seeds' share at the best of a dense grid, refined."""
    same, n, k = (seeds[:, None] == seeds).astype(float), *fixed.shape

    def at(ratio: float) -> tuple[float, np.ndarray, np.ndarray]:
        variance = np.eye(n) + ratio * same
        weighted = np.linalg.solve(variance, fixed)
        information = fixed.T @ weighted
        effects = np.linalg.solve(information, weighted.T @ values)
        left = values - fixed @ effects
        scale = left @ np.linalg.solve(variance, left) / (n - k)
        deviance = np.linalg.slogdet(variance)[1] + np.linalg.slogdet(information)[1] + (n - k) * math.log(scale)
        return deviance, effects, np.sqrt(scale * np.diag(np.linalg.inv(information)))

    best = min(np.arange(-9, 9, 0.25), key=lambda log: at(math.exp(log))[0])
    bounds, exact = (best - 0.25, best + 0.25), {"xatol": 1e-9}
    log = minimize_scalar(lambda log: at(math.exp(log))[0], bounds=bounds, method="bounded", options=exact).x
    ratio = math.exp(log) if at(math.exp(log))[0] < at(0)[0] else 0.0
    return at(ratio)[1], at(ratio)[2], ratio / (1 + ratio)


def test_with_runs_missing_it_is_reml_by_its_definition() -> None:
    boundary = 0
    for key in range(20):
        random = np.random.default_rng(key)
        arm, seed = (x.ravel()[random.permutation(24)[:20]] for x in np.indices((4, 6)))
        values = 2 + 0.1 * random.normal(0, 2 * (key % 4), 6)[seed] + 0.1 * random.normal(0, 1, 20) + 0.1 * arm
        columns = (arm[:, None] == np.arange(1, 4)).astype(float)
        effects, errors, share = by_hand(values, np.column_stack([np.ones(20), columns]), seed)
        found = mixed.fit(values, columns, seed)
        np.testing.assert_allclose(found.estimate, effects[1:], atol=1e-6)
        np.testing.assert_allclose(found.se, errors[1:], rtol=1e-5)
        assert found.seed_share == pytest.approx(share, abs=1e-5)
        boundary += share == 0
    assert 0 < boundary < 20


def test_where_seeds_have_no_variance_it_is_least_squares_with_the_degrees_of_freedom_within_seeds() -> None:
    arms = {("adamw", "float32"): [3.0, 3.2, 3.1, 3.3], ("adamw", "low"): [3.4, 3.1, 3.3, 3.2]}  # against each other
    row = mixed.effects(frame(arms), fewest=1).iloc[0]
    pooled = math.sqrt(sum(np.var(values, ddof=1) for values in arms.values()) / 4)
    assert (row["seed_share"], row["df"], row["not_fitted"]) == (0.0, 3, "")
    assert row["se"] == pytest.approx(pooled, rel=1e-12)
    assert row["high"] == pytest.approx(row["estimate"] + stats.t.ppf(0.975, 3) * pooled, rel=1e-12)


def test_the_unit_of_the_metric_changes_nothing_else() -> None:
    runs = grid(3, 1)
    there = mixed.effects(runs)
    other = mixed.effects(runs.assign(primary_metric=1e4 * (runs["primary_metric"] - 2)))
    np.testing.assert_allclose(other[NUMBERS], 1e4 * there[NUMBERS], rtol=1e-6)
    np.testing.assert_allclose(other[["p", "seed_share"]], there[["p", "seed_share"]], rtol=1e-6)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_hold_the_truth_at_their_rate(seeds: int) -> None:
    """Two optimizers × two formats, a run in ten missing; seeds with as much variance as chance in half of the cases,
    and with none in the others.
    """
    arm, seed = (x.ravel() for x in np.indices((4, seeds)))
    columns = np.stack([arm >= 2, arm % 2 == 1, arm == 3], axis=1).astype(float)
    covered, of = np.zeros(3, dtype=int), 0
    for key in range(80):
        there = np.random.default_rng((seeds, key, 1)).random(arm.size) > 0.1
        values = draws(seeds, key, luck=float(key % 2)).ravel() + columns @ [0.1, 0.2, -0.1]
        found = mixed.fit(values[there], columns[there], seed[there])
        half = stats.t.ppf(0.975, found.df) * found.se
        if np.isfinite(half).all():
            of += 1
            covered += np.abs(found.estimate - [0.1, 0.2, -0.1]) <= half
    assert of > 70
    low, high = stats.binom.interval(0.9999, of, tables.CONFIDENCE)
    assert np.all((low <= covered) & (covered <= high)), (covered, of)


def test_a_grid_of_one_factor_has_no_rows() -> None:
    one = grid()[grid()["optimizer"] == "lmd"]
    assert mixed.effects(one).empty
    assert list(mixed.effects(one).columns) == list(mixed.effects(grid()).columns)
    assert mixed.effects(grid().iloc[:0]).empty


def test_diverged_runs_are_left_out_and_counted() -> None:
    runs = grid()
    lost = runs.index[[7, 21]]
    runs.loc[lost, "status"] = "diverged"
    runs.loc[lost, "primary_metric"] = math.nan
    table, without = mixed.effects(runs), mixed.effects(runs.drop(index=lost))
    assert table[["runs", "n", "diverged", "excluded"]].drop_duplicates().to_numpy().tolist() == [[30, 28, 2, 2]]
    pd.testing.assert_frame_equal(table[[*NUMBERS, "df", "p_holm"]], without[[*NUMBERS, "df", "p_holm"]])


def test_a_format_that_always_diverges_takes_its_own_effects_along_and_no_other() -> None:
    runs = grid()
    lost = (runs["optimizer"] == "lmd") & (runs["format"] == "mxfp4_e2m1")
    runs.loc[lost, "status"] = "diverged"
    table = mixed.effects(runs)
    gone = table["level"] == "lmd × mxfp4_e2m1"
    assert list(table.loc[gone, "not_fitted"]) == ["none of the 5 runs of one of its sides is counted"]
    assert table.loc[gone, [*NUMBERS, "p", "p_holm"]].isna().all(axis=None)
    np.testing.assert_allclose(table.loc[~gone, "estimate"], mixed.effects(grid()).loc[~gone, "estimate"], rtol=0.2)
    assert (table.loc[~gone, "not_fitted"] == "").all()
    runs.loc[runs["format"] == "float32", "status"] = "diverged"
    assert mixed.effects(runs)["not_fitted"].ne("").all()


def test_without_every_combination_there_is_no_interaction() -> None:
    runs = grid()
    runs = runs[(runs["optimizer"] == "adamw") | (runs["format"] != "mxfp4_e2m1")]
    table = mixed.effects(runs)
    assert list(table["factor"]) == ["optimizer", "format", "format", "optimizer × format"]
    assert set(table["within"]) == {""}
    assert table["not_fitted"].iloc[-1] == "the grid has no lmd × mxfp4_e2m1"


def test_a_setting_that_each_optimizer_has_for_itself_has_effects_within_it() -> None:
    rates = {"adamw": (0.001, 0.003), "lmd": (0.01, 0.03)}
    runs = pd.concat(
        [
            frame({(optimizer, format): list(draws(4, key, 1)[0])}, **{"optimizer.lr": rate})
            for optimizer in rates
            for key, rate in enumerate(rates[optimizer])
            for format in ("float32", "low")
        ],
        ignore_index=True,
    )
    runs["primary_metric"] += np.random.default_rng(0).normal(0, 0.01, len(runs))
    table = mixed.effects(runs)
    assert (table["not_fitted"] == "").all()
    effects = tables.effects(runs)
    mine = table[table["factor"] == "optimizer.lr"]
    assert mine[["within", "level", "against"]].to_numpy().tolist() == (
        effects[["optimizer", "level", "reference"]].to_numpy().tolist()
    )
    np.testing.assert_allclose(mine["estimate"], effects["difference"], rtol=1e-9)
    assert table["within"].iloc[0] == "float32; optimizer.lr 0.01 against 0.001"


SAME = [3.0, 3.1, 3.3]
NONE = [math.nan] * 3


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        ([[3.0], [3.1], [3.2]], "it needs at least two seeds with a counted run"),
        ([NONE, NONE, NONE], "it needs at least two seeds with a counted run"),
        ([[3.0, math.nan], [3.1, math.nan], [math.nan, 3.2]], "3 counted runs leave no degree of freedom"),
        ([SAME, [x + 0.1 for x in SAME], [x + 0.2 for x in SAME]], "the runs do not scatter about the model"),
        ([SAME, SAME, SAME], "the runs do not scatter about the model"),
        ([[3.0, 3.1, *NONE], [3.2, 3.4, *NONE], [math.nan, math.nan, 3.3, 3.1, 3.5]], "seeds that both sides share"),
    ],
)
def test_what_cannot_be_fitted_says_why_and_has_no_number(losses: list[list[float]], reason: str) -> None:
    runs = frame({("adamw", format): values for format, values in zip("abc", losses, strict=True)})
    last = mixed.effects(runs, fewest=1).iloc[-1]
    assert last["level"] == "c"
    lost = not np.isfinite(losses[2]).any()
    assert last["not_fitted"].startswith("none of the 3 runs" if lost else reason)
    assert last[[*NUMBERS, "df", "p", "p_holm", "seed_share"]].isna().all()


def test_a_likelihood_without_a_maximum_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from statsmodels.regression.mixed_linear_model import MixedLM

    def fit(self: MixedLM, **settings: Any) -> Any:
        raise np.linalg.LinAlgError("Singular matrix")

    monkeypatch.setattr(MixedLM, "fit", fit)
    assert set(mixed.effects(grid())["not_fitted"]) == {"its likelihood is singular"}
