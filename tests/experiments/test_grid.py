"""Grids: skip what is done, resume what was interrupted, go on after a failure; refuse unusable folders."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis import load
from experiments.command.run import summary
from experiments.grids import GridError, load_claims, load_grid
from experiments.grids.claims import resolve
from experiments.grids.source_files import SourceError
from experiments.running import grid as grids
from experiments.running.grid import Row, labels, run_grid
from experiments.training import record, train
from experiments.training.config import Config
from experiments.training.data import TokenFiles
from experiments.training.optimizers import LMD, SGD
from experiments.training.record import RunFolderError
from tests.experiments import experiment_jobs
from tests.experiments.experiment_jobs import Here, one_thread, tiny_config, tiny_grid, wait_until


@pytest.fixture(scope="module", autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def statuses(rows: list[Row]) -> list[str]:
    return [row.status for row in rows]


def contents(folder: Path) -> dict[str, Any]:
    """Metrics and results of every run, times left out."""

    def timeless(value: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in value.items() if k not in ("time_ms", "time_s", "peak_memory_mb")}

    runs = {}
    for result in sorted(folder.glob("*/result.json")):
        lines = (result.parent / "metrics.jsonl").read_text().splitlines()
        runs[result.parent.name] = (
            timeless(json.loads(result.read_text())),
            [timeless(json.loads(line)) for line in lines],
        )
    return runs


def test_a_grid_leaves_its_folder_and_the_second_time_runs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    configs = [tiny_config(seed=seed) for seed in range(2)]
    executor = Here()
    rows = run_grid(configs, folder, executor, argv=["lpsim", "run"])
    assert statuses(rows) == ["finished", "finished"] and executor.submitted == 2
    assert [row.signature for row in rows] == [replace(config, grid="small").signature() for config in configs]
    before = contents(folder)
    assert before.keys() == {row.signature for row in rows}
    described = json.loads((folder / "grid.json").read_text())
    assert described == {
        "version": 1,
        "grid": "small",
        "source": None,
        "source_text": None,
        "signatures": [row.signature for row in rows],
        "argv": ["lpsim", "run"],
    }
    again = run_grid(configs, folder, executor)
    assert executor.submitted == 2 and all(row.skipped for row in again)
    assert [replace(row, skipped=False) for row in again] == rows
    assert contents(folder) == before


def test_a_run_records_what_ran_where(tmp_path: Path) -> None:
    row = run_grid([tiny_config()], tmp_path / "g", Here())[0]
    folder = tmp_path / "g" / row.signature
    assert Config.from_dict(json.loads((folder / "config.json").read_text())) == tiny_config(grid="g")
    environment = json.loads((folder / "env.json").read_text())
    assert environment["data_sha256"] == tiny_config().data.fingerprint()
    assert environment["threads"] == 1


def test_a_failing_run_is_a_row_and_is_tried_again_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / "g"
    good = tiny_config()
    bad = tiny_config(batch_size=4, data=replace(good.data, validation_windows=9))
    broken = replace(bad, device="abacus")
    rows = run_grid([good, broken, bad], folder, Here())
    assert statuses(rows) == ["finished", "failed", "finished"]
    assert rows[1].cause is not None and "RuntimeError" in rows[1].cause and "abacus" in rows[1].cause
    result = json.loads((folder / rows[1].signature / "result.json").read_text())
    assert result["status"] == "failed" and "Traceback" in result["traceback"]
    executor = Here()
    again = run_grid([good, broken, bad], folder, executor)
    assert [replace(row, skipped=False) for row in again] == rows and executor.submitted == 0
    assert "what failed is tried again by the same command with --retry-failed" in summary(again)
    retried = run_grid([good, broken, bad], folder, executor, retry_failed=True)
    assert statuses(retried) == statuses(rows) and executor.submitted == 1


def test_data_that_are_missing_or_do_not_fit_are_told_once_and_before_any_run(tmp_path: Path) -> None:
    """Where jobs run on this machine; elsewhere the data may be where the jobs are, and each run tells."""
    folder = str(tmp_path / "tokens")
    configs = [tiny_config(data=TokenFiles(folder), seed=seed) for seed in range(5)]
    executor = Here()
    with pytest.raises(GridError, match=r"cannot be read: token-files: cannot map .*train\.bin"):
        run_grid(configs, tmp_path / "g", executor)
    (tmp_path / "tokens").mkdir()
    for name in ("train", "val"):
        (tmp_path / "tokens" / f"{name}.bin").write_bytes(bytes(4))
    with pytest.raises(GridError, match="do not fit: the training stream has 2 tokens"):
        run_grid(configs, tmp_path / "g", executor)
    assert executor.submitted == 0 and not list((tmp_path / "g").glob("*/"))
    executor.here = False
    rows = run_grid(configs, tmp_path / "g", executor)
    assert statuses(rows) == ["failed"] * 5
    assert summary(rows).count("the training stream has 2 tokens") == 3 and "2 more, for the same" in summary(rows)


def test_a_failed_run_that_is_tried_again_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[float] = []

    def breaks(config: Config, loss: float, *_: Any) -> None:
        steps.append(loss)
        if len(steps) == 10:
            raise MemoryError("just then")

    with monkeypatch.context() as patch:
        patch.setattr(train, "divergence", breaks)
        (failed,) = run_grid([tiny_config()], tmp_path / "g", Here())
    assert (failed.status, failed.cause, failed.step) == ("failed", "MemoryError: just then", 9)
    (row,) = run_grid([tiny_config()], tmp_path / "g", Here(), retry_failed=True)
    assert (row.status, row.skipped) == ("finished", False)
    run_grid([tiny_config()], tmp_path / "whole" / "g", Here())
    assert contents(tmp_path / "g") == contents(tmp_path / "whole" / "g")


def test_some_runs_only_leave_a_grid_that_knows_all_and_goes_on(tmp_path: Path) -> None:
    configs = [tiny_config(steps=3, warmup_steps=1, seed=seed) for seed in range(3)]
    names = [replace(config, grid="g").signature() for config in configs]
    executor = Here()
    rows = run_grid(configs, tmp_path / "g", executor, only=names[1:2])
    assert [(row.signature, row.status) for row in rows] == [(names[1], "finished")] and executor.submitted == 1
    assert json.loads((tmp_path / "g" / "grid.json").read_text())["signatures"] == names
    assert load.read(tmp_path / "g").not_started == [names[0], names[2]]
    rows = run_grid(configs, tmp_path / "g", executor)
    assert [(row.status, row.skipped) for row in rows] == [("finished", s) for s in (False, True, False)]
    assert executor.submitted == 3


def test_a_diverged_run_is_done(tmp_path: Path) -> None:
    config = tiny_config(optimizer=SGD(lr=1e4, weight_decay=0.0), clip_norm=None)
    executor = Here()
    row = run_grid([config], tmp_path / "g", executor)[0]
    assert row.status == "diverged" and row.cause is not None and 0 < row.step < 12
    assert run_grid([config], tmp_path / "g", executor) == [replace(row, skipped=True)]
    assert executor.submitted == 1


def test_a_run_whose_folder_cannot_be_written_is_a_failed_row(tmp_path: Path) -> None:
    folder = tmp_path / "g"
    configs = [tiny_config(seed=seed) for seed in range(2)]
    full = folder / replace(configs[0], grid="g").signature()
    full.mkdir(parents=True)
    (full / "metrics.jsonl").symlink_to(tmp_path / "unmounted" / "disk")
    rows = run_grid(configs, folder, Here())
    assert statuses(rows) == ["failed", "finished"]
    assert rows[0].cause is not None and rows[0].cause.startswith(f"cannot write {full / 'metrics.jsonl'}: ")


def finished(tmp_path: Path) -> tuple[list[Config], Path, Path]:
    configs = [tiny_config(steps=3, warmup_steps=1)]
    row = run_grid(configs, tmp_path / "g", Here())[0]
    return configs, tmp_path / "g", tmp_path / "g" / row.signature


@pytest.mark.parametrize("name", ["config.json", "env.json", "result.json"])
def test_a_torn_folder_is_a_failed_row_and_the_other_runs_go_on(tmp_path: Path, name: str) -> None:
    configs, folder, run = finished(tmp_path)
    (run / name).write_bytes((run / name).read_bytes()[:20])
    damaged, other = run_grid([*configs, tiny_config(steps=3, warmup_steps=1, seed=1)], folder, Here())
    assert damaged.status == "failed" and other.status == "finished"
    assert re.search(rf"{name} is torn .*; delete {run} to run it again", damaged.cause or "")


def test_a_cancelled_run_is_named_and_fails_the_command(tmp_path: Path) -> None:
    class Cancels(Here):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            if not args[0]["seed"]:
                return super().submit(fn, *args, **kwargs)
            future: Future[Any] = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    configs = [tiny_config(steps=3, warmup_steps=1, seed=seed) for seed in (0, 1)]
    rows = run_grid(configs, tmp_path / "g", Cancels())
    assert statuses(rows) == ["finished", "interrupted"]
    assert f"interrupted: {rows[1].label} ({rows[1].signature}): cancelled" in summary(rows)


def test_runs_are_named_by_what_tells_them_apart() -> None:
    one = tiny_config()
    two, three = (replace(one, optimizer=replace(one.optimizer, weight_decay=decay)) for decay in (0.2, 0.3))
    names = labels({config.signature(): config for config in (one, two, three, replace(one, seed=5))})
    assert len(set(names.values())) == 4
    assert names[two.signature()].endswith("weight_decay 0.2")
    assert names[replace(one, seed=5).signature()].endswith("seed 5")


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_folder_of_another_version_is_refused(tmp_path: Path) -> None:
    configs, folder, run = finished(tmp_path)
    edit(run / "result.json", version=2)
    with pytest.raises(
        RunFolderError, match=r"result\.json is of version 2, this is version 1; use another --runs folder"
    ):
        run_grid(configs, folder, Here())


def test_another_config_under_a_signature_is_refused(tmp_path: Path) -> None:
    configs, folder, run = finished(tmp_path)
    edit(run / "config.json", steps=4)
    (row,) = run_grid(configs, folder, Here())
    assert row.status == "failed" and "config.json is not the config of its signature" in (row.cause or "")


def test_results_of_other_data_are_refused(tmp_path: Path) -> None:
    configs, folder, run = finished(tmp_path)
    edit(run / "env.json", data_sha256="0", versions={"python": "3.99"})
    with pytest.raises(RunFolderError, match=r"trained on other data than stdlib-text holds now .*that run had 3\.99"):
        run_grid(configs, folder, Here())


def test_a_folder_that_only_just_began_is_begun_again(tmp_path: Path) -> None:
    configs, folder, run = finished(tmp_path)
    before = contents(folder)
    for name in ("result.json", "checkpoint.pt", "config.json"):
        (run / name).unlink()
    assert statuses(run_grid(configs, folder, Here())) == ["finished"]
    assert contents(folder) == before


def test_two_grids_do_not_share_a_folder(tmp_path: Path) -> None:
    busy = pytest.raises(RunFolderError, match=rf"another `lpsim run` is working in .*\(process {os.getpid()} on ")
    with record.exclusive(tmp_path / "g" / ".lock", ""), busy:
        run_grid([tiny_config()], tmp_path / "g", Here())


def test_equal_configs_and_no_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GridError, match=r"has the same run twice: adamw lr 0\.01, float32, gpt2-tiny, seed 0"):
        run_grid([tiny_config(), tiny_config()], tmp_path / "g", Here())
    with pytest.raises(GridError, match="the grid g has no runs"):
        run_grid([], tmp_path / "g", Here())


def test_the_workers_answer_is_a_row_even_when_it_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(grids, "run_one", dies)
    rows = run_grid([tiny_config()], tmp_path / "g", Here())
    assert (rows[0].status, rows[0].cause) == ("failed", "no memory")


# --- kill -9 and Ctrl-C, on the real command ---

GRID = """
from tests.experiments.experiment_jobs import tiny_grid
def grid():
    return tiny_grid(steps=60, seeds=1)
"""


def start(tmp_path: Path, jobs: str) -> "subprocess.Popen[str]":
    (tmp_path / "tiny.py").write_text(GRID)
    command = [sys.executable, "-m", "experiments.command.cli", "run", str(tmp_path / "tiny.py"), "--jobs", jobs]
    return subprocess.Popen(
        [*command, "--runs", str(tmp_path / "runs")],
        env=experiment_jobs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    )


def logged(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/metrics.jsonl"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same runs, in this process."""
    folder = tmp_path_factory.mktemp("whole") / "tiny"
    assert set(statuses(run_grid(tiny_grid(steps=60, seeds=1), folder, Here()))) == {"finished"}
    return contents(folder)


def test_kill_9_at_a_random_moment_changes_nothing(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed of the moments:", seed)
    moments = random.Random(seed)
    total = sum(len(lines) for _, lines in uninterrupted.values())
    folder = tmp_path / "runs" / "tiny"
    share = moments.random()
    process = start(tmp_path, jobs="2")
    wait_until(lambda: logged(folder) >= share * total)
    if moments.random() < 0.5:
        process.kill()  # the workers notice by themselves
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    process = start(tmp_path, jobs="2")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "4 runs: 4 finished" in output
    assert contents(folder) == uninterrupted


def test_ctrl_c_stops_cleanly_and_says_how_to_resume(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    process = start(tmp_path, jobs="1")
    folder = tmp_path / "runs" / "tiny"
    wait_until(lambda: logged(folder) >= 40)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: to the workers too
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "have written a checkpoint" in errors and "Traceback" not in errors
    resume = f"continue with: lpsim run {tmp_path / 'tiny.py'} --jobs 1 --runs {tmp_path / 'runs'}"
    assert resume in errors
    started = [run for run in folder.iterdir() if run.is_dir()]
    assert all((run / "checkpoint.pt").exists() for run in started)
    rows = run_grid(tiny_grid(steps=60, seeds=1), folder, Here())
    assert set(statuses(rows)) == {"finished"}
    assert contents(folder) == uninterrupted


def test_a_full_disk_ends_in_one_message_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """The disk is full from the first checkpoint on: a limit on the size of files stands in for it."""
    (tmp_path / "full.py").write_text(
        "from tests.experiments.experiment_jobs import one_thread, tiny_config\ndef grid():\n    yield tiny_config()\n"
    )
    arguments = [
        "-m",
        "experiments.command.cli",
        "run",
        str(tmp_path / "full.py"),
        "--jobs",
        "1",
        "--runs",
        str(tmp_path),
    ]
    limited = shlex.join([sys.executable, *arguments])
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 150; {limited}"], env=experiment_jobs.environment(), capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    run = next((tmp_path / "full").glob("*/config.json")).parent
    assert f"cannot write {run}/checkpoint.pt: File too large. What is on disk is kept" in done.stdout
    assert not (run / "result.json").exists() and not (run / "checkpoint.pt.tmp").exists()
    lines = len((run / "metrics.jsonl").read_text().splitlines())
    assert 6 <= lines <= 12  # up to step 4 before the checkpoint; at most up to step 8, where the next one is due
    run_grid([tiny_config()], tmp_path / "full", Here())
    run_grid([tiny_config()], tmp_path / "whole" / "full", Here())
    assert contents(tmp_path / "full") == contents(tmp_path / "whole" / "full")


# --- grid files ---


def test_the_shipped_grids_load() -> None:
    path, configs = load_grid("quickstart")
    assert path.name == "quickstart.py" and len(configs) == 36
    arms = {(c.optimizer.name, c.recipe.format.name, c.model.name, c.seed) for c in configs}
    formats = ("float32", "mxfp6_e3m2", "mxfp4_e2m1")
    models = ("gpt2-micro", "vit-micro")
    assert arms == {(o, f, m, s) for o in ("adamw", "lmd-for-model") for f in formats for m in models for s in range(3)}
    tuned = load_grid("quickstart_tuning")[1]
    for name in models:
        rates = [
            {c.optimizer.lr for c in tuned if (c.optimizer.name, c.model.name) == (o, name)}
            for o in ("adamw", "lmd-for-model")
        ]
        assert len(rates[0]) == len(rates[1]) == 6
    assert not {c.seed for c in tuned} & {c.seed for c in configs}
    chosen = {(c.model.name, c.optimizer) for c in configs}
    assert chosen < {(c.model.name, c.optimizer) for c in tuned}


@pytest.mark.parametrize("name", ["paper_gpt2", "paper_vit"])
def test_a_twin_has_the_arms_of_its_grid_on_the_same_kind_of_data(name: str) -> None:
    (full, small) = (load_grid(name, twin=twin)[1] for twin in (False, True))
    arms = [
        [(type(c.optimizer), c.recipe, c.seed, type(c.data), type(c.model)) for c in configs]
        for configs in (full, small)
    ]
    assert arms[0] == arms[1] and len({c.signature() for c in full}) == 78
    for twin, configs in ((False, full), (True, small)):
        assert len(resolve(load_claims(name, twin=twin), {c.signature(): c for c in configs}, Path(name))) == 5
    with pytest.raises(GridError, match=r"quickstart\.py: grid\(\) has no small twin"):
        load_grid("quickstart", twin=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def grid(:\n", r"g\.py:1: SyntaxError: "),
        ("x = 1\n", r"g\.py: defines no function grid\(\); it must be: def grid\(\) -> Iterator\[Config\]"),
        ("import nothing_here\ndef grid(): ...\n", r"g\.py:1: ModuleNotFoundError: No module named 'nothing_here'"),
        ("def grid():\n    yield 3\n", r"g\.py: grid\(\) must yield Config objects, it yielded 3"),
        (
            "from experiments.training.config import forward\ndef grid():\n    x = 1\n    yield forward('mxfp4')\n",
            r"g\.py:4: ValueError: unknown format 'mxfp4'.*mxfp4_e2m1",
        ),
        (
            "from experiments.training.optimizers import AdamW\ndef grid():\n    yield AdamW(lr=1, wd=2)\n",
            r"g\.py:3: TypeError: .*unexpected keyword argument 'wd'",
        ),
    ],
)
def test_an_error_in_a_grid_file_is_one_line(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for path in ("g.py", str(tmp_path / "g.py")):
        with pytest.raises(SourceError, match=message) as caught:
            load_grid(path)
        assert "\n" not in str(caught.value)


def test_an_unknown_grid_is_told_the_close_ones(tmp_path: Path) -> None:
    with pytest.raises(GridError, match="no grid file 'quickstrat'; shipped grids: quickstart, "):
        load_grid("quickstrat")
    (tmp_path / "a b.py").write_text("")
    with pytest.raises(GridError, match=r"is named like ablation_1\.py"):
        load_grid(str(tmp_path / "a b.py"))


def test_lmd_settings_travel_to_the_worker(tmp_path: Path) -> None:
    config = tiny_config(optimizer=LMD(lr=0.03, prior="flat", kappa=2.0))
    row = run_grid([config], tmp_path / "g", Here())[0]
    written = json.loads((tmp_path / "g" / row.signature / "config.json").read_text())
    assert (written["optimizer"]["prior"], written["optimizer"]["kappa"]) == ("flat", 2.0)
