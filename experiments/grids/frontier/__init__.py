"""Frontiers: how far the learning rate of every arm can be pushed before training breaks.

A grid file with `def frontier() -> Frontier` says which arms are pushed and what counts as broken; `lpsim frontier`
runs it as an adaptive grid. `search` says which rates are tried, `judge` what holds and what breaks, `written` what is
kept of it.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.grids import load_defined
from experiments.grids.frontier.search import Arm, Frontier
from experiments.grids.tuning.ranges import LogUniform
from lpsim.formats import Format

__all__ = ["Arm", "Frontier", "LogUniform", "load_frontier"]


def load_frontier(source: str, formats: Sequence[Format] | None = None) -> tuple[Path, Frontier]:
    """The file that `source` names (a path, or a shipped one) and its frontier, with `formats` if any are given.

    Raises: SourceError with file and line.
    """
    return load_defined(source, "frontier", Frontier, formats)
