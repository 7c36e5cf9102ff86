"""Where runs are computed: processes of this machine, Dask; `slurm` has Slurm. Each is a `concurrent.futures.Executor`
with two more methods, `submit_many` and `stop`.

A job is a module-level function. Importing this module loads no torch, since a worker fixes its thread counts and its
GPU first. A job that can stop early asks `stop_requested()`.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")}
ORPHAN_GRACE_S = 300.0  # how long the last step of a worker without a parent may take

_stop = threading.Event()
_working = threading.Lock()  # held while this worker process computes a job


class WorkerDied(Exception):
    """A worker ended without an answer, for example killed for lack of memory."""


def stop_requested() -> bool:
    """Whether this process was asked to leave: by its grid, or by its grid's death."""
    return _stop.is_set()


def set_stop(requested: bool) -> None:
    """What `stop_requested` returns in this process from now on."""
    if requested:
        _stop.set()
    else:
        _stop.clear()


class StoppableExecutor(Executor):
    """An executor whose running jobs can be asked to leave early."""

    here = False  # whether jobs read the files of this machine, so that what they will miss can be told before

    def submit_many(self, fn: Callable[..., Any], calls: Iterable[Sequence[Any]]) -> list[Future[Any]]:
        """A future for fn(*arguments) of each of the calls, in order. Known together, they can be packed."""
        return [self.submit(fn, *arguments) for arguments in calls]

    def stop(self) -> None:
        """Make `stop_requested()` true in every worker, now and from now on. Returns at once."""
        raise NotImplementedError


class LocalExecutor(StoppableExecutor):
    """`jobs` spawned processes that live as long as the executor, so that torch is imported once in each.

    Each process has a pool of its own: when one is killed its job fails with WorkerDied, and the others go on. A worker
    listens on a pipe that closes when the parent stops it or dies, kill -9 included: it then ends its job at the next
    step, and itself. gpus: a worker sees the GPUs of one entry and no other, such as "3" or "2,3"; with more jobs than
    entries they are shared in turn. Without entries a worker sees what this process sees.
    """

    here = True

    def __init__(self, jobs: int = 1, gpus: Sequence[str] = ()) -> None:
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, is {jobs}")
        self._gpus = itertools.cycle(gpus or [None])
        self._threads = ThreadPoolExecutor(jobs, thread_name_prefix="worker")
        self._own = threading.local()  # .pool: the one process of this thread; .gpus: those that it sees
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
        if not hasattr(self._own, "gpus"):
            self._own.gpus = next(self._gpus)
        pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker, initargs=(ear, self._own.gpus))
        self._own.pool = pool
        self._pools.append((pool, mouth))
        if self._stopped:
            mouth.close()
        return pool


def _start_worker(ear: Connection, gpus: str | None) -> None:
    os.environ.update(ONE_THREAD)
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    # Ctrl-C and a scheduler's signals reach the whole group; the parent decides, and tells by the pipe
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signal_number, signal.SIG_IGN)
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
