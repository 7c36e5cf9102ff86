"""Runs as other tools keep them: TensorBoard's event files, MLflow's file store, Weights & Biases' offline folders.

Each takes runs and an empty folder, and returns the command that shows what it wrote. The tools' own packages write;
none is let to the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

MLFLOW_BATCH = 1000  # the most metrics that one call of MLflow takes
MLFLOW_PARAMS = 100
MLFLOW_STATUS = {"finished": "FINISHED", "diverged": "FINISHED", "failed": "FAILED"}  # else KILLED: no end is known


@dataclass(frozen=True)
class Exported:
    """One run. Times are in seconds, since 1970 where they are dates."""

    signature: str
    name: str  # fit for a folder; no two runs of a grid have the same
    grid: str
    config: dict[str, str | int | float]  # by dotted path
    status: str
    final: dict[str, float]
    numbers: list[tuple[int, str, float]]  # step, "train/loss", value; in order of steps
    started: float
    time_s: float

    def at(self, step: int) -> float:
        """When the step was made, were all steps equally long."""
        last = self.numbers[-1][0]
        return self.started + (self.time_s * step / last if last else 0.0)


def tensorboard(runs: Sequence[Exported], folder: Path) -> str:
    """One folder of event files a run: its numbers, and its config and final metrics under HPARAMS."""
    from torch.utils.tensorboard import SummaryWriter

    for run in runs:
        with SummaryWriter(str(folder / run.name)) as writer:
            for step, name, value in run.numbers:
                writer.add_scalar(name, value, step, run.at(step))
            final = {f"final/{name}": value for name, value in run.final.items()}
            writer.add_hparams({**run.config, "status": run.status}, final, run_name=".")
    return f"tensorboard --logdir {folder}"


def mlflow(runs: Sequence[Exported], folder: Path) -> str:
    """A file store with one experiment, the grid: config as parameters, numbers as metrics, finals as `final/NAME`."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    store = folder.resolve().as_uri()
    client = MlflowClient(tracking_uri=store)
    for grid, of_grid in groupby(runs, lambda run: run.grid):
        experiment = client.create_experiment(grid)
        for run in of_grid:
            tags = {"signature": run.signature, "status": run.status}
            made = client.create_run(experiment, round(1000 * run.started), tags, run.name).info.run_id
            parameters = [Param(name, str(value)) for name, value in run.config.items()]
            for start in range(0, len(parameters), MLFLOW_PARAMS):
                client.log_batch(made, params=parameters[start : start + MLFLOW_PARAMS])
            metrics = [Metric(name, value, round(1000 * run.at(step)), step) for step, name, value in run.numbers]
            last = run.numbers[-1][0] if run.numbers else 0
            end = round(1000 * (run.started + run.time_s))
            metrics += [Metric(f"final/{name}", value, end, last) for name, value in run.final.items()]
            for start in range(0, len(metrics), MLFLOW_BATCH):
                client.log_batch(made, metrics=metrics[start : start + MLFLOW_BATCH])
            client.set_terminated(made, MLFLOW_STATUS.get(run.status, "KILLED"), end)
    return f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {store}"


def wandb(runs: Sequence[Exported], folder: Path) -> str:
    """One offline run each, in the project that is the grid; the run's identity there is its signature."""
    import wandb as package

    quiet = package.Settings(silent=True, console="off", x_disable_meta=True, x_disable_stats=True)
    for run in runs:
        made = package.init(
            project=run.grid,
            id=run.signature,
            name=run.name,
            config={**run.config, "status": run.status},
            dir=str(folder),
            mode="offline",
            settings=quiet,
        )
        for step, numbers in groupby(run.numbers, lambda number: number[0]):
            made.log({name: value for _, name, value in numbers} | {"time": run.at(step)}, step=step)
        made.summary.update({f"final/{name}": value for name, value in run.final.items()})
        made.finish(exit_code=int(run.status == "failed"))
    return f"wandb sync {folder}/wandb/offline-run-*"


SINKS: dict[str, Callable[[Sequence[Exported], Path], str]] = {
    "tensorboard": tensorboard,
    "mlflow": mlflow,
    "wandb": wandb,
}
# set before a package is imported: none is to tell anybody that it is used, and MLflow 3 wants to be asked for files
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "WANDB_ERROR_REPORTING": "false",
}
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow-skinny", "wandb": "wandb"}  # that pip is to install
