"""Laws of claims: what a prediction is measured as, when it comes true, and how often chance alone makes it so."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import load
from analysis.page import report
from analysis.statistics import claims, stability
from tests.analysis import run_folders as made

ARMS = ("lmd low", "lmd high", "adamw low", "adamw high")


def world(losses: dict[str, np.ndarray], diverged: tuple[str, ...] = ()) -> pd.DataFrame:
    """A frame of runs, named "arm seed", with these final losses."""
    rows = [
        {"signature": f"{arm} {seed}", "model": "m", "data": "d", "seed": seed, "final.validation_loss": loss}
        for arm, of_arm in losses.items()
        for seed, loss in enumerate(of_arm)
    ]
    frame = pd.DataFrame(rows)
    frame["status"] = ["diverged" if name in diverged else "finished" for name in frame["signature"]]
    return frame.assign(metric="validation_loss", primary_metric=frame["final.validation_loss"])


def contrast(name: str, plus: list[str], minus: list[str], n: int, below: float = 0.0) -> dict[str, object]:
    terms = [
        {"weight": weight, "runs": {str(seed): f"{arm} {seed}" for seed in range(n)}}
        for weight, arms in ((1, plus), (-1, minus))
        for arm in arms
    ]
    return {"name": name, "metric": "validation_loss", "below": below, "terms": terms}


def claim(name: str, *contrasts: dict[str, object], steady: tuple[str, ...] = ()) -> dict[str, object]:
    return {"name": name, "statement": f"{name} holds.", "contrasts": list(contrasts), "steady": list(steady)}


def no_growth(runs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"signature": runs["signature"], "weight_growth": math.nan})


def predicted(made_claims: list[dict[str, object]], runs: pd.DataFrame) -> pd.DataFrame:
    return claims.predictions(made_claims, runs, no_growth(runs))


def draws(n: int, seed: int, **shift: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {arm: shift.get(arm.replace(" ", "_"), 0.0) + random.normal(0, 1, n) for arm in ARMS}


def test_a_contrast_is_the_difference_of_differences_by_seed_and_its_test_is_students() -> None:
    losses = draws(8, 0)
    runs = world(losses)
    row = predicted([claim("b", contrast("c", [ARMS[0], ARMS[3]], [ARMS[1], ARMS[2]], 8, 0.25))], runs).iloc[0]
    x = losses[ARMS[0]] - losses[ARMS[1]] - (losses[ARMS[2]] - losses[ARMS[3]])
    half = stats.t.ppf(0.975, 7) * x.std(ddof=1) / math.sqrt(8)
    np.testing.assert_allclose(row[["mean", "low", "high"]].astype(float), [x.mean(), x.mean() - half, x.mean() + half])
    statistic = (x.mean() - 0.25) / (x.std(ddof=1) / math.sqrt(8))
    assert row["p"] == pytest.approx(2 * stats.t.sf(abs(statistic), 7))
    assert (row["n"], row["missing"], row["runs"]) == (8, 0, 32)


def test_the_correction_is_holms() -> None:
    """p-values in order, times the number of those not smaller, made monotone: Holm 1979."""
    shifts = {"lmd_low": -2.0, "lmd_high": -0.7, "adamw_low": 0.3}
    runs = world(draws(6, 1, **shifts))
    table = predicted([claim("x", *(contrast(a, [a], [ARMS[3]], 6) for a in ARMS[:3]))], runs)
    order = np.argsort(table["p"].to_numpy())
    expected = np.minimum(np.maximum.accumulate(table["p"].to_numpy()[order] * [3, 2, 1]), 1)
    np.testing.assert_allclose(table["p_holm"].to_numpy()[order], expected)


def test_a_prediction_comes_true_or_false_by_its_side_and_a_claim_needs_all_of_them() -> None:
    runs = world(draws(8, 2, lmd_low=-20.0, lmd_high=20.0))
    below, above = (contrast(f"{arm} low", [arm], [ARMS[3]], 8) for arm in ARMS[:2])
    even = contrast("even", [ARMS[2]], [ARMS[3]], 8)
    made_claims = [claim("a", below), claim("b", below, above), claim("c", below, even), claim("d", even, above)]
    table = predicted(made_claims, runs)
    assert list(table["verdict"]) == ["true", "true", "false", "true", "undecided", "undecided", "false"]
    assert list(claims.verdicts(made_claims, table)["verdict"]) == ["supported", "refuted", "undecided", "refuted"]


def test_divergence_is_never_in_favour_of_a_claim() -> None:
    losses = draws(8, 3, lmd_low=-20.0)
    lower = contrast("lower", [ARMS[0]], [ARMS[3]], 8)
    steady = tuple(f"{ARMS[0]} {seed}" for seed in range(8))
    made_claims = [claim("a", lower, steady=steady)]
    assert list(predicted(made_claims, world(losses))["verdict"]) == ["true", "true"]
    table = predicted(made_claims, world(losses, diverged=(f"{ARMS[0]} 5",)))
    assert list(table["verdict"]) == ["undecided", "false"]
    assert list(table["n"]) == [7, 8]
    assert list(table["missing"]) == [1, 0]
    assert table.loc[1, "mean"] == 1 / 8


def test_a_run_that_is_not_there_leaves_a_prediction_undecided() -> None:
    runs = world(draws(8, 4))
    runs = runs[runs["signature"] != f"{ARMS[0]} 2"]
    table = predicted([claim("a", steady=tuple(f"{ARMS[0]} {seed}" for seed in range(8)))], runs)
    assert list(table["verdict"]) == ["undecided"]
    none = predicted([claim("a", contrast("c", ["nobody"], ["no one"], 8))], runs).iloc[0]
    assert (none["n"], none["missing"], none["verdict"]) == (0, 8, "undecided")


def test_the_seeds_needed_are_the_fewest_with_a_power_of_80_percent() -> None:
    runs = world(draws(4, 5, lmd_low=-0.8))
    table = predicted([claim("a", *(contrast(a, [a], [ARMS[3]], 4) for a in ARMS[:2]))], runs)
    row = table.iloc[0]
    assert row["verdict"] == "undecided"
    effect, n = abs(row["mean"]) / row["sd"], int(row["seeds_needed"])

    def power(n: int) -> float:
        limit = stats.t.ppf(1 - 0.05 / 2 / 2, n - 1)  # two tests
        spread = stats.nct(n - 1, effect * math.sqrt(n))
        return float(spread.sf(limit) + spread.cdf(-limit))

    assert power(n - 1) < 0.8 <= power(n)


def test_chance_decides_a_claim_in_at_most_one_of_twenty_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five predictions of no effect: the share of grids in which any is decided, over 100 grids for each n."""
    monkeypatch.setattr(claims, "seeds_to_decide", lambda *_: math.nan)  # slow, and no part of a verdict
    monkeypatch.setattr("gc.collect", lambda: 0)  # statsmodels calls it in every correction
    for n in (2, 5, 10):
        decided = 0
        for seed in range(100):
            random = np.random.default_rng((n, seed))
            runs = world({f"arm {k}": random.normal(0, 1, n) for k in range(6)})
            table = predicted([claim("a", *(contrast(str(k), [f"arm {k}"], ["arm 5"], n) for k in range(5)))], runs)
            decided += bool((table["verdict"] != "undecided").any())
        assert decided <= stats.binom.ppf(0.999, 100, 0.05), n


@pytest.mark.usefixtures("undrawn")
def test_a_report_begins_with_the_question_and_the_verdicts(tmp_path: Path) -> None:
    configs = made.quickstart(3)
    folder = made.write_runs(tmp_path / "made", configs)
    grid = load.read(folder).grid

    def signatures(optimizer: str, format: str) -> dict[str, str]:
        of_arm = [made.config("gpt2-micro", optimizer, format, seed) for seed in range(3)]
        return {str(config["seed"]): made.signature(config) for config in of_arm}

    terms = [
        {"weight": 1, "runs": signatures("adamw", "mxfp4_e2m1")},
        {"weight": -1, "runs": signatures("adamw", "float32")},
    ]
    lossless = {"name": "MXFP4 − float32", "metric": "validation_loss", "below": 0.0, "terms": terms}
    made_claims = [
        {
            "name": "a",
            "statement": "MXFP4 <costs> nothing.",
            "contrasts": [lossless],
            "steady": list(terms[0]["runs"].values()),
        }
    ]
    document = {"version": 1, **grid, "claims": made_claims, "source_text": '"""Is it free?\n\nMore."""\n'}
    made.write_json(folder / "grid.json", document)
    text = report.write_report(folder, figures=False).read_text()
    assert text.index("Is it free?") < text.index("refuted") < text.index("MXFP4 &lt;costs&gt; nothing.")
    assert "The claim made before the runs is <strong>refuted</strong>." in text
    assert "0% diverged" in text
    assert list(pd.read_csv(folder / "tables" / "claims.csv")["verdict"]) == ["refuted"]
    assert "stability" in {path.stem for path in (folder / "tables").iterdir()}
    assert stability.by_run(load.metrics(folder))["weight_growth"].notna().all()
