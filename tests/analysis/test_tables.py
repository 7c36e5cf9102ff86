"""Laws of the tables: no run is lost between arms, pairing cancels what pairs share, intervals are Student's."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import load
from analysis.figures import drawings
from analysis.page import summary
from analysis.statistics import tables
from tests.analysis import run_folders as made


def loaded(folder: Path, configs: list[made.Config], outcome: object = None) -> pd.DataFrame:
    made.write_runs(folder, configs, outcome)  # type: ignore[arg-type]
    return load.runs(folder)


def test_interval_is_students() -> None:
    random = np.random.default_rng(0)
    for n in (2, 3, 7, 50):
        x = random.normal(size=n)
        low, high = stats.t.interval(0.95, n - 1, loc=x.mean(), scale=x.std(ddof=1) / math.sqrt(n))
        np.testing.assert_allclose(tables.interval(x), (x.mean(), low, high), rtol=1e-12)
    mean, low, high = tables.interval([3.0])
    assert mean == 3.0
    assert math.isnan(low)
    assert math.isnan(high)
    assert all(math.isnan(value) for value in tables.interval([]))


def test_every_run_is_counted_in_exactly_one_arm(tmp_path: Path) -> None:
    outcomes = {0: ("finished", None), 1: ("diverged", 60), 2: ("failed", 20), 3: ("unfinished", 20)}
    configs = made.quickstart(4)
    runs = loaded(tmp_path, configs, lambda config: outcomes[config["seed"]])
    runs.loc[0, "primary_metric"] = math.inf  # finished, and yet no number
    table = tables.arms(runs)
    assert len(table) == 12
    assert table["runs"].sum() == len(configs)
    assert (table["runs"] == table["n"] + table["excluded"]).all()
    assert (table[["diverged", "failed", "unfinished"]] == 1).all(axis=None)
    assert list(table["n"]) == [0] + [1] * 11
    assert table["sd"].isna().all()


def test_mean_and_sd_are_of_the_arm(tmp_path: Path) -> None:
    runs = loaded(tmp_path, made.quickstart(3))
    for row in tables.arms(runs).to_dict("records"):
        mine = np.logical_and.reduce([runs[name] == row[name] for name in ("model", "optimizer", "format")])
        values = runs.loc[mine, "primary_metric"]
        assert row["n"] == 3
        assert row["mean"] == pytest.approx(values.mean(), rel=1e-15)
        assert row["sd"] == pytest.approx(np.std(values, ddof=1), rel=1e-12)


def test_factors_are_what_the_others_do_not_decide(tmp_path: Path) -> None:
    quick = loaded(tmp_path / "a", made.quickstart())
    assert tables.factors(quick) == ["model", "data", "optimizer", "format"]  # lr, width, definition follow from them
    assert {"optimizer.lr", "model.width", "recipe.format_definition"} <= set(tables.derived(quick))
    assert tables.replicates(quick) == ["seed", "data.seed"]

    sweep = [
        made.config("gpt2-micro", o, "float32", s, lr=lr)
        for o in ("adamw", "lmd")
        for lr in (0.01, 0.1)
        for s in (0, 1)
    ]
    assert tables.factors(loaded(tmp_path / "b", sweep))[4:] == ["optimizer.lr"]

    # a warm-up that is a share of the steps follows from them; one format name with two definitions does not
    plain = made.config("gpt2-micro", "adamw", "float32", 0)
    steps = [plain | {"steps": n, "warmup_steps": n // 10} for n in (100, 200)]
    assert tables.factors(loaded(tmp_path / "c", steps))[4:] == ["steps"]
    two = [
        made.config("gpt2-micro", "adamw", "own", 0, **{"recipe.format_definition": {"bias": bias}}) for bias in (1, 2)
    ]
    assert tables.factors(loaded(tmp_path / "d", two))[4:] == ["recipe.format_definition"]


def additive(runs: pd.DataFrame) -> pd.Series:
    """A made-up metric: a large effect of the seed, of the optimizer, and what each format costs each optimizer."""
    cost = runs["format"].map(made.LOST) * runs["optimizer"].map({"adamw": 1.0, "lmd": 0.5})
    return 2.0 + 10.0 * runs["seed"] + runs["optimizer"].map({"adamw": 0.0, "lmd": 0.25}) + cost


def test_pairing_cancels_the_seed(tmp_path: Path) -> None:
    runs = loaded(tmp_path, made.quickstart(4))
    runs["primary_metric"] = additive(runs)
    table = tables.differences(runs)
    expected = table["format"].map(made.LOST) * table["optimizer"].map({"adamw": 1.0, "lmd": 0.5})
    assert len(table) == 8
    assert (table["n"] == 4).all()
    for column in ("difference", "low", "high"):  # an unpaired interval would be tens wide
        np.testing.assert_allclose(table[column], expected, atol=1e-12)


def test_differences_do_not_depend_on_the_order_of_runs(tmp_path: Path) -> None:
    runs = loaded(tmp_path, made.quickstart(3))
    keys = ["model", "optimizer", "format"]
    straight = tables.differences(runs).sort_values(keys, ignore_index=True)
    shuffled = tables.differences(runs.sample(frac=1, random_state=0)).sort_values(keys, ignore_index=True)
    pd.testing.assert_frame_equal(straight, shuffled, rtol=1e-12)


def test_a_pair_that_lacks_one_side_is_excluded_and_counted(tmp_path: Path) -> None:
    lost = {("float32", 0): "diverged", ("mxfp6_e3m2", 1): "failed"}
    configs = [made.config("gpt2-micro", "adamw", format, seed) for format in made.FORMATS for seed in range(4)]
    runs = loaded(tmp_path, configs, lambda c: (lost.get((c["recipe"]["format"], c["seed"]), "finished"), None))
    table = tables.differences(runs).set_index("format")
    assert (table.loc["mxfp6_e3m2", "n"], table.loc["mxfp6_e3m2", "excluded"]) == (2, 2)
    assert (table.loc["mxfp4_e2m1", "n"], table.loc["mxfp4_e2m1", "excluded"]) == (3, 1)


def test_one_seed_has_a_difference_and_no_interval(tmp_path: Path) -> None:
    table = tables.differences(loaded(tmp_path, made.quickstart(1)))
    assert (table["n"] == 1).all()
    assert table["difference"].notna().all()
    assert table[["low", "high"]].isna().all(axis=None)


def recipe(format: str, rounding: str, seed: int) -> made.Config:
    return made.config("gpt2-micro", "adamw", format, seed, **{"recipe.rounding": rounding})


def test_the_partner_is_the_float32_machine_that_fits(tmp_path: Path) -> None:
    both = ("ties_to_even", "stochastic")
    low = [recipe("mxfp4_e2m1", rounding, seed) for rounding in both for seed in (0, 1)]
    # one float32 machine serves both roundings: rounding is of the machine, as the format is
    one = loaded(tmp_path / "one", [recipe("float32", both[0], seed) for seed in (0, 1)] + low)
    assert list(tables.differences(one)["n"]) == [2, 2]
    # of two, the one with the same rounding
    two = loaded(tmp_path / "two", [recipe("float32", rounding, seed) for rounding in both for seed in (0, 1)] + low)
    two["primary_metric"] = two["recipe.rounding"].map({"ties_to_even": 1.0, "stochastic": 2.0})
    np.testing.assert_array_equal(tables.differences(two)["difference"], [0.0, 0.0])
    # of two that both differ, none
    neither = loaded(tmp_path / "none", [recipe("float32", r, 0) for r in ("a", "b")] + [recipe("mxfp4_e2m1", "c", 0)])
    assert list(tables.differences(neither)["n"]) == [0]


def test_contrast_is_the_difference_of_the_differences(tmp_path: Path) -> None:
    runs = loaded(tmp_path, made.quickstart(3))
    table = tables.contrasts(runs)
    assert set(table["reference"]) == {"adamw"}
    assert list(table["optimizer"]) == ["lmd"] * 4
    cell = runs.set_index(["model", "optimizer", "format", "seed"])["primary_metric"]
    for row in table.to_dict("records"):
        change = [
            [cell[row["model"], o, row["format"], s] - cell[row["model"], o, "float32", s] for s in range(3)]
            for o in ("lmd", "adamw")
        ]
        np.testing.assert_allclose(
            (row["difference"], row["low"], row["high"]), tables.interval(np.subtract(*change)), rtol=1e-9
        )


def test_the_reference_takes_part_with_its_best_float32_setting(tmp_path: Path) -> None:
    configs = [
        made.config("gpt2-micro", "adamw", f, s, lr=lr) for lr in (0.1, 0.2) for f in made.FORMATS for s in (0, 1)
    ]
    configs += [made.config("gpt2-micro", "lmd", f, s, lr=0.3) for f in made.FORMATS for s in (0, 1)]
    runs = loaded(tmp_path, configs)
    runs["primary_metric"] = additive(runs) * np.where(
        runs["optimizer.lr"] == 0.1, 3.0, 1.0
    )  # 0.2 is better in float32
    table = tables.contrasts(runs)
    assert set(table["reference_settings"]) == {"lr 0.2"}
    np.testing.assert_allclose(table["difference"], -0.5 * table["format"].map(made.LOST), atol=1e-12)


def test_contrasts_are_empty_for_one_optimizer(tmp_path: Path) -> None:
    runs = loaded(tmp_path, [config for config in made.quickstart() if config["optimizer"]["name"] == "lmd"])
    assert tables.contrasts(runs).empty
    assert list(tables.contrasts(runs).columns) == list(tables.contrasts(runs.iloc[:0]).columns)


def test_effects_recover_an_additive_truth(tmp_path: Path) -> None:
    decay, noise = (0.0, 0.1, 0.3), (0.0, 0.2)
    configs = [
        made.config("gpt2-micro", "lmd", "float32", seed, weight_decay=d, noise_scale=s)
        for d in decay
        for s in noise
        for seed in range(3)
    ]
    runs = loaded(tmp_path, configs)
    runs["primary_metric"] = 5.0 * runs["seed"] + runs["optimizer.weight_decay"] - 2 * runs["optimizer.noise_scale"]
    table = tables.effects(runs)
    assert list(zip(table["factor"], table["reference"], table["level"], strict=True)) == [
        ("optimizer.weight_decay", "0", "0.1"),
        ("optimizer.weight_decay", "0", "0.3"),
        ("optimizer.noise_scale", "0", "0.2"),
    ]
    np.testing.assert_allclose(table["difference"], [0.1, 0.3, -0.4], atol=1e-12)
    assert (table["n"] == 3).all()  # seeds, not the 6 or 9 pairs
    assert list(table["runs"]) == [6, 6, 9]


def clipped(optimizer: str, seed: int, clip_norm: float | None) -> made.Config:
    return made.config("gpt2-micro", optimizer, "float32", seed) | {"clip_norm": clip_norm}


def test_none_is_a_level_of_a_setting_and_a_setting_that_is_not_there_is_none(tmp_path: Path) -> None:
    """clip_norm is of every run, noise_scale of LMD alone: None of it there is a level, its absence in AdamW is not."""
    configs = [
        clipped("lmd", seed, clip) | {"optimizer": {"name": "lmd", "lr": 0.1, "noise_scale": noise}}
        for clip in (None, 0.05)
        for noise in (None, 0.5)
        for seed in range(3)
    ]
    configs += [clipped("adamw", seed, clip) for clip in (None, 0.05) for seed in range(3)]
    runs = loaded(tmp_path, configs)
    adamw = runs["optimizer"] == "adamw"
    assert list(dict.fromkeys(runs["clip_norm"])) == ["none", "0.05"]
    assert list(dict.fromkeys(runs.loc[~adamw, "optimizer.noise_scale"])) == ["none", "0.5"]
    assert runs.loc[adamw, "optimizer.noise_scale"].isna().all()
    runs["primary_metric"] = 5.0 * runs["seed"] + runs["clip_norm"].map({"none": 0.0, "0.05": 0.25})
    table = tables.effects(runs)
    assert list(zip(table["optimizer"], table["factor"], table["reference"], table["level"], strict=True)) == [
        ("lmd", "clip_norm", "none", "0.05"),
        ("lmd", "optimizer.noise_scale", "none", "0.5"),
        ("adamw", "clip_norm", "none", "0.05"),
    ]
    np.testing.assert_allclose(table["difference"], [0.25, 0.0, 0.25], atol=1e-12)
    assert list(table["same"]) == [0, 6, 0]
    assert [summary.verdict(row) for row in table.to_dict("records")][1] == "the same in every pair"
    names = summary.varying(tables.arms(runs))
    told = [summary.arm_name(row, names) for row in tables.arms(runs).to_dict("records")]
    assert told[0] == "lmd, clip_norm none, noise_scale none" and told[-1] == "adamw, clip_norm 0.05"
    assert drawings.levels(runs["optimizer.noise_scale"]) == ["none", "0.5", "–"]
    plain = load.read(tmp_path, plain=True).runs["clip_norm"]
    assert plain.isna().sum() == 9 and set(plain.dropna()) == {0.05}
    grids = [made.write_runs(tmp_path / str(c), [clipped("lmd", s, c) for s in range(3)]) for c in (None, 1.0)]
    both = tables.effects(load.read_all(grids).runs)
    assert list(zip(both["factor"], both["reference"], both["level"], strict=True)) == [("clip_norm", "none", "1")]


def test_no_difference_is_told_only_where_every_pair_has_none() -> None:
    row = {"n": 3, "difference": 0.0, "low": 0.0, "high": 0.0, "metric": "validation_loss", "runs": 6, "excluded": 2}
    assert summary.verdict(row) == summary.verdict(row | {"same": 4}) == "the same in every pair"
    assert summary.verdict(row | {"same": 2}) == "undecided"  # pairs of a seed that cancel


def test_against_first_pairs_every_arm_with_the_first_of_its_task(tmp_path: Path) -> None:
    settings = [{}, {"noise_scale": 0.0}, {"noise_scale": 0.2, "weight_decay": 0.3}]
    configs = [
        made.config(model, "lmd", "float32", seed, **each)
        for seed in range(4)
        for model in ("gpt2-micro", "vit-micro")
        for each in settings
    ]
    diverged = made.signature(configs[4 * 3 * 2 - 1])  # the last arm of vit-micro at the last seed
    runs = loaded(
        tmp_path, configs, lambda c: ("diverged", 90) if made.signature(c) == diverged else ("finished", None)
    )
    random = np.random.default_rng(0)
    by_seed = random.normal(size=4)
    change = runs["optimizer.noise_scale"].map({0.05: 0.0, 0.0: -1.0, 0.2: 3.0}) + 0.1 * random.normal(size=len(runs))
    runs["primary_metric"] = 5.0 * by_seed[runs["seed"]] + change
    table = tables.against_first(runs)
    assert list(table["optimizer.noise_scale"]) == [0.05, 0.0, 0.2] * 2
    assert list(table["n"]) == [4, 4, 4, 4, 4, 3] and list(table["excluded"]) == [0, 0, 0, 0, 0, 1]
    firsts = table["optimizer.noise_scale"] == 0.05
    assert (table.loc[firsts, ["difference", "low", "high"]] == 0.0).all(axis=None)
    for row in table[~firsts].to_dict("records"):
        of_task = runs[(runs["model"] == row["model"]) & (runs["status"] == "finished")].set_index("seed")
        arm = of_task[of_task["optimizer.noise_scale"] == row["optimizer.noise_scale"]]["primary_metric"]
        base = of_task[of_task["optimizer.noise_scale"] == 0.05]["primary_metric"].loc[arm.index]
        expected = (arm.mean(), *tables.interval(arm - base))
        np.testing.assert_allclose([row[name] for name in ("mean", "difference", "low", "high")], expected)
    other = pd.DataFrame({"signature": runs["signature"], "other": 2 * runs["primary_metric"]})
    doubled = tables.against_first(runs, "other", other)
    np.testing.assert_allclose(doubled["difference"], 2 * table["difference"])
    assert set(doubled["metric"]) == {"other"}


def test_the_best_arm_is_by_direction_and_complete_arms_come_first() -> None:
    table = pd.DataFrame({"metric": "validation_loss", "mean": [1.0, 2.0, 3.0, math.nan], "excluded": [1, 0, 0, 2]})
    assert tables.best_arm(table).name == 1  # type: ignore[union-attr]
    assert tables.best_arm(table.assign(metric="validation_accuracy")).name == 2  # type: ignore[union-attr]
    assert tables.best_arm(table.iloc[3:]) is None
