"""Claims: what a grid is to decide, written before it is run.

A grid file may define, beside `grid`, `def claims() -> list[Claim]`. A claim is a sentence and the measurements that
decide it: differences between arms, paired by seed, and arms none of whose runs may diverge. They are written to
grid.json; `analysis.statistics.claims` reads the verdicts off the runs, and the report begins with them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.grids.source_files import GridError
from experiments.training.config import Config

METRICS = ("validation_loss", "validation_accuracy", "weight_growth")  # nats; a share; log of the norm per 1000 steps


@dataclass(frozen=True)
class Contrast:
    """A difference between arms, and the prediction that its mean over seeds lies below a bound.

    For each seed: the metric of the run of every arm in `plus`, summed, less that of every arm in `minus`. Two arms
    make a difference, four (a − b) − (c − d). An arm is given by one of its configs, whose seed is not used.

    Raises: ValueError for no arms, unequal numbers of them, and an unknown metric.
    """

    name: str
    plus: Sequence[Config]
    minus: Sequence[Config]
    metric: str = "validation_loss"
    below: float = 0.0  # in the unit of the metric; above 0 it says: not worse by more than that

    def __post_init__(self) -> None:
        if not self.plus or len(self.plus) != len(self.minus):
            raise ValueError(
                f"contrast {self.name!r}: plus and minus need equally many arms, have {len(self.plus)}, "
                f"{len(self.minus)}"
            )
        if self.metric not in METRICS:
            raise ValueError(f"contrast {self.name!r}: metric must be one of {', '.join(METRICS)}, is {self.metric!r}")


def lost(name: str, one: tuple[Config, Config], other: tuple[Config, Config]) -> Contrast:
    """What the second of `one` loses against its first, such as a format against float32, less what `other` loses."""
    return Contrast(name, [one[1], other[0]], [one[0], other[1]])


@dataclass(frozen=True)
class Claim:
    """A sentence that is supported when every prediction comes true, refuted when one turns out false.

    steady: arms of which no run may diverge, one config each. Raises: ValueError where nothing is predicted.
    """

    name: str
    statement: str
    contrasts: Sequence[Contrast] = ()
    steady: Sequence[Config] = ()

    def __post_init__(self) -> None:
        if not self.contrasts and not self.steady:
            raise ValueError(f"claim {self.name!r} predicts nothing: give it contrasts, or arms that are steady")


def resolve(claims: Iterable[Claim], runs: Mapping[str, Config], path: Path) -> list[dict[str, Any]]:
    """The claims as data that name runs by their signatures, for grid.json. `runs`: those of the grid by signature.

    Raises: GridError for two claims of one name, and for an arm of which the grid has no run.
    """
    claims = list(claims)
    if stray := [claim for claim in claims if not isinstance(claim, Claim)]:
        raise GridError(f"{path}: claims() must return Claim objects, it returned {stray[0]!r}")
    names = [claim.name for claim in claims]
    if len(set(names)) < len(names):
        raise GridError(f"{path}: claims() has two claims of one name: {', '.join(names)}")
    arms: dict[str, dict[int, str]] = {}
    for signature, config in runs.items():
        arms.setdefault(_arm(config), {})[config.seed] = signature

    def of(config: Config, claim: Claim) -> dict[int, str]:
        found = arms.get(_arm(config))
        if found is None:
            raise GridError(
                f"{path}: claim {claim.name!r} is about an arm of which the grid has no run: {config.model.name}, "
                f"{config.optimizer}, {config.recipe.name}, {config.steps} steps"
            )
        return found

    resolved = []
    for claim in claims:
        contrasts = []
        for contrast in claim.contrasts:
            terms = [(1, config) for config in contrast.plus] + [(-1, config) for config in contrast.minus]
            runs_of = [{"weight": weight, "runs": of(config, claim)} for weight, config in terms]
            contrasts.append(
                {"name": contrast.name, "metric": contrast.metric, "below": contrast.below, "terms": runs_of}
            )
        steady = [signature for config in claim.steady for signature in of(config, claim).values()]
        resolved.append({"name": claim.name, "statement": claim.statement, "contrasts": contrasts, "steady": steady})
    return resolved


def _arm(config: Config) -> str:
    """What the runs of an arm have in common."""
    return replace(config, seed=0, grid="", telemetry_every=None).signature()
