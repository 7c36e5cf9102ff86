"""A simulated step over the plain one, for GPTs from d = 64 with one layer to d = 1024 with 24; and a figure."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from experiments.bench.step import arms, measure
from experiments.training.models.gpt2 import MICRO, GPT2Config

WIDTHS = ((64, 4), (128, 4), (256, 8), (512, 8), (1024, 16))  # d_model, heads
LAYERS = (1, 4, 24)
BATCH, CONTEXT = 8, 128
SHOWN = ("recipe of Nones", "MXFP6 forward", "MXFP6 all three GEMMs")
SMALL = 256  # the largest width times layers of a small measurement


def sizes(small: bool) -> list[GPT2Config]:
    shapes = itertools.product(WIDTHS, LAYERS)
    made = [
        replace(MICRO, name=f"{layers}x{width}", layers=layers, heads=heads, d_model=width, context=CONTEXT)
        for (width, heads), layers in shapes
    ]
    return [config for config in made if not small or config.layers * config.d_model <= SMALL]


def measure_size(config: GPT2Config, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = config.build()
    tokens = torch.randint(0, config.vocab_size, (BATCH, config.context + 1))
    made = arms(model, tokens)
    times = measure({name: made[name] for name in ("plain float32", *SHOWN)}, repeats)
    ms = {name: 1e3 * statistics.median(cpu for _, cpu in pairs) for name, pairs in times.items()}
    plain = ms["plain float32"]
    row = {"d": config.d_model, "layers": config.layers, "parameters": sum(p.numel() for p in model.parameters())}
    return row | {"plain ms": round(plain, 1)} | {name: round(ms[name] / plain, 3) for name in SHOWN}


def measured(repeats: int, small: bool) -> pd.DataFrame:
    torch.set_num_threads(1)
    return pd.DataFrame(map(partial(measure_size, repeats=repeats), sizes(small)))


def plot(steps: pd.DataFrame, grids: pd.DataFrame, path: Path) -> None:
    """The ratio over the width, an arm a colour and a depth a marker; the cost of a run over runs. One may be empty."""
    import matplotlib
    import seaborn as sns
    from matplotlib.figure import Figure

    from analysis.figures.plots import STYLE

    with matplotlib.rc_context(STYLE):
        panels = [table for table in (steps, grids) if len(table)]
        figure = Figure(figsize=(5.8 * len(panels), 4), layout="constrained")
        axes = iter(figure.subplots(1, len(panels), squeeze=False).flat)
        if len(steps):
            ax, widths = next(axes), sorted(steps["d"].unique())
            long = steps.melt(["d", "layers", "parameters", "plain ms"], list(SHOWN), "arm", "ratio")
            shape = {"hue": "arm", "style": "layers", "markers": True, "dashes": False, "palette": "colorblind"}
            sns.lineplot(long, x="d", y="ratio", ax=ax, **shape)
            ax.set(xscale="log", xlabel="width d of the GPT", ylabel="step over the plain float32 step")
            ax.set_xticks(widths, [str(d) for d in widths])
            ax.set_xticks([], minor=True)
            ax.axhline(1, color="black", linewidth=0.8)
            sns.move_legend(ax, "upper right", fontsize=8)
        if len(grids):
            ax = next(axes)
            long = grids.melt("runs", [name for name in grids if name != "runs"], "", "ms")
            sns.lineplot(long, x="runs", y="ms", hue="", marker="o", palette="colorblind", ax=ax)
            ax.set(xscale="log", yscale="log", xlabel="runs of a grid", ylabel="milliseconds a run")
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter("{x:g}")
        figure.savefig(path)
