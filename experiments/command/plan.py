"""`lpsim run GRID --dry-run`: what the command would do, without doing it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.running.grid import DONE
from experiments.training import record
from experiments.training.config import Config


def plan(runs: Sequence[Config], folder: Path, jobs: int, retry_failed: bool = False) -> str:
    """How many runs there are, what became of them, and how long the rest takes; what failed is of the rest where it is
    tried again. runs: as the grid in the folder runs them.

    The time is the mean over finished runs of the same model, or over all where that model has none, of seconds a step,
    times the steps that are left; a run that has begun counts whole.
    """
    results = [record.read_json(folder / run.signature() / "result.json") or {} for run in runs]
    status = [_status(run, result, folder) for run, result in zip(runs, results, strict=True)]
    count = {name: status.count(name) for name in dict.fromkeys(status)}
    lines = [f"{folder}: {len(runs)} runs: {', '.join(f'{number} {name}' for name, number in count.items())}"]
    ended = DONE if retry_failed else (*DONE, "failed")
    left = [run for run, name in zip(runs, status, strict=True) if name not in ended]
    timed = [(run, result) for run, result in zip(runs, results, strict=True) if _is_timed(run, result)]
    if left and timed:
        times = [_seconds_a_step([pair for pair in timed if pair[0].model == run.model] or timed) for run in left]
        seconds = sum(time * run.steps for time, run in zip(times, left, strict=True)) / jobs
        time = f"{round(seconds / 60)} min" if seconds >= 90 else f"{max(1, round(seconds))} s"
        lines.append(f"  the {len(left)} left take about {time} with --jobs {jobs}, by {len(timed)} finished")
    elif left:
        lines.append(
            f"  the {len(left)} left have {sum(run.steps for run in left)} steps; "
            "no finished run says how long one takes"
        )
    return "\n".join(lines)


def _status(run: Config, result: Mapping[str, Any], folder: Path) -> str:
    begun = "interrupted" if (folder / run.signature()).is_dir() else "not started"
    return str(result.get("status", begun))


def _is_timed(run: Config, result: Mapping[str, Any]) -> bool:
    return result.get("status") == "finished" and result.get("time_s", 0) > 0


def _seconds_a_step(timed: Iterable[tuple[Config, Mapping[str, Any]]]) -> float:
    each = [result["time_s"] / run.steps for run, result in timed]
    return float(sum(each) / len(each))
