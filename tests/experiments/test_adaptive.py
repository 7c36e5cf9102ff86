"""Adaptive grids: what they receive, and that a kill at any time changes nothing."""

import json
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.command import cli
from experiments.grids import load_grid
from experiments.grids.adaptive import Adaptive, Outcome, Rounds
from experiments.grids.source_files import GridError, SourceError
from experiments.running.executors import StoppableExecutor
from experiments.running.grid import Row, run_grid
from experiments.training.config import Config
from experiments.training.optimizers import SGD
from tests.experiments.experiment_jobs import Here, one_thread, tiny_config
from tests.experiments.test_executors import submitit_executor
from tests.experiments.test_grid import contents


@pytest.fixture(scope="module", autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def config(lr: float, **fields: Any) -> Config:
    small = tiny_config(steps=3, warmup_steps=1, **fields)
    return small if "optimizer" in fields else replace(small, optimizer=replace(small.optimizer, lr=lr))


def halving() -> Rounds:
    """Three rounds around the better of two rates."""
    rates = [0.01, 0.02]
    for _ in range(3):
        outcomes = yield [config(lr) for lr in rates]
        best = min(outcomes, key=lambda outcome: outcome.final["validation_loss"]).config.optimizer.lr
        rates = [best * 5, best / 3]


def adaptive(play: Any) -> Adaptive:
    return Adaptive(play, Path("g.py"))


class Killed(BaseException):
    """Ends the grid as a signal does: nothing in it catches this."""


class KilledAfter(Here):
    """Ends the grid at the run after so many."""

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.left = runs

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.left == 0:
            raise Killed
        self.left -= 1
        return super().submit(fn, *args, **kwargs)


class LastFirst(StoppableExecutor):
    """Computes what was submitted from the last to the first, when the first is asked for."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, fn, args))
        if len(self.waiting) == 2:  # a round of halving
            for each, function, given in reversed(self.waiting):
                each.set_result(function(*given))
            self.waiting.clear()
        return future

    def stop(self) -> None:
        pass


def test_each_round_sees_the_outcomes_of_the_one_before(tmp_path: Path) -> None:
    seen: list[list[Outcome]] = []

    def play() -> Rounds:
        seen.append(list((yield [config(0.01), config(1e4, optimizer=SGD(1e4, 0.0), clip_norm=None)])))
        seen.append(list((yield [config(0.03)])))

    rows = run_grid(adaptive(play), tmp_path / "g", Here())
    first, second = seen[0], seen[-1]
    assert [outcome.config for outcome in first] == [
        config(0.01),
        config(1e4, optimizer=SGD(1e4, 0.0), clip_norm=None),
    ]
    assert [(o.signature, o.status) for o in [*first, *second]] == [(row.signature, row.status) for row in rows]
    assert [row.status for row in rows] == ["finished", "diverged", "finished"]
    result = json.loads((tmp_path / "g" / first[0].signature / "result.json").read_text())
    assert first[0].final == result["final"]
    assert json.loads((tmp_path / "g" / "grid.json").read_text())["signatures"] == [row.signature for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("whole") / "g"
    rows = run_grid(adaptive(halving), folder, Here())
    return [replace(row, skipped=False) for row in rows], contents(folder), (folder / "grid.json").read_text()


def test_killed_before_each_run_it_ends_as_undisturbed(
    tmp_path: Path, undisturbed: tuple[list[Row], dict[str, Any], str]
) -> None:
    rows, runs, described = undisturbed
    assert len(rows) == 6
    for kill in range(6):
        with pytest.raises(Killed):
            run_grid(adaptive(halving), tmp_path / "g", KilledAfter(min(kill, 1)))
    run_grid(adaptive(halving), tmp_path / "g", KilledAfter(1))
    last = Here()
    again = run_grid(adaptive(halving), tmp_path / "g", last)
    assert last.submitted == 0 and [replace(row, skipped=False) for row in again] == rows
    assert contents(tmp_path / "g") == runs and (tmp_path / "g" / "grid.json").read_text() == described


def test_the_order_in_which_runs_end_is_not_seen(
    tmp_path: Path, undisturbed: tuple[list[Row], dict[str, Any], str]
) -> None:
    assert run_grid(adaptive(halving), tmp_path / "g", LastFirst()) == undisturbed[0]


def test_a_scheduler_runs_its_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def play() -> Rounds:
        (outcome,) = yield [config(0.01)]
        yield [config(outcome.final["validation_loss"] / 100)]

    here = run_grid(adaptive(play), tmp_path / "here" / "g", Here())
    with submitit_executor(tmp_path / "jobs", monkeypatch) as scheduler:
        assert run_grid(adaptive(play), tmp_path / "g", scheduler) == here
    assert [row.status for row in here] == ["finished", "finished"]


def test_a_failed_run_is_tried_again_before_the_grid_goes_on(
    tmp_path: Path, undisturbed: tuple[list[Row], dict[str, Any], str]
) -> None:
    class FirstDies(Here):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            if self.submitted:
                return super().submit(fn, *args, **kwargs)
            self.submitted = 1
            future: Future[Any] = Future()
            future.set_exception(RuntimeError("no memory"))
            return future

    rows = run_grid(adaptive(halving), tmp_path / "g", FirstDies())
    assert [row.status for row in rows] == ["failed", "finished"]
    rows = run_grid(adaptive(halving), tmp_path / "g", Here())
    assert [replace(row, skipped=False) for row in rows] == undisturbed[0]


def test_telemetry_can_be_asked_for_and_changes_no_result(
    tmp_path: Path, undisturbed: tuple[list[Row], dict[str, Any], str]
) -> None:
    rows = run_grid(adaptive(halving), tmp_path / "g", Here(), telemetry_every=2)
    assert [row.final for row in rows] == [row.final for row in undisturbed[0]]
    assert all((tmp_path / "g" / row.signature / "telemetry.parquet").exists() for row in rows)


def test_a_grid_that_depends_on_more_than_its_results_is_refused_before_anything_runs(tmp_path: Path) -> None:
    rates = iter((0.01, 0.02, 0.03))

    def play() -> Rounds:
        yield [config(next(rates))]

    executor = Here()
    with pytest.raises(GridError, match=r"g\.py: the same results gave two different rounds"):
        run_grid(adaptive(play), tmp_path / "g", executor)
    assert executor.submitted == 0


TOP = "from tests.experiments.test_adaptive import config, halving\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def grid():\n    yield []\n", r"g\.py: grid\(\) yielded an empty round"),
        ("def grid():\n    yield [3]\n", r"g\.py: grid\(\) must yield Config objects, it yielded 3"),
        (
            "def grid():\n    yield [config(0.01)]\n    yield config(0.02)\n",
            r"g\.py: grid\(\) began with a list of configs, then yielded Config\(",
        ),
        ("def grid():\n    yield [config(0.01)]\n    yield [config(0.01)]\n", r"the grid g has the same run twice: "),
        ("def grid():\n    r = yield [config(0.01)]\n    r[7]\n", r"g\.py:4: IndexError: "),
        ("def grid():\n    return [[config(0.01)]]\n", r"g\.py: grid\(\) holds lists of configs"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "g.py").write_text(TOP + text)
    with pytest.raises(SourceError, match=message) as caught:
        run_grid(load_grid(str(tmp_path / "g.py"))[1], tmp_path / "runs" / "g", Here())
    assert "\n" not in str(caught.value)


def test_the_command_runs_it_in_processes_reports_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "g.py").write_text(TOP + "def grid():\n    yield from halving()\n")
    run = ["run", str(tmp_path / "g.py"), "--runs", str(tmp_path), "--report"]
    assert cli.main([*run, "--jobs", "2"]) == 0
    assert "6 runs: 6 finished (6 of them run now)" in capsys.readouterr().out
    assert cli.main([*run, "--jobs", "1"]) == 0
    assert "6 runs: 6 finished (0 of them run now)" in capsys.readouterr().out
    assert (tmp_path / "g" / "report.html").exists()
    broken = TOP + "def grid():\n    yield [config(0.01, device='abacus')]\n    yield [config(0.02)]\n"
    (tmp_path / "g.py").write_text(broken)
    assert cli.main([*run, "--jobs", "1"]) == 1
    assert "what the grid asks for next depends on these" in capsys.readouterr().out
