"""Laws of a report's first screen: few sentences, decided things first, nothing decided without an interval."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import load
from analysis.page import answer, report
from analysis.statistics import power, tables
from tests.analysis import run_folders as made


def answers(folder: Path) -> list[answer.Answer]:
    return list(answer.answers(report.all_tables(load.read(folder))))


def ablation(noise: float, seed: int) -> made.Config:
    return made.config("gpt2-micro", "lmd", "float32", seed, noise_scale=noise)


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_a_task_is_answered_in_at_most_three_sentences(tmp_path: Path, seeds: int) -> None:
    for found in answers(made.write_runs(tmp_path / "grid", made.quickstart(seeds))):
        assert 1 <= len(found.sentences) <= 3
        assert all(sentence.endswith(".") for sentence in [*found.sentences, *found.decided])


def test_what_is_said_as_decided_has_an_interval_without_0_and_the_rest_is_counted(tmp_path: Path) -> None:
    folder = made.write_runs(tmp_path / "grid", made.quickstart(3))
    runs = load.runs(folder)
    for found, (_, mine) in zip(answers(folder), runs.groupby("model", sort=False), strict=True):
        rows = pd.concat([tables.differences(mine), tables.contrasts(mine)])
        decided = ((rows["low"] > 0) | (rows["high"] < 0)).sum()
        said = [sentence for sentence in found.sentences if " seeds]" in sentence]
        assert len(said) + len(found.decided) == decided
        assert (found.undecided == "") == (decided == len(rows))


def test_the_headline_compares_the_optimizers_in_the_format_that_costs_most(tmp_path: Path) -> None:
    folder = made.write_runs(tmp_path / "grid", made.quickstart(5))
    first = answers(folder)[0]
    row = tables.contrasts(load.runs(folder)).set_index(["model", "format"]).loc[("gpt2-micro", "mxfp4_e2m1")]
    assert row["high"] < 0
    expected = f"[{-row['high']:.3f} to {-row['low']:.3f}, 5 seeds]"
    assert first.sentences[0] == (
        f"lmd loses {-row['difference']:.3f} nats less to mxfp4_e2m1 than adamw does {expected}."
    )


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    for found in answers(made.write_runs(tmp_path / "grid", made.quickstart(1))):
        assert found.decided == []
        assert found.undecided == "Undecided: 6 comparisons, too few seeds to say how many more."


def test_a_grid_of_settings_is_answered_by_its_settings(tmp_path: Path) -> None:
    configs = [ablation(noise, seed) for noise in (0.05, 0.0) for seed in range(4)]
    (found,) = answers(made.write_runs(tmp_path / "grid", configs))
    assert "noise_scale 0.05 → 0" in " ".join([*found.sentences, *found.decided, found.undecided])


def test_lost_runs_are_said_on_the_first_screen(tmp_path: Path) -> None:
    configs = made.quickstart(3)[:18]
    lost = {made.signature(configs[0]): "diverged", made.signature(configs[1]): "failed"}
    outcome = lambda config: (lost.get(made.signature(config), "finished"), 100)  # noqa: E731
    (found,) = answers(made.write_runs(tmp_path / "grid", configs, outcome))
    assert found.sentences[-1] == "Of 18 runs 1 diverged and 1 did not finish; they are in no mean."


def test_a_grid_where_nothing_finished_says_so(tmp_path: Path) -> None:
    configs = made.quickstart(2)[:4]
    (found,) = answers(made.write_runs(tmp_path / "grid", configs, lambda config: ("diverged", 100)))
    assert "No run has finished with a finite value." in found.sentences


def test_the_seeds_that_would_decide_have_the_power_that_is_promised() -> None:
    mean, sd = 0.4, 1.0
    n = int(power.seeds_to_decide(mean, sd))

    def chance(n: int) -> float:
        limit, spread = stats.t.ppf(0.975, n - 1), stats.nct(n - 1, mean / sd * math.sqrt(n))
        return float(spread.sf(limit) + spread.cdf(-limit))

    assert chance(n - 1) < 0.8 <= chance(n)
    assert math.isinf(power.seeds_to_decide(1e-6, 1.0))
    assert math.isnan(power.seeds_to_decide(0.0, 1.0)) and math.isnan(power.seeds_to_decide(1.0, math.nan))


def test_the_spread_is_read_back_from_an_interval() -> None:
    values = np.random.default_rng(0).normal(2, 3, 7)
    _, low, high = tables.interval(values)
    assert power.sd_of_interval(low, high, 7) == pytest.approx(values.std(ddof=1))
    assert math.isnan(power.sd_of_interval(math.nan, math.nan, 1))
