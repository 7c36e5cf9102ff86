"""What holds and what breaks: the best rate of an arm, its frontier, and the trials that contradict the assumption.

In plain words. A seed holds at a rate when its run there does not diverge and ends at most `margin` nats above the same
seed's run at the arm's best rate. A rate holds when at least a stated share of the seeds hold. The best rate is the one
at which fewest seeds diverge and, among these, the mean loss is lowest; it holds by definition. The frontier is the
largest rate up to which, from the best rate on, every rate that was tried holds; the rate that breaks is the next one
tried above it.

That there is one such point is an assumption: that above the best rate what has broken stays broken, and that below it
nothing diverges. A rate below the best that ends worse has only not got far enough, and breaks nothing.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.grids.adaptive import Outcome

LOSS = "validation_loss"
TINY = 1e-9  # shares and losses are compared up to this


@dataclass(frozen=True)
class Trial:
    """A rate of an arm, and how its runs ended, in the order of the seeds."""

    rate: float
    outcomes: tuple[Outcome, ...]

    @property
    def losses(self) -> list[float]:
        """The final validation loss (nats) of every seed; infinite where the run diverged or the loss is not finite."""
        losses = [o.final.get(LOSS, math.inf) if o.status == "finished" else math.inf for o in self.outcomes]
        return [loss if math.isfinite(loss) else math.inf for loss in losses]

    @property
    def diverged(self) -> int:
        return sum(math.isinf(loss) for loss in self.losses)

    @property
    def mean(self) -> float:
        """The mean loss over the seeds that did not diverge; NaN where all did."""
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        return statistics.fmean(finite) if finite else math.nan

    def excess(self, best: "Trial") -> list[float]:
        """How much worse (nats) every seed ends than at the best rate; infinite where it diverges here, −infinite where
        it diverges there alone.
        """
        pairs = zip(self.losses, best.losses, strict=True)
        return [mine if math.isinf(mine) else mine - theirs for mine, theirs in pairs]


@dataclass(frozen=True)
class Found:
    """What the trials of an arm say, in the order of their rates."""

    trials: tuple[Trial, ...]
    best: Trial | None = None  # None where every rate breaks
    frontier: Trial | None = None
    breaks: Trial | None = None  # None where the largest rate tried holds, too
    contradicting: tuple[Trial, ...] = ()
    margin: float = 0.0
    share: float = 1.0

    def holding(self, trial: Trial) -> list[bool]:
        """Which seeds hold at a rate."""
        if self.best is None:
            return [False] * len(trial.outcomes)
        return [excess <= self.margin + TINY for excess in trial.excess(self.best)]

    def holds(self, trial: Trial) -> bool:
        holding = self.holding(trial)
        return sum(holding) >= self.share * len(holding) - TINY


def judged(tried: Sequence[Trial], margin: float, share: float) -> Found:
    """The frontier that these trials show. margin: nats; share: of the seeds, in (0, 1]."""
    trials = tuple(sorted(tried, key=lambda trial: trial.rate))

    def steady(trial: Trial) -> bool:
        n = len(trial.outcomes)
        return n - trial.diverged >= share * n - TINY

    steady_ones = [trial for trial in trials if steady(trial)]
    if not steady_ones:
        return Found(trials, margin=margin, share=share)
    best = min(steady_ones, key=lambda trial: (trial.diverged, trial.mean, trial.rate))
    found = Found(trials, best, margin=margin, share=share)
    above = [trial for trial in trials if trial.rate > best.rate]
    first = next((place for place, trial in enumerate(above) if not found.holds(trial)), len(above))
    below = [trial for trial in trials if trial.rate < best.rate and not steady(trial)]
    return Found(
        trials,
        best,
        frontier=above[first - 1] if first else best,
        breaks=above[first] if first < len(above) else None,
        contradicting=(*below, *(trial for trial in above[first:] if found.holds(trial))),
        margin=margin,
        share=share,
    )
