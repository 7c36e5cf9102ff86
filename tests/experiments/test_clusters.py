"""A real Slurm and a real Dask: jobs cancelled, requeued and killed leave the tables of a local grid."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.experiments import experiment_jobs, slurm_cluster
from tests.experiments.slurm_cluster import ask
from tests.experiments.test_grid import contents

pytestmark = pytest.mark.full
wait_until = partial(experiment_jobs.wait_until, timeout_s=600)

GRID = """
from tests.experiments.experiment_jobs import tiny_grid
def grid():
    yield from tiny_grid(steps=60, seeds=4)
"""


def lpsim(tmp_path: Path, runs: str, *options: str, environment: dict[str, str]) -> "subprocess.Popen[str]":
    (tmp_path / "tiny.py").write_text(GRID)
    command = [sys.executable, "-m", "experiments.command.cli", "run", str(tmp_path / "tiny.py")]
    return subprocess.Popen(
        [*command, "--runs", str(tmp_path / runs), *options],
        env=environment | {"PYTHONPATH": experiment_jobs.environment()["PYTHONPATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ends_well(process: "subprocess.Popen[str]") -> None:
    output, errors = process.communicate(timeout=1800)
    assert process.returncode == 0 and "16 runs: 16 finished" in output, output + errors


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The contents of the run folders of the grid, run by local processes."""
    folder = tmp_path_factory.mktemp("local")
    ends_well(lpsim(folder, "local", "--jobs", "2", environment=dict(os.environ)))
    return contents(folder / "local" / "tiny")


def queue(environment: dict[str, str]) -> list[str]:
    return ask(environment, "squeue", "--noheader", "--array", "--format=%i").split()


def restarted(environment: dict[str, str], job: str) -> bool:
    told = ask(environment, "scontrol", "show", "job", job)
    return "JobState=RUNNING" in told and "Restarts=1" in told


def with_checkpoint(folder: Path) -> int:
    return len(list(folder.glob("*/checkpoint.pt")))


@pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"not installed: {', '.join(slurm_cluster.missing())}")
def test_slurm_a_job_cancelled_two_requeued_and_the_parent_killed(tmp_path: Path, local: object) -> None:
    with slurm_cluster.running(tmp_path / "slurm") as environment:
        folder = tmp_path / "runs" / "tiny"
        options = ("--executor", "slurm", "--sbatch=--time=10", "--runs-per-job", "4")
        process = lpsim(tmp_path, "runs", *options, environment=environment)
        wait_until(lambda: with_checkpoint(folder) >= 4)
        cancelled, requeued, warned, *_ = queue(environment)
        ask(environment, "scancel", cancelled)
        ask(environment, "scontrol", "requeue", requeued)
        ask(environment, "scancel", "--signal=USR2", warned)  # as Slurm does before the time limit
        wait_until(lambda: cancelled not in queue(environment))
        for job in (requeued, warned):
            wait_until(partial(restarted, environment, job))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        again = lpsim(tmp_path, "runs", *options, environment=environment)
        ends_well(again)
        assert contents(folder) == local
        assert not (folder / "slurm").exists()


def test_dask_a_worker_killed(tmp_path: Path, local: object) -> None:
    pytest.importorskip("distributed")
    process = lpsim(tmp_path, "runs", "--executor", "dask", "--jobs", "2", environment=dict(os.environ))
    folder = tmp_path / "runs" / "tiny"
    wait_until(lambda: with_checkpoint(folder) >= 2)
    lock = next(path for path in folder.glob("*/.lock") if not (path.parent / "result.json").exists())
    os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
    ends_well(process)
    assert contents(folder) == local
