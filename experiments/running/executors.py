"""Where runs are computed: local processes, Slurm, Dask. Each is a `concurrent.futures.Executor` with one more method,
`stop`.

A job is a module-level function; for Slurm its arguments and result are JSON. Importing this module loads no torch,
since a worker fixes its thread counts first. A job that can stop early asks `stop_requested()`.
"""

import importlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")}
CUDA_REPEATABLE = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8"
}  # without it torch refuses deterministic matrix products on a GPU
ORPHAN_GRACE_S = 300.0  # how long the last step of a worker without a parent may take

_stop = threading.Event()
_working = threading.Lock()  # held while this worker process computes a job


class WorkerDied(Exception):
    """A worker ended without an answer, for example killed for lack of memory."""


class JobFailed(Exception):
    """A Slurm job raised; the message is its traceback."""


def stop_requested() -> bool:
    """Whether this process was asked to leave: by its grid, by its grid's death, or by a scheduler's SIGTERM."""
    return _stop.is_set()


def set_stop(requested: bool) -> None:
    """What `stop_requested` returns in this process from now on."""
    if requested:
        _stop.set()
    else:
        _stop.clear()


class StoppableExecutor(Executor):
    """An executor whose running jobs can be asked to leave early."""

    def stop(self) -> None:
        """Make `stop_requested()` true in every worker, now and from now on. Returns at once."""
        raise NotImplementedError


class LocalExecutor(StoppableExecutor):
    """`jobs` spawned processes that live as long as the executor, so that torch is imported once in each.

    Each process has a pool of its own: when one is killed its job fails with WorkerDied, and the others go on. A worker
    listens on a pipe that closes when the parent stops it or dies, kill -9 included: it then ends its job at the next
    step, and itself.
    """

    def __init__(self, jobs: int = 1) -> None:
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, is {jobs}")
        self._threads = ThreadPoolExecutor(jobs, thread_name_prefix="worker")
        self._own = threading.local()  # .pool: the one process of this thread
        self._stopped = False
        self._pools: list[tuple[ProcessPoolExecutor, Connection]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._threads.submit(self._run, fn, args, kwargs)

    def stop(self) -> None:
        self._stopped = True
        for _, mouth in self._pools:
            mouth.close()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)
        for pool, mouth in self._pools:
            pool.shutdown(wait=wait)
            mouth.close()

    def _run(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pool = getattr(self._own, "pool", None) or self._start()
        try:
            return pool.submit(_work, fn, args, kwargs).result()
        except BrokenProcessPool:
            self._own.pool = None
            raise WorkerDied("the worker process was killed from outside; most often for lack of memory") from None

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        ear, mouth = context.Pipe(duplex=False)
        pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker, initargs=(ear,))
        self._own.pool = pool
        self._pools.append((pool, mouth))
        if self._stopped:
            mouth.close()
        return pool


def _start_worker(ear: Connection) -> None:
    os.environ.update(ONE_THREAD)
    os.environ.update(CUDA_REPEATABLE)
    # Ctrl-C reaches the whole group; the grid decides, and tells by the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_listen, args=(ear,), daemon=True).start()


def _work(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with _working:
        return fn(*args, **kwargs)


def _listen(ear: Connection) -> None:
    ear.poll(None)  # nothing is ever sent: this returns when the other end closes
    set_stop(True)
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # a living parent shuts us down itself
    _working.acquire(timeout=ORPHAN_GRACE_S)
    os._exit(1)


class SlurmExecutor(StoppableExecutor):
    """One Slurm job a call, submitted by `sbatch`, watched by `squeue`, ended by `scancel`.

    folder: for calls and answers, on a shared file system. options: further arguments of sbatch, such as
    "--partition=gpu". A job that leaves the queue without an answer fails with WorkerDied and the end of its log. A job
    is asked to stop (SIGTERM) two minutes before its time limit.
    """

    def __init__(self, folder: Path, options: Sequence[str] = (), poll_s: float = 5.0) -> None:
        if missing := [command for command in ("sbatch", "squeue", "scancel") if shutil.which(command) is None]:
            raise ValueError(
                f"{', '.join(missing)} not on PATH: the slurm executor must run where jobs can be submitted"
            )
        self.folder, self.options, self.poll_s = folder.resolve(), list(options), poll_s
        self._jobs: dict[str, tuple[Future[Any], Path]] = {}  # by Slurm's job id
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._closing.is_set():
            raise RuntimeError("cannot submit after shutdown")
        if fn.__module__ == "__main__" or "." in fn.__qualname__ or "<" in fn.__qualname__:
            raise ValueError(
                f"a Slurm job must be a function of an importable module, is {fn.__module__}.{fn.__qualname__}"
            )
        job = self.folder / uuid.uuid4().hex
        job.mkdir(parents=True)
        (job / "call.json").write_text(json.dumps({"args": args, "kwargs": kwargs}))
        command = [sys.executable, "-m", "experiments.running.executors", f"{fn.__module__}:{fn.__name__}", str(job)]
        job_id = self._slurm(
            "sbatch",
            "--parsable",
            "--job-name=lpsim",
            f"--output={job / 'log.txt'}",
            "--signal=B:TERM@120",
            *self.options,
            f"--wrap=exec {shlex.join(command)}",
        )
        future: Future[Any] = Future()
        with self._lock:
            self._jobs[job_id.split(";")[0]] = (future, job)
        return future

    def stop(self) -> None:
        with self._lock:
            running = [job_id for job_id, (future, _) in self._jobs.items() if not future.cancel()]
        if running:
            self._slurm("scancel", "--batch", "--signal=TERM", *running)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            futures = [future for future, _ in self._jobs.values()]
        if cancel_futures:
            for future in futures:
                future.cancel()
        self._closing.set()
        if wait:
            self._watcher.join()

    def _watch(self) -> None:
        # jobs that had left the queue at the last look; their answer may still be on its way through the file system
        absent: set[str] = set()
        while self._jobs or not self._closing.wait(self.poll_s):
            with self._lock:
                jobs = dict(self._jobs)
            ended = [job_id for job_id, (_, job) in jobs.items() if (job / "answer.json").exists()]
            cancelled = [job_id for job_id, (future, _) in jobs.items() if future.cancelled()]
            states = self._states(jobs)
            lost = [job_id for job_id in absent & jobs.keys() if states is not None and job_id not in states]
            absent = set() if states is None else jobs.keys() - states.keys()
            for job_id, state in (states or {}).items():
                if state == "RUNNING" and job_id in jobs and not jobs[job_id][0].running() and job_id not in cancelled:
                    jobs[job_id][0].set_running_or_notify_cancel()
            if waiting := [job_id for job_id in cancelled if job_id in (states or {})]:
                self._slurm("scancel", *waiting)
            for job_id in {*ended, *cancelled, *lost}:
                _settle(*jobs[job_id])
                with self._lock:
                    del self._jobs[job_id]
            if self._closing.is_set() and self._jobs:
                time.sleep(self.poll_s)

    def _states(self, jobs: Iterable[str]) -> dict[str, str] | None:
        """State by job id of those in the queue; None when Slurm did not answer this time."""
        ids = list(jobs)
        if not ids:
            return {}
        try:
            text = self._slurm("squeue", "--noheader", "--states=all", "--format=%i %T", f"--jobs={','.join(ids)}")
        except OSError:
            return None
        states = dict(line.split()[:2] for line in text.splitlines() if line.strip())
        return {job_id: state for job_id, state in states.items() if state in QUEUED}

    def _slurm(self, command: str, *arguments: str) -> str:
        """Its output. Raises OSError with what it said when it fails."""
        done = subprocess.run([command, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{command} failed: {done.stderr.strip() or done.returncode}")
        return done.stdout.strip()


QUEUED = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "RESIZING",
    "SIGNALING",
    "STOPPED",
}


def _settle(future: Future[Any], job: Path) -> None:
    """Give the future its answer and remove the job's folder, which is kept where there is none."""
    if future.cancelled():
        shutil.rmtree(job, ignore_errors=True)
        return
    if not future.running():
        future.set_running_or_notify_cancel()
    try:
        answer = json.loads((job / "answer.json").read_bytes())
    except (OSError, ValueError):
        log = job / "log.txt"
        last = "\n".join(log.read_text(errors="replace").splitlines()[-10:]) if log.exists() else "it wrote no log"
        future.set_exception(WorkerDied(f"the Slurm job of {job} ended without an answer: {last}"))
        return
    if "error" in answer:
        future.set_exception(JobFailed(answer["error"]))
    else:
        future.set_result(answer["value"])
    shutil.rmtree(job, ignore_errors=True)


def answer_job(function: str, job: Path) -> None:
    """In a Slurm job: call module:function with the arguments in the job's folder and leave the answer there.

    The function's name comes from the submitted command line, not from the folder.
    """
    os.environ.update(ONE_THREAD)
    os.environ.update(CUDA_REPEATABLE)
    signal.signal(signal.SIGTERM, lambda *_: set_stop(True))
    call = json.loads((job / "call.json").read_bytes())
    module, name = function.split(":")
    try:
        answer = {"value": getattr(importlib.import_module(module), name)(*call["args"], **call["kwargs"])}
    except Exception:
        answer = {"error": traceback.format_exc()}
    beside = job / "answer.json.tmp"
    beside.write_text(json.dumps(answer))
    beside.replace(job / "answer.json")


class DaskExecutor(StoppableExecutor):
    """Dask: the scheduler at `address`, or `jobs` processes on this machine. Needs the package `distributed`."""

    def __init__(self, address: str | None = None, jobs: int = 1) -> None:
        try:
            from dask.distributed import Client  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            raise ImportError("the dask executor needs Dask: pip install distributed") from None
        self._client = (
            Client(address) if address else Client(n_workers=jobs, threads_per_worker=1, dashboard_address=":0")
        )
        self._client.run(set_stop, False)  # the workers of a lasting cluster may remember an earlier grid's
        self._executor = self._client.get_executor()
        self._futures: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._futures.append(self._executor.submit(fn, *args, **kwargs))
        return self._futures[-1]

    def stop(self) -> None:
        self._client.run(set_stop, True)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if cancel_futures:
            for future in self._futures:
                future.cancel()
        self._executor.shutdown(wait=wait)
        self._client.close()


if __name__ == "__main__":
    from experiments.running import executors  # the module that jobs import, whose stop flag SIGTERM must set

    executors.answer_job(sys.argv[1], Path(sys.argv[2]))
