"""`lpsim tune`: what is written and said when all runs of a tuning have ended."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.figures.tuning import tuning as picture
from experiments.grids.tuning.search import Trial, Tuning
from experiments.training import record


def write(tuning: Tuning, trials: Sequence[Trial], folder: Path, output: Path) -> list[Path]:
    """Write the table of trials, the picture and the chosen values; the same trials give the same bytes.

    Raises: RunFolderError when a file cannot be written.
    """
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
