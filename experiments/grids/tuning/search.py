"""What a tuning tries, and what it chooses: a generator of rounds, and a table of trials at its end.

The first trials of every arm are quasi-random (a scrambled Halton sequence: the same points of the unit cube for every
arm), the others proposed by a tree-structured Parzen estimator (Bergstra et al. 2011), which Optuna computes from the
arm's earlier trials. Both are functions of their seed and of what has ended, so a tuning is an adaptive grid.
"""

import importlib.util
import json
import math
import statistics
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from experiments.grids.adaptive import Outcome
from experiments.grids.tuning.ranges import Choice, Range, Uniform, with_values
from experiments.grids.tuning.tuned import VERSION, arm_name
from experiments.training.config import Config
from experiments.training.settings import names_near

METRICS = {"validation_loss": 1.0, "validation_accuracy": -1.0}  # times this, lower is better
TPE, QUASI_RANDOM = "tpe", "quasi-random"
SAMPLERS = (TPE, QUASI_RANDOM)


@dataclass(frozen=True)
class Arm:
    """What is tuned on its own: a config, and the range of each setting that is tried. The config's seed is not used.

    Raises: ValueError for a setting that the config has not, or a range whose ends it cannot have.
    """

    config: Config
    ranges: Mapping[str, Range]  # by the place of the setting: "optimizer.lr"
    name: str = ""  # by default its model, optimizer and format

    def __post_init__(self) -> None:
        if not isinstance(self.config, Config):
            raise ValueError(f"Arm: config must be a Config, is {self.config!r}")
        object.__setattr__(self, "name", self.name or arm_name(self.config))
        if not self.ranges:
            raise ValueError(
                f"Arm {self.name!r}: has no ranges; give one as {{'optimizer.lr': LogUniform(0.001, 0.1)}}"
            )
        for path, span in self.ranges.items():
            if not isinstance(span, (Uniform, Choice)):
                raise ValueError(f"Arm {self.name!r}: {path} needs a LogUniform, Uniform or Choice, got {span!r}")
            for value in span.values if isinstance(span, Choice) else (span.at(0.0), span.at(0.5), span.at(1.0)):
                try:
                    with_values(self.config, {path: value})
                except ValueError as error:
                    raise ValueError(f"Arm {self.name!r}: {error}") from None

    def at(self, point: Sequence[float]) -> dict[str, Any]:
        """The values at a point of the unit cube."""
        return {path: span.at(share) for (path, span), share in zip(self.ranges.items(), point, strict=True)}


@dataclass
class Trial:
    """One set of values of an arm, and how its runs ended, in the order of their seeds."""

    arm: Arm
    number: int
    sampler: str
    values: dict[str, Any]
    metric: str
    outcomes: list[Outcome] = field(default_factory=list)
    finalist: bool = False
    rank: int = 0
    chosen: bool = False

    def configs(self, seeds: Iterable[int]) -> list[Config]:
        config = with_values(self.arm.config, self.values)
        return [replace(config, seed=seed) for seed in seeds]

    @property
    def measured(self) -> list[float]:
        """The metric of every run that finished with a finite one."""
        numbers = [outcome.final.get(self.metric) for outcome in self.outcomes if outcome.status == "finished"]
        return [number for number in numbers if number is not None and math.isfinite(number)]

    @property
    def diverged(self) -> bool:
        """Whether any of its runs diverged, or finished at a metric that is not finite."""
        return len(self.measured) < len(self.outcomes)

    @property
    def score(self) -> float:
        """The mean of the metric over its seeds, signed so that lower is better; infinite when any diverged."""
        return math.inf if self.diverged else METRICS[self.metric] * statistics.fmean(self.measured)


@dataclass(frozen=True)
class Tuning:
    """Every arm gets `trials` trials on `seeds`; the best `finalists` of them are run on `final_seeds` too.

    Chosen is the finalist with the best mean of the metric over all its seeds. A trial of which a run diverged is worse
    than any that finished, and never chosen; where all finalists diverge, the next best are run. Equal trials rank in
    the order in which they were tried.

    Raises: ValueError that names the field and says what would be right.
    """

    arms: Sequence[Arm]
    trials: int = 16
    seeds: Sequence[int] = (1000,)
    finalists: int = 4
    final_seeds: Sequence[int] = (1001, 1002, 1003)
    metric: str = "validation_loss"  # or "validation_accuracy"
    sampler: str = TPE  # or "quasi-random" for all trials
    rounds: int = 5  # of trials, the first of them half of all: TPE learns between rounds, runs within one are parallel
    seed: int = 0  # of the sampler

    def __post_init__(self) -> None:
        for name in ("arms", "seeds", "final_seeds"):
            try:
                object.__setattr__(self, name, tuple(getattr(self, name)))
            except TypeError:
                raise ValueError(f"Tuning: {name} must be a list, is {getattr(self, name)!r}") from None
        names = [arm.name if isinstance(arm, Arm) else None for arm in self.arms]
        if not names or None in names:
            raise ValueError("Tuning: arms must be one or more Arm(config, ranges)")
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise ValueError(f"Tuning: two arms are called {twice[0]!r}; give each a name: Arm(config, ranges, name)")
        for name in ("trials", "finalists", "rounds"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"Tuning: {name} must be at least 1, is {getattr(self, name)!r}")
        if self.finalists > self.trials:
            raise ValueError(f"Tuning: finalists must be at most trials, {self.trials}; is {self.finalists}")
        for name in ("seeds", "final_seeds"):
            if not getattr(self, name):
                raise ValueError(f"Tuning: {name} must name one seed or more")
        if len({*self.seeds, *self.final_seeds}) < len(self.all_seeds):
            raise ValueError(
                f"Tuning: seeds and final_seeds must all differ, got {', '.join(map(str, self.all_seeds))}"
            )
        for name, known in (("metric", METRICS), ("sampler", SAMPLERS)):
            if getattr(self, name) not in known:
                near = names_near(getattr(self, name), known)
                raise ValueError(f"Tuning: {name} must be one of {near}; is {getattr(self, name)!r}")
        if self.sampler == TPE and importlib.util.find_spec("optuna") is None:
            raise ValueError("Tuning: sampler='tpe' needs Optuna: pip install 'lpsim[tune]'; or take 'quasi-random'")
        for seed in self.all_seeds:
            replace(self.arms[0].config, seed=seed)  # refuses what is no seed

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return (*self.seeds, *self.final_seeds)

    def play(self) -> Generator[list[Config], Sequence[Outcome], list[Trial]]:
        """The rounds of an adaptive grid; returns every trial, arm by arm in the order tried, ranked within its arm."""
        known: dict[str, Outcome] = {}
        trials: dict[str, list[Trial]] = {arm.name: [] for arm in self.arms}
        for sampler, count in self._plan():
            new = []
            for arm in self.arms:
                before = trials[arm.name]
                points = enumerate(_points(sampler, arm, before, count, self.seed), len(before))
                new += [Trial(arm, number, sampler, arm.at(point), self.metric) for number, point in points]
            for trial in new:
                trials[trial.arm.name].append(trial)
            yield from _run(new, self.seeds, known)
        while promoted := [trial for mine in trials.values() for trial in self._promoted(mine)]:
            for trial in promoted:
                trial.finalist = True
            yield from _run(promoted, self.final_seeds, known)
        for mine in trials.values():
            ranked = sorted(mine, key=lambda trial: (trial.diverged, not trial.finalist, trial.score, trial.number))
            for place, trial in enumerate(ranked, 1):
                trial.rank = place
            ranked[0].chosen = not ranked[0].diverged
        return [trial for mine in trials.values() for trial in mine]

    def _plan(self) -> list[tuple[str, int]]:
        """The sampler and the number of trials of an arm, for each round."""
        if self.sampler == QUASI_RANDOM or self.rounds == 1:
            return [(QUASI_RANDOM, self.trials)]
        first, later = math.ceil(self.trials / 2), self.rounds - 1
        rest = self.trials - first
        sizes = [rest // later + (place < rest % later) for place in range(later)]
        return [(QUASI_RANDOM, first), *((TPE, size) for size in sizes if size)]

    def _promoted(self, mine: Sequence[Trial]) -> list[Trial]:
        """The next finalists of an arm: none when one has ended well, or when no other trial has."""
        if any(trial.finalist and not trial.diverged for trial in mine):
            return []
        left = [trial for trial in mine if not trial.finalist and not trial.diverged]
        return sorted(left, key=lambda trial: trial.score)[: self.finalists]

    def table(self, trials: Sequence[Trial]) -> pd.DataFrame:
        """One row a trial: arm, model, data, optimizer, format, trial, sampler, the values, seeds, n, diverged, metric,
        mean, sd, status, finalist, rank, chosen.

        mean and sd (n − 1 in its denominator) are over the n runs that finished; `diverged` counts the others. A value
        that is neither number nor text is JSON; a setting that an arm does not tune is empty.
        """
        paths = list(dict.fromkeys(path for arm in self.arms for path in arm.ranges))
        rows = []
        for trial in trials:
            config, measured = trial.arm.config, trial.measured
            seeds = [outcome.config.seed for outcome in trial.outcomes]
            rows.append(
                {"arm": trial.arm.name, "model": config.model.name, "data": config.data.name}
                | {"optimizer": config.optimizer.name, "format": config.recipe.name}
                | {"trial": trial.number, "sampler": trial.sampler}
                | {path: _cell(trial.values[path]) if path in trial.values else None for path in paths}
                | {"seeds": " ".join(map(str, seeds)), "n": len(measured), "diverged": len(seeds) - len(measured)}
                | {"metric": self.metric, "mean": statistics.fmean(measured) if measured else math.nan}
                | {"sd": statistics.stdev(measured) if len(measured) > 1 else math.nan}
                | {"status": "diverged" if trial.diverged else "finished", "finalist": trial.finalist}
                | {"rank": trial.rank, "chosen": trial.chosen}
            )
        return pd.DataFrame(rows)

    def document(self, trials: Sequence[Trial], name: str) -> dict[str, Any]:
        """What the file of chosen values holds: for each arm the values (None when all diverged), the mean and sd over
        the seeds, the ranges that were searched, and the run folders that the choice rests on.
        """
        arms: dict[str, Any] = {}
        for arm in self.arms:
            chosen = next((trial for trial in trials if trial.arm.name == arm.name and trial.chosen), None)
            measured = [] if chosen is None else chosen.measured
            arms[arm.name] = {
                "values": None if chosen is None else chosen.values,
                "mean": statistics.fmean(measured) if measured else None,
                "sd": statistics.stdev(measured) if len(measured) > 1 else None,
                "ranges": {path: span.to_dict() for path, span in arm.ranges.items()},
                "runs": [] if chosen is None else [outcome.signature for outcome in chosen.outcomes],
            }
        return {
            "version": VERSION,
            "tuning": name,
            "metric": self.metric,
            "sampler": self.sampler,
            "trials": self.trials,
            "finalists": self.finalists,
            "seeds": list(self.all_seeds),
            "arms": arms,
        }


def _run(
    trials: Sequence[Trial], seeds: Sequence[int], known: dict[str, Outcome]
) -> Generator[list[Config], Sequence[Outcome], None]:
    """Give the trials their outcomes on the seeds; runs that are known, of equal values or arms, are not asked for.

    Raises: ValueError for a run that finished without the metric.
    """
    asked = [(trial, [(config.signature(), config) for config in trial.configs(seeds)]) for trial in trials]
    new = {signature: config for _, mine in asked for signature, config in mine if signature not in known}
    if new:
        for signature, outcome in zip(new, (yield list(new.values())), strict=True):
            known[signature] = outcome
    for trial, mine in asked:
        trial.outcomes += [known[signature] for signature, _ in mine]
        for outcome in trial.outcomes:
            if outcome.status == "finished" and trial.metric not in outcome.final:
                there = ", ".join(name for name in METRICS if name in outcome.final)
                raise ValueError(f"{trial.arm.name} has no {trial.metric} to tune by; it has: {there}")


def _points(sampler: str, arm: Arm, before: Sequence[Trial], count: int, seed: int) -> list[list[float]]:
    """`count` points of the unit cube to try next, with a coordinate for each range."""
    if sampler == QUASI_RANDOM:
        from scipy.stats import qmc

        return [list(map(float, point)) for point in qmc.Halton(len(arm.ranges), seed=seed).random(count)]
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, optuna.distributions.BaseDistribution] = {
        path: optuna.distributions.CategoricalDistribution([_share(span, value) for value in span.values])
        if isinstance(span, Choice)
        else optuna.distributions.FloatDistribution(0.0, 1.0)
        for path, span in arm.ranges.items()
    }
    parzen = optuna.samplers.TPESampler(n_startup_trials=1, constant_liar=True, seed=seed + len(before))
    study = optuna.create_study(sampler=parzen)
    for trial in before:
        point = {path: _share(span, trial.values[path]) for path, span in arm.ranges.items()}
        study.add_trial(optuna.trial.create_trial(params=point, distributions=space, value=trial.score))
    return [[float(asked.params[path]) for path in space] for asked in (study.ask(space) for _ in range(count))]


def _share(span: Range, value: Any) -> float:
    """The coordinate of a value: of a choice the middle of its share of the unit interval."""
    if isinstance(span, Choice):
        return (list(span.values).index(value) + 0.5) / len(span.values)
    return min(max(span.share(value), 0.0), 1.0)


def _cell(value: Any) -> Any:
    """A value as a table holds it: a number or text, else its JSON."""
    return value if isinstance(value, (int, float, str)) and not isinstance(value, bool) else json.dumps(value)
