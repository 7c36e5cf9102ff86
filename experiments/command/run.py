"""`lpsim run`: run a grid, resume it, say what it would do. What `lpsim tune` does alike is here too."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.command import where
from experiments.command.report import write_report
from experiments.command.shared import UserError, add_define, chosen_formats, user_errors

if TYPE_CHECKING:  # torch takes seconds to import: `lpsim --help` does without
    from experiments.grids.adaptive import Adaptive
    from experiments.grids.claims import Claim
    from experiments.running.executors import StoppableExecutor
    from experiments.running.grid import Row
    from experiments.training.config import Config


NAMED_ALIKE = 3  # runs that failed for the same reason


def add(commands: Any) -> None:
    parser = commands.add_parser("run", help="run a grid; the same command again resumes it")
    parser.add_argument(
        "grid", metavar="GRID", help="a Python file with `def grid() -> Iterator[Config]`, or a shipped grid's name"
    )
    add_running(parser)
    parser.add_argument("--twin", action="store_true", help="run the small twin of a grid of real size, as NAME_twin")
    parser.add_argument("--only", action="append", default=[], metavar="FIELD=VALUE", help=where.HELP)
    parser.add_argument("--dry-run", action="store_true", help="say how many runs there are, done and left, and end")
    parser.set_defaults(function=lambda options: interruptible(_run_grid, options))


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
        help="processes (default: one for each of --gpus, otherwise the usable cores); slurm: jobs at a time",
    )
    parser.add_argument(
        "--gpus",
        metavar="LIST",
        help='local: the GPUs, such as 0,1,2 or "all"; a process sees one of them and no other',
    )
    parser.add_argument("--executor", choices=("local", "slurm", "dask"), default="local")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where the grid's folder lies (default: runs)"
    )
    parser.add_argument("--retry-failed", action="store_true", help="try the runs that failed again")
    parser.add_argument("--report", action="store_true", help="write the report when all runs have ended")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="slurm: an option of sbatch; repeatable"
    )
    parser.add_argument(
        "--processes-per-run", type=int, default=1, metavar="N", help="that share each batch, a GPU each (default: 1)"
    )
    parser.add_argument(
        "--runs-per-job",
        type=int,
        default=1,
        metavar="N",
        help="slurm: so many short runs in a job (default: 1)",
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
    from experiments.command.plan import plan
    from experiments.grids import load_claims, load_grid

    with user_errors():
        formats = chosen_formats(options)
        source, configs = load_grid(options.grid, formats, options.twin)
        chosen = _chosen(configs, source, options) if options.only or options.dry_run else None
        if options.dry_run:
            print(plan(chosen or [], folder_of(source, options), processes(options), options.retry_failed))
            return 0
        claims = load_claims(options.grid, formats, options.twin)
        return 0 if run_all(configs, source, options, claims, chosen) else 1


def folder_of(source: Path, options: argparse.Namespace) -> Path:
    """Where the grid's runs lie."""
    twin = "_twin" if getattr(options, "twin", False) else ""
    return Path(options.runs) / f"{source.stem}{twin}"


def _chosen(configs: list[Config] | Adaptive, source: Path, options: argparse.Namespace) -> list[Config]:
    """The runs that --only leaves, as they are run; all without it. Raises ValueError."""
    from analysis.run_files import flatten, with_left_out
    from experiments.running.grid import distinct, resolved

    if not isinstance(configs, list):
        raise ValueError(f"{source.stem} looks at its runs to decide on more: what it will ask for is not known before")
    folder = folder_of(source, options)
    asked = resolved(configs, folder, options.telemetry_every)
    runs = list(distinct(asked, folder.name, options.processes_per_run).values())
    if not options.only:
        return runs
    fields = [with_left_out(flatten(run.to_dict())) for run in runs]
    for each in fields:
        del each["version"]
    met = where.meets(fields, options.only, "--only")
    return [run for run, is_met in zip(runs, met, strict=True) if is_met]


def run_all(
    configs: list[Config] | Adaptive,
    source: Path,
    options: argparse.Namespace,
    claims: Sequence[Claim] = (),
    only: Sequence[Config] | None = None,
) -> bool:
    """Run a grid, or some of its runs only, where the options say, print how it ended, write the report.

    Whether every run came to its end.
    """
    from experiments.grids.adaptive import Adaptive
    from experiments.running.grid import DONE, run_grid

    folder = folder_of(source, options)
    with make_executor(options, folder) as executor:
        rows = run_grid(
            configs,
            folder,
            executor,
            source,
            options.argv,
            options.telemetry_every,
            claims=claims,
            processes_per_run=options.processes_per_run,
            only=None if only is None else {config.signature() for config in only},
            retry_failed=options.retry_failed,
        )
    print(f"{folder}: {summary(rows)}")
    if isinstance(configs, list) and len(rows) < len(configs):
        print(f"  --only left out {len(configs) - len(rows)} runs of the grid")
    if others := _others(folder):
        print(f"  {others} more run folders there are of other configs or other code; no table holds them")
    done = all(row.status in DONE for row in rows)
    if not done and isinstance(configs, Adaptive):
        print("  what the grid asks for next depends on these")
    if options.report:
        write_report([folder], None)
    return done


def _others(folder: Path) -> int:
    """How many run folders lie there that the grid, as it was run last, does not hold."""
    from experiments.training.record import read_json

    known = set((read_json(folder / "grid.json") or {}).get("signatures", ()))
    return sum(path.parent.name not in known for path in folder.glob("*/config.json"))


def make_executor(options: argparse.Namespace, folder: Path) -> StoppableExecutor:
    """Where the options say. Raises ValueError for an option that the executor has no use for."""
    from experiments.running.executors import DaskExecutor, LocalExecutor
    from experiments.running.slurm import SlurmExecutor, gpu_groups

    for name, used_by in (("gpus", "local"), ("sbatch", "slurm"), ("scheduler", "dask")):
        if getattr(options, name) and options.executor != used_by:
            raise ValueError(f"--{name} goes with --executor {used_by}, not with {options.executor}")
    if options.runs_per_job != 1 and options.executor != "slurm":
        raise ValueError(f"--runs-per-job goes with --executor slurm, not with {options.executor}")
    share = options.processes_per_run
    if share < 1 or (share > 1 and options.executor == "dask"):
        raise ValueError("--processes-per-run is at least 1, and goes with --executor local or slurm")
    if options.executor == "slurm":
        return SlurmExecutor(folder / "slurm", options.sbatch, options.jobs, options.runs_per_job, share)
    if options.executor == "dask":
        try:
            return DaskExecutor(options.scheduler, processes(options))
        except (ImportError, OSError) as error:
            raise UserError(str(error)) from error
    gpus = gpu_groups(all_gpus() if options.gpus == "all" else options.gpus or "", share)
    if options.gpus and not gpus:
        raise ValueError(f"--gpus {options.gpus}: there are not {share}, which a run needs")
    return LocalExecutor(len(gpus) if gpus and options.jobs is None else processes(options), gpus)


def processes(options: argparse.Namespace) -> int:
    """How many runs are computed at once on this machine. Raises ValueError for none."""
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, is {options.jobs}")
    cores = getattr(os, "process_cpu_count", os.cpu_count)() or 1
    return int(max(1, cores // options.processes_per_run) if options.jobs is None else options.jobs)


def all_gpus() -> str:
    """The GPUs that this process may use, by the words CUDA_VISIBLE_DEVICES has for them."""
    from torch import cuda

    return os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(cuda.device_count())))


def summary(rows: Sequence[Row]) -> str:
    """One line of counts, and one for the runs that did not come to their end, of which equal reasons name a few."""
    ran = sum(not row.skipped for row in rows)
    counts = {
        status: sum(row.status == status for row in rows)
        for status in ("finished", "diverged", "failed", "interrupted")
    }
    outcomes = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    lines = [f"{len(rows)} runs: {outcomes} ({ran} of them run now)"]
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.status in ("failed", "interrupted"):
            alike.setdefault((row.status, row.cause or "the same command resumes it"), []).append(row)
    for (status, cause), some in alike.items():
        lines += [f"  {status}: {row.label} ({row.signature}): {cause}" for row in some[:NAMED_ALIKE]]
        if len(some) > NAMED_ALIKE:
            lines.append(f"  {status}: {len(some) - NAMED_ALIKE} more, for the same reason")
    if any(row.status == "failed" and row.ended for row in rows):
        lines.append("  what failed is tried again by the same command with --retry-failed")
    return "\n".join(lines)
