"""A run in several processes of one machine: started together, ended together."""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path
from typing import Any

from experiments.running.executors import LocalExecutor, WorkerDied, stop_requested
from experiments.running.slurm import gpu_groups


def train_together(
    config_json: dict[str, Any], folder: Path, sources: str | None, count: int, stop: Callable[[], bool]
) -> dict[str, Any] | None:
    """As train.train, in `count` processes; each has a GPU of its own where this process sees that many.

    Raises: what a process raised; WorkerDied when one was killed: the others end, and the checkpoint stays.
    """
    gpus = gpu_groups(os.environ.get("CUDA_VISIBLE_DEVICES", ""), 1)
    if gpus and len(gpus) < count and config_json["device"].startswith("cuda"):
        raise ValueError(f"a run in {count} processes needs as many GPUs; this worker sees {len(gpus)}")
    with tempfile.TemporaryDirectory() as place, LocalExecutor(count, gpus) as executor:
        store = str(Path(place) / "store")
        calls = [(config_json, str(folder), sources, rank, count, store) for rank in range(count)]
        futures = executor.submit_many(train_part, calls)
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
            if stop() or any(future.exception() for future in done):
                executor.stop()
        errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: not isinstance(error, WorkerDied)):  # the others follow from it
        raise error
    result: dict[str, Any] | None = futures[0].result()
    return result


def train_part(
    config_json: dict[str, Any], folder: str, sources: str | None, rank: int, count: int, store: str
) -> dict[str, Any] | None:
    """In one of the processes: train with its part of every batch. The first writes the run's record."""
    import torch

    from experiments.training import parallel, train
    from experiments.training.config import Config
    from experiments.training.record import RunRecord, exclusive

    torch.set_num_threads(1)
    config = Config.from_dict(config_json, None if sources is None else Path(sources))
    record = (parallel.SilentRecord if rank else RunRecord)(Path(folder))
    lock = Path(folder) / f".process{rank}.lock"  # a process outlives the one that started it by a step
    try:
        with (
            exclusive(lock, f"another process is training {folder}", wait_s=60),
            parallel.joined(rank, count, Path(store), config.device) as peers,
        ):
            return train.train(config, record, stop_requested, peers)
    finally:
        record.close()
