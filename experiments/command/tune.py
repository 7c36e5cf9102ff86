"""`lpsim tune`: run a tuning; what is written and said when all its runs have ended."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.command.run import add_running, interruptible, run_all
from experiments.command.shared import chosen_formats, user_errors

if TYPE_CHECKING:  # torch takes seconds to import: `lpsim --help` does without
    from experiments.grids.adaptive import Rounds
    from experiments.grids.tuning.search import Trial, Tuning


def add(commands: Any) -> None:
    parser = commands.add_parser("tune", help="tune the settings of every arm; the same command again resumes it")
    parser.add_argument(
        "grid", metavar="GRID", help="a Python file with `def tune() -> Tuning`, or a shipped tuning's name"
    )
    add_running(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the chosen values go, for a grid to read (default: tuned.json in the grid's folder)",
    )
    parser.set_defaults(function=lambda options: interruptible(_tune, options))


def _tune(options: argparse.Namespace) -> int:
    from experiments.grids.adaptive import Adaptive
    from experiments.grids.tuning import load_tuning

    with user_errors():
        source, tuning = load_tuning(options.grid, chosen_formats(options))
        trials: list[Trial] = []

        def play() -> Rounds:
            trials[:] = yield from tuning.play()

        if not run_all(Adaptive(play, source), source, options):
            return 1
        folder = options.runs / source.stem
        files = write(tuning, trials, folder, options.output or folder / "tuned.json")
        print(summary(tuning, trials), *files, sep="\n")
        return 0


def write(tuning: Tuning, trials: Sequence[Trial], folder: Path, output: Path) -> list[Path]:
    """Write the table of trials, the picture and the chosen values; the same trials give the same bytes.

    Raises: RunFolderError when a file cannot be written.
    """
    from analysis.figures.tuning import tuning as picture
    from experiments.training import record

    table, document = tuning.table(trials), tuning.document(trials, folder.name)
    files = [folder / "tables" / "tuning.csv", folder / "tuning.svg", output]
    ranges = {name: arm["ranges"] for name, arm in document["arms"].items()}
    record.write_atomically(files[0], table.to_csv(index=False, lineterminator="\n").encode())
    record.write_atomically(files[1], picture(table, ranges))
    record.write_json(files[2], document)
    return files


def summary(tuning: Tuning, trials: Sequence[Trial]) -> str:
    """The choice for every arm, and which values lie at an edge of their range: the best may lie beyond it."""
    lines = []
    for arm in tuning.arms:
        mine = [trial for trial in trials if trial.arm.name == arm.name]
        chosen = next((trial for trial in mine if trial.chosen), None)
        if chosen is None:
            lines.append(f"{arm.name}: no choice, each of {len(mine)} trials diverged; try lower values")
            continue
        values = ", ".join(f"{path} {_text(value)}" for path, value in chosen.values.items())
        mean, n = statistics.fmean(chosen.measured), len(chosen.measured)
        diverged = sum(trial.diverged for trial in mine)
        lines.append(
            f"{arm.name}: {values} ({tuning.metric} {mean:.4g}, mean over {n} seeds; {len(mine)} trials, "
            f"{diverged} of them diverged)"
        )
        for path, span in arm.ranges.items():
            if edge := span.edge(chosen.values[path]):
                ends = span.to_dict()
                lines.append(
                    f"  {path} {_text(chosen.values[path])} lies at the {edge} edge of its range, "
                    f"{ends['low']:g} to {ends['high']:g}: the best may lie beyond, widen the range"
                )
    return "\n".join(lines)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
