"""Batches from a stream of tokens (`Tokens`), and the random numbers that any batch is drawn with (`generator`)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # inputs, targets


def generator(seed: int, step: int) -> np.random.Generator:
    """The generator of one step's batch; no two (seed, step) pairs share one."""
    return np.random.default_rng([seed, step])


class Shards:
    """Arrays, one after the other, read as one sequence; a slice of it is an array."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        first = int(np.searchsorted(self.ends, start, side="right"))
        pieces = []
        for part, end in zip(self.parts[first:], self.ends[first:].tolist(), strict=True):
            begin = end - len(part)
            pieces.append(part[max(start - begin, 0) : stop - begin])
            if end >= stop:
                break
        return np.concatenate(pieces) if pieces else self.parts[0][:0]


class Tokens:
    """Windows of two token streams (of unsigned integers): inputs (B, T) and targets, one token on, both int64.

    T is the model's context. Training windows begin anywhere; the `validation_windows` held-out ones are spread evenly.
    Raises ValueError for a stream that is not longer than the context, and for a batch with a token that the model has
    not.
    """

    def __init__(
        self, train: np.ndarray | Shards, held_out: np.ndarray | Shards, model: Any, validation_windows: int
    ) -> None:
        self.train, self.held_out = train, held_out
        self.context, self.classes = model.context, model.vocab_size
        for name, stream in (("training", train), ("validation", held_out)):
            if len(stream) <= self.context:
                raise ValueError(f"the {name} stream has {len(stream)} tokens; a context of {self.context} needs more")
        self.starts = np.linspace(0, len(held_out) - self.context - 1, validation_windows).astype(np.int64)

    def train_batch(self, seed: int, step: int, batch_size: int) -> Batch:
        starts = generator(seed, step).integers(0, len(self.train) - self.context, size=batch_size)
        return self._windows(self.train, starts)

    def validation_batches(self, batch_size: int) -> Iterator[Batch]:
        for i in range(0, len(self.starts), batch_size):
            yield self._windows(self.held_out, self.starts[i : i + batch_size])

    def _windows(self, stream: np.ndarray | Shards, starts: np.ndarray) -> Batch:
        windows = torch.from_numpy(np.stack([stream[s : s + self.context + 1] for s in starts]).astype(np.int64))
        if (largest := int(windows.max())) >= self.classes:
            raise ValueError(
                f"the tokens reach {largest}, the model's vocab_size is {self.classes}: another tokenizer's tokens, or "
                "files of another type, or with a header"
            )
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()  # (B, T) each
