"""What the commands share: how a mistake is told, and the option --define."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import: `lpsim --help` does without
    from lpsim.formats import Format


class UserError(Exception):
    """A mistake in what was asked; its message is all that is printed."""


@contextmanager
def user_errors() -> Iterator[None]:
    """What is wrong with a grid, its folder or an option is a mistake of the user."""
    from experiments.grids.source_files import SourceError
    from experiments.training.record import RunFolderError

    try:
        yield
    except (SourceError, RunFolderError, ValueError) as error:
        raise UserError(str(error)) from error


def chosen_formats(options: argparse.Namespace) -> list[Format] | None:
    """Those of --formats, of which --define may have made some known."""
    from lpsim import formats

    define(options.define)
    return None if options.formats is None else [formats.get(name) for name in options.formats]


def add_define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--define",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file whose top-level number formats become known by name; repeatable",
    )


def define(files: Sequence[Path]) -> None:
    """Make the formats of the files known. Raises UserError."""
    from experiments.grids.source_files import SourceError, define_formats

    try:
        for file in files:
            define_formats(file)
    except SourceError as error:
        raise UserError(str(error)) from error
