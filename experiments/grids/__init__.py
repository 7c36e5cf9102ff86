"""One file a research question, each with `def grid() -> Iterator[Config]`; `load_grid` reads such a file.

A grid that looks at finished runs yields lists of configs and receives how they ended (`adaptive`). A file with
`def tune()` seeks the best settings of each arm (`tuning`), one with `def frontier()` how far the learning rate of each
can be pushed (`frontier`); one with `def claims()` says what its grid is to decide (`claims`). A grid whose formats may
be chosen on the command line takes them: `def grid(formats: Sequence[Format] = (...))`; one of real size has a small
twin that takes the same path: `def grid(twin: bool = False)`. In: a file that a user names. Out: configs, or one
message that tells the file and line of a mistake. It imports training; running and command import it.
"""

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from experiments.grids.adaptive import Adaptive, only_configs
from experiments.grids.claims import Claim
from experiments.grids.source_files import GridError, blamed, execute
from experiments.training.config import Config
from experiments.training.settings import names_near
from lpsim.formats import Format

Defined = TypeVar("Defined")
HERE = Path(__file__).parent
COMMANDS = {  # what a file may define, and what runs it
    "grid": "it is a grid: lpsim run",
    "tune": "it is a tuning: lpsim tune",
    "frontier": "it seeks a frontier: lpsim frontier",
}
KINDS = rf"^def ({'|'.join(COMMANDS)})\("


def load_grid(
    source: str, formats: Sequence[Format] | None = None, twin: bool = False
) -> tuple[Path, list[Config] | Adaptive]:
    """The file that `source` names (a path, or a shipped grid) and its configs, with `formats` if any are given.

    twin: those of the grid's small twin.

    A grid whose first yield is a list of configs is adaptive; it has been played up to there.
    Raises: SourceError with file and line.
    """
    path = find(source)
    with blamed(path):
        grid = function(path, "grid", "Iterator[Config]", formats, twin)
        made = grid()
        if not isinstance(made, Iterable):
            raise GridError(
                f"{path}: grid() must yield or return Configs, in a list, say; it gave {type(made).__name__}"
            )
        started = iter(made)
        first = list(itertools.islice(started, 1))
        if first and isinstance(first[0], (list, tuple)):
            if not inspect.isgenerator(started):
                raise GridError(f"{path}: grid() holds lists of configs; to receive results it must yield them")
            return path, Adaptive(grid, path)
        configs = [*first, *started]
    only_configs(configs, path)
    return path, configs


def load_claims(source: str, formats: Sequence[Format] | None = None, twin: bool = False) -> list[Claim]:
    """What the file's `claims` returns; nothing where it defines none, or where `formats` replace those it is about.

    twin: those about the grid's small twin, which a file makes in `def claims(twin: bool = False)`; else it makes none.

    Raises: SourceError with file and line.
    """
    path = find(source)
    wanted = r"^def claims\([^)]*\btwin\b" if twin else r"^def claims\("
    if formats is not None or re.search(wanted, path.read_text(), re.MULTILINE) is None:
        return []
    with blamed(path):
        return list(function(path, "claims", "list[Claim]", None, twin)())


def find(source: str) -> Path:
    """The grid file of that path, or the shipped one of that name. Raises GridError."""
    path = Path(source)
    if not path.is_file():
        shipped = sorted(p.stem for p in HERE.glob("*.py") if re.search(KINDS, p.read_text(), re.M))
        if source not in shipped:
            beside = f" (there is {source}.py: say so)" if Path(f"{source}.py").is_file() else ""
            raise GridError(f"no grid file {source!r}{beside}; shipped grids: {names_near(source, shipped)}")
        path = HERE / f"{source}.py"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.py", path.name):
        raise GridError(f"{path}: a grid file is named like ablation_1.py; its name becomes the folder of its runs")
    return path


def load_defined(
    source: str, name: str, kind: type[Defined], formats: Sequence[Format] | None = None
) -> tuple[Path, Defined]:
    """The file that `source` names (a path, or a shipped one) and what its function `name` returns, which must be of
    `kind`; with `formats` if any are given.

    Raises: SourceError with file and line.
    """
    path = find(source)
    with blamed(path):
        made = function(path, name, kind.__name__, formats)()
    if not isinstance(made, kind):
        raise GridError(f"{path}: {name}() must return a {kind.__name__}, it returned {made!r}")
    return path, made


def function(
    path: Path, name: str, returns: str, formats: Sequence[Format] | None, twin: bool = False
) -> Callable[[], Any]:
    """The function of that name in a file, with what was chosen filled in. Call it inside `blamed`."""
    module = execute(path, f"grid_{path.stem.replace('.', '_')}")
    found = getattr(module, name, None)
    if not callable(found):
        there = [f"; {command}" for other, command in COMMANDS.items() if callable(getattr(module, other, None))]
        raise GridError(f"{path}: defines no function {name}(); it must be: def {name}() -> {returns}{''.join(there)}")
    takes = inspect.signature(found).parameters
    chosen: dict[str, Any] = {}
    if formats is not None:
        if "formats" not in takes:
            raise GridError(f"{path}: {name}() takes no formats to choose; it must be: def {name}(formats=(...))")
        chosen["formats"] = tuple(formats)
    if twin:
        if "twin" not in takes:
            raise GridError(f"{path}: {name}() has no small twin; it must be: def {name}(twin=False)")
        chosen["twin"] = True
    return functools.partial(found, **chosen) if chosen else found
