"""Grid folders with made-up numbers in the layout that experiments/training/record.py writes: the analysis is tested
without training anything.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = ("float32", "mxfp6_e3m2", "mxfp4_e2m1")
LOST = {"float32": 0.0, "mxfp6_e3m2": 0.02, "mxfp4_e2m1": 0.11}  # nats that a format costs AdamW, in the made-up world
SOURCE = 'def grid():\n    """A made-up grid; <b>not</b> HTML."""\n'
Config = dict[str, Any]


def config(model: str, optimizer: str, format: str, seed: int, **settings: Any) -> Config:
    """One run's config.json. Keyword settings go into the optimizer (`lr=...`), or to a dotted place
    (`**{"recipe.rounding": ...}`).
    """
    rate = {"adamw": 6e-3, "lmd": 0.03}[optimizer]
    definition = None if format == "float32" else {"name": format, "element": {"mantissa_bits": 2}, "block_size": 32}
    resolved: Config = {
        "version": 1,
        "grid": "made-up",
        "model": {"name": model, "layers": 3, "width": 96 if model == "gpt2-micro" else 64},
        "data": {"name": "stdlib" if model == "gpt2-micro" else "digits", "seed": seed},
        "optimizer": {"name": optimizer, "lr": rate, "weight_decay": 0.1, "betas": [0.9, 0.99]},
        "recipe": {"format": format, "passes": "forward", "rounding": "ties_to_even", "format_definition": definition},
        "seed": seed,
        "steps": 400,
    }
    if optimizer == "lmd":
        resolved["optimizer"]["noise_scale"] = 0.05
    for name, value in settings.items():
        *path, last = name.split(".") if "." in name else ("optimizer", name)
        place = resolved
        for part in path:
            place = place[part]
        place[last] = value
    return resolved


def signature(config: Config) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def final_loss(config: Config) -> float:
    """The made-up truth: what the model, optimizer, format and seed make of the validation loss, in nats."""
    name = config["optimizer"]["name"]
    lost = LOST.get(config["recipe"]["format"], 0.05) * (0.6 if name == "lmd" else 1.0)
    by_seed = np.random.default_rng(config["seed"]).normal(0, 0.01)
    by_run = np.random.default_rng(int(signature(config), 16)).normal(0, 0.004)
    base = 2.3 if config["model"]["name"] == "gpt2-micro" else 0.25
    return float(base + 0.03 * (name == "lmd") + lost + by_seed + by_run)


def metric_lines(config: Config, stop: int | None = None, blow_up: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to step `stop`; `blow_up` makes the loss grow and end in NaN there."""
    text = config["model"]["name"] == "gpt2-micro"
    random = np.random.default_rng(int(signature(config), 16))
    last, end = stop or config["steps"], final_loss(config)
    start = math.log(256) if text else math.log(10)
    growth = 0.9 if config["optimizer"]["name"] == "lmd" else 0.5
    lines: list[dict[str, Any]] = []
    for step in range(1, last + 1):
        loss = end + (start - end) * math.exp(-step / 60)
        if blow_up and step > last - 40:
            loss *= 1 + (step - last + 40) / 4
        nan = blow_up and step == last
        noisy = loss * (1 + 0.02 * random.normal())
        gradient = "Infinity" if nan else 0.8 * math.exp(0.2 * random.normal())
        lines.append(
            {"step": step, "split": "train", "loss": "NaN" if nan else noisy, "lr": config["optimizer"]["lr"]}
            | {"grad_norm": gradient, "time_ms": 12.0}
        )
        if step % 40 == 0 or step in (1, last):
            validation = {"step": step, "split": "validation", "loss": "NaN" if nan else loss}
            lines.append(validation if text else validation | {"accuracy": 1 - loss * 0.25})
            norm = 11 * math.exp(growth * (1 + 2 * LOST.get(config["recipe"]["format"], 0.05)) * step / 1000)
            lines.append({"step": step, "split": "weights", "norm": norm, "max": norm / 20, "mean_abs": norm / 200})
    return lines


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1, allow_nan=False))


def write_run(
    folder: Path, config: Config, status: str = "finished", step: int | None = None, commit: str = "0123abcd"
) -> Path:
    """A run folder as a run leaves it: finished, diverged, failed or (no result.json) unfinished at `step`."""
    run = folder / signature(config)
    run.mkdir(parents=True)
    write_json(run / "config.json", config)
    versions = {"python": "3.11.9", "torch": "2.13.0", "numpy": "2.4.6", "numba": "0.68.1"}
    write_json(
        run / "env.json",
        {
            "version": 1,
            "versions": versions,
            "machine": {"cpu": "Made-up CPU @ 2.0 GHz", "cores": 2},
            "lpsim": "0.1.0",
            "threads": 1,
        }
        | {"git": {"commit": commit, "dirty": False}, "started_at": "2025-01-01T00:00:00+00:00"},
    )
    lines = metric_lines(config, step, blow_up=status == "diverged")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status == "unfinished":
        return run
    last = {line["split"]: line for line in lines}
    final = (
        {"validation_loss": last["validation"]["loss"], "train_loss": last["train"]["loss"]}
        if "validation" in last
        else {}
    )
    if "accuracy" in last.get("validation", {}) and status == "finished":
        final["validation_accuracy"] = last["validation"]["accuracy"]
    cause = {"diverged": "train loss is NaN", "failed": "ValueError: no <such> block", "finished": None}[status]
    traceback = 'Traceback (most recent call last):\n  File "<train>", line 1\nValueError: no <such> block\n'
    write_json(
        run / "result.json",
        {"version": 1, "status": status, "step": last["train"]["step"] if last else 0, "cause": cause}
        | {"traceback": traceback if status == "failed" else None, "final": final, "time_s": 9.5},
    )
    return run


def write_grid(folder: Path, configs: Iterable[Config], source: str = SOURCE) -> Path:
    """grid.json alone, for `configs`; their runs are written by `write_run`."""
    folder.mkdir(parents=True, exist_ok=True)
    signatures = [signature(config) for config in configs]
    write_json(
        folder / "grid.json",
        {"version": 1, "grid": folder.name, "source": "grids/made_up.py", "source_text": source}
        | {"signatures": signatures, "argv": ["lpsim", "run", "grids/made_up.py"]},
    )
    return folder


def quickstart(seeds: int = 2) -> list[Config]:
    """The configs of the quickstart's shape: 2 models × 2 optimizers × 3 formats × seeds."""
    return [
        config(model, optimizer, format, seed)
        for model in ("gpt2-micro", "vit-micro")
        for optimizer in ("adamw", "lmd")
        for format in FORMATS
        for seed in range(seeds)
    ]


def write_runs(
    folder: Path, configs: list[Config], outcome: Callable[[Config], tuple[str, int | None]] | None = None
) -> Path:
    """A whole grid folder; `outcome(config)` says status and last step where it is not ("finished", None)."""
    write_grid(folder, configs)
    for each in configs:
        status, step = outcome(each) if outcome else ("finished", None)
        write_run(folder, each, status, step)
    return folder
