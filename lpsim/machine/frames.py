"""A running call of a module: where it stands in the model, and how often each op has occurred in it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

OUTSIDE, BACKWARD, ROOT = "<outside>", "<backward>", "<model>"


class Frame:
    """One running call of a module: its path, and how often each op has occurred in it.

    training: whether the outermost call that it belongs to began with gradients enabled.
    """

    __slots__ = ("counts", "guard", "module", "path", "training")

    def __init__(
        self, module: nn.Module | None, path: str, counts: dict[str, int] | None = None, training: bool = True
    ) -> None:
        self.module = module
        self.path = path
        self.counts = {} if counts is None else counts
        self.training = training
        self.guard: AbstractContextManager[Any] | None = None  # entered for the time of the call

    def copy(self) -> Frame:
        """The same call; the copy counts on its own from here on."""
        return Frame(self.module, self.path, dict(self.counts), self.training)

    def repetition(self, op: str) -> int:
        """How often `op` occurred in this call before; always 0 outside every module, where no call ends."""
        if self.module is None:
            return 0
        n = self.counts.get(op, 0)
        self.counts[op] = n + 1
        return n
