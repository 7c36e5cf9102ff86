"""What the page's script is told of the runs: curves that stay short, commands that repeat one run, no NaN."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import load
from analysis.page import explore_data
from analysis.statistics import tables
from tests.analysis import run_folders as made


def told(folder: Path) -> explore_data.Data:
    results = load.read(folder)
    data = explore_data.data(results, tables.arms(results.runs))
    json.dumps(data, allow_nan=False)
    return data


def test_a_run_that_diverged_has_a_curve_and_no_final_value(tmp_path: Path) -> None:
    configs = [made.config("gpt2-micro", "adamw", "float32", seed) for seed in (0, 1)]
    made.write_runs(tmp_path, configs, lambda config: ("diverged", 60) if config["seed"] else ("finished", None))
    (task,) = told(tmp_path)["tasks"]
    fine, lost = task["runs"]
    assert (fine["status"], fine["step"], lost["status"], lost["step"]) == ("finished", 400, "diverged", 60)
    assert fine["value"] == pytest.approx(made.metric_lines(configs[0])[-2]["loss"], rel=1e-4)
    assert lost["value"] is None and lost["cause"] == "train loss is NaN"
    (loss,) = [curve for curve in task["curves"] if curve["name"] == "training loss"]
    assert loss["mean_of"] == 2
    steps = [loss["steps"][place][: len(values)] for place, values in loss["lines"]]
    assert steps[0] == [1.5 + 2 * k for k in range(200)]
    assert steps[1] == [*steps[0][:29], 59]  # of 59 finite losses the last stands alone


def test_a_curve_keeps_its_mean_and_few_points() -> None:
    """300 runs of 1,000 steps: at most 133 points a run, the mean of as many neighbours each."""
    random = np.random.default_rng(0)
    runs = pd.DataFrame({"signature": [f"s{k}" for k in range(300)]})
    each = pd.DataFrame({"step": range(1, 1001), "split": "train", "metric": "loss"})
    metrics = pd.concat([each.assign(signature=name, value=random.normal(5, 1, 1000)) for name in runs["signature"]])
    (curve,) = explore_data.curves(runs, metrics)
    assert curve["mean_of"] == 8 and len(curve["steps"]) == 1
    assert all(len(values) == 125 for _, values in curve["lines"])
    means = metrics.groupby("signature", sort=False)["value"].mean()
    assert [np.mean(values) for _, values in curve["lines"]] == pytest.approx(list(means), rel=1e-4)


def test_runs_have_the_levels_and_settings_of_their_configs(tmp_path: Path) -> None:
    configs = made.quickstart(1)
    made.write_runs(tmp_path, configs)
    by_signature = {made.signature(config): config for config in configs}
    for task in told(tmp_path)["tasks"]:
        assert [each["name"] for each in task["colourings"]] == ["arm", "optimizer", "format"]
        for run in task["runs"]:
            config = by_signature[run["signature"]]
            levels = [each["levels"][place] for each, place in zip(task["colourings"], run["levels"], strict=True)]
            assert levels == [run["arm"], config["optimizer"]["name"], config["recipe"]["format"]]
            settings = dict(task["constant"]) | dict(zip(task["columns"], run["settings"], strict=True))
            assert settings["optimizer.lr"] == f"{config['optimizer']['lr']:g}"
            assert (settings["model"], settings["seed"]) == (config["model"]["name"], "0")


def test_the_command_sets_one_run_aside_and_runs_its_own_grid(tmp_path: Path) -> None:
    half, whole = tmp_path / "half a grid", tmp_path / "whole"
    configs = made.quickstart(1)
    made.write_runs(half, configs[:1])
    made.write_runs(whole, configs[1:2])
    grid = json.loads((whole / "grid.json").read_text()) | {"argv": ["lpsim", "run", "my grid.py", "--jobs", "2"]}
    made.write_json(whole / "grid.json", grid)
    results = load.read_all([half, whole])
    first, second = (made.signature(config) for config in configs[:2])
    assert explore_data.command(results, first) == (
        f"mv '{half}/{first}' '{half}.{first}' && lpsim run grids/made_up.py"
    )
    assert explore_data.command(results, second) == (
        f"mv {whole}/{second} {whole}.{second} && lpsim run 'my grid.py' --jobs 2"
    )
    once = ["lpsim", "run", "--only", "seed=1", "g.py", "--only=a=b", "--retry", "--dry-run", "--report", "--runs", "r"]
    made.write_json(whole / "grid.json", grid | {"argv": once})
    assert explore_data.command(load.read(whole), second) == (
        f"mv {whole}/{second} {whole}.{second} && lpsim run g.py --runs r"
    )
    made.write_json(whole / "grid.json", grid | {"argv": []})
    assert explore_data.command(load.read(whole), second) is None
