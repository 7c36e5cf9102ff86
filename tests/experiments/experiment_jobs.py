"""Functions that workers of the tests import, and the smallest configs."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.running.executors import StoppableExecutor, stop_requested

REPOSITORY = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """For child processes: this repository importable, one thread."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, as in a worker."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Here(StoppableExecutor):
    """Runs a job at once, in this process; counts them."""

    here = True

    def __init__(self) -> None:
        self.submitted = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted += 1
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def stop(self) -> None:
        pass


def add(a: int, b: int) -> int:
    return a + b


def fail(message: str) -> None:
    raise ValueError(message)


def die() -> None:
    os._exit(1)


def announce_and_wait(file: str) -> str:
    """Write the process id, then work until asked to stop."""
    beside = Path(file + ".tmp")
    beside.write_text(str(os.getpid()))
    beside.rename(file)
    while not stop_requested():
        time.sleep(0.01)
    return "stopped"


def signal_job_once(file: str, number: int) -> str:
    """The first time, send the process above this worker a signal and work until asked to stop."""
    if Path(file).exists():
        return "again"
    Path(file).touch()
    os.kill(os.getppid(), number)
    while not stop_requested():
        time.sleep(0.01)
    return "stopped"


def visible_gpus(file: str, others: list[str]) -> str | None:
    """What this worker sees, once the other calls run too."""
    Path(file).touch()
    wait_until(lambda: all(Path(other).exists() for other in others))
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def wait_until(condition: Any, timeout_s: float = 60) -> None:
    """Poll for something another process does. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s} s: {condition}")
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def tiny_config(**fields: Any) -> Any:
    """A run of 12 steps, a few milliseconds each."""
    from experiments.training.config import Config
    from experiments.training.data import StdlibText
    from experiments.training.models.gpt2 import GPT2Config
    from experiments.training.optimizers import AdamW

    config = Config(
        model=GPT2Config(name="gpt2-tiny", layers=1, heads=2, d_model=32, context=16, vocab_size=256),
        data=StdlibText(validation_windows=8),
        optimizer=AdamW(lr=0.01),
        steps=12,
        batch_size=4,
        warmup_steps=2,
        validate_every=5,
        checkpoint_every=4,
    )
    return replace(config, **fields)


def tiny_grid(steps: int = 12, seeds: int = 2) -> Iterator[Any]:
    """Both optimizers, float32 and MXFP4 with stochastic rounding."""
    from experiments.training.config import RecipeConfig, forward
    from experiments.training.optimizers import LMD, AdamW
    from lpsim import Rounding

    for seed in range(seeds):
        for optimizer in (AdamW(lr=0.01), LMD(lr=0.03)):
            for recipe in (RecipeConfig(), forward("mxfp4_e2m1", rounding=Rounding.STOCHASTIC)):
                yield tiny_config(optimizer=optimizer, recipe=recipe, seed=seed, steps=steps)
