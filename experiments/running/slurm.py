"""Slurm, through submitit: calls packed into the jobs of an array, requeued at the time limit, answered by JSON files.

A job runs its calls in worker processes that live as long as it does: one for every GPU it was given, otherwise one for
every CPU of its task. So a thousand short runs in a hundred jobs import torch a hundred times. Everything lies in one
folder on a file system that all machines see. Jobs unpickle what this executor has put there; this executor reads back
JSON alone.
"""

import getpass
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from experiments.running.executors import LocalExecutor, StoppableExecutor, WorkerDied
from experiments.training.record import write_json

ARRAY_LIMIT = 1000  # jobs of one array: Slurm's MaxArraySize is 1001 where nobody has raised it
REQUEUES = 1000  # at time limits; submitit needs a number
WARNING_S = 120  # how long before its time limit a job is told: runs then write their checkpoints


class JobFailed(Exception):
    """A call in a job raised; the message is its traceback."""


@dataclass(frozen=True)
class Call:
    """One call of a job. function: "module:name". answer: the file for what it returned or raised."""

    function: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    answer: Path


@dataclass
class Pack:
    """What a job computes: those of its calls that have no answer yet, `gpus_per_call` GPUs each where it has GPUs.

    It leaves early, and its calls at their next step, when the file `stop` appears (then the calls under way are
    answered), at SIGTERM (they are not; Slurm may requeue the job) and before its time limit (it requeues itself).
    """

    calls: Sequence[Call]
    stop: Path
    gpus_per_call: int = 1
    warning_s: float = WARNING_S  # see SlurmExecutor
    poll_s: float = 1.0

    def __post_init__(self) -> None:
        self._executor: LocalExecutor | None = None
        self._pending: dict[Future[Any], Call] = {}

    def __call__(self) -> None:
        calls = [call for call in self.calls if not call.answer.exists()]
        if not calls or self.stop.exists():
            return
        gpus = gpu_groups(os.environ.get("CUDA_VISIBLE_DEVICES", ""), self.gpus_per_call)
        cpus = int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        workers = min(len(calls), len(gpus) or max(1, cpus // self.gpus_per_call))
        executor = self._executor = LocalExecutor(workers, gpus)
        signal.signal(signal.SIGTERM, self._terminated)
        with executor:
            for call in calls:
                self._pending[executor.submit(call_by_name, call.function, call.args, call.kwargs)] = call
            stopped = False
            while self._pending:
                done, _ = wait(self._pending, timeout=self.poll_s, return_when=FIRST_COMPLETED)
                for future in done:  # a signal in between finds it here and writes it
                    write_answer(self._pending[future].answer, future)
                    del self._pending[future]
                if not stopped and self.stop.exists():
                    stopped = True
                    executor.stop()
                    for future in [future for future in self._pending if future.cancel()]:
                        del self._pending[future]

    def checkpoint(self) -> Any:
        """For submitit, before the time limit: end the runs under way; what the job that is queued again is to do."""
        from submitit.core.utils import DelayedSubmission

        self._leave()
        return DelayedSubmission(Pack(self.calls, self.stop, self.gpus_per_call, self.warning_s, self.poll_s))

    def _terminated(self, *_: object) -> None:
        self._leave()
        sys.exit(128 + signal.SIGTERM)

    def _leave(self) -> None:
        """Return when all calls under way have ended. In a signal's handler, so their answers are not written.

        Or when time gets short: Slurm may warn a minute late, and a run that is still importing torch has nothing to
        save. What was not saved is computed again.
        """
        if self._executor is not None:
            for future in [future for future in self._pending if future.done()]:  # before anybody was asked to leave
                write_answer(self._pending.pop(future).answer, future)
            self._executor.stop()
            self._executor.shutdown(wait=False, cancel_futures=True)
            running = [future for future in self._pending if not future.cancelled()]
            wait(running, timeout=max(self.warning_s / 2, self.warning_s - 60))


def gpu_groups(visible: str, size: int) -> list[str]:
    """The GPUs of a list such as "0,1,2,3" in groups, "0,1" and "2,3", each of `size`; a rest is left out."""
    gpus = [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    return [",".join(gpus[i : i + size]) for i in range(0, len(gpus) - size + 1, size)]


def call_by_name(function: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)(*args, **kwargs)


def write_answer(file: Path, future: Future[Any]) -> None:
    try:
        answer = {"value": future.result()}
    except CancelledError:
        return
    except WorkerDied as error:
        answer = {"died": str(error)}
    except Exception as error:
        answer = {"error": "".join(traceback.format_exception(error))}
    write_json(file, answer)


class Queue(Protocol):
    """The scheduler's queue."""

    def states(self) -> dict[str, str] | None:
        """State by job id of my jobs that wait or run; None when the scheduler did not answer this time."""
        ...

    def end(self, jobs: Iterable[str]) -> None:
        """Take these from the queue; running ones get SIGTERM first."""
        ...


class SlurmQueue:
    """Slurm's, by squeue. Not by sacct, as submitit: it needs an accounting database, which not every cluster has."""

    def states(self) -> dict[str, str] | None:
        command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i|%T"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return None
        return dict(line.strip().split("|") for line in done.stdout.splitlines() if "|" in line)

    def end(self, jobs: Iterable[str]) -> None:
        subprocess.run(["scancel", *jobs], capture_output=True)  # it fails for those that have just ended


@dataclass
class Job:
    """A submitted job: those of its calls that are not settled; `log` is what it wrote."""

    calls: dict[Future[Any], Call]
    log: Path
    answers: list[Path]  # of all its calls: a job that is queued again asks which it has
    log_stays: bool = False


class SubmititExecutor(StoppableExecutor):
    """Calls as jobs of a submitit executor, `calls_per_job` in each.

    folder: for calls, answers and logs. A job that leaves the queue fails those of its calls that have no answer with
    WorkerDied and the end of its log. Jobs of an earlier command, which was killed, are ended first. Not waiting for
    jobs, they go on when this process dies; what they write stays.
    """

    def __init__(
        self,
        backend: Any,
        queue: Queue,
        folder: Path,
        calls_per_job: int = 1,
        gpus_per_call: int = 1,
        warning_s: float = WARNING_S,
        poll_s: float = 5.0,
    ) -> None:
        if calls_per_job < 1:
            raise ValueError(f"runs per job must be at least 1, are {calls_per_job}")
        self._backend, self._queue, self._folder = backend, queue, folder.resolve()
        self._calls_per_job, self._gpus_per_call = calls_per_job, gpus_per_call
        self._warning_s, self._poll_s = warning_s, poll_s
        self._answers = self._folder / "answers"
        self._stop_file = self._folder / f"stop-{uuid.uuid4().hex}"
        self._stopped = self._taken_over = False
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._submit([self._call(fn, args, kwargs)])[0]

    def submit_many(self, fn: Callable[..., Any], calls: Iterable[Sequence[Any]]) -> list[Future[Any]]:
        """As submit, in as few arrays as Slurm allows. Raises ValueError with what the scheduler said."""
        return self._submit([self._call(fn, arguments, {}) for arguments in calls])

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stop_file.touch()
            waiting = [
                job_id
                for job_id, job in self._jobs.items()
                if job.calls and not any(future.running() for future in job.calls)
            ]
        if waiting:
            self._queue.end(waiting)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if cancel_futures:
            with self._lock:
                futures = [future for job in self._jobs.values() for future in job.calls]
            for future in futures:
                future.cancel()
        self._closing.set()
        if wait:
            self._watcher.join()

    def _call(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        if fn.__module__ == "__main__" or "." in fn.__qualname__ or "<" in fn.__qualname__:
            raise ValueError(f"a job must be a function of an importable module, is {fn.__module__}.{fn.__qualname__}")
        return Call(f"{fn.__module__}:{fn.__name__}", args, kwargs, self._answers / f"{uuid.uuid4().hex}.json")

    def _submit(self, calls: Sequence[Call]) -> list[Future[Any]]:
        if self._closing.is_set():
            raise RuntimeError("cannot submit after shutdown")
        if not self._taken_over:
            self._take_over()
        size, futures = self._calls_per_job, list[Future[Any]]()
        packs = [calls[i : i + size] for i in range(0, len(calls), size)]
        for first in range(0, len(packs), ARRAY_LIMIT):
            array = packs[first : first + ARRAY_LIMIT]
            try:
                settings = (self._stop_file, self._gpus_per_call, self._warning_s)
                jobs = self._backend.submit_array([Pack(pack, *settings) for pack in array])
            except Exception as error:  # submitit's own classes, with the scheduler's words
                self.stop()
                raise ValueError(f"the scheduler took no job: {_last_lines(str(error), 3)}") from error
            for job, pack in zip(jobs, array, strict=True):
                mine = {Future[Any](): call for call in pack}
                futures += mine
                with self._lock:
                    self._jobs[job.job_id] = Job(mine, job.paths.stderr, [call.answer for call in pack])
        return futures

    def _take_over(self) -> None:
        """End what an earlier command has left in the queue, and remove its files."""
        known = {path.name.removesuffix("_submitted.pkl") for path in self._folder.glob("*_submitted.pkl")}
        said = False
        while known and (left := known & self._states().keys()):
            if not said:
                print(f"Ending {len(left)} jobs of an earlier command; their runs go on from there.", file=sys.stderr)
                self._queue.end(left)
                said = True
            time.sleep(self._poll_s)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._answers.mkdir(parents=True)
        self._taken_over = True

    def _states(self) -> dict[str, str]:
        states = self._queue.states()
        if states is None:
            raise ValueError("the scheduler's queue does not answer: `squeue` fails")
        return states

    def _watch(self) -> None:
        # jobs that had left the queue at the last look; their answers may still be on their way through the file system
        absent: set[str] = set()
        while self._jobs or not self._closing.is_set():
            if self._closing.wait(self._poll_s):
                time.sleep(self._poll_s)
            with self._lock:
                jobs = dict(self._jobs)
            try:
                states = self._queue.states() if jobs else {}
                answered = {path.name for path in self._answers.iterdir()} if jobs else set()
                lost = set() if states is None else absent - states.keys()
                absent = absent if states is None else jobs.keys() - states.keys()
                for job_id, job in jobs.items():
                    self._look(job_id, job, answered, (states or {}).get(job_id), job_id in absent, job_id in lost)
            except OSError:  # of a shared file system; the next look may find it well
                continue
        self._tidy()

    def _look(self, job_id: str, job: Job, answered: set[str], state: str | None, gone: bool, lost: bool) -> None:
        """Give the futures of a job what is known of it; forget it when nothing is left to know."""
        cancelled = [future for future in job.calls if future.cancelled()]
        for future in cancelled:
            future.set_running_or_notify_cancel()
            del job.calls[future]
        for future, call in list(job.calls.items()):
            if call.answer.name in answered:
                _settle(future, json.loads(call.answer.read_bytes()))
                del job.calls[future]
            elif lost:
                _start(future)
                said = _last_lines(job.log.read_text(errors="replace"), 10) if job.log.exists() else "it wrote no log"
                died = WorkerDied(f"the job {job_id} ended without an answer: {said}")
                future.set_exception(CancelledError() if self._stopped else died)
                del job.calls[future]
                job.log_stays = not self._stopped
            elif state == "RUNNING":
                _start(future)
        if not job.calls and cancelled and state is not None:
            self._queue.end([job_id])
        if not job.calls and gone:  # until then it may still write
            with self._lock:
                del self._jobs[job_id]
            for answer in job.answers:
                answer.unlink(missing_ok=True)
            if not job.log_stays:
                for file in self._folder.glob(f"{job_id}_*"):
                    file.unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Remove the folder, but for the logs of jobs that were lost."""
        for file in (*self._folder.glob(".submission_file_*"), *self._folder.glob("*_submission.sh"), self._stop_file):
            file.unlink(missing_ok=True)
        for folder in (self._answers, self._folder):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _start(future: Future[Any]) -> None:
    if not future.running():
        future.set_running_or_notify_cancel()


def _settle(future: Future[Any], answer: Mapping[str, Any]) -> None:
    _start(future)
    if "error" in answer:
        future.set_exception(JobFailed(answer["error"]))
    elif "died" in answer:
        future.set_exception(WorkerDied(answer["died"]))
    else:
        future.set_result(answer["value"])


def _last_lines(text: str, count: int) -> str:
    return "; ".join(line.strip() for line in text.strip().splitlines()[-count:])


class SlurmExecutor(SubmititExecutor):
    """Jobs of Slurm. options: of sbatch, in their long form, such as "--partition=gpu" or "--gpus-per-node=4".

    jobs: how many run at a time, at most. Raises: ValueError where submitit or Slurm's commands are missing, and for
    an option that cannot be passed on.
    """

    def __init__(
        self,
        folder: Path,
        options: Sequence[str] = (),
        jobs: int | None = None,
        calls_per_job: int = 1,
        gpus_per_call: int = 1,
        poll_s: float = 5.0,
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise ValueError("the slurm executor needs submitit: pip install 'lpsim[slurm]'") from None
        commands = ("sbatch", "srun", "squeue", "scancel", "scontrol")
        if missing := [command for command in commands if shutil.which(command) is None]:
            raise ValueError(
                f"{', '.join(missing)} not on PATH: the slurm executor must run where jobs can be submitted"
            )
        given = dict(_sbatch_option(option) for option in options)
        if "time" not in given:
            raise ValueError("say how long a job may run, such as --sbatch=--time=2:00:00; it is requeued then")
        backend = submitit.SlurmExecutor(folder.resolve(), max_num_timeout=REQUEUES)
        # srun does not take the number of CPUs over from sbatch
        srun = [f"--cpus-per-task={given['cpus-per-task']}"] if "cpus-per-task" in given else []
        backend.update_parameters(
            job_name="lpsim",
            signal_delay_s=WARNING_S,
            srun_args=srun,
            **({} if jobs is None else {"array_parallelism": jobs}),
        )
        # what submitit sets itself gives way to what was asked for
        backend.parameters["additional_parameters"] = ({} if "no-requeue" in given else {"requeue": True}) | given
        warning = str(given.get("signal", "")).partition("@")[2]
        warning_s = float(warning) if warning.isdecimal() else WARNING_S
        super().__init__(backend, SlurmQueue(), folder, calls_per_job, gpus_per_call, warning_s, poll_s)


def _sbatch_option(text: str) -> tuple[str, str | bool]:
    name, given, value = text.removeprefix("--").partition("=")
    if not text.startswith("--") or not name:
        raise ValueError(f"--sbatch takes long options with =, such as --sbatch=--partition=gpu; got {text!r}")
    return name, value if given else True
