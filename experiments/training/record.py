"""What a run leaves on disk: the folder runs/<grid>/<signature>/.

`config.json`, `env.json`, `metrics.jsonl` (append-only, one object a line), `weights.json` (histograms of the weights),
`checkpoint.pt` and, last, `result.json`; where telemetry is on, `telemetry.parquet` and `telemetry_cosines.parquet`,
replaced with every checkpoint. Whole files are written beside their place, synced and renamed; so kill -9 leaves a
folder that is read as it was, less the steps since the last checkpoint that was written. Nothing found in a folder is
executed: JSON, Parquet, and checkpoints with `weights_only=True`. What a worker imports from a grid's `sources` is what
the running command has put there (`own`).
"""

import fcntl
import io
import json
import math
import os
import platform
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
PACKAGES = ("lpsim", "torch", "numpy", "numba", "pandas", "scikit-learn", "matplotlib", "transformers")


class RunFolderError(Exception):
    """A run folder cannot be read or written. The message says which file, why, and what to do."""


class DamagedFolderError(RunFolderError):
    """One run's folder holds a file that is no record of that run; the other runs of its grid are not concerned."""


def strict_json(value: Any) -> Any:
    """`value` with non-finite floats as the strings "NaN", "Infinity" and "-Infinity": JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: strict_json(item) for key, item in value.items()}
    return [strict_json(item) for item in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write of `path` into one RunFolderError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunFolderError(
            f"cannot write {path}: {reason}. What is on disk is kept; free space or fix the folder, then run the same "
            "command again"
        ) from None


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace `path` by `content`, or leave it as it was. Raises RunFolderError."""
    beside = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)  # the rename is on disk when its folder is
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by the value as JSON, non-finite numbers as `strict_json` has them. Raises RunFolderError."""
    write_atomically(path, (json.dumps(strict_json(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, None when there is no such file. Raises DamagedFolderError for a torn one."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedFolderError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise DamagedFolderError(f"{path} is torn ({error}); delete {path.parent} to run it again") from None
    if not isinstance(value, dict):
        raise DamagedFolderError(f"{path} is not a JSON object; delete {path.parent} to run it again")
    return value


@contextmanager
def exclusive(path: Path, busy: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`; the system drops it with the process. Raises RunFolderError `busy` when it is held."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    raise RunFolderError(f"{busy} ({file.read().strip() or 'no name left'})") from None
                time.sleep(0.1)
        with writing(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


class RunRecord:
    """One run's folder, opened for writing by the process that trains it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last_step = 0  # of the last line logged
        self._metrics: io.RawIOBase | None = None
        self._writer = ThreadPoolExecutor(max_workers=1)  # its thread starts with the first checkpoint
        self._written: Future[None] | None = None

    def exclusive(self) -> Any:
        """The run's own lock: waits a minute for a worker that outlived its grid to write its checkpoint and leave."""
        return exclusive(self.folder / ".lock", f"another process is training {self.folder}", wait_s=60)

    def begin(self, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Write config.json and env.json; what a later session runs in is added to env.json under "resumed".

        The result of an earlier, failed attempt goes: the run is under way again. So does the env.json of one that left
        no checkpoint, where the data have been mended since.
        """
        with writing(self.folder / "result.json"):
            (self.folder / "result.json").unlink(missing_ok=True)
        first = read_json(self.folder / "env.json")
        mended = first is not None and first.get("data_sha256") != environment.get("data_sha256")
        if first is None or (mended and not (self.folder / "checkpoint.pt").exists()):
            write_json(self.folder / "env.json", environment)
        else:
            write_json(self.folder / "env.json", {**first, "resumed": [*first.get("resumed", []), dict(environment)]})
        write_json(self.folder / "config.json", config)

    def keep_metrics_until(self, step: int) -> None:
        """Cut off the metrics after `step`, and a torn last line: the run goes on from there."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_bytes().split(b"\n") if _step(line) <= step]
            write_atomically(path, b"".join(line + b"\n" for line in kept))

    def log(self, step: int, split: str, **metrics: float) -> None:
        """Append one line to metrics.jsonl and hand it to the system.

        Raises RunFolderError where that fails, or where a checkpoint could not be written in the background.
        """
        if self._written is not None and self._written.done():
            self.flush()
        line = json.dumps(strict_json({"step": step, "split": split, **metrics}), allow_nan=False)
        path = self.folder / "metrics.jsonl"
        with writing(path):
            if self._metrics is None:
                self._metrics = path.open("ab", buffering=0)
            self._metrics.write(line.encode() + b"\n")
        self.last_step = step

    def write_telemetry(self, tables: Mapping[str, "Tensor"]) -> None:
        """Replace NAME.parquet by the bytes of that name."""
        for name, content in tables.items():
            write_atomically(self.folder / f"{name}.parquet", content.cpu().numpy().data)

    def write_weights(
        self, step: int, histograms: Sequence[Mapping[str, Any]], values: Sequence[float], width: float
    ) -> None:
        """Add the histograms of `step` to weights.json; what it holds of this step or later, from before a kill, goes.

        values: the positive values of the weights' format, empty where they are not rounded. width: of a bin, octaves.
        """
        path = self.folder / "weights.json"
        known = [each for each in (read_json(path) or {}).get("histograms", []) if each["step"] < step]
        rows = [*known, *({"step": step, **each} for each in histograms)]
        write_json(path, {"version": VERSION, "width": width, "values": list(values), "histograms": rows})

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Have checkpoint.pt replaced by `state` as it is now; the metrics up to here are on disk before it is.

        The disk is written in the background while the run goes on. What goes wrong there is raised by the next `log`
        after it, and at the latest by the next checkpoint, `flush`, `finish` or `close`.
        """
        import torch

        self.flush()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._written = self._writer.submit(self._write_checkpoint, buffer)

    def _write_checkpoint(self, buffer: io.BytesIO) -> None:
        self._sync_metrics()
        with buffer.getbuffer() as content:  # Python 3.12.1 crashes where it is left to the garbage collector
            write_atomically(self.folder / "checkpoint.pt", content)

    def _sync_metrics(self) -> None:
        if self._metrics is not None:
            with writing(self.folder / "metrics.jsonl"):
                os.fsync(self._metrics.fileno())

    def flush(self) -> None:
        """Wait until the last checkpoint is on disk. Raises RunFolderError where it could not be written."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def load_checkpoint(self, device: str) -> dict[str, Any] | None:
        """The last checkpoint, None when there is none. Raises RunFolderError when it cannot be read."""
        import torch

        self.flush()
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            reason = str(error).split("\n")[0]
            raise RunFolderError(f"cannot load {path} ({reason}); delete it to train this run from its start") from None
        return dict(state)

    def weights_of(self, signature: str, device: str) -> dict[str, Any]:
        """The model's state at the end of another run of this grid. Raises RunFolderError where it has not finished."""
        other = RunRecord(self.folder.parent / signature)
        result = read_json(other.folder / "result.json")
        saved = other.load_checkpoint(device)
        if saved is None or result is None or result.get("status") != "finished":
            raise RunFolderError(
                f"{self.folder} begins with the weights of {other.folder}, which has not finished; an adaptive grid "
                "yields that run first"
            )
        return dict(saved["model"])

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json: the run is over, and its last checkpoint is on disk."""
        self.flush()
        self._sync_metrics()
        write_json(self.folder / "result.json", {"version": VERSION, **result})

    def close(self) -> None:
        """Wait for the last checkpoint, and close the metrics. Raises as `flush` does."""
        try:
            self.flush()
        finally:
            self._writer.shutdown()
            if self._metrics is not None:
                self._metrics.close()
                self._metrics = None


def _step(line: bytes) -> float:
    """The step of a metrics line; infinity for a torn one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def forget_peak_memory() -> None:
    """Let `peak_memory_mb` count from here on, where the system can (Linux): a worker trains one run after another."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """The largest resident memory of this process, its libraries included, in units of 10^6 bytes.

    Linux's getrusage counts what the process was that started this one, and forgets nothing; /proc knows better.
    """
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def environment() -> dict[str, Any]:
    """Versions, machine, commit and threads of this process."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "version": VERSION,
        "versions": versions,
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpu": gpu, "system": platform.platform()},
        "git": _git(),
        "threads": torch.get_num_threads(),
        "host": socket.gethostname(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git() -> dict[str, Any] | None:
    """Commit of the tree this package is imported from, and whether that has changes; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
