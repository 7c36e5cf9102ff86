"""`lpsim export`: what TensorBoard, MLflow and Weights & Biases read back is what the run folders hold."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import load
from experiments.command import cli
from tests.analysis import run_folders as made

STARTED = 1735689600  # 2025-01-01, of the made-up runs


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    configs = [made.config("vit-micro", optimizer, "mxfp4_e2m1", 0) for optimizer in ("adamw", "lmd")]
    outcome = {"adamw": ("diverged", 60), "lmd": ("finished", None)}
    return made.write_runs(tmp_path / "made", configs, lambda config: outcome[config["optimizer"]["name"]])


def export(grid: Path, sink: str) -> Path:
    output = grid.parent / sink
    assert cli.main(["export", str(grid), "--to", sink, "--output", str(output)]) == 0
    return output


def runs_and_numbers(grid: Path) -> Iterator[tuple[dict[str, Any], dict[str, tuple[list[int], list[float]]]]]:
    """Every run, and by "split/metric" its steps and values."""
    results = load.read(grid)
    for row in results.runs.to_dict("records"):
        mine = results.metrics[results.metrics["signature"] == row["signature"]]
        by_name = mine.groupby(mine["split"] + "/" + mine["metric"])
        yield row, {name: (list(part["step"]), list(part["value"])) for name, part in by_name}


def test_tensorboard(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = export(grid, "tensorboard")
    assert capsys.readouterr().out == f"2 runs; see them with: tensorboard --logdir {output}\n"
    for row, numbers in runs_and_numbers(grid):
        folder = output / f"{row['optimizer']}-{row['signature'][:8]}"
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
        final = {name for name in scalars if name.startswith("final/")}
        assert scalars.keys() - final == numbers.keys()
        for name, (steps, values) in numbers.items():
            assert [scalar.step for scalar in scalars[name]] == steps
            np.testing.assert_array_equal([scalar.value for scalar in scalars[name]], np.float32(values))
        known = {
            name.replace(".", "/", 1): row[name] for name in row if name.startswith("final.") and row[name] == row[name]
        }
        assert final == known.keys()
        assert all(scalars[name][0].value == np.float32(value) for name, value in known.items())
        times = [scalar.wall_time for scalar in scalars["train/loss"]]
        assert times == sorted(times) and times[0] >= STARTED and times[-1] == STARTED + 9.5
        settings = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        assert row["optimizer"].encode() in settings and b"optimizer.lr" in settings


def test_mlflow(grid: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=export(grid, "mlflow").as_uri())
    experiment = client.get_experiment_by_name("made")
    found = {run.data.tags["signature"]: run for run in client.search_runs([experiment.experiment_id])}
    for row, numbers in runs_and_numbers(grid):
        run = found.pop(row["signature"])
        assert (run.info.status, run.data.tags["status"]) == ("FINISHED", row["status"])
        assert run.data.params["optimizer.lr"] == str(row["optimizer.lr"])
        for name, (steps, values) in numbers.items():
            history = client.get_metric_history(run.info.run_id, name)
            assert [metric.step for metric in history] == steps
            np.testing.assert_array_equal([metric.value for metric in history], values)
    assert not found


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = file.read_bytes(), 7, b""
    while place < len(content):
        if 32768 - place % 32768 < 7:  # the rest of a block that holds no header
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or a last part
            yield Record.FromString(record)
            record = b""


def test_wandb(grid: Path) -> None:
    pytest.importorskip("wandb")
    output = export(grid, "wandb")
    for row, numbers in runs_and_numbers(grid):
        (file,) = output.glob(f"wandb/offline-run-*-{row['signature']}/run-{row['signature']}.wandb")
        found = list(records(file))
        lines = [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in found
            if record.HasField("history")
        ]
        for name, (steps, values) in numbers.items():
            mine = [(line["_step"], float(line[name])) for line in lines if name in line]
            np.testing.assert_array_equal(mine, list(zip(steps, values, strict=True)))
        config = {item.key: item.value_json for record in found for item in record.run.config.update}
        assert (config["optimizer"], config["optimizer.lr"]) == (f'"{row["optimizer"]}"', str(row["optimizer.lr"]))


@pytest.mark.parametrize(
    ("sink", "package"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow-skinny"), ("wandb", "wandb")]
)
def test_a_missing_package_is_named(
    grid: Path, sink: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, sink, None)
    output = grid.parent / "out"
    assert cli.main(["export", str(grid), "--to", sink, "--output", str(output)]) == 2
    assert capsys.readouterr().err == f"lpsim: --to {sink} needs the package {package}: pip install {package}\n"
    assert not output.exists()


def test_nothing_is_overwritten(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    (grid.parent / "out").mkdir()
    (grid.parent / "out" / "mine").write_text("kept")
    assert cli.main(["export", str(grid), "--to", "tensorboard", "--output", str(grid.parent / "out")]) == 2
    assert "is not empty; give another --output" in capsys.readouterr().err
    assert [path.name for path in (grid.parent / "out").iterdir()] == ["mine"]
    assert math.isnan(load.runs(grid)["final.train_loss"].iloc[0])
