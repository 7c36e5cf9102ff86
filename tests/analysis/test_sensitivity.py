"""Laws of the sensitivity: a diverged run never makes its arm better, and nothing else changes."""

from pathlib import Path

import pandas as pd

from analysis import load
from analysis.page import summary
from analysis.page.worst import section
from analysis.statistics import tables
from analysis.statistics.sensitivity import COMPARISONS, sensitivity, worst_case
from tests.analysis import run_folders as made


def lossy(folder: Path) -> pd.DataFrame:
    """Runs of which AdamW's in mxfp4_e2m1 with seed 1 diverged, on both models."""

    def outcome(config: made.Config) -> tuple[str, int | None]:
        where = config["optimizer"]["name"], config["recipe"]["format"], config["seed"]
        return ("diverged", 60) if where == ("adamw", "mxfp4_e2m1", 1) else ("finished", None)

    return load.runs(made.write_runs(folder, made.quickstart(3), outcome))


def test_a_diverged_run_is_the_worst_of_its_task_and_no_other_run_changes(tmp_path: Path) -> None:
    runs = lossy(tmp_path / "grid")
    worst = worst_case(runs)
    lost = runs["status"] == "diverged"
    assert lost.sum() == 2
    assert tables.counted(worst).all()
    pd.testing.assert_frame_equal(worst[~lost], runs[~lost])
    for row in worst[lost].to_dict("records"):
        mine = runs.loc[tables.counted(runs) & (runs["model"] == row["model"]), "primary_metric"]
        assert row["primary_metric"] == (mine.min() if tables.higher_is_better(row["metric"]) else mine.max())


def test_no_arm_is_better_for_a_diverged_run(tmp_path: Path) -> None:
    runs = lossy(tmp_path / "grid")
    both = tables.arms(runs).merge(tables.arms(worst_case(runs)), on=tables.factors(runs), suffixes=("", "_worst"))
    for row in both.to_dict("records"):
        sign = -1 if tables.higher_is_better(row["metric"]) else 1
        assert sign * (row["mean_worst"] - row["mean"]) >= 0


def test_every_comparison_has_a_row_that_counts_all_seeds(tmp_path: Path) -> None:
    runs = lossy(tmp_path / "grid")
    table = sensitivity(runs)
    assert len(table) == len(tables.differences(runs)) + len(tables.contrasts(runs))
    assert set(table["worst_n"]) == {3}
    touched = (table["optimizer"] == "adamw") | (table["comparison"] == "contrast")
    touched &= table["format"] == "mxfp4_e2m1"
    assert set(table.loc[touched, "n"]) == {2}
    others = table[~touched]
    pd.testing.assert_series_equal(others["difference"], others["worst_difference"], check_names=False)


def test_arms_that_a_setting_alone_tells_apart_keep_their_own_values(tmp_path: Path) -> None:
    """Of two learning rates one diverges; the other's comparisons stay, and each row says whose it is."""
    configs = [
        made.config("gpt2-micro", "adamw", format, seed, lr=lr)
        for lr in (0.005, 1e6)
        for format in ("float32", "mxfp4_e2m1")
        for seed in range(3)
    ]
    lost = lambda config: ("diverged", 60) if config["optimizer"]["lr"] > 1 else ("finished", None)  # noqa: E731
    runs = load.runs(made.write_runs(tmp_path, configs, lost))
    worst = {name: table(worst_case(runs)) for name, table in COMPARISONS.items()}
    table = sensitivity(runs)
    for row in table[table["comparison"] == "difference"].to_dict("records"):
        mine = worst["difference"].query("`optimizer.lr` == @row['optimizer.lr']").iloc[0]
        assert row["worst_difference"] == mine["difference"]
    fine = table[table["optimizer.lr"] == 0.005]
    assert len(fine) == 1 and (fine["difference"] == fine["worst_difference"]).all()
    page = "".join(section(table))
    assert summary.SAME not in page  # of the rate that diverged, the worst value stands on both sides
    assert "adamw, mxfp4_e2m1, lr 0.005 − float32" in page and "adamw, mxfp4_e2m1, lr 1e+06 − float32" in page


def test_a_grid_without_divergence_has_no_rows(tmp_path: Path) -> None:
    assert sensitivity(load.runs(made.write_runs(tmp_path / "grid", made.quickstart(2)))).empty
    assert sensitivity(load.runs(made.write_grid(tmp_path / "none", made.quickstart(2)))).empty
