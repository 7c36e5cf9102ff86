"""Python files that a user names on the command line: a grid, or definitions of number formats.

They are executed because the user asked for them by name; a mistake in one is told with its file and line. What they
define reaches the workers, and the run folders, as data.
"""

import dataclasses
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from experiments.training import own
from experiments.training.settings import Settings, names_near
from lpsim import formats
from lpsim.formats import Format


class SourceError(Exception):
    """A file of the user cannot be used. The message names the file, the line and the reason."""


class GridError(SourceError):
    """A grid cannot be used. The message names the file or the grid, and the reason."""


@contextmanager
def blamed(path: Path) -> Iterator[None]:
    """Turns an exception into a SourceError with the last line of the file that it came through, if any."""
    try:
        yield
    except SourceError:
        raise
    except SyntaxError as error:
        raise SourceError(f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
        where = f"{path}:{lines[-1]}" if lines else str(path)  # what is found in a file after it ran has no line
        raise SourceError(f"{where}: {type(error).__name__}: {error}{_fields_near(error)}") from None


def _fields_near(error: Exception) -> str:
    """What a setting that does not exist may have meant."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    classes: list[type[Settings]] = [Settings]
    for each in classes:  # it grows
        classes += each.__subclasses__()
    for each in classes if found else ():
        if found and each.__name__ == found[1]:
            return f"; there are: {names_near(found[2], [field.name for field in dataclasses.fields(each)])}"
    return ""


def execute(path: Path, name: str) -> ModuleType:
    """The module that the file is; the modules beside it can be imported by name. Call it inside `blamed`."""
    own.enter(path.parent)
    return own.execute(path, name)


def define_formats(path: Path) -> list[Format]:
    """Make every number format that the file holds at its top level, alone or in a list, known by name. Returns them.

    Raises: SourceError for a file that is not there, fails or holds none, and for a name that another format has.
    """
    if path.suffix != ".py" or not path.is_file():
        raise SourceError(f"{path}: no such Python file; it is to define number formats, one constant each")
    with blamed(path):
        module = execute(path, f"formats_{path.stem}")
        held = [v for value in vars(module).values() for v in (value if isinstance(value, (list, tuple)) else [value])]
        defined = [formats.register(value) for value in held if isinstance(value, Format)]
        if not defined:
            raise SourceError(f'{path}: defines no number format; for one, write: my5 = FloatFormat("my5", 2, 2)')
    return defined
