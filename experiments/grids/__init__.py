"""One file a research question, each with `def grid() -> Iterator[Config]`; `load_grid` reads such a file."""

import importlib.util
import os
import re
import traceback
from pathlib import Path

from experiments.config import Config
from experiments.settings import names_near

HERE = Path(__file__).parent


class GridError(Exception):
    """A grid cannot be used. The message names the file, the line and the reason."""


def load_grid(source: str) -> tuple[Path, list[Config]]:
    """The file that `source` names (a path, or a shipped grid) and its configs. Raises GridError with file and line."""
    path = Path(source)
    if not path.is_file():
        shipped = sorted(p.stem for p in HERE.glob("*.py") if p.stem != "__init__")
        if source not in shipped:
            raise GridError(f"no grid file {source!r}; shipped grids: {names_near(source, shipped)}")
        path = HERE / f"{source}.py"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.py", path.name):
        raise GridError(f"{path}: a grid file is named like ablation_1.py; its name becomes the folder of its runs")
    try:
        spec = importlib.util.spec_from_file_location(f"grid_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not callable(getattr(module, "grid", None)):
            raise GridError(f"{path}: defines no function grid(); it must be: def grid() -> Iterator[Config]")
        configs = list(module.grid())
    except GridError:
        raise
    except SyntaxError as error:
        raise GridError(f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}") from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == os.path.abspath(path)]
        raise GridError(f"{path}:{lines[-1] if lines else 0}: {type(error).__name__}: {error}") from None
    if stray := [config for config in configs if not isinstance(config, Config)]:
        raise GridError(f"{path}: grid() must yield Config objects, it yielded {stray[0]!r}")
    return path, configs
