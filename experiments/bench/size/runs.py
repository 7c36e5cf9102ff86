"""What a run costs a grid besides its training: `lpsim run` on grids of 1 to 2000 runs of a tiny model and one step."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from analysis import load

COUNTS = (1, 10, 100, 200, 1000, 2000)
GRID = """
from experiments.config import Config
from experiments.training.data import StdlibText
from experiments.training.models.gpt2 import GPT2Config
from experiments.training.optimizers import AdamW

MODEL = GPT2Config(name="gpt2-tiny", layers=1, heads=2, d_model=32, context=16, vocab_size=256)


def grid():
    for seed in range({runs}):
        yield Config(
            model=MODEL, data=StdlibText(validation_windows=8), optimizer=AdamW(lr=0.01), steps=1, batch_size=4,
            warmup_steps=0, seed=seed,
        )
"""


def measure(most: int) -> pd.DataFrame:
    """Milliseconds a run: of the first command, of the same command when all is done, and of reading the tables."""
    rows = []
    for count in [count for count in COUNTS if count <= most]:
        with tempfile.TemporaryDirectory() as folder:
            grid = Path(folder) / "tiny.py"
            grid.write_text(GRID.format(runs=count))
            command = [
                sys.executable,
                "-m",
                "experiments.command.cli",
                "run",
                str(grid),
                "--runs",
                folder,
                "--jobs",
                "2",
            ]
            first, again = (_seconds(command) for _ in range(2))
            start = time.perf_counter()
            read = load.read(Path(folder) / "tiny")
            reading = time.perf_counter() - start
            if len(read.runs) != count or set(read.runs["status"]) != {"finished"}:
                raise RuntimeError(f"of {count} runs not all finished")
        names = ("run", "found done", "read by analysis")
        seconds = (first, again, reading)
        rows.append({"runs": count, **{n: round(1e3 * s / count, 1) for n, s in zip(names, seconds, strict=True)}})
    return pd.DataFrame(rows)


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start
