"""Laws of a report's first screen: few sentences, decided things first, nothing decided without an interval."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import load
from analysis.page import answer, report, summary
from analysis.statistics import power, tables
from tests.analysis import run_folders as made


def answered(folder: Path) -> answer.Answer:
    return answer.answer(report.all_tables(load.read(folder)))


def gpt2(seeds: int) -> list[made.Config]:
    return [config for config in made.quickstart(seeds) if config["model"]["name"] == "gpt2-micro"]


def ablation(noise: float, seed: int) -> made.Config:
    return made.config("gpt2-micro", "lmd", "float32", seed, noise_scale=noise)


@pytest.mark.parametrize(
    "configs", [made.quickstart(1), made.quickstart(3), gpt2(2)], ids=["one", "two tasks", "one task"]
)
def test_a_grid_is_answered_in_at_most_three_sentences(tmp_path: Path, configs: list[made.Config]) -> None:
    found = answered(made.write_runs(tmp_path / "grid", configs))
    assert 1 <= len(found.sentences) <= 3
    assert all(sentence.endswith(".") for sentence in [*found.sentences, *found.decided])


def test_what_is_said_as_decided_has_an_interval_without_0_and_the_rest_is_counted(tmp_path: Path) -> None:
    folder = made.write_runs(tmp_path / "grid", made.quickstart(3))
    runs = load.runs(folder)
    found = answered(folder)
    rows = pd.concat([tables.differences(runs), tables.contrasts(runs), tables.optimizers(runs)])
    decided = int(((rows["low"] > 0) | (rows["high"] < 0)).sum())
    said = [sentence for sentence in found.sentences if "chance" not in sentence]
    more = int(found.decided[-1].split()[0]) - 1 if "more are decided" in found.decided[-1] else 0
    assert len(said) + len(found.decided) + more == decided
    assert len(found.open) == len(rows) - decided
    assert found.undecided.startswith(f"Undecided: {len(found.open)} of {len(rows)} comparisons; about ")


def test_the_headline_compares_the_optimizers_in_the_format_that_costs_most(tmp_path: Path) -> None:
    folder = made.write_runs(tmp_path / "grid", gpt2(5))
    first, second = answered(folder).sentences
    runs = load.runs(folder)
    row = tables.contrasts(runs).set_index("format").loc["mxfp4_e2m1"]
    cost = tables.differences(runs).set_index(["optimizer", "format"])["difference"]
    end = tables.optimizers(runs).set_index("format").loc["mxfp4_e2m1"]
    assert row["high"] < 0 and end["high"] < 0
    assert first == (
        f"Training in mxfp4_e2m1 instead of float32 costs adamw {cost['adamw', 'mxfp4_e2m1']:.3f} nats of validation "
        f"loss and lmd {cost['lmd', 'mxfp4_e2m1']:.3f} nats: lmd loses **{-row['difference']:.3f} nats less** "
        f"(95% interval {-row['high']:.3f} to {-row['low']:.3f}, 5 seeds)."
    )
    assert second == (
        f"Trained in mxfp4_e2m1, lmd ends **{-end['difference']:.3f} nats better** than adamw "
        f"(95% interval {-end['high']:.3f} to {-end['low']:.3f}, 5 seeds)."
    )


def test_optimizers_are_compared_seed_by_seed_in_every_format(tmp_path: Path) -> None:
    runs = load.runs(made.write_runs(tmp_path / "grid", gpt2(3)))
    values = runs.set_index(["optimizer", "format", "seed"])["primary_metric"].sort_index()
    table = tables.optimizers(runs)
    assert list(table["format"]) == list(made.FORMATS) and set(table["reference"]) == {"adamw"}
    for row in table.to_dict("records"):
        differences = values["lmd", row["format"]] - values["adamw", row["format"]]
        assert (row["difference"], row["low"], row["high"]) == pytest.approx(tables.interval(differences))
    assert tables.optimizers(runs[runs["format"] == "float32"]).empty


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    found = answered(made.write_runs(tmp_path / "grid", gpt2(1)))
    assert found.decided == [] and "one seed, which says nothing about chance" in found.sentences[0]
    assert found.undecided == "Undecided: 9 of 9 comparisons; two or more seeds are needed to tell."


def test_what_is_undecided_is_called_chance_with_the_seeds_that_would_decide() -> None:
    row = {"n": 3, "difference": 0.1, "low": -0.1, "high": 0.3, "metric": "validation_loss"}
    found = answer._comparison(row, "a loses **0.100 nats more**", "", "whether")
    more = power.seeds_to_decide(0.1, power.sd_of_interval(-0.1, 0.3, 3)) - 3
    assert found.headline == (
        f"a loses 0.100 nats more, **which may be chance** (95% interval −0.100 to 0.300, 3 seeds; about {more:.0f} "
        "more seeds would decide)."
    )


@pytest.mark.full
def test_one_line_tells_on_which_models_the_headline_is_decided(tmp_path: Path) -> None:
    row = {"n": 3, "difference": 0.2, "low": 0.1, "high": 0.3, "metric": "validation_loss"}
    sure, unsure = (answer._comparison(row | {"low": low}, "a", "", "") for low in (0.1, -0.1))
    assert answer._verdict({"m": sure, "n": sure}) == answer._verdict({}) == ""
    assert answer._verdict({"m": sure, "n": unsure}) == "Decided on m, not on n:"
    assert answer._verdict({"l": unsure, "m": sure, "n": unsure}) == "Decided on m; not on l, n:"
    assert answer._verdict({"m": unsure, "n": unsure}) == "Not decided by these runs:"
    made_at = datetime(2025, 1, 2, tzinfo=UTC)
    for seeds in (2, 3):
        results = load.read(made.write_runs(tmp_path / str(seeds), made.quickstart(seeds)))
        frames = report.all_tables(results)
        found = answer.answer(frames)
        doubtful = ["chance" in sentence for sentence in found.sentences]
        assert found.verdict.startswith("Not decided" if all(doubtful) else "Decided on" if any(doubtful) else "")
        assert bool(found.verdict) == any(doubtful) and found.verdict in report.render(results, frames, made_at)


def test_a_grid_whose_models_have_different_arms_is_answered(tmp_path: Path) -> None:
    configs = [
        each
        for each in made.quickstart(3)
        if (each["model"]["name"], each["optimizer"]["name"]) != ("vit-micro", "lmd")
    ]
    path = report.write_report(made.write_runs(tmp_path / "grid", configs))
    assert "In float32: gpt2-micro, adamw 2.3" in path.read_text()


def test_a_grid_of_settings_is_answered_by_its_settings(tmp_path: Path) -> None:
    configs = [ablation(noise, seed) for noise in (0.05, 0.0) for seed in range(4)]
    found = answered(made.write_runs(tmp_path / "grid", configs))
    assert found.sentences[0].startswith("Changing noise scale from 0.05 to 0 makes lmd ")


def test_lost_runs_are_said_on_the_first_screen(tmp_path: Path) -> None:
    configs = gpt2(3)
    lost = {made.signature(configs[0]): "diverged", made.signature(configs[1]): "failed"}
    outcome = lambda config: (lost.get(made.signature(config), "finished"), 100)  # noqa: E731
    found = answered(made.write_runs(tmp_path / "grid", configs, outcome))
    assert found.sentences[-1] == "Of 18 runs 1 diverged and 1 failed; they are in no mean."


def test_an_arm_that_lost_all_its_runs_is_named_and_its_comparisons_are_not_undecided(tmp_path: Path) -> None:
    configs = [
        made.config("gpt2-micro", "adamw", format, seed, lr=lr)
        for lr in (0.005, 1e6, 0.1)
        for format in ("float32", "mxfp4_e2m1")
        for seed in range(2)
    ]
    fate = {1e6: {"float32": "diverged", "mxfp4_e2m1": "diverged"}, 0.1: {"mxfp4_e2m1": "failed"}}

    def outcome(config: made.Config) -> tuple[str, int | None]:
        return fate.get(config["optimizer"]["lr"], {}).get(config["recipe"]["format"], "finished"), 60

    found = answered(made.write_runs(tmp_path / "grid", configs, outcome))
    assert found.sentences[-1] == (
        "Of 12 runs 4 diverged and 2 failed; they are in no mean. All 4 runs of adamw, lr 1e+06 diverged; "
        "all 2 runs of adamw, mxfp4_e2m1, lr 0.1 failed."
    )
    ((line, without),) = found.apart
    assert line == f"Without any pair of runs: {len(without)} comparisons." and len(without) == 3
    assert all("1e+06" in phrase or "mxfp4_e2m1 costs adamw, lr 0.1" in phrase for phrase in without)
    assert not any("1e+06" in phrase for phrase in found.open)
    all_lost = answered(made.write_runs(tmp_path / "lost", configs, lambda _: ("diverged", 60)))
    assert all_lost.sentences[-1] == "Of 12 runs 12 diverged; they are in no mean."


def test_a_setting_that_changes_nothing_is_the_same_in_every_pair_not_undecided(tmp_path: Path) -> None:
    configs = [ablation(noise, seed) for noise in (0.05, 0.0) for seed in range(4)]
    folder = made.write_runs(tmp_path / "grid", configs)
    for config in configs:
        path = folder / made.signature(config) / "result.json"
        result = json.loads(path.read_text())
        made.write_json(path, result | {"final": {"validation_loss": 2.0 + config["seed"]}})
    found = answered(folder)
    (same,) = found.apart
    assert same == ("The same in every pair: 1 comparison.", ["what noise scale 0 instead of 0.05 does to lmd"])
    assert found.undecided == "" and not any("chance" in sentence for sentence in found.sentences)


def test_a_grid_where_nothing_finished_says_so(tmp_path: Path) -> None:
    found = answered(made.write_runs(tmp_path / "grid", gpt2(2)[:4], lambda config: ("diverged", 100)))
    assert "No run has finished with a finite value." in found.sentences


def test_the_question_is_the_first_sentence_of_the_docstring(tmp_path: Path) -> None:
    results = load.read(made.write_grid(tmp_path, [], source='"""Is `a` better? In\n3.5 runs.\n\nMore."""\n'))
    assert summary.question(results) == ("Is `a` better?", "In 3.5 runs.")
    told = load.read(made.write_grid(tmp_path, [], source='"""What 3.5 runs say.\n\nMore?"""\n'))
    assert summary.question(told) == ("", "What 3.5 runs say.")


@pytest.mark.usefixtures("undrawn")
def test_the_report_of_a_twin_says_that_it_is_one(tmp_path: Path) -> None:
    grid, twin = (made.write_runs(tmp_path / name, made.quickstart(2)) for name in ("made_up", "made_up_twin"))
    assert not summary.is_twin(load.read(grid))
    assert "These runs are the grid&#x27;s twin" in report.write_report(twin, figures=False).read_text()


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
