"""`lpsim report --watch`: the report of runs that go on, until all have ended."""

import fcntl
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

SEEN = ("grid.json", "*/config.json", "*/metrics.jsonl", "*/result.json")  # what a report is made of
Stamp = list[tuple[str, int, int]]


def watch(
    folders: Sequence[Path], write: Callable[[], object], seconds: float, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Write, then look every so many seconds and write again when something has changed, until every grid has ended."""
    while True:
        # asked before writing: what ends while the report is written stands in the next one
        ended, seen = all(map(has_ended, folders)), stamp(folders)
        write()
        if ended:
            return
        sleep(seconds)
        while stamp(folders) == seen and not all(map(has_ended, folders)):
            sleep(seconds)


def has_ended(folder: Path) -> bool:
    """Whether all runs of grid.json have a result, and no `lpsim run` is there that may ask for more."""
    signatures = json.loads((folder / "grid.json").read_bytes())["signatures"]
    return all((folder / name / "result.json").exists() for name in signatures) and not _is_worked_in(folder)


def _is_worked_in(folder: Path) -> bool:
    try:
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def stamp(folders: Sequence[Path]) -> Stamp:
    """Names, times and sizes of the files that a report is made of."""
    found = []
    for path in (path for folder in folders for pattern in SEEN for path in folder.glob(pattern)):
        try:
            stat = path.stat()
        except FileNotFoundError:  # the result of an earlier attempt, just now
            continue
        found.append((str(path), stat.st_mtime_ns, stat.st_size))
    return sorted(found)
