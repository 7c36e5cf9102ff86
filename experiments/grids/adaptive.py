"""Grids that look at finished runs and yield more: generators of rounds.

`def grid()` of such a file yields lists of configs. What its `yield` returns is the list of their `Outcome`s, in the
order in which they were yielded, whichever ended first; when it returns, the grid is over. A grid depends on nothing
but what it receives. So after a kill it is played again from its start: rounds whose runs are on disk return at once,
and the first round that is not complete goes on.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.grids.source_files import GridError, blamed
from experiments.training.config import Config


@dataclass(frozen=True)
class Outcome:
    """How a run of a round ended."""

    config: Config  # as the grid yielded it
    signature: str  # the name of its run folder
    status: str  # "finished" or "diverged"; while one has failed, the grid does not hear of its round
    final: Mapping[str, float]  # "validation_loss" (nats) and the other final metrics; few of a diverged run


Rounds = Generator[Sequence[Config], Sequence[Outcome], Any]


class Adaptive:
    """A grid of rounds. play: starts the generator; path: the file to name when it makes a mistake."""

    def __init__(self, play: Callable[[], Rounds], path: Path) -> None:
        self._play, self._path = play, path

    def rounds(self) -> Generator[list[Config], Sequence[Outcome], None]:
        """The rounds from the first on, checked.

        The generator is played twice in step, and both must yield the same configs: one that draws unseeded random
        numbers or reads a clock would ask for other runs after each kill. Raises: SourceError with file and line.
        """
        with blamed(self._path):
            games = [self._play(), self._play()]
            received: Sequence[Outcome] | None = None
            while True:
                one, other = (self._next(game, received) for game in games)
                if one != other:
                    raise GridError(
                        f"{self._path}: the same results gave two different rounds; a grid that looks at its runs "
                        "must depend on their results alone (seed its random numbers)"
                    )
                if one is None:
                    return
                received = yield one

    def _next(self, game: Rounds, received: Sequence[Outcome] | None) -> list[Config] | None:
        """The next round, None at the end."""
        try:
            configs = next(game) if received is None else game.send(received)
        except StopIteration:
            return None
        if not isinstance(configs, (list, tuple)):
            raise GridError(f"{self._path}: grid() began with a list of configs, then yielded {configs!r}")
        if not configs:
            raise GridError(f"{self._path}: grid() yielded an empty round; to end the grid, return")
        only_configs(configs, self._path)
        return list(configs)


def only_configs(configs: Iterable[object], path: Path) -> None:
    """Raises GridError for anything else among them."""
    if stray := [config for config in configs if not isinstance(config, Config)]:
        raise GridError(f"{path}: grid() must yield Config objects, it yielded {stray[0]!r}")
