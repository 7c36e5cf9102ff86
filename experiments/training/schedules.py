"""Learning-rate schedules: how the rate goes on after the warm-up, which is linear in all of them.

One of your own is a subclass of `Schedule` in a grid's file, with a `name` and `factor`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from experiments.training.settings import Settings


@dataclass(frozen=True)
class Schedule(Settings):
    """The rate of a step is the optimizer's lr times a factor."""

    tag: ClassVar[str] = "name"
    name: ClassVar[str]

    def factor(self, progress: float, final: float) -> float:
        """The rate of a step after the warm-up, over the optimizer's lr.

        progress: the share of the steps after the warm-up that are done, this one included, in (0, 1].
        final: `Config.final_lr_fraction`, the factor to reach at progress 1.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Cosine(Schedule):
    """A half cosine from 1 to final."""

    name: ClassVar[str] = "cosine"

    def factor(self, progress: float, final: float) -> float:
        return final + (1 - final) * (0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Constant(Schedule):
    """1 to the end; final does not count."""

    name: ClassVar[str] = "constant"

    def factor(self, progress: float, final: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from 1 to final."""

    name: ClassVar[str] = "linear"

    def factor(self, progress: float, final: float) -> float:
        return 1 - (1 - final) * progress


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay: 1, then a straight line to final over the last `decay_fraction` of the steps after the
    warm-up (Hu et al. 2024, arXiv:2404.06395, with a linear decay).
    """

    name: ClassVar[str] = "wsd"

    decay_fraction: float = 0.2

    def check(self) -> None:
        self.require(0 < self.decay_fraction <= 1, f"decay_fraction must lie in (0, 1], is {self.decay_fraction}")

    def factor(self, progress: float, final: float) -> float:
        decayed = max(0.0, progress - (1 - self.decay_fraction)) / self.decay_fraction
        return 1 - (1 - final) * decayed


SCHEDULES: dict[str, type[Settings]] = {entry.name: entry for entry in (Cosine, Constant, Linear, WSD)}
