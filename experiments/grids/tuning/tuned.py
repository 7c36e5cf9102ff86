"""The values that a tuning chose, read by the grid that compares with them.

There is no way to a value but past its seeds: a run that compares must not have a seed of the runs that chose.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.grids.tuning.ranges import with_values
from experiments.training.config import Config
from experiments.training.settings import names_near

VERSION = 1  # of the file
SHIPPED = Path(__file__).parent.parent


def arm_name(config: Config) -> str:
    """What an arm is called unless it is given a name: its model, optimizer and format."""
    return f"{config.model.name}, {config.optimizer.name}, {config.recipe.name}"


class Tuned:
    """What `lpsim tune` chose for each arm, and the seeds that it used."""

    def __init__(self, path: Path, document: Mapping[str, Any]) -> None:
        self.path = path
        self.seeds: tuple[int, ...] = tuple(document["seeds"])
        self._arms: dict[str, Any] = document["arms"]

    def config(self, config: Config, arm: str | None = None) -> Config:
        """The config with the values chosen for `arm`, by default that of its model, optimizer and format.

        Raises: ValueError as `values` does, and for a value that the config cannot have.
        """
        return with_values(config, self.values(arm_name(config) if arm is None else arm, config.seed))

    def values(self, arm: str, seed: int) -> dict[str, Any]:
        """The values chosen for an arm, by the names of the settings, for a run of that seed.

        Raises: ValueError for a seed that the tuning used, for an arm that it has not, and where no trial of the arm
        ended without diverging.
        """
        if seed in self.seeds:
            raise ValueError(
                f"seed {seed} tuned the values of {self.path}: a comparison on it would favour what was chosen on it; "
                f"take a seed other than {', '.join(map(str, self.seeds))}"
            )
        if arm not in self._arms:
            raise ValueError(f"{self.path} tuned no arm {arm!r}; there are: {names_near(arm, self._arms)}")
        values = self._arms[arm]["values"]
        if values is None:
            raise ValueError(f"{self.path} has no values for {arm!r}: each of its trials diverged")
        return {path: _tuples(value) for path, value in values.items()}


def tuned(source: str | Path) -> Tuned:
    """The choice in a file that `lpsim tune` wrote, or that of a shipped tuning, by name.

    Raises: ValueError when there is no such file, saying which command makes it, and for one that is none of this kind.
    """
    path = Path(source)
    shipped = SHIPPED / f"{source}.json"
    if not path.is_file() and shipped.is_file():
        path = shipped
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise ValueError(
            f"no tuned values in {path} ({reason}); make it with: lpsim tune GRID --output {path}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is torn or not JSON ({error}); make it again with: lpsim tune GRID") from None
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise ValueError(f"{path} is no file of tuned values of version {VERSION}; lpsim tune GRID writes such a file")
    return Tuned(path, document)


def _tuples(value: Any) -> Any:
    """JSON has lists where a config has tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
