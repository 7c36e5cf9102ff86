"""Run folders: torn files, full disks, locks. What was computed stays readable."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.training import record
from experiments.training.record import RunFolderError, RunRecord


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunRecord]:
    run = RunRecord(tmp_path / "run")
    run.begin({"seed": 0}, {"version": 1, "host": "a"})
    yield run
    run.close()


def lines(run: RunRecord) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_non_finite_numbers_are_strict_json(run: RunRecord) -> None:
    run.log(1, "train", loss=math.nan, high=math.inf, low=-math.inf, norm=1.5)
    expected = {"step": 1, "split": "train", "loss": "NaN", "high": "Infinity", "low": "-Infinity", "norm": 1.5}
    text = (run.folder / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == expected


def test_numbers_survive_the_round_trip_bit_for_bit(run: RunRecord) -> None:
    value = torch.tensor(2.3, dtype=torch.float32).item() / 3
    run.log(1, "train", loss=value)
    assert lines(run)[0]["loss"] == value


@pytest.mark.parametrize("torn", [b"", b'{"step": 3, "spl', b'{"step": 3}', b"\xff\xfe", b"[1]\n", b'{"split": "x"}\n'])
def test_metrics_are_cut_at_a_step_and_at_a_torn_line(run: RunRecord, torn: bytes) -> None:
    for step in (1, 2, 3):
        run.log(step, "train", loss=float(step))
        run.log(step, "validation", loss=float(step))
    run.close()
    with (run.folder / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    run.keep_metrics_until(2)
    assert [line["step"] for line in lines(run)] == [1, 1, 2, 2]
    run.log(3, "train", loss=9.0)
    assert lines(run)[-1] == {"step": 3, "split": "train", "loss": 9.0}


def test_checkpoints_hold_tensors_and_numbers_and_load_without_executing_anything(run: RunRecord) -> None:
    state = {"step": 3, "model": {"w": torch.arange(3.0)}, "final": {"train_loss": math.nan}}
    run.save_checkpoint(state)
    loaded = run.load_checkpoint("cpu")
    assert loaded is not None and loaded["step"] == 3 and torch.equal(loaded["model"]["w"], state["model"]["w"])
    torch.save({"step": Path("evil")}, run.folder / "checkpoint.pt")  # any class would do
    with pytest.raises(
        RunFolderError, match=r"cannot load .*checkpoint\.pt .*delete it to train this run from its start"
    ):
        run.load_checkpoint("cpu")


def test_a_damaged_checkpoint_is_named(run: RunRecord) -> None:
    assert run.load_checkpoint("cpu") is None
    for content in (b"", b"PK\x03\x04nonsense"):
        (run.folder / "checkpoint.pt").write_bytes(content)
        with pytest.raises(RunFolderError, match=r"cannot load .*checkpoint\.pt"):
            run.load_checkpoint("cpu")


def test_an_interrupted_write_leaves_the_old_file(run: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save_checkpoint({"step": 1})
    run.flush()

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    run.save_checkpoint({"step": 2})
    with pytest.raises(KeyboardInterrupt):
        run.flush()
    loaded = run.load_checkpoint("cpu")
    assert loaded is not None and loaded["step"] == 1


FULL = r"cannot write .*{}: No space left on device\. What is on disk is kept; .*run the same command again"


def test_metrics_on_a_full_disk_are_one_message(run: RunRecord) -> None:
    (run.folder / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match=FULL.format("metrics.jsonl")):
        run.log(1, "train", loss=1.0)


def test_a_checkpoint_on_a_full_disk_is_one_message_and_keeps_the_old_one(run: RunRecord) -> None:
    later: list[Callable[[], Any]] = [
        run.flush,
        lambda: run.save_checkpoint({"step": 3}),
        lambda: run.finish({"status": "finished"}),
        run.close,
    ]
    for call in later:
        run.save_checkpoint({"step": 1})
        run.flush()
        (run.folder / "checkpoint.pt.tmp").symlink_to("/dev/full")
        run.save_checkpoint({"step": 2})
        with pytest.raises(RunFolderError, match=FULL.format(r"checkpoint\.pt")):
            call()
        loaded = run.load_checkpoint("cpu")
        assert loaded is not None and loaded["step"] == 1
    assert not (run.folder / "result.json").exists()


def test_a_checkpoint_holds_what_the_state_was_when_it_was_saved(run: RunRecord) -> None:
    weights = torch.arange(3.0)
    run.save_checkpoint({"w": weights})
    weights.zero_()
    loaded = run.load_checkpoint("cpu")
    assert loaded is not None and torch.equal(loaded["w"], torch.arange(3.0))


def test_an_unwritable_folder_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot write .*result\.json: Not a directory"):
        RunRecord(tmp_path / "file" / "run").finish({"status": "finished"})


@pytest.mark.parametrize("content", ["", "{", '{"version": 1', "[]", "null", "\x00"])
def test_torn_json_is_told_from_absent(tmp_path: Path, content: str) -> None:
    path = tmp_path / "result.json"
    assert record.read_json(path) is None
    path.write_text(content)
    with pytest.raises(RunFolderError, match=r"result\.json is (torn|not a JSON object).*delete .* to run it again"):
        record.read_json(path)


def test_sessions_are_added_to_the_environment_and_an_old_failure_goes(run: RunRecord) -> None:
    run.finish({"status": "failed"})
    run.begin({"seed": 0}, {"version": 1, "host": "b"})
    run.begin({"seed": 0}, {"version": 1, "host": "c"})
    assert record.read_json(run.folder / "env.json") == {
        "version": 1,
        "host": "a",
        "resumed": [{"version": 1, "host": "b"}, {"version": 1, "host": "c"}],
    }
    assert not (run.folder / "result.json").exists()


def test_a_lock_is_held_by_one_and_freed_with_its_holder(tmp_path: Path) -> None:
    with (
        record.exclusive(tmp_path / ".lock", "busy"),
        pytest.raises(RunFolderError, match=rf"busy \(process {os.getpid()} on "),
        record.exclusive(tmp_path / ".lock", "busy"),
    ):
        pytest.fail("two hold it")
    with record.exclusive(tmp_path / ".lock", "busy"):
        pass


def test_the_environment_says_what_ran_where() -> None:
    environment = record.environment()
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["versions"].keys() >= {"python", "torch", "numpy", "numba"}
    assert environment["machine"]["cores"] == os.cpu_count()
    assert environment["threads"] == torch.get_num_threads()
    assert environment["started_at"].endswith("+00:00")
    json.dumps(environment, allow_nan=False)
