"""One contract for every executor: local processes, submitit (its processes stand in for Slurm's jobs), Dask.

`test_slurm.py` does the same on a real Slurm.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from experiments.running.executors import DaskExecutor, LocalExecutor, StoppableExecutor, WorkerDied
from experiments.running.slurm import SlurmExecutor, SubmititExecutor, gpu_groups
from tests.experiments import experiment_jobs
from tests.experiments.experiment_jobs import (
    add,
    alive,
    announce_and_wait,
    die,
    fail,
    signal_job_once,
    visible_gpus,
    wait_until,
)


class LocalQueue:
    """Of jobs that submitit runs as processes of this machine; a job's id is its process's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def states(self) -> dict[str, str]:
        jobs = [path.name.partition("_")[0] for path in self.folder.glob("*_submitted.pkl")]
        return {job: "RUNNING" for job in jobs if alive(int(job))}

    def end(self, jobs: Iterable[str]) -> None:
        for job in jobs:
            os.kill(int(job), signal.SIGTERM)


class LocalBackend:
    """submitit's LocalExecutor; holds its jobs, whose processes want to be waited for."""

    def __init__(self, folder: Path) -> None:
        self.made: Any = pytest.importorskip("submitit").LocalExecutor(folder)
        self.made.update_parameters(timeout_min=10)
        self.jobs: list[Any] = []

    def submit_array(self, packs: Sequence[Any]) -> list[Any]:
        self.jobs += (jobs := self.made.submit_array(packs))
        return jobs


@contextmanager
def submitit_executor(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[SubmititExecutor]:
    """What SlurmExecutor is, with processes for jobs."""
    monkeypatch.setenv("PYTHONPATH", experiment_jobs.environment()["PYTHONPATH"])
    backend = LocalBackend(folder)
    with SubmititExecutor(backend, LocalQueue(folder), folder, poll_s=0.05, **settings) as executor:
        yield executor
    for job in backend.jobs:
        job._process.wait()


@pytest.fixture(params=["local-1", "local-2", "submitit", "dask"])
def executor(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StoppableExecutor]:
    kind = request.param
    if kind == "submitit":
        with submitit_executor(tmp_path / "jobs", monkeypatch, calls_per_job=4) as made:
            yield made
    elif kind == "dask":
        pytest.importorskip("distributed")
        monkeypatch.setenv("PYTHONPATH", experiment_jobs.environment()["PYTHONPATH"])
        with DaskExecutor(jobs=2) as made:
            yield made
    else:
        with LocalExecutor(int(kind[-1])) as made:
            yield made


def test_executor_contract(executor: StoppableExecutor, tmp_path: Path) -> None:
    """Results belong to their calls, exceptions arrive with their message, a stop reaches a running job."""
    sums = executor.submit_many(add, [(i, 1) for i in range(4)])
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


def test_a_worker_sees_the_gpus_it_was_given(tmp_path: Path) -> None:
    """Also after another worker of its executor has died."""
    files = [str(tmp_path / name) for name in "abc"]
    with LocalExecutor(3, gpu_groups("0,1,2,3,4,5,6", 2)) as executor:
        with pytest.raises(WorkerDied):
            executor.submit(die).result(60)
        seen = executor.submit_many(visible_gpus, [(file, files) for file in files])
        assert sorted(future.result(60) for future in seen) == ["0,1", "2,3", "4,5"]


def test_a_job_at_its_time_limit_is_requeued_and_does_what_it_has_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "jobs"
    with submitit_executor(folder, monkeypatch, calls_per_job=3) as executor:
        calls = [(str(tmp_path / name), int(signal.SIGUSR2)) for name in "ab"]
        (tmp_path / "a").touch()
        again = executor.submit_many(signal_job_once, calls)
        assert [future.result(60) for future in again] == ["again", "again"]
    assert not folder.exists()


def test_a_terminated_job_fails_with_its_log_and_the_calls_before_it_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with submitit_executor(tmp_path / "jobs", monkeypatch, calls_per_job=2) as executor:
        (tmp_path / "a").touch()
        calls = [(str(tmp_path / name), int(signal.SIGTERM)) for name in "ab"]
        before, terminated = executor.submit_many(signal_job_once, calls)
        assert before.result(60) == "again"
        with pytest.raises(WorkerDied, match="ended without an answer"):
            terminated.result(60)


def test_jobs_of_a_killed_command_are_ended_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with submitit_executor(tmp_path / "jobs", monkeypatch) as killed:
        left = killed.submit(announce_and_wait, str(tmp_path / "running"))
        wait_until((tmp_path / "running").exists)
        with submitit_executor(tmp_path / "jobs", monkeypatch) as next_one:
            assert next_one.submit(add, 1, 1).result(60) == 2
        with pytest.raises(WorkerDied):
            left.result(60)


def test_slurm_refuses_what_it_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sbatch, srun, squeue, scancel, scontrol not on PATH"):
        SlurmExecutor(tmp_path / "jobs")
    for name in ("sbatch", "srun", "squeue", "scancel", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'invalid partition' >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(ValueError, match="say how long a job may run, such as --sbatch=--time=2:00:00"):
        SlurmExecutor(tmp_path / "jobs")
    with pytest.raises(ValueError, match=r"long options with =.*got '-p gpu'"):
        SlurmExecutor(tmp_path / "jobs", ["-p gpu"])
    local: Callable[[], None] = lambda: None  # noqa: E731
    with SlurmExecutor(tmp_path / "jobs", ["--time=10"], poll_s=0.05) as executor:
        with pytest.raises(ValueError, match="must be a function of an importable module"):
            executor.submit(local)
        with pytest.raises(ValueError, match=r"(?s)the scheduler took no job.*invalid partition"):
            executor.submit(add, 1, 1)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install 'lpsim\[slurm\]'"):
        SlurmExecutor(tmp_path / "jobs")


def test_slurm_hands_options_to_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "srun", "squeue", "scancel", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ["--time=1-00:00:00", "--cpus-per-task=4", "--exclusive", "--signal=USR2@300"]
    with SlurmExecutor(tmp_path / "jobs", options, jobs=7, poll_s=0.05) as executor:
        text = executor._backend._make_submission_file_text("COMMAND", "")
        lines = [line for option in (*options, "--requeue") if (line := f"#SBATCH {option}") not in text.splitlines()]
        assert lines == [] and text.count("--time") == text.count("--signal") == 1
        assert "srun" in text and "--cpus-per-task=4 COMMAND" in text


def test_dask_missing_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    with pytest.raises(ImportError, match="pip install distributed"):
        DaskExecutor()


def test_local_needs_a_job() -> None:
    with pytest.raises(ValueError, match="jobs must be at least 1, is 0"):
        LocalExecutor(0)


def test_importing_executors_loads_no_torch() -> None:
    code = "import experiments.running.slurm, sys; assert not {'torch', 'numpy', 'numba'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env=experiment_jobs.environment())
