"""How cost grows with size: a simulated step over the plain one, a run's share of a grid, and what large models need.

Three parts, each a table, or only those named. `steps`: GPTs of 1 to 24 layers, d = 64 to 1024. `runs`: grids of 1 to
2000 runs of one step each, run and then found done. `memory`: a model of what a step needs, fitted to what small models
keep for their backward pass, compared with small models it has not seen and with the memory of a process, then applied
to GPT-2 (124M), a GPT of 1.3B and the paper's grids. `--plot` draws the first two.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from experiments.bench.size import growth, memory, runs

PARTS = ("steps", "runs", "memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each arm and size (default 5)")
    parser.add_argument(
        "--most-runs", type=int, default=200, help="of the largest grid (default 200; 2000 take minutes)"
    )
    parser.add_argument("--small", action="store_true", help="the smaller sizes alone")
    parser.add_argument(
        "--tflops",
        type=float,
        default=400,
        help="that a GPU sustains in bfloat16 (default 400: 40%% of an H100's peak)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the growth of both, as .svg, .pdf or .png")


def run(options: argparse.Namespace) -> int:
    if unknown := [name for name in options.parts if name not in PARTS]:
        print(f"no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
        return 2
    chosen = options.parts or PARTS
    if options.plot is not None and not {"steps", "runs"} & {*chosen}:
        print("--plot draws the parts steps and runs; name one of them, too")
        return 2
    steps = grids = pd.DataFrame()
    if "steps" in chosen:
        steps = growth.measured(options.repeats, options.small)
        _show("A training step over the plain float32 step (CPU time, one thread, medians of interleaved steps)", steps)
    if "runs" in chosen:
        grids = runs.measure(options.most_runs)
        _show("A grid of runs of one step, two jobs: milliseconds of wall time a run", grids)
    if "memory" in chosen:
        for title, table in memory.tables(options.tflops, options.small):
            _show(title, table)
    if options.plot is not None:
        growth.plot(steps, grids, options.plot)
        print(f"\n{options.plot}")
    return 0


def _show(title: str, table: pd.DataFrame) -> None:
    print(f"\n{title}\n{table.to_string(index=False)}", flush=True)
