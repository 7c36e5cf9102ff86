"""A part of the GPU's examination: rows of results from a process of its own, within a budget of time.

A process of its own, since a fault on a GPU spoils the process it happened in. It is forked, so that it need not import
everything anew; therefore the parent must never touch the GPU, nor start threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from experiments.bench.gpu.machine import Machine, Record, Row

_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Part:
    """name: as asked for. what: for people. run: records rows as they are measured. budget_s: then it is ended."""

    name: str
    what: str
    run: Callable[[Machine, Record], None]
    budget_s: float


@dataclass
class Outcome:
    """status: "done", "failed" or "out of time"; rows: those that came before; error: a traceback, or the signal."""

    name: str
    budget_s: float
    status: str = "failed"
    time_s: float = 0.0
    rows: list[Row] = field(default_factory=list)
    error: str | None = None


def run_part(part: Part, device: str, small: bool, log: Path) -> Outcome:
    """What became of the part; it prints into `log`. An interrupt ends it and goes on to the caller.

    small: the part has all the time it wants; tiny sizes are not there to be timed.
    """
    outcome = Outcome(part.name, part.budget_s)
    receiver, sender = _fork.Pipe(duplex=False)
    process = _fork.Process(target=_child, args=(part, Machine(device, small), log, receiver, sender))
    budget_s = float("inf") if small else part.budget_s
    begun = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads: libraries' idle ones
        process.start()
    sender.close()
    try:
        outcome.status = _receive(receiver, begun + budget_s, outcome)
    finally:
        if process.is_alive() and outcome.status != "done":
            with suppress(ProcessLookupError):  # its workers too; it leads a group of its own
                os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        outcome.time_s = round(time.monotonic() - begun, 1)
    if outcome.status == "failed" and outcome.error is None:
        outcome.error = f"the process ended with code {process.exitcode}; a negative one is a signal"
    return outcome


def _receive(receiver: Connection, deadline: float, outcome: Outcome) -> str:
    while receiver.poll(min(max(deadline - time.monotonic(), 0), 1e6)):
        try:
            kind, value = receiver.recv()
        except EOFError:
            return "failed"
        if kind == "row":
            outcome.rows.append(value)
        elif kind == "error":
            outcome.error = value
            return "failed"
        else:
            return "done"
    return "out of time"


def _child(part: Part, machine: Machine, log: Path, receiver: Connection, sender: Connection) -> None:
    os.setsid()
    receiver.close()
    with log.open("ab", buffering=0) as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        file.write(f"\n===== {part.name}\n".encode())
        try:
            part.run(machine, lambda row: sender.send(("row", row)))
            sender.send(("done", None))
        except BaseException:
            sender.send(("error", traceback.format_exc()))
        sys.stdout.flush()


def attempt(what: Row, measure: Callable[[], Row]) -> Row:
    """`what` and what was measured; or, where that raised, its traceback, for one arm must not stop the others."""
    try:
        return what | measure()
    except Exception:
        return what | {"error": traceback.format_exc()}


def warm_up(work: Sequence[Callable[[], object]], processes: int) -> None:
    """Do the work in forked processes, for what it leaves in Triton's cache; whatever fails there fails again later.

    The caller must not have touched the GPU.
    """
    workers = [_fork.Process(target=_quietly, args=(work[i::processes],)) for i in range(min(processes, len(work)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _quietly(work: Sequence[Callable[[], object]]) -> None:
    for function in work:
        try:
            function()
        except Exception:
            traceback.print_exc()
