"""Grids of runs: skip what is done, resume what was interrupted, go on when one fails (a failure is a row).

The grid's folder is runs/<grid>/: `grid.json` (the source of the grid and its signatures) and one folder a run. Every
decision is read from there, so the same command after a crash, a Ctrl-C or a kill -9 continues, and after success does
nothing. What failed, by an exception of its training, stays failed until it is asked for again. A grid is a round of
runs, or, when it is adaptive, several, each asked for after the one before has ended.
"""

import dataclasses
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.grids.adaptive import Adaptive, Outcome
from experiments.grids.claims import Claim, resolve
from experiments.grids.source_files import GridError
from experiments.running.executors import StoppableExecutor, WorkerDied, stop_requested
from experiments.running.processes import train_together
from experiments.training import own, parallel, record, train
from experiments.training.config import Config
from experiments.training.record import DamagedFolderError, RunFolderError, RunRecord

VERSION = 1
DONE = ("finished", "diverged")  # outcomes that are never tried again


@dataclass(frozen=True)
class Row:
    """How one run stands: status "finished", "diverged", "failed" or "interrupted"; `skipped` when it was so before.

    ended: it has a result. A failed run without one (its worker was killed, the disk was full) is resumed next time.
    """

    signature: str
    label: str
    status: str
    step: int = 0
    cause: str | None = None
    final: dict[str, float] = field(default_factory=dict)
    skipped: bool = False
    ended: bool = False


def label(config: Config) -> str:
    optimizer = f"{config.optimizer.name} lr {config.optimizer.lr:g}"
    return f"{optimizer}, {config.recipe.name}, {config.model.name}, seed {config.seed}"


def labels(configs: Mapping[str, Config]) -> dict[str, str]:
    """A name for every run of a grid, by its signature: its `label`, and the settings that tell equal ones apart."""
    alike: dict[str, list[str]] = {}
    for signature, config in configs.items():
        alike.setdefault(label(config), []).append(signature)
    names = {}
    for common, signatures in alike.items():
        settings = {signature: dict(_leaves(configs[signature].to_dict())) for signature in signatures}
        paths = sorted({path for leaves in settings.values() for path in leaves})
        differ = [path for path in paths if len({repr(leaves.get(path)) for leaves in settings.values()}) > 1]
        differ = [path for path in differ if "_definition" not in path] or differ
        for signature, leaves in settings.items():
            values = [f"{path.rpartition('.')[2]} {leaves[path]}" for path in differ if path in leaves]
            names[signature] = ", ".join([common, *values])
    return names


def _leaves(data: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a config by its dotted path."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def run_grid(
    configs: Iterable[Config] | Adaptive,
    folder: Path,
    executor: StoppableExecutor,
    source: Path | None = None,
    argv: Sequence[str] = (),
    telemetry_every: int | None = None,
    claims: Sequence[Claim] = (),
    only: Collection[str] | None = None,
    retry_failed: bool = False,
    processes_per_run: int = 1,
) -> list[Row]:
    """Bring every run to its end and return one row a config, in order. The grid's name is the folder's.

    A run that has failed is tried again, from its last checkpoint, with retry_failed alone. A run whose folder is
    damaged is a failed row that says how to mend it; the others are run. An adaptive grid gets the results of a round
    when all its runs have finished or diverged; while one has failed or was interrupted, the grid stops there, so that
    what it asks for next never depends on an accident. telemetry_every: replaces the configs' own, where given. claims:
    what the grid is to decide, written to grid.json for the report. only: the signatures of the runs to bring to their
    end; the others stand in grid.json, and have no row. processes_per_run: how many share each run's batches
    (experiments.training.parallel).

    Raises: GridError for no or equal configs, of any rounds, for a claim about runs that the grid has not, for `only`
    of an adaptive grid, and for data that are not there or do not fit, where the executor's jobs run on this machine;
    RunFolderError, before anything of a round is run, when the folder is in use, of another version or was filled from
    other data; KeyboardInterrupt, after all running runs have written a checkpoint, on Ctrl-C.
    """
    rounds = configs.rounds() if isinstance(configs, Adaptive) else _one_round(configs)
    by_signature: dict[str, Config] = {}

    def joined(asked: Iterable[Config]) -> dict[str, Config]:
        """The configs of a round by signature; they join those of the rounds before."""
        mine = distinct(resolved(asked, folder, telemetry_every), folder.name, processes_per_run, by_signature)
        by_signature.update(mine)
        return mine

    asked = next(rounds, [])
    mine = joined(asked)
    if (claims or only is not None) and isinstance(configs, Adaptive):
        what = "claims need" if claims else "to run some only needs"
        raise GridError(f"the grid {folder.name} looks at its runs; {what} a grid whose runs are known before")
    resolved_claims = resolve(claims, by_signature, source or folder)
    description: dict[str, Any] = {
        "version": VERSION,
        "grid": folder.name,
        "source": None if source is None else str(source),
        "source_text": None if source is None else source.read_text(),
        **({"claims": resolved_claims} if resolved_claims else {}),
    }

    def describe() -> None:
        document = {**description, "signatures": list(by_signature), "argv": list(argv)}
        record.write_json(folder / "grid.json", document)

    with record.exclusive(folder / ".lock", f"another `lpsim run` is working in {folder}"):
        fingerprint = functools.cache(_fingerprint)  # of a large data set it takes a while
        rows: dict[str, Row | None] = {}
        while True:
            names = labels(by_signature)
            chosen = {signature: config for signature, config in mine.items() if only is None or signature in only}
            rows |= {
                signature: _recorded(folder / signature, config, names[signature], fingerprint, retry_failed)
                for signature, config in chosen.items()
            }
            if None in rows.values():
                if executor.here:
                    _check_here(
                        [config for signature, config in chosen.items() if rows[signature] is None], fingerprint
                    )
                describe()
                sources = own.keep((part for each in chosen.values() for part in each.own_parts()), folder, source)
                wanted = {signature: by_signature[signature] for signature in rows}
                _run_missing(wanted, names, rows, folder, executor, sources, processes_per_run)
            ended = [row for row in (rows[signature] for signature in chosen) if row is not None and row.status in DONE]
            if len(ended) < len(mine):
                break
            try:
                asked = rounds.send([_outcome_of(config, row) for config, row in zip(asked, ended, strict=True)])
            except StopIteration:
                break
            mine = joined(asked)
        describe()
    names = labels(by_signature)
    return [dataclasses.replace(row, label=names[row.signature]) for row in rows.values() if row is not None]


def resolved(configs: Iterable[Config], folder: Path, telemetry_every: int | None = None) -> list[Config]:
    """The configs as the grid in that folder runs them; telemetry_every replaces their own, where given."""
    changes: dict[str, Any] = {} if telemetry_every is None else {"telemetry_every": telemetry_every}
    return [dataclasses.replace(config, grid=folder.name, **changes) for config in configs]


def distinct(
    configs: Iterable[Config], grid: str, processes_per_run: int = 1, before: Collection[str] = ()
) -> dict[str, Config]:
    """The configs of a grid's round by signature. before: the signatures of earlier rounds.

    Raises: GridError for none in the first round, for equal ones, and where a run cannot be shared among so many.
    """
    mine: dict[str, Config] = {}
    for config in configs:
        signature = config.signature()
        if signature in before or signature in mine:
            raise GridError(f"the grid {grid} has the same run twice: {label(config)}")
        if processes_per_run > 1:
            parallel.check(config, processes_per_run)
        mine[signature] = config
    if not mine and not before:
        raise GridError(f"the grid {grid} has no runs")
    return mine


def _fingerprint(data: Any) -> str:
    try:
        return str(data.fingerprint())
    except (OSError, ValueError) as error:
        raise GridError(f"the data of the grid cannot be read: {error}") from None


def _check_here(configs: Iterable[Config], fingerprint: Callable[[Any], str]) -> None:
    """Raises GridError for a GPU or data that are not there: one message instead of one for every run."""
    configs = list(configs)
    if any(config.device.startswith("cuda") for config in configs) and not torch.cuda.is_available():
        raise GridError(
            "the grid's runs are for device cuda, and torch finds no GPU here: run it where one is, or by --executor "
            "slurm or dask, or give the configs device='cpu'"
        )
    checked: list[tuple[Any, Any]] = []
    for data, model in ((config.data, config.model) for config in configs):
        if (data, model) in checked:
            continue
        checked.append((data, model))
        fingerprint(data)
        if getattr(data, "lazy", False):
            try:
                data.load(model)
            except (OSError, ValueError) as error:
                raise GridError(f"the data of the grid do not fit: {error}") from None


def _one_round(configs: Iterable[Config]) -> Generator[list[Config], Sequence[Outcome], None]:
    yield list(configs)


def _outcome_of(config: Config, row: Row) -> Outcome:
    """What an adaptive grid hears of a run: numbers that are not finite as floats, not as JSON's strings."""
    return Outcome(config, row.signature, row.status, {name: float(value) for name, value in row.final.items()})


def _recorded(
    folder: Path, config: Config, name: str, fingerprint: Callable[[Any], str], retry_failed: bool
) -> Row | None:
    """The row of a run that has ended or whose folder is damaged, None for one to be run, resumed or tried again.

    Raises: RunFolderError for a folder that is not to be touched.
    """
    try:
        return _read(folder, config, name, fingerprint, retry_failed)
    except DamagedFolderError as error:
        return Row(config.signature(), name, "failed", cause=str(error), skipped=True)


def _read(folder: Path, config: Config, name: str, fingerprint: Callable[[Any], str], retry_failed: bool) -> Row | None:
    written = record.read_json(folder / "config.json")
    result = record.read_json(folder / "result.json")
    made_in = record.read_json(folder / "env.json")
    for file, content in (("result.json", result), ("env.json", made_in)):
        if content is not None and content.get("version") != record.VERSION:
            raise RunFolderError(
                f"{folder / file} is of version {content.get('version')!r}, this is version {record.VERSION}; "
                f"use another --runs folder, or delete {folder} to run it again"
            )
    if written is not None and written != config.to_dict():
        raise DamagedFolderError(
            f"{folder}/config.json is not the config of its signature; delete {folder} to run it again"
        )
    trained = (folder / "checkpoint.pt").exists() or (result is not None and result.get("status") in DONE)
    if trained and made_in is not None and made_in.get("data_sha256") != fingerprint(config.data):
        versions = made_in.get("versions", {})
        shipped = (
            "the text differs between versions of Python, glyphs between those of matplotlib: that run had "
            f"{versions.get('python')} and {versions.get('matplotlib')}"
        )
        of_files = isinstance(config.data, own.DataSet) or hasattr(config.data, "folder")
        why = "its fingerprint is another" if of_files else shipped
        raise RunFolderError(
            f"{folder} was trained on other data than {config.data.name} holds now ({why}); use another --runs "
            f"folder, or delete {folder.parent}"
        )
    if result is None or result.get("status") not in (*DONE, *(() if retry_failed else ("failed",))):
        return None
    return _row(config, name, result, skipped=True)


def _row(config: Config, name: str, result: dict[str, Any], skipped: bool = False) -> Row:
    cause, final = result.get("cause"), result.get("final") or {}
    return Row(config.signature(), name, result["status"], result.get("step", 0), cause, final, skipped, ended=True)


def _run_missing(
    configs: dict[str, Config],
    names: dict[str, str],
    rows: dict[str, Row | None],
    folder: Path,
    executor: StoppableExecutor,
    sources: Path | None,
    processes: int,
) -> None:
    """Run every config that has no row yet and fill in its row."""
    futures: dict[Future[Any], str] = {}
    with Progress(configs, names, rows, folder) as progress:
        try:
            missing = [signature for signature in configs if rows[signature] is None]
            told = [] if sources is None and processes == 1 else [None if sources is None else str(sources), processes]
            calls = [[configs[signature].to_dict(), str(folder / signature), *told] for signature in missing]
            futures = dict(zip(executor.submit_many(run_one, calls), missing, strict=True))
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    signature = futures[future]
                    rows[signature] = _outcome(configs[signature], names[signature], future)
                    progress.ended(rows[signature])
                progress.refresh()
        except KeyboardInterrupt:
            progress.say("Stopping: the running runs write their checkpoints. Ctrl-C again leaves without waiting.")
            _stop(futures, executor, progress)
            raise


def _stop(futures: dict[Future[Any], str], executor: StoppableExecutor, progress: "Progress") -> None:
    try:
        for future in futures:
            future.cancel()
        executor.stop()
        wait(futures)
    except KeyboardInterrupt:
        progress.say("Left; what is still running stops at its next step.")
        os._exit(130)
    stopped = sum(
        not future.cancelled() and future.exception() is None and future.result() is None for future in futures
    )
    progress.say(f"Stopped: {stopped} runs were under way and have written a checkpoint.")


def _outcome(config: Config, name: str, future: Future[Any]) -> Row:
    try:
        result = future.result()
    except CancelledError:
        return Row(config.signature(), name, "interrupted", cause="cancelled before its end")
    except Exception as error:  # the worker died, or could not even write its folder: the run is a failed row
        return Row(config.signature(), name, "failed", cause=str(error) or type(error).__name__)
    return Row(config.signature(), name, "interrupted") if result is None else _row(config, name, result)


def run_one(
    config_json: dict[str, Any], folder: str, sources: str | None = None, processes: int = 1
) -> dict[str, Any] | None:
    """In a worker: train one run and write its result.json. Returns what that holds, None when asked to stop.

    An exception of the training is a result ("failed", with its traceback). sources: the grid's copy of the source of
    classes that are not shipped.
    Raises: RunFolderError when the folder is at fault.
    """
    torch.set_num_threads(1)  # as train does; so that env.json says so
    config = Config.from_dict(config_json, None if sources is None else Path(sources))
    run = RunRecord(Path(folder))
    if stop_requested():
        return None
    try:
        with run.exclusive():
            return _train(config, run, sources, processes)
    finally:
        run.close()


def _train(config: Config, run: RunRecord, sources: str | None, processes: int) -> dict[str, Any] | None:
    try:
        made_in = {**record.environment(), "data_sha256": config.data.fingerprint()}
        if sources is not None:
            made_in["sources"] = Path(sources).name
        if processes > 1:
            made_in["processes"] = processes
        run.begin(config.to_dict(), made_in)
        record.forget_peak_memory()
        if processes == 1:
            result = train.train(config, run, stop_requested)
        else:
            result = train_together(config.to_dict(), run.folder, sources, processes, stop_requested)
    except (RunFolderError, WorkerDied):
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        trace = traceback.format_exc()
        result = {
            "status": "failed",
            "step": run.last_step,
            "cause": cause,
            "traceback": trace,
            "final": {},
            "time_s": 0.0,
        }
    if result is not None:
        result["peak_memory_mb"] = round(record.peak_memory_mb(), 1)
        run.finish(result)
    return record.strict_json(result)


class Progress:
    """A bar over the steps of all runs, with the time left and the last losses, read from the runs' metrics.jsonl."""

    def __init__(
        self, configs: dict[str, Config], names: dict[str, str], rows: dict[str, Row | None], folder: Path
    ) -> None:
        self._configs, self._names, self._folder = configs, names, folder
        self._steps = {s: configs[s].steps if row is not None else 0 for s, row in rows.items()}
        self._losses: dict[str, float] = {}
        self._offsets: dict[str, int] = {s: 0 for s, row in rows.items() if row is None}  # of the runs not ended
        self._done, self._count = sum(row is not None for row in rows.values()), len(rows)
        self._read()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=sum(config.steps for config in configs.values()),
            initial=sum(self._steps.values()),
            unit="step",
            desc=f"{self._done}/{self._count} runs",
            mininterval=0.5 if terminal else 15,
            dynamic_ncols=terminal,
            smoothing=0,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def ended(self, row: Row | None) -> None:
        assert row is not None
        self._offsets.pop(row.signature)
        self._losses.pop(row.signature, None)
        if row.status in DONE:
            self._steps[row.signature] = self._configs[row.signature].steps
            self._done += 1
            final = "  ".join(f"{name} {value:.4g}" for name, value in row.final.items() if isinstance(value, float))
            self.say(f"{row.label}: {row.status}  {final if row.cause is None else row.cause}")
        else:
            self.say(f"{row.label}: {row.status}  {row.cause or ''}".rstrip())

    def refresh(self) -> None:
        active = self._read()
        self._bar.set_description(f"{self._done}/{self._count} runs", refresh=False)
        losses = (f"{self._names[s]} {self._losses[s]:.3f}" for s in active[:2] if s in self._losses)
        self._bar.set_postfix_str(", ".join(losses), refresh=False)
        self._bar.update(max(0, sum(self._steps.values()) - self._bar.n))

    def _read(self) -> list[str]:
        """Take in what the runs have logged since; those that logged something."""
        active = []
        for signature, offset in self._offsets.items():
            try:
                with (self._folder / signature / "metrics.jsonl").open("rb") as file:
                    if file.seek(0, os.SEEK_END) < offset:  # a resumed run has cut its tail off
                        offset = 0
                    file.seek(offset)
                    new = file.read()
            except OSError:
                continue
            complete = new[: new.rfind(b"\n") + 1]
            self._offsets[signature] = offset + len(complete)
            for line in complete.splitlines():
                try:
                    entry = json.loads(line)
                    self._steps[signature] = entry["step"]
                    if entry["split"] == "train" and isinstance(entry["loss"], float):
                        self._losses[signature] = entry["loss"]
                except (ValueError, KeyError, TypeError):  # read while a resumed run cuts its tail off
                    continue
            if complete:
                active.append(signature)
        return active
