"""A metric of one's own: measured on the model as it is trained, at every validation; its source makes new runs."""

import json
from pathlib import Path

import pytest

from analysis import load
from analysis.page import report
from analysis.statistics import tables
from experiments.grids import load_grid
from experiments.running.executors import LocalExecutor
from experiments.running.grid import run_grid
from experiments.training.config import Config
from tests.experiments.experiment_jobs import tiny_config

GRID = """
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from experiments.config import forward
from experiments.training.own import Metric
from tests.experiments.experiment_jobs import tiny_config


@dataclass(frozen=True)
class Nats(Metric):
    name: str = "nats"
    noise: float = 0.0

    def measure(self, model, batches):
        total, count = 0.0, 0
        for inputs, targets in batches:
            logits = model(inputs) + self.noise * torch.rand(())
            total += F.cross_entropy(logits.flatten(0, -2), targets.flatten()).item() * targets.numel()
            count += targets.numel()
        return total / count  # the same


@dataclass(frozen=True)
class Broken(Metric):
    name: str = "broken"

    def measure(self, model, batches):
        return ["no number"]


def grid():
    for metrics in ((), (Nats(), Nats("noisy", noise=1.0)), (Broken(),)):
        yield tiny_config(metrics=metrics, recipe=forward("mxfp4_e2m1"))
"""


def configs(folder: Path, text: str = GRID) -> list[Config]:
    (folder / "nats.py").write_text(text)
    found = load_grid(str(folder / "nats.py"))[1]
    assert isinstance(found, list)
    return found


def test_a_metric_lands_in_the_run_the_frames_and_the_report_and_disturbs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "nats"
    with LocalExecutor(1) as executor:
        rows = run_grid(configs(tmp_path), folder, executor, tmp_path / "nats.py")
    assert [row.status for row in rows] == ["finished", "finished", "failed"]
    assert (rows[2].cause or "") == "ValueError: metric broken: measure must return a number, it returned ['no number']"
    assert rows[1].label == "adamw lr 0.01, mxfp4_e2m1, gpt2-tiny, seed 0, name nats, noise 0.0, name noisy, noise 1.0"
    assert rows[0].signature == tiny_config(recipe=configs(tmp_path)[0].recipe, grid="nats").signature()
    plain, measured = (
        [json.loads(line) for line in (folder / row.signature / "metrics.jsonl").read_text().splitlines()]
        for row in rows[:2]
    )
    for before, after in zip(plain, measured, strict=True):
        assert before == {name: after[name] for name in before} | {k: before[k] for k in before if k == "time_ms"}
        if after["split"] == "validation":
            assert after["nats"] == after["noisy"] == pytest.approx(after["loss"], rel=1e-6)
    runs = load.runs(folder).set_index("signature")
    with_metric = runs.loc[rows[1].signature]
    assert with_metric["final.nats"] == measured[-2]["nats"] == with_metric["final.validation_loss"]
    assert (with_metric["metrics.noisy.noise"], load.own_metrics(runs)) == (1.0, ["final.nats", "final.noisy"])
    assert tables.arms(runs.reset_index())["final.nats"].notna().tolist() == [False, True, False]
    assert ">nats</th>" in report.write_report(folder).read_text()


def test_the_source_of_a_metric_enters_the_signature(tmp_path: Path) -> None:
    before = [config.signature() for config in configs(tmp_path)]
    assert [c.signature() for c in configs(tmp_path, GRID.replace("# the same", "# nats"))] == before
    changed = [c.signature() for c in configs(tmp_path, GRID.replace("/ count", "/ count / 0.69"))]
    assert changed[0] == before[0] and changed[1] != before[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"noisy"', '"nats"', "two metrics have one name: nats, nats"),
        ('"noisy"', '"loss"', "metric Nats: 'loss' is the name of a shipped one; give it another"),
        ('"noisy"', '"a b"', "a metric's name is a word, is 'a b'"),
    ],
)
def test_a_metric_without_a_name_of_its_own_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        configs(tmp_path, GRID.replace(old, new))
