"""`lpsim runs`: every run of the grid is a row, whatever became of it; rows are filtered, ordered and written."""

import csv
import io
from pathlib import Path

import pytest

from analysis import load
from experiments.command import cli
from tests.analysis import run_folders as made


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Eight runs: six listed ones that finished, diverged, failed or are under way, two not started."""
    configs = [made.config("gpt2-micro", o, f, s) for o in ("adamw", "lmd") for f in made.FORMATS[:2] for s in (0, 1)]
    folder = made.write_grid(tmp_path / "made", configs)
    outcomes = [("finished", None), ("unfinished", 35), ("diverged", 60), ("failed", 20), *2 * [("finished", None)]]
    for config, (status, step) in zip(configs, outcomes, strict=False):
        made.write_run(folder, config, status, step)
    return folder


def table(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, str]]:
    assert cli.main(["runs", *arguments, "--csv"]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_every_run_of_the_grid_is_a_row(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(capsys, str(grid))
    assert list(rows[0]) == [
        *("status", "step", "optimizer", "format", "seed", "data.seed"),
        *("final.validation_loss", "final.train_loss", "path"),
    ]
    states = ["finished", "unfinished", "diverged", "failed", "finished", "finished", "not started", "not started"]
    assert [row["status"] for row in rows] == states
    runs = load.runs(grid)
    assert [row["path"] for row in rows[:6]] == [str(grid / name) for name in runs["signature"]]
    assert float(rows[0]["final.validation_loss"]) == runs.loc[0, "final.validation_loss"]
    assert [rows[1]["final.validation_loss"], rows[1]["step"]] == ["", "35"]


def test_rows_are_chosen_and_ordered(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = table(capsys, str(grid), "--where", "optimizer=adamw", "--where", "seed=0", "--columns", "format", "seed")
    assert chosen == [{"format": "float32", "seed": "0"}, {"format": "mxfp6_e3m2", "seed": "0"}]
    by_loss = ["--columns", "final.validation_loss", "--sort", "final.validation_loss"]
    up = [row["final.validation_loss"] for row in table(capsys, str(grid), *by_loss)]
    present = [float(value) for value in up if value]
    assert present == sorted(present) and up[len(present) :] == [""] * (8 - len(present)) and present
    down = [row["final.validation_loss"] for row in table(capsys, str(grid), *by_loss, "--descending")]
    assert down == up[: len(present)][::-1] + up[len(present) :]


def test_the_table_in_a_terminal(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (grid / load.runs(grid)["signature"].iloc[5] / "config.json").write_text("{")
    assert cli.main(["runs", str(grid), "--where", "status!=not started"]) == 0
    output = capsys.readouterr()
    header, _, *rows, last = output.out.splitlines()
    assert header.split()[:5] == ["status", "step", "optimizer", "format", "seed"] and len(rows) == 5
    assert last == "5 runs: 2 finished, 1 unfinished, 1 diverged, 1 failed"
    assert "is left out: config.json is torn or not JSON" in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--where", "optimizer=sgd"], "--where optimizer=sgd: no run has that value; there are: "),
        (["--sort", "loss"], "no field 'loss'; there are: "),
        (["--columns", "optimiser"], "no field 'optimiser'; there are: optimizer, "),
    ],
)
def test_a_mistake_is_one_line(
    grid: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["runs", str(grid), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lpsim: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("condition", "count"), [("seed!=1", 3), ("seed=0", 3), ("status!=finished", 5), ("step>0", 6)]
)
def test_a_run_that_has_not_started_meets_no_condition_on_what_is_not_known_of_it(
    grid: Path, capsys: pytest.CaptureFixture[str], condition: str, count: int
) -> None:
    """Nor its negation. Its status is known."""
    assert cli.main(["runs", str(grid), "--where", condition, "--csv"]) == 0
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 1 + count
    assert ("2 runs that have not started are left out" in output.err) == ("status" not in condition)


@pytest.mark.parametrize("condition", ["seed=7", "seed=none", "sed=0", "seed>7"])
def test_a_value_that_no_run_has_yet_may_be_that_of_one_not_started(
    grid: Path, capsys: pytest.CaptureFixture[str], condition: str
) -> None:
    assert cli.main(["runs", str(grid), "--where", condition]) == 2
    error = capsys.readouterr().err
    assert "2 runs that have not started are left out" in error and "none;" not in error


def test_a_grid_whose_runs_are_all_damaged_says_so(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (grid / "grid.json").write_text("{")
    for path in grid.glob("*/config.json"):
        path.write_text("{")
    assert cli.main(["runs", str(grid)]) == 0
    output = capsys.readouterr()
    assert "0 runs" in output.out and output.err.count("is left out") == 7


def test_a_grid_where_nothing_has_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.write_grid(tmp_path / "made", made.quickstart(1)[:2])
    assert [row["status"] for row in table(capsys, str(folder))] == ["not started", "not started"]
    assert cli.main(["runs", str(folder), "--where", "seed=0"]) == 2
    assert "seed=0: no run has started; 2 runs that have not started are left out" in capsys.readouterr().err
    assert cli.main(["runs", str(tmp_path)]) == 2
    assert "no grid folder" in capsys.readouterr().err
