"""Tuning: the same number of trials for every arm, and the values they chose as a file that a grid reads.

A grid file with `def tune() -> Tuning` says what is tuned; `lpsim tune` runs it as an adaptive grid. `ranges` says what
may be tried, `search` what is tried and what is chosen, `tuned` reads the choice. A grid that compares imports `tuned`.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.grids import load_defined
from experiments.grids.tuning.ranges import Choice, LogUniform, Range, Uniform
from experiments.grids.tuning.search import Arm, Tuning
from experiments.grids.tuning.tuned import Tuned, tuned
from lpsim.formats import Format

__all__ = ["Arm", "Choice", "LogUniform", "Range", "Tuned", "Tuning", "Uniform", "load_tuning", "tuned"]


def load_tuning(source: str, formats: Sequence[Format] | None = None) -> tuple[Path, Tuning]:
    """The file that `source` names (a path, or a shipped one) and its tuning, with `formats` if any are given.

    Raises: SourceError with file and line.
    """
    return load_defined(source, "tune", Tuning, formats)
