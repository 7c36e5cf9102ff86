"""`lpsim report --watch`: written when something has changed, until all runs have ended; a kill leaves a whole file."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.command import cli, report
from experiments.command.watch import has_ended, watch
from experiments.training import record
from tests.analysis import run_folders as made
from tests.experiments import experiment_jobs

CONFIGS = [made.config("gpt2-micro", "adamw", "float32", seed) for seed in range(3)]


def test_it_is_written_when_a_run_has_changed_and_ends_with_the_last(tmp_path: Path) -> None:
    folder = made.write_grid(tmp_path / "made", CONFIGS)
    events: list[str] = []
    moves = iter(
        [
            lambda: events.append("nothing"),
            lambda: made.write_run(folder, CONFIGS[0]),
            lambda: made.write_run(folder, CONFIGS[1], "failed", 20),
            lambda: made.write_run(folder, CONFIGS[2], "unfinished", 20),
            lambda: made.write_json(folder / made.signature(CONFIGS[2]) / "result.json", {"status": "diverged"}),
        ]
    )
    watch([folder], lambda: events.append("written"), 30, lambda seconds: next(moves)() and None)
    assert events == ["written", "nothing", *["written"] * 4]
    assert next(moves, None) is None


def test_a_grid_that_may_ask_for_more_has_not_ended(tmp_path: Path) -> None:
    folder = made.write_runs(tmp_path / "made", CONFIGS[:1])
    events: list[str] = []
    with record.exclusive(folder / ".lock", "busy"):
        assert not has_ended(folder)
        with pytest.raises(InterruptedError):
            watch([folder], lambda: events.append("written"), 30, interrupt)
    watch([folder], lambda: events.append("written"), 30, interrupt)
    assert events == ["written", "written"]


def interrupt(seconds: float) -> None:
    raise InterruptedError


def test_the_command_writes_the_report_and_can_be_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made.write_runs(tmp_path / "made", CONFIGS[:1])
    monkeypatch.setattr(report, "written", lambda folders, output, tables: folders[0] / "report.html")
    assert cli.main(["report", str(folder), "--watch", "5"]) == 0
    assert capsys.readouterr().out.startswith(f"{folder}/report.html; it is written anew until ")

    def ctrl_c(*_: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "written", ctrl_c)
    assert cli.main(["report", str(folder), "--watch"]) == 130
    assert "the report stays as it was last written" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "made.py"), "--watch"]) == 2  # no grid, or none that has begun
    without = capsys.readouterr().err
    assert f"made.py holds no grid (no grid.json); there are: {folder}" in without and without.count("\n") == 1
    assert cli.main(["report", str(folder), "--watch", "0"]) == 2
    assert "--watch takes a positive number of seconds, not 0" in capsys.readouterr().err


def test_a_kill_between_writing_and_renaming_leaves_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    code = (
        "import os, signal, sys; from pathlib import Path; from analysis.page import files\n"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.replace(Path(sys.argv[1]), b'new' * 100)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=experiment_jobs.environment())
    assert done.returncode == -9 and path.read_text() == "old"
