"""`lpsim run --dry-run` and `lpsim new`: what they say is what a run then finds."""

import re
from pathlib import Path

import pytest

from experiments.command import cli
from experiments.grids import load_grid

GRID = """
from tests.experiments.experiment_jobs import tiny_config


def grid():
    for seed in range(3):
        yield tiny_config(steps=4, warmup_steps=1, seed=seed)
"""


def test_a_dry_run_counts_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, runs = tmp_path / "small.py", tmp_path / "runs"
    run = ["run", str(file), "--runs", str(runs), "--jobs", "1"]
    file.write_text(GRID.replace("range(3)", "range(1)"))
    assert cli.main(run) == 0
    before = sorted(runs.rglob("*"))
    file.write_text(GRID)
    capsys.readouterr()
    assert cli.main([*run, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "3 runs: 1 finished, 2 not started" in text
    assert re.search(r"the 2 left take about \d+ s with --jobs 1, by 1 finished", text)
    assert sorted(runs.rglob("*")) == before
    assert cli.main(run) == 0
    assert "3 runs: 3 finished (2 of them run now)" in capsys.readouterr().out


def test_a_grid_that_has_changed_says_what_it_no_longer_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", str(tmp_path / "small.py"), "--runs", str(tmp_path / "runs"), "--jobs", "1"]
    for size, said in ((4, ""), (2, "  3 more run folders there are of other configs or other code")):
        (tmp_path / "small.py").write_text(GRID.replace("seed=seed", f"seed=seed, batch_size={size}"))
        assert cli.main(run) == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        (GRID.replace("seed=seed", "seed=0"), [], "has the same run twice"),
        (GRID.replace("range(3)", "range(0)"), [], "has no runs"),
        (GRID, ["--jobs", "0"], "--jobs must be at least 1, is 0"),
        ("def grid():\n    return None\n", [], "grid() must yield or return Configs, in a list, say; it gave NoneType"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(
    grid: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.py").write_text(grid)
    for more in (["--dry-run"], []):
        run = ["run", str(tmp_path / "small.py"), "--runs", str(tmp_path / "runs"), *options, *more]
        assert cli.main(run) == 2
        assert message.removeprefix("--") in capsys.readouterr().err


def test_only_some_of_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.py").write_text(GRID)
    run = ["run", str(tmp_path / "small.py"), "--runs", str(tmp_path / "runs"), "--jobs", "1"]
    assert cli.main([*run, "--only", "seed=1", "--only", "seed=2", "--dry-run"]) == 0
    assert "2 runs: 2 not started" in capsys.readouterr().out
    assert cli.main([*run, "--only", "optimizer.lrr=0.01"]) == 2
    assert capsys.readouterr().err.startswith(
        "lpsim: --only optimizer.lrr=0.01: no field 'optimizer.lrr'; there are: optimizer.lr, "
    )
    assert cli.main([*run, "--only", "optimizer.lr=0.02"]) == 2
    assert "--only optimizer.lr=0.02: no run has that value; there are: 0.01" in capsys.readouterr().err
    assert cli.main([*run, "--only", "seed=1"]) == 0
    output = capsys.readouterr().out
    assert "1 runs: 1 finished (1 of them run now)\n  --only left out 2 runs of the grid\n" in output
    assert cli.main([*run, "--dry-run"]) == 0
    assert "3 runs: 2 not started, 1 finished" in capsys.readouterr().out


def test_a_dry_run_of_an_adaptive_grid_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "looks.py").write_text(
        GRID.replace("yield tiny_config(steps=4, warmup_steps=1, seed=seed)", "yield [tiny_config(seed=seed)]")
    )
    assert cli.main(["run", str(tmp_path / "looks.py"), "--runs", str(tmp_path), "--dry-run"]) == 2
    assert "looks looks at its runs to decide on more" in capsys.readouterr().err


def test_a_new_grid_is_one_and_none_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "mine"]) == 0
    configs = load_grid("mine.py")[1]
    assert isinstance(configs, list) and len(configs) == 18
    assert len({config.signature() for config in configs}) == 18
    (tmp_path / "mine.py").write_text("kept")
    assert cli.main(["new", "mine"]) == 2 and "mine.py exists" in capsys.readouterr().err
    assert (tmp_path / "mine.py").read_text() == "kept"
    assert cli.main(["new", "my-grid"]) == 2 and "no name for a grid file" in capsys.readouterr().err
