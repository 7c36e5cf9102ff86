"""One run in several processes, each with its part of every batch: `Group`. A run in one process is `Alone`.

The same as in one process: every process begins with the same weights and gets its own rows of the global batch.
Gradients are averaged (DistributedDataParallel), so losses, gradients and weights are those of the global batch, up to
the order of sums in the compute dtype. Random bits are the same: LMD's noise is keyed by parameter and step, batches by
seed and step, and stochastic rounding by the element's index in the tensor of the global batch (`Simulation.part`). A
sum's last bit can still turn a rounding over, so that losses agree to what one rounding is worth, not in every bit.

Different from one process: the gradient of the weights (wgrad) sums over rows, and blocks of its operands lie along
them. So a process must hold whole blocks: its number of rows must be a multiple of the block. A rounding of wgrad's
result, or an accumulator, sees a process's part of the sum. Vector operations cannot be rounded stochastically, and
telemetry would see one part: both are refused. Resumed runs end in the same bits with two processes; with more, torch
may add up the first step in another order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from experiments.training.config import Config
from experiments.training.record import RunRecord
from experiments.training.tokens import Batch
from lpsim import Rounding

TIMEOUT = timedelta(minutes=10)  # for a process that waits for another: longer than a validation or a checkpoint takes


class Peers(Protocol):
    """What the training loop asks of the processes that share a run."""

    rank: int  # this process's number, from 0; the first writes the record

    def network(self, model: nn.Module) -> nn.Module:
        """What to call for gradients: they are then those of the global batch."""
        ...

    def part(self, batch: Batch, micro_batches: int) -> Batch:
        """This process's rows of the global batch: its part of every micro-batch, in their order."""
        ...

    def mean(self, loss: float) -> float:
        """The mean of all processes' losses."""
        ...

    def any(self, stop: bool) -> bool:
        """Whether one of them says so. Every process gets the same answer, at the same step."""
        ...


class Alone:
    """One process, which has it all."""

    rank = 0

    def network(self, model: nn.Module) -> nn.Module:
        return model

    def part(self, batch: Batch, micro_batches: int) -> Batch:
        return batch

    def mean(self, loss: float) -> float:
        return loss

    def any(self, stop: bool) -> bool:
        return stop


class Group:
    """One of `count` processes; torch's process group has been made."""

    def __init__(self, rank: int, count: int, device: str) -> None:
        self.rank, self.count, self.device = rank, count, device

    def network(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)

    def part(self, batch: Batch, micro_batches: int) -> Batch:
        inputs, targets = (
            torch.cat([micro.chunk(self.count)[self.rank] for micro in tensor.chunk(micro_batches)]) for tensor in batch
        )
        return inputs, targets

    def mean(self, loss: float) -> float:
        return self._sum(loss) / self.count

    def any(self, stop: bool) -> bool:
        return self._sum(float(stop)) > 0

    def _sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()


@contextmanager
def joined(rank: int, count: int, store: Path, device: str) -> Iterator[Group]:
    """The group of `count` processes of this machine that name the same new file; nccl for GPUs, otherwise gloo."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("nccl" if cuda else "gloo", f"file://{store}", TIMEOUT, world_size=count, rank=rank)
    try:
        yield Group(rank, count, device)
    finally:
        dist.destroy_process_group()


def check(config: Config, count: int) -> None:
    """Raise ValueError for a run that several processes cannot share."""
    rows = config.batch_size // config.micro_batches
    if rows % count:
        raise ValueError(f"a batch of {rows} cannot be shared equally by {count} processes")
    if config.telemetry_every is not None:
        raise ValueError("telemetry sees the whole batch in one process only; leave out --processes-per-run")
    recipe = config.recipe.build()
    vectors = [each.vector for each in (recipe, *recipe.overrides.values()) if each.vector is not None]
    if any(vector.rounding is Rounding.STOCHASTIC for vector in vectors):
        raise ValueError("vector operations cannot be rounded stochastically where processes share a batch")


class SilentRecord(RunRecord):
    """The record of a process that is not the first: it reads the checkpoint and writes nothing."""

    def keep_metrics_until(self, step: int) -> None:
        pass

    def log(self, step: int, split: str, **metrics: float) -> None:
        pass

    def save_checkpoint(self, state: Any) -> None:
        pass

    def write_weights(self, *_: Any, **__: Any) -> None:
        pass
