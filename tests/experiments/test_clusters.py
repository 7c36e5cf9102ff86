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


def with_checkpoint(folder: Path) -> int:
    return len(list(folder.glob("*/checkpoint.pt")))


@pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"not installed: {', '.join(slurm_cluster.missing())}")
def test_slurm_one_job_cancelled_one_requeued_the_parent_killed(tmp_path: Path, local: object) -> None:
    with slurm_cluster.running(tmp_path / "slurm") as environment:
        folder = tmp_path / "runs" / "tiny"
        options = ("--executor", "slurm", "--sbatch=--time=10", "--runs-per-job", "4")
        process = lpsim(tmp_path, "runs", *options, environment=environment)
        wait_until(lambda: with_checkpoint(folder) >= 4)
        first, second, *_ = ask(environment, "squeue", "--noheader", "--array", "--format=%i").split()
        ask(environment, "scancel", first)
        ask(environment, "scontrol", "requeue", second)
        wait_until(lambda: first not in ask(environment, "squeue", "--noheader", "--array", "--format=%i").split())
        wait_until(
            lambda: (
                "JobState=RUNNING" in (told := ask(environment, "scontrol", "show", "job", second))
                and "Restarts=1" in told
            )
        )
        process.send_signal(signal.SIGKILL)
        process.communicate()
        again = lpsim(tmp_path, "runs", *options, environment=environment)
        ends_well(again)
        assert contents(folder) == local
        assert not (folder / "slurm").exists()


@pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"not installed: {', '.join(slurm_cluster.missing())}")
def test_slurm_jobs_requeue_themselves_at_their_time_limit(tmp_path: Path, local: object) -> None:
    """Slurm warns 50 seconds before the limit of a minute, and looks at its jobs every half minute."""
    with slurm_cluster.running(tmp_path / "slurm") as environment:
        options = ("--executor", "slurm", "--sbatch=--time=1", "--sbatch=--signal=USR2@50", "--runs-per-job", "8")
        ends_well(lpsim(tmp_path, "runs", *options, environment=environment))
        assert contents(tmp_path / "runs" / "tiny") == local
        log = (tmp_path / "slurm" / "slurmctld.log").read_text()
        assert "requeue" in log.lower()


def test_dask_a_worker_killed(tmp_path: Path, local: object) -> None:
    pytest.importorskip("distributed")
    process = lpsim(tmp_path, "runs", "--executor", "dask", "--jobs", "2", environment=dict(os.environ))
    folder = tmp_path / "runs" / "tiny"
    wait_until(lambda: with_checkpoint(folder) >= 2)
    lock = next(path for path in folder.glob("*/.lock") if not (path.parent / "result.json").exists())
    os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
    ends_well(process)
    assert contents(folder) == local
