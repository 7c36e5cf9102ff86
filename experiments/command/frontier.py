"""`lpsim frontier`: seek frontiers of the learning rate; what is written and said when all runs have ended."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.command.report import write_report
from experiments.command.run import add_running, interruptible, run_all
from experiments.command.shared import chosen_formats, user_errors

if TYPE_CHECKING:  # torch and pandas take seconds to import: `lpsim --help` does without
    import pandas as pd

    from experiments.grids.adaptive import Rounds
    from experiments.grids.frontier.judge import Found
    from experiments.grids.frontier.search import Frontier


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "frontier", help="how far the learning rate of every arm can be pushed; the same command again resumes it"
    )
    parser.add_argument(
        "grid", metavar="GRID", help="a Python file with `def frontier() -> Frontier`, or a shipped one's name"
    )
    add_running(parser)
    parser.add_argument("--dry-run", action="store_true", help="say how many runs and steps it takes, and end")
    parser.set_defaults(function=lambda options: interruptible(_frontier, options))


def _frontier(options: argparse.Namespace) -> int:
    from experiments.grids.adaptive import Adaptive
    from experiments.grids.frontier import load_frontier

    with user_errors():
        source, sought = load_frontier(options.grid, chosen_formats(options))
        if options.dry_run:
            print(plan(sought))
            return 0
        found: list[Found] = []

        def play() -> Rounds:
            found[:] = yield from sought.play()

        with_report, options.report = options.report, False  # it shows what is written below
        if not run_all(Adaptive(play, source), source, options):
            return 1
        folder = options.runs / source.stem
        files, arms = write(sought, found, folder)
        print(summary(arms), *files, sep="\n")
        if with_report:
            write_report([folder], None)
        return 0


def plan(sought: Frontier) -> str:
    """How many runs and steps are asked for: the bisections are those of an arm whose best rate stays the best."""
    rates = [(arm, len(sought.first_rates(arm)), sought.bisections(arm)) for arm in sought.arms]
    runs = [(first + more) * len(sought.seeds) for _, first, more in rates]
    steps = sum(n * arm.config.steps for n, (arm, _, _) in zip(runs, rates, strict=True))
    lines = [f"  {arm.name}: {first} rates in the first round, then {more}" for arm, first, more in rates]
    total = f"about {sum(runs)} runs, {steps} steps where none diverges"
    return "\n".join([f"{len(sought.arms)} arms on {len(sought.seeds)} seeds: {total}", *lines])


def write(sought: Frontier, found: Sequence[Found], folder: Path) -> tuple[list[Path], pd.DataFrame]:
    """Write frontier.json (which the analysis reads), frontier.csv and frontier.svg; the same runs give the same bytes.

    Returns the files and the table of arms. Raises: RunFolderError when a file cannot be written.
    """
    from analysis import load
    from analysis.figures.frontier import frontier as picture
    from experiments.grids.frontier import written
    from experiments.training import record

    files = [folder / f"frontier.{kind}" for kind in ("json", "csv", "svg")]
    record.write_json(files[0], written.document(sought, found, folder.name))
    arms = load.frontier(folder)
    record.write_atomically(files[1], arms.to_csv(index=False, lineterminator="\n").encode())
    record.write_atomically(files[2], picture(arms, load.frontier_runs(folder)).svg)
    return files, arms


def summary(arms: pd.DataFrame) -> str:
    """For every arm its frontier and bracket, the best rate and loss, the share that holds, and what broke above."""
    margin, share = arms["margin"].iloc[0], arms["required_share"].iloc[0]
    lines = [
        f"The largest learning rate at which at least {share:.0%} of the seeds neither diverge nor end more than "
        f"{margin:g} nats above the best rate:"
    ]
    for row in arms.to_dict("records"):
        lines.append(f"{row['arm']}: {_bracket(row)}")
        if row["best_edge"]:
            lines.append(
                f"  its best rate lies at the {row['best_edge']} bound of those tried, {row['low']:g} to "
                f"{row['high']:g}: a better one may lie beyond, and would move the frontier; widen the rates"
            )
        if row["monotone"] == "false":
            lines.append(
                f"  {row['contradicting']} contradict{'' if ',' in row['contradicting'] else 's'} that what has broken "
                "stays broken: take this frontier with care"
            )
    return "\n".join(lines)


def _bracket(row: dict[str, Any]) -> str:
    if row["status"] == "none":
        return f"none, every rate from {row['low']:g} to {row['high']:g} breaks; try lower ones"
    best = f"best {row['best']:g} at {row['best_loss']:.4g} nats"
    if row["status"] == "open":
        return f"at least {row['frontier']:g}, the largest tried ({best}); {row['share']:.0%} of the seeds hold there"
    return (
        f"{row['frontier']:g}, {row['breaks']:g} breaks ({row['broke']}); {row['share']:.0%} of the seeds hold at the "
        f"frontier; {best}"
    )
