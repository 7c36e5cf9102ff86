"""One file a research question, each with `def grid() -> Iterator[Config]`; `load_grid` reads such a file.

A grid whose formats may be chosen on the command line takes them: `def grid(formats: Sequence[Format] = (...))`. In: a
file that a user names. Out: configs, or one message that tells the file and line of a mistake. It imports training;
running and command import it.
"""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from experiments.grids.source_files import SourceError, blamed, execute
from experiments.training.config import Config
from experiments.training.settings import names_near
from lpsim.formats import Format

HERE = Path(__file__).parent


class GridError(SourceError):
    """A grid cannot be used. The message names the file or the grid, and the reason."""


def load_grid(source: str, formats: Sequence[Format] | None = None) -> tuple[Path, list[Config]]:
    """The file that `source` names (a path, or a shipped grid) and its configs, with `formats` if any are given.

    Raises: SourceError with file and line.
    """
    path = Path(source)
    if not path.is_file():
        shipped = sorted(p.stem for p in HERE.glob("*.py") if p.stem != "__init__")
        if source not in shipped:
            raise GridError(f"no grid file {source!r}; shipped grids: {names_near(source, shipped)}")
        path = HERE / f"{source}.py"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.py", path.name):
        raise GridError(f"{path}: a grid file is named like ablation_1.py; its name becomes the folder of its runs")
    with blamed(path):
        grid = getattr(execute(path, f"grid_{path.stem}"), "grid", None)
        if not callable(grid):
            raise GridError(f"{path}: defines no function grid(); it must be: def grid() -> Iterator[Config]")
        if formats is None:
            configs = list(grid())
        elif "formats" in inspect.signature(grid).parameters:
            configs = list(grid(formats=tuple(formats)))
        else:
            raise GridError(f"{path}: grid() takes no formats to choose; it must be: def grid(formats=(...))")
    if stray := [config for config in configs if not isinstance(config, Config)]:
        raise GridError(f"{path}: grid() must yield Config objects, it yielded {stray[0]!r}")
    return path, configs
