"""Which rates are tried: a generator of rounds, the rates of all arms beside each other.

The first round of an arm is spread evenly in log rate between its bounds. Every further one halves, in log rate, the
bracket between the frontier and the rate that breaks above it, until that is as narrow as stated. After each round the
frontier is sought anew among all trials, since a better best rate moves it.
"""

import dataclasses
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from experiments.grids.adaptive import Outcome
from experiments.grids.frontier.judge import LOSS, Found, Trial, judged
from experiments.grids.tuning.ranges import DIGITS, LogUniform, with_values
from experiments.grids.tuning.tuned import arm_name
from experiments.training.config import Config, RecipeConfig
from lpsim import Rounding, formats

RATE = "optimizer.lr"
FINEST = 1.01  # the least resolution: a rate has 4 digits


@dataclass(frozen=True)
class Arm:
    """What is pushed: a config, and the least and largest learning rate that are tried. The config's own rate and seed
    are not used.

    Raises: ValueError for rates that are no LogUniform, or that the config cannot have.
    """

    config: Config
    rates: LogUniform
    name: str = ""  # by default its model, optimizer and format, and what rounding and noise it has beside the usual

    def __post_init__(self) -> None:
        if not isinstance(self.config, Config):
            raise ValueError(f"Arm: config must be a Config, is {self.config!r}")
        object.__setattr__(self, "name", self.name or _name(self.config))
        if not isinstance(self.rates, LogUniform):
            raise ValueError(f"Arm {self.name!r}: rates must be a LogUniform, such as LogUniform(0.001, 0.1)")
        for rate in (self.rates.low, self.rates.high):
            try:
                with_values(self.config, {RATE: rate})
            except ValueError as error:
                raise ValueError(f"Arm {self.name!r}: {error}") from None

    @property
    def rounding(self) -> str:
        """How its recipe rounds; empty where that is nothing, or is given whole."""
        recipe = self.config.recipe
        if not isinstance(recipe, RecipeConfig) or (recipe.format == formats.float32 and recipe.vector is None):
            return ""
        return recipe.rounding.value

    @property
    def noise(self) -> float | None:
        """The scale of its optimizer's noise; None for an optimizer without."""
        return getattr(self.config.optimizer, "noise_scale", None)

    def configs(self, rate: float, seeds: Sequence[int]) -> list[Config]:
        config = with_values(self.config, {RATE: rate})
        return [replace(config, seed=seed) for seed in seeds]


def _name(config: Config) -> str:
    parts = [arm_name(config)]
    recipe, optimizer = config.recipe, config.optimizer
    if isinstance(recipe, RecipeConfig) and recipe.rounding is not Rounding.TIES_TO_EVEN:
        parts.append(recipe.rounding.value)
    usual = {field.name: field.default for field in dataclasses.fields(optimizer)}
    noise = getattr(optimizer, "noise_scale", None)
    if noise is not None and noise != usual.get("noise_scale"):
        parts.append(f"noise {noise:g}")
    return ", ".join(parts)


@dataclass(frozen=True)
class Frontier:
    """For every arm the largest learning rate at which at least `share` of the seeds neither diverge nor end more than
    `margin` nats above their own run at the arm's best rate.

    Every rate is run on all seeds. Neighbouring rates of the first round differ by at most the factor `spacing`; the
    bisection ends when the rate that breaks is at most `resolution` times the frontier.

    Raises: ValueError that names the field and says what would be right.
    """

    arms: Sequence[Arm]
    seeds: Sequence[int] = (0, 1, 2)
    margin: float = 0.1  # nats of validation loss
    share: float = 1.0
    spacing: float = 2.0
    resolution: float = 1.25

    def __post_init__(self) -> None:
        for name in ("arms", "seeds"):
            try:
                object.__setattr__(self, name, tuple(getattr(self, name)))
            except TypeError:
                raise ValueError(f"Frontier: {name} must be a list, is {getattr(self, name)!r}") from None
        names = [arm.name if isinstance(arm, Arm) else None for arm in self.arms]
        if not names or None in names:
            raise ValueError("Frontier: arms must be one or more frontier.Arm(config, rates)")
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise ValueError(f"Frontier: two arms are called {twice[0]!r}; give each a name: Arm(config, rates, name)")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"Frontier: seeds must be one or more different ones, got {_listed(self.seeds)}")
        for name in ("margin", "share", "spacing", "resolution"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"Frontier: {name} must be a finite number, is {value!r}")
        if self.margin <= 0:
            raise ValueError(f"Frontier: margin must be positive, in nats, is {self.margin:g}")
        if not 0 < self.share <= 1:
            raise ValueError(f"Frontier: share must lie in (0, 1], is {self.share:g}; 1 asks that every seed holds")
        if self.resolution < FINEST:
            raise ValueError(f"Frontier: resolution is a factor of at least {FINEST}, is {self.resolution:g}")
        if self.spacing < self.resolution:
            raise ValueError(
                f"Frontier: spacing is a factor of at least the resolution, {self.resolution:g}; is {self.spacing:g}"
            )
        for arm in self.arms:
            arm.configs(arm.rates.low, self.seeds)  # refuses what is no seed

    def first_rates(self, arm: Arm) -> list[float]:
        """The rates of an arm's first round, its bounds included."""
        gaps = max(1, math.ceil(math.log(arm.rates.high / arm.rates.low) / math.log(self.spacing) - 1e-9))
        return sorted({arm.rates.at(place / gaps) for place in range(gaps + 1)})

    def bisections(self, arm: Arm) -> int:
        """How often the bracket of an arm is halved, where no better best rate moves it."""
        rates = self.first_rates(arm)
        gap = math.log(rates[1] / rates[0]) / math.log(self.resolution)
        return max(0, math.ceil(math.log2(gap) - 1e-3))

    def next_rate(self, found: Found) -> float | None:
        """The rate that halves the bracket; None where it is narrow enough, or there is none."""
        if found.frontier is None or found.breaks is None:
            return None
        low, high = found.frontier.rate, found.breaks.rate
        if high / low <= self.resolution * (1 + 1e-9):
            return None
        middle = float(f"{math.sqrt(low * high):.{DIGITS}g}")
        return middle if low < middle < high else None

    def play(self) -> Generator[list[Config], Sequence[Outcome], list[Found]]:
        """The rounds of an adaptive grid; returns what was found of every arm, in the order of the arms."""
        trials: dict[str, list[Trial]] = {arm.name: [] for arm in self.arms}
        asked = [(arm, rate) for arm in self.arms for rate in self.first_rates(arm)]
        while asked:
            outcomes = list((yield [config for arm, rate in asked for config in arm.configs(rate, self.seeds)]))
            for arm, rate in asked:
                mine, outcomes = outcomes[: len(self.seeds)], outcomes[len(self.seeds) :]
                for outcome in mine:
                    if outcome.status == "finished" and LOSS not in outcome.final:
                        raise ValueError(f"{arm.name} has no {LOSS} to judge by")
                trials[arm.name].append(Trial(rate, tuple(mine)))
            rates = [(arm, self.next_rate(self._found(trials[arm.name]))) for arm in self.arms]
            asked = [(arm, rate) for arm, rate in rates if rate is not None]
        return [self._found(trials[arm.name]) for arm in self.arms]

    def _found(self, trials: Sequence[Trial]) -> Found:
        return judged(trials, self.margin, self.share)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "none"
