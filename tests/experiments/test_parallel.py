"""Runs that processes share: the losses and the random bits of one process with the same global batch."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.running.executors import LocalExecutor, WorkerDied
from experiments.running.grid import GridError, run_grid, run_one
from experiments.training import train
from experiments.training.config import GivenRecipe, forward
from experiments.training.optimizers import LMD
from experiments.training.record import RunRecord
from lpsim import Gemm, Quantizer, Recipe, Rounding, formats, simulate
from tests.experiments.experiment_jobs import alive, one_thread, tiny_config, wait_until

STOCHASTIC = Quantizer(formats.mxfp4_e2m1, rounding=Rounding.STOCHASTIC)


def test_a_part_of_the_batch_draws_the_bits_of_its_place_in_the_whole() -> None:
    """Operands and results of products, forward and backward, of activations alone and with weights.

    With elements that are multiples of a power of two no sum rounds, so one other bit anywhere would show.
    """
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False), torch.nn.Linear(32, 32, bias=False))
    out = Quantizer(formats.float16, rounding=Rounding.STOCHASTIC)
    gemm = Gemm(STOCHASTIC, STOCHASTIC, out=out)
    recipe = Recipe(fprop=gemm, dgrad=gemm)
    x = torch.randn(8, 4, 32).mul(64).round() / 64

    class Scores(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            return y @ (y * 2).mT

    def run(x: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        with simulate(Scores(), recipe, seed=3) as simulation:
            simulation.step, simulation.part = 5, part
            y = simulation.model(x)
            y.sum().backward()
        assert x.grad is not None
        return y.detach(), x.grad

    whole = run(x, 0)
    for part, rows in enumerate(x.tensor_split(4)):
        for mine, all_rows in zip(run(rows, part), whole, strict=True):
            assert torch.equal(mine, all_rows.tensor_split(4)[part])


def config(**fields: Any) -> Any:
    """Noise, stochastic rounding of operands, dividing heads and a tied embedding; 4 rows, 2 for each of two."""
    recipe = forward("mxfp4_e2m1", rounding=Rounding.STOCHASTIC)
    return tiny_config(recipe=recipe, optimizer=LMD(lr=0.01), **fields)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] in ("train", "validation")]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """To what one rounding is worth: the first step, before any sum has gone another way, to float32's last bits."""
    shared = config(steps=6, warmup_steps=1, micro_batches=2)
    alone = RunRecord(tmp_path / "alone")
    alone.folder.mkdir()
    with one_thread():
        result = train.train(shared, alone)
    alone.close()
    together = run_one(shared.to_dict(), str(tmp_path / "together"), None, 2)
    assert result is not None and together is not None and together["status"] == "finished", together
    one, two = losses(tmp_path / "alone"), losses(tmp_path / "together")
    assert len(one) == len(two) and two[:2] == pytest.approx(one[:2], rel=1e-6)
    assert two == pytest.approx(one, rel=2e-3)
    assert json.loads((tmp_path / "together" / "env.json").read_text())["processes"] == 2


def test_runs_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    vector = GivenRecipe("v", Recipe(vector=Quantizer(formats.bfloat16, rounding=Rounding.STOCHASTIC)))
    for refused, message in (
        (config(batch_size=3), "a batch of 3 cannot be shared equally by 2 processes"),
        (config(telemetry_every=2), "telemetry sees the whole batch in one process only"),
        (replace(config(), recipe=vector), "vector operations cannot be rounded stochastically"),
    ):
        with LocalExecutor(1) as executor, pytest.raises((ValueError, GridError), match=message):
            run_grid([refused], tmp_path / "g", executor, processes_per_run=2)


@pytest.mark.full
def test_one_of_two_processes_killed_and_resumed_is_an_undisturbed_run(tmp_path: Path) -> None:
    shared = config(steps=60, checkpoint_every=10).to_dict()
    assert run_one(shared, str(tmp_path / "whole"), None, 2) is not None
    folder = tmp_path / "killed"
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(run_one, shared, str(folder), None, 2)
        wait_until((folder / "checkpoint.pt").exists, timeout_s=600)
        process = int((folder / ".process1.lock").read_text().split()[1])
        os.kill(process, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            first.result(600)
    assert not alive(process)
    again = run_one(shared, str(folder), None, 2)
    assert again is not None and again["status"] == "finished"
    assert losses(folder) == losses(tmp_path / "whole")
