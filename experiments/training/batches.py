"""What a data set gives the training loop: batches that depend on (seed, step) alone, and a fixed held-out split."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # inputs, targets


class Data(Protocol):
    """What the training loop needs of a data set."""

    classes: int  # size of the output distribution: a uniform guess has loss ln(classes)

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch: ...
    def validation_batches(self, batch_size: int) -> Iterator[Batch]: ...


def generator(seed: int, step: int) -> np.random.Generator:
    """The generator of one step's batch; no two (seed, step) pairs share one."""
    return np.random.default_rng([seed, step])
