"""Run a tiny grid, then read its run folders as pandas frames. A real grid is run by `lpsim run FILE.py`."""

import tempfile
from pathlib import Path

from analysis import load
from analysis.statistics import tables
from experiments.config import Config, forward, model
from experiments.running.executors import LocalExecutor
from experiments.running.grid import run_grid
from experiments.training.data import Digits
from experiments.training.optimizers import AdamW

if __name__ == "__main__":  # the executor starts processes, which import this file
    configs = [
        Config(
            model=model("vit-micro"),
            data=Digits(),
            optimizer=AdamW(lr=0.0015),
            recipe=forward(name),
            seed=seed,
            steps=5,
            batch_size=16,
            warmup_steps=1,
        )
        for name in ("float32", "mxfp4_e2m1")
        for seed in (0, 1)
    ]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "tiny"
        with LocalExecutor(jobs=2) as executor:
            run_grid(configs, folder, executor)
        runs = load.runs(folder)  # one row a run: its settings, how it ended, its final metrics
        metrics = load.metrics(folder)  # one row a number: signature, step, split, metric, value
        print(runs[["format", "seed", "status", "primary_metric"]])
        print(metrics.groupby(["split", "metric"])["value"].count())
        print(tables.arms(runs)[["format", "n", "mean", "low", "high"]])
        print(tables.differences(runs)[["format", "n", "difference", "low", "high"]])
