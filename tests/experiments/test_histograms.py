"""The record of a run's weights: every weight is counted, and rounded ones are measured over their block's scale."""

import json
import math
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from analysis import load
from experiments.running.grid import run_grid
from experiments.training.config import forward
from experiments.training.histograms import recorded_steps
from experiments.training.record import RunRecord
from experiments.training.train import build
from tests.experiments.experiment_jobs import one_thread, tiny_config
from tests.experiments.test_grid import Here


def test_weights_are_recorded_at_start_middle_and_end(tmp_path: Path) -> None:
    configs = [tiny_config(recipe=forward(name)) for name in ("mxfp4_e2m1", "float32")]
    with one_thread():
        rows = run_grid(configs, tmp_path / "g", Here())
    results = load.read(tmp_path / "g")
    assert results.problems.empty
    table = results.weights.groupby(["signature", "of", "step"])["count"].sum()
    model, _ = build(configs[0])
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert recorded_steps(configs[0]) == set(table[rows[0].signature, "all"].index)
    assert set(table[rows[0].signature, "all"]) == {matrices} == set(table[rows[1].signature, "all"])
    assert (rows[1].signature, "rounded") not in table.index.droplevel("step")
    rounded = results.weights[results.weights["of"] == "rounded"]
    assert 0 < table[rows[0].signature, "rounded"].iloc[0] <= matrices
    largest = rounded.loc[rounded["count"] > 0, "log2"].max()
    assert 2.0 <= largest < 3.0  # MX's rule: the largest of a block lies in [4, 8) scales
    pd.testing.assert_series_equal(
        results.weight_values["value"], pd.Series([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]), check_names=False
    )
    document = json.loads((tmp_path / "g" / rows[0].signature / "result.json").read_text())
    assert results.environment["peak_memory_mb"].iloc[0] == document["peak_memory_mb"] > 0


def test_what_was_recorded_after_the_checkpoint_is_replaced(tmp_path: Path) -> None:
    with closing(RunRecord(tmp_path)) as record:
        for step in (0, 5, 10, 5):
            record.write_weights(step, [{"of": "all", "zeros": 0, "log2": [], "count": []}], [], 0.25)
    assert [each["step"] for each in json.loads((tmp_path / "weights.json").read_text())["histograms"]] == [0, 5]


@pytest.mark.parametrize(
    "damage", ['{"torn', '{"version": 1}', '{"version": 1, "width": 1, "values": [], "histograms": [{}]}']
)
def test_a_damaged_record_is_a_problem_and_the_run_is_kept(damage: str, tmp_path: Path) -> None:
    with one_thread():
        (row,) = run_grid([tiny_config()], tmp_path / "g", Here())
    (tmp_path / "g" / row.signature / "weights.json").write_text(damage)
    results = load.read(tmp_path / "g")
    (problem,) = results.problems.to_dict("records")
    assert problem["folder"] == row.signature and problem["reason"].startswith("weights.json ")
    assert results.weights.empty and math.isfinite(results.runs["primary_metric"].iloc[0])
