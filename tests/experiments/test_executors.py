"""One contract for every executor: local processes, Slurm (stand-ins for its commands), Dask where installed."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from experiments.running.executors import DaskExecutor, LocalExecutor, SlurmExecutor, StoppableExecutor, WorkerDied
from tests.experiments import experiment_jobs
from tests.experiments.experiment_jobs import add, alive, announce_and_wait, die, fail, wait_until

SBATCH = """#!/bin/bash
for argument; do case $argument in --output=*) log=${argument#*=};; --wrap=*) wrap=${argument#*=};; esac; done
echo "$@" >> "$FAKE_SLURM/submitted"
setsid bash -c "$wrap" > "$log" 2>&1 < /dev/null & echo "$!;cluster"
"""
SQUEUE = """#!/bin/bash
for argument; do case $argument in --jobs=*) jobs=${argument#*=};; esac; done
for job in ${jobs//,/ }; do kill -0 $job 2> /dev/null && echo "$job RUNNING" || echo "$job COMPLETED"; done
"""
SCANCEL = """#!/bin/bash
signal=TERM
for argument; do case $argument in --signal=*) signal=${argument#*=};; -*) ;; *) kill -$signal $argument;; esac; done
"""


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch, squeue and scancel on PATH that start, list and signal ordinary processes."""
    folder.mkdir()
    for name, script in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setenv("PYTHONPATH", experiment_jobs.environment()["PYTHONPATH"])
    return folder


@pytest.fixture(params=["local-1", "local-2", "slurm", "dask"])
def executor(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StoppableExecutor]:
    kind = request.param
    if kind == "slurm":
        fake_slurm(tmp_path / "slurm", monkeypatch)
        made: StoppableExecutor = SlurmExecutor(tmp_path / "jobs", poll_s=0.05)
    elif kind == "dask":
        pytest.importorskip("distributed")
        monkeypatch.setenv("PYTHONPATH", experiment_jobs.environment()["PYTHONPATH"])
        made = DaskExecutor(jobs=2)
    else:
        made = LocalExecutor(int(kind[-1]))
    with made:
        yield made


def test_executor_contract(executor: StoppableExecutor, tmp_path: Path) -> None:
    """Results belong to their calls, exceptions arrive with their message, a stop reaches a running job."""
    sums = [executor.submit(add, i, b=1) for i in range(4)]
    failed = executor.submit(fail, "not so")
    assert [future.result(60) for future in sums] == [1, 2, 3, 4]
    with pytest.raises(Exception, match="not so"):
        failed.result(60)
    file = tmp_path / "running"
    running = executor.submit(announce_and_wait, str(file))
    wait_until(file.exists)
    assert not running.done()
    executor.stop()
    assert running.result(60) == "stopped"


def test_a_killed_worker_fails_its_own_job_only(tmp_path: Path) -> None:
    with LocalExecutor(2) as executor:
        file = tmp_path / "running"
        running = executor.submit(announce_and_wait, str(file))
        wait_until(file.exists)
        died = executor.submit(die)
        with pytest.raises(WorkerDied, match="killed"):
            died.result(60)
        assert executor.submit(add, 2, 2).result(60) == 4  # the dead worker is replaced
        executor.stop()
        assert running.result(60) == "stopped"
        killed = executor.submit(os.getpid).result(60)
        assert alive(killed)
    wait_until(lambda: not alive(killed))


def test_queued_jobs_can_be_cancelled(tmp_path: Path) -> None:
    with LocalExecutor(1) as executor:
        file = tmp_path / "running"
        running = executor.submit(announce_and_wait, str(file))
        wait_until(file.exists)
        queued = executor.submit(add, 1, 1)
        assert queued.cancel()
        executor.stop()
        assert running.result(60) == "stopped"
        with pytest.raises(CancelledError):
            queued.result()


def test_workers_keep_to_one_thread_and_import_torch_once() -> None:
    with LocalExecutor(1) as executor:
        first, second = (executor.submit(os.getpid).result(60) for _ in range(2))
        assert first == second
        assert executor.submit(os.getenv, "OMP_NUM_THREADS").result(60) == "1"
        assert executor.submit(os.getenv, "NUMBA_NUM_THREADS").result(60) == "1"


ORPHAN = """
import sys
from tests.experiments.experiment_jobs import announce_and_wait
from experiments.running.executors import LocalExecutor
if __name__ == "__main__":
    executor = LocalExecutor(2)
    executor.submit(announce_and_wait, sys.argv[1])
    executor.submit(announce_and_wait, sys.argv[2]).result()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_when_their_parent_is_killed(how: int, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(ORPHAN)
    files = [tmp_path / "a", tmp_path / "b"]
    command = [sys.executable, str(tmp_path / "parent.py"), *map(str, files)]
    parent = subprocess.Popen(command, env=experiment_jobs.environment())
    wait_until(lambda: all(file.exists() for file in files))
    workers = [int(file.read_text()) for file in files]
    assert all(alive(worker) for worker in workers)
    parent.send_signal(how)
    parent.wait(60)
    wait_until(lambda: not any(alive(worker) for worker in workers))


def test_slurm_passes_options_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = fake_slurm(tmp_path / "slurm", monkeypatch)
    with SlurmExecutor(tmp_path / "jobs", options=["--partition=gpu"], poll_s=0.05) as executor:
        assert executor.submit(add, 1, 1).result(60) == 2
    submitted = (slurm / "submitted").read_text()
    assert (
        "--partition=gpu" in submitted
        and "experiments.running.executors tests.experiments.experiment_jobs:add" in submitted
    )
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_slurm_job_that_leaves_no_answer_fails_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_slurm(tmp_path / "slurm", monkeypatch)
    with SlurmExecutor(tmp_path / "jobs", poll_s=0.05) as executor:
        died = executor.submit(die)
        with pytest.raises(WorkerDied, match="ended without an answer"):
            died.result(60)


def test_a_cancelled_slurm_job_is_taken_from_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = fake_slurm(tmp_path / "slurm", monkeypatch)
    (slurm / "sbatch").write_text("#!/bin/bash\nsetsid sleep 1000 > /dev/null 2>&1 & echo $!\n")
    (slurm / "squeue").write_text(SQUEUE.replace("RUNNING", "PENDING"))
    with SlurmExecutor(tmp_path / "jobs", poll_s=0.05) as executor:
        queued = executor.submit(add, 1, 1)
        job = next(iter(executor._jobs))
        assert queued.cancel()
        wait_until(lambda: not alive(int(job)))


def test_slurm_refuses_what_it_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sbatch, squeue, scancel not on PATH"):
        SlurmExecutor(tmp_path / "jobs")
    monkeypatch.undo()
    slurm = fake_slurm(tmp_path / "slurm", monkeypatch)
    local: Callable[[], None] = lambda: None  # noqa: E731
    with SlurmExecutor(tmp_path / "jobs", poll_s=0.05) as executor:
        with pytest.raises(ValueError, match="must be a function of an importable module"):
            executor.submit(local)
        (slurm / "sbatch").write_text("#!/bin/bash\necho 'invalid partition' >&2; exit 1\n")
        with pytest.raises(OSError, match="sbatch failed: invalid partition"):
            executor.submit(add, 1, 1)


def test_dask_missing_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    with pytest.raises(ImportError, match="pip install distributed"):
        DaskExecutor()


def test_local_needs_a_job() -> None:
    with pytest.raises(ValueError, match="jobs must be at least 1, is 0"):
        LocalExecutor(0)


def test_importing_executors_loads_no_torch() -> None:
    code = "import experiments.running.executors, sys; assert not {'torch', 'numpy', 'numba'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env=experiment_jobs.environment())
