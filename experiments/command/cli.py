"""The `lpsim` command: formats, evaluate, new, run, tune, report, bench.

A mistake of the user gives one message and exit code 2; a grid with failed runs exits with 1, an interrupted one with
130.
"""

import argparse
import importlib
import os
import pkgutil
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.command import compare, evaluate

if TYPE_CHECKING:  # torch takes seconds to import: `lpsim report` and `--help` do without
    from experiments.grids.adaptive import Adaptive
    from experiments.grids.claims import Claim
    from experiments.running.executors import StoppableExecutor
    from experiments.running.grid import Row
    from experiments.training.config import Config
    from lpsim.formats import Format


class UserError(Exception):
    """A mistake in what was asked; its message is all that is printed."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="lpsim", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_formats(commands)
    add_evaluate(commands)
    add_new(commands)
    add_run(commands)
    add_tune(commands)
    add_report(commands)
    add_bench(commands)
    options = parser.parse_args(arguments)
    options.argv = ["lpsim", *arguments]
    try:
        return int(options.function(options))
    except UserError as error:
        print(f"lpsim: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `lpsim formats | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# --- formats ---


def add_formats(commands: Any) -> None:
    parser = commands.add_parser(
        "formats",
        help="the number formats that exist, as a table; drawn; proved",
        usage="lpsim formats [--plot FILE] [--define FILE] [NAME ...]\n"
        "       lpsim formats check NAME [--define FILE] [--exhaustive]\n"
        "       lpsim formats compare NAME ... [--tensors FILE | --run RUN | --distribution NAME] [--plot FILE]",
    )
    parser.add_argument("words", nargs="*", metavar="NAME", help="formats (default: all of them, some to draw)")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw value lines and relative errors (.png, .svg, .pdf)"
    )
    parser.add_argument("--exhaustive", action="store_true", help="check: walk all 2^32 float32 inputs, in minutes")
    compare.add_options(parser)
    add_define(parser)
    parser.set_defaults(function=run_formats)


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


def run_formats(options: argparse.Namespace) -> int:
    from experiments.command import formats as formats_cli
    from lpsim.conformance import ConformanceError

    define(options.define)
    if options.words[:1] == ["compare"]:
        with user_errors():
            return compare.run(options)
    if misplaced := compare.misplaced(options):
        raise UserError(misplaced)
    checked = options.words[:1] == ["check"]
    if checked and len(options.words) != 2:
        raise UserError("check takes the name of one format: lpsim formats check NAME")
    if options.exhaustive and not checked:
        raise UserError("--exhaustive goes with check: lpsim formats check NAME --exhaustive")
    try:
        if checked:
            result = formats_cli.check(options.words[1], options.exhaustive)
        elif options.plot:
            from experiments.command.formats_plot import plot

            plot(options.words, options.plot)
            result = str(options.plot)
        else:
            result = formats_cli.text(formats_cli.table(options.words))
    except ConformanceError as error:
        print(f"lpsim: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(result)
    return 0


# --- evaluate ---


def add_evaluate(commands: Any) -> None:
    parser = evaluate.add(commands)
    add_define(parser)
    parser.set_defaults(function=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    with user_errors():
        return evaluate.run(options, chosen_formats(options) or [])


# --- new, run, tune ---


def add_new(commands: Any) -> None:
    parser = commands.add_parser("new", help="write a grid file to start from")
    parser.add_argument("name", metavar="NAME", help="of the grid: NAME.py is written, never over another file")
    parser.set_defaults(function=_new)


def _new(options: argparse.Namespace) -> int:
    from experiments.command import new

    try:
        file = new.write(options.name)
    except FileExistsError as error:
        raise UserError(f"{error.filename} exists; give the grid another name") from error
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(f"{file}: lpsim run {file} --report")
    return 0


def add_run(commands: Any) -> None:
    parser = commands.add_parser("run", help="run a grid; the same command again resumes it")
    parser.add_argument(
        "grid", metavar="GRID", help="a Python file with `def grid() -> Iterator[Config]`, or a shipped grid's name"
    )
    add_running(parser)
    parser.add_argument("--dry-run", action="store_true", help="say how many runs there are, done and left, and end")
    parser.set_defaults(function=lambda options: interruptible(_run_grid, options))


def add_tune(commands: Any) -> None:
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


def add_running(parser: argparse.ArgumentParser) -> None:
    """The options of everything that runs a grid."""
    parser.add_argument(
        "--formats",
        nargs="+",
        metavar="NAME",
        help="the number formats of a grid that takes formats, as quickstart does",
    )
    add_define(parser)
    parser.add_argument(
        "--telemetry-every", type=int, metavar="N", help="record what rounding did at every site, every N steps"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=getattr(os, "process_cpu_count", os.cpu_count)() or 1,
        help="processes (default: the usable cores)",
    )
    parser.add_argument("--executor", choices=("local", "slurm", "dask"), default="local")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where the grid's folder lies (default: runs)"
    )
    parser.add_argument("--report", action="store_true", help="write the report when all runs have ended")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="slurm: an option of sbatch; repeatable"
    )
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="dask: the scheduler; without it, processes on this machine"
    )


def interruptible(work: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """`work(options)`; 130, and how to go on, when it was interrupted or asked to end."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        return work(options)
    except KeyboardInterrupt:
        print(f"lpsim: interrupted; continue with: {shlex.join(options.argv)}", file=sys.stderr)
        return 130


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _run_grid(options: argparse.Namespace) -> int:
    from experiments.grids import load_claims, load_grid

    with user_errors():
        formats = chosen_formats(options)
        source, configs = load_grid(options.grid, formats)
        if options.dry_run:
            return _plan(configs, source, options)
        return 0 if run_all(configs, source, options, load_claims(options.grid, formats)) else 1


def _plan(configs: "list[Config] | Adaptive", source: Path, options: argparse.Namespace) -> int:
    from experiments.command.plan import plan

    if not isinstance(configs, list):
        raise ValueError(f"{source.stem} looks at its runs to decide on more: what it will ask for is not known before")
    print(plan(configs, options.runs / source.stem, options.jobs, options.telemetry_every))
    return 0


def _tune(options: argparse.Namespace) -> int:
    from experiments.command import tune
    from experiments.grids.adaptive import Adaptive, Rounds
    from experiments.grids.tuning import load_tuning
    from experiments.grids.tuning.search import Trial

    with user_errors():
        source, tuning = load_tuning(options.grid, chosen_formats(options))
        trials: list[Trial] = []

        def play() -> Rounds:
            trials[:] = yield from tuning.play()

        if not run_all(Adaptive(play, source), source, options):
            return 1
        folder = options.runs / source.stem
        files = tune.write(tuning, trials, folder, options.output or folder / "tuned.json")
        print(tune.summary(tuning, trials), *files, sep="\n")
        return 0


@contextmanager
def user_errors() -> Iterator[None]:
    """What is wrong with a grid, its folder or an option is a mistake of the user."""
    from experiments.grids.source_files import SourceError
    from experiments.training.record import RunFolderError

    try:
        yield
    except (SourceError, RunFolderError, ValueError) as error:
        raise UserError(str(error)) from error


def chosen_formats(options: argparse.Namespace) -> "list[Format] | None":
    """Those of --formats, of which --define may have made some known."""
    from lpsim import formats

    define(options.define)
    return None if options.formats is None else [formats.get(name) for name in options.formats]


def run_all(
    configs: "list[Config] | Adaptive", source: Path, options: argparse.Namespace, claims: "Sequence[Claim]" = ()
) -> bool:
    """Run a grid where the options say, print how it ended, write the report. Whether every run came to its end."""
    from experiments.grids.adaptive import Adaptive
    from experiments.running.grid import DONE, run_grid

    folder = options.runs / source.stem
    with make_executor(options, folder) as executor:
        rows = run_grid(configs, folder, executor, source, options.argv, options.telemetry_every, claims=claims)
    print(f"{folder}: {summary(rows)}")
    done = all(row.status in DONE for row in rows)
    if not done and isinstance(configs, Adaptive):
        print("  what the grid asks for next depends on these; the same command tries them again")
    if options.report:
        write_report([folder], None)
    return done


def make_executor(options: argparse.Namespace, folder: Path) -> "StoppableExecutor":
    from experiments.running.executors import DaskExecutor, LocalExecutor, SlurmExecutor

    if options.executor == "slurm":
        return SlurmExecutor(folder / "slurm", options.sbatch)
    if options.executor == "dask":
        try:
            return DaskExecutor(options.scheduler, options.jobs)
        except (ImportError, OSError) as error:
            raise UserError(str(error)) from error
    return LocalExecutor(options.jobs)


def summary(rows: Sequence["Row"]) -> str:
    """One line of counts, and one for every run that did not come to its end."""
    ran = sum(not row.skipped for row in rows)
    counts = {
        status: sum(row.status == status for row in rows)
        for status in ("finished", "diverged", "failed", "interrupted")
    }
    outcomes = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    lines = [f"{len(rows)} runs: {outcomes} ({ran} of them run now)"]
    for row in rows:
        if row.status in ("failed", "interrupted"):
            lines.append(f"  {row.status}: {row.label} ({row.signature}): {row.cause or 'the same command resumes it'}")
    return "\n".join(lines)


# --- report ---


def add_report(commands: Any) -> None:
    parser = commands.add_parser("report", help="one self-contained HTML file from the runs of one grid or several")
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUNS/GRID")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html in the folder; of A and B, A+B/report.html"
    )
    parser.add_argument("--tables", choices=("latex", "markdown"), help="write the tables for a paper too, in tables/")
    parser.set_defaults(function=lambda options: write_report(options.folders, options.output, options.tables))


def write_report(folders: Sequence[Path], output: Path | None, tables: str | None = None) -> int:
    for folder in folders:
        if not (folder / "grid.json").exists():
            near = (
                sorted(str(path.parent) for path in folder.parent.glob("*/grid.json")) if folder.parent.is_dir() else []
            )
            raise UserError(f"{folder} holds no grid (no grid.json); there are: {', '.join(near) or 'none beside it'}")
    from analysis.page.report import write_report as write

    try:
        print(write(folders, output, tables))
    except (ValueError, OSError) as error:
        raise UserError(f"no report of {', '.join(map(str, folders))}: {error}") from error
    return 0


# --- bench ---


def add_bench(commands: Any) -> None:
    names = ", ".join(benchmarks())
    parser = commands.add_parser(
        "bench",
        help="a benchmark of experiments/bench; without a name, all of them",
        epilog=f"Benchmarks: {names}. `lpsim bench NAME --help` tells what one measures, and its options.",
    )
    parser.add_argument("name", metavar="NAME", nargs="?")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    parser.set_defaults(function=run_bench)


def benchmarks() -> list[str]:
    """The names of the modules of experiments/bench."""
    from experiments import bench

    return [module.name for module in pkgutil.iter_modules(bench.__path__) if module.name[0] != "_"]


def run_bench(options: argparse.Namespace) -> int:
    from experiments.training.settings import names_near

    names = benchmarks()
    if options.name is not None and options.name not in names:
        raise UserError(f"no benchmark {options.name!r}; there are: {names_near(options.name, names)}")
    failed = 0
    for name in names if options.name is None else [options.name]:
        module = importlib.import_module(f"experiments.bench.{name}")
        parser = argparse.ArgumentParser(prog=f"lpsim bench {name}", description=module.__doc__)
        module.add_arguments(parser)
        failed |= int(module.run(parser.parse_args(options.rest)) or 0)
    return failed


if __name__ == "__main__":
    sys.exit(main())
