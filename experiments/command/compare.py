"""`lpsim formats compare`: formats on tensors of a file, of a run or of a distribution, as a table and a drawing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they take seconds to import
    import pandas as pd
    from torch import Tensor

DISTRIBUTIONS = ("normal", "normal-variable-variance", "laplace", "student-t", "log-normal")
SHAPE = (512, 512)
DRAWN = {
    "bits": "bits an element",
    "area": "area of a multiply-accumulate",
    "energy": "energy of a multiply-accumulate",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tensors", type=Path, metavar="FILE", help="compare: on the tensors of a .safetensors file")
    source.add_argument("--run", type=Path, metavar="RUN", help="compare: on the weights of a run's last checkpoint")
    source.add_argument(
        "--distribution", choices=DISTRIBUTIONS, help="compare: on random numbers (default: normal, of variance 1)"
    )


def misplaced(options: argparse.Namespace) -> str:
    """What to say where an option of compare stands without it; "" otherwise."""
    given = options.tensors or options.run or options.distribution
    return "--tensors, --run and --distribution go with compare: lpsim formats compare NAME ..." if given else ""


def run(options: argparse.Namespace) -> int:
    """Print the table, and draw it where --plot says. Raises ValueError."""
    from lpsim import formats
    from lpsim.compare import compare

    if len(options.words) < 2:
        raise ValueError("compare takes the names of formats: lpsim formats compare mxfp8_e4m3 mxfp4_e2m1")
    if options.exhaustive:
        raise ValueError("--exhaustive goes with check: lpsim formats check NAME --exhaustive")
    chosen = [formats.get(name) for name in dict.fromkeys(options.words[1:])]
    if options.tensors:
        tensors = from_file(options.tensors)
    elif options.run:
        tensors = from_run(options.run)
    else:
        name = options.distribution or "normal"
        tensors = {name: sample(name)}
    frame = compare(chosen, tensors)
    print(text(frame))
    if options.plot:
        try:
            plot(frame, options.plot)
        except OSError as error:
            raise ValueError(str(error)) from None
        print(options.plot)
    return 0


def sample(distribution: str, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Float32 numbers: normal and Laplace of variance 1, Student's t with 5 degrees of freedom, or e^z with a random
    sign for a standard normal z. With variable variance every row is normal and has a standard deviation of its own,
    |z| (Rouhani et al. 2023, arXiv:2302.08007, section IV).
    """
    import numpy as np
    import torch

    rng = np.random.default_rng(seed)
    if distribution == "normal":
        x = rng.standard_normal(shape)
    elif distribution == "normal-variable-variance":
        x = rng.standard_normal(shape) * np.abs(rng.standard_normal((*shape[:-1], 1)))
    elif distribution == "laplace":
        x = rng.laplace(scale=0.5**0.5, size=shape)
    elif distribution == "student-t":
        x = rng.standard_t(5, shape)
    elif distribution == "log-normal":
        x = rng.lognormal(size=shape) * rng.choice([-1.0, 1.0], shape)
    else:
        raise ValueError(f"unknown distribution {distribution!r}; known: {', '.join(DISTRIBUTIONS)}")
    return torch.from_numpy(x).float()


def from_file(path: Path) -> dict[str, Tensor]:
    """The floating-point tensors of a .safetensors file. Raises ValueError."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"--tensors needs the package: pip install safetensors ({error})") from None
    try:
        tensors = load_file(path)
    except Exception as error:  # the library has its own kind for a damaged file
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None
    return _floating(tensors, path)


def from_run(folder: Path) -> dict[str, Tensor]:
    """The weights in a run's last checkpoint. Raises ValueError, or RunFolderError for a damaged one."""
    from experiments.training.record import RunRecord

    saved = RunRecord(folder).load_checkpoint("cpu")
    if saved is None:
        raise ValueError(f"{folder} holds no checkpoint.pt; a run is a folder runs/GRID/SIGNATURE of `lpsim run`")
    return _floating(saved["model"], folder)


def _floating(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    import torch

    known = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    found = {name: x for name, x in tensors.items() if x.dtype in known and x.numel()}
    if not found:
        raise ValueError(f"{source} holds no floating-point tensor")
    return found


def text(frame: pd.DataFrame) -> str:
    shares = {name: lambda share: f"{100 * share:.3g}%" for name in ("clipped", "underflowed")}
    numbers = {name: lambda value: f"{value:.3g}" for name in ("largest_relative_error", "area", "energy")}
    widths = {"bits": lambda bits: f"{bits:.5g}", "qsnr_db": lambda db: f"{db:.2f}"}
    return str(frame.to_string(index=False, formatters=shares | numbers | widths))


def plot(frame: pd.DataFrame, path: Path) -> None:
    """Draw each format's QSNR, the mean over the tensors, over bits, area and energy, with the Pareto front of each.

    Formats with a flagged row are crosses, and no part of a front. Raises ValueError for an unknown kind of file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from analysis.figures.plots import STYLE, colours
    from lpsim.compare import pareto_front

    means = frame.groupby("format", sort=False)[["qsnr_db", *DRAWN]].mean().reset_index()
    flagged = frame.groupby("format", sort=False)["flag"].agg(lambda flags: next((f for f in flags if f), ""))
    means["flag"] = means["format"].map(flagged)
    means = means[means["qsnr_db"].abs() < float("inf")]  # without error there is no place on the axis
    shade = colours(list(means["format"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        for ax, (price, label) in zip(figure.subplots(1, 3, sharey=True), DRAWN.items(), strict=True):
            front = pareto_front(means, price)
            ax.step(front[price], front["qsnr_db"], where="post", color="0.6", lw=1, zorder=1)
            for _, row in means.iterrows():
                ax.scatter(row[price], row["qsnr_db"], color=shade[row["format"]], marker="x" if row["flag"] else "o")
                ax.annotate(
                    row["format"], (row[price], row["qsnr_db"]), xytext=(4, 4), textcoords="offset points", fontsize=7
                )
            ax.set_xlabel(label if price == "bits" else f"{label}, float32 = 1")
            ax.margins(x=0.2)
        figure.axes[0].set_ylabel("QSNR, dB")
        figure.suptitle("the line is the Pareto front: no format has more for less")
        figure.savefig(path, dpi=150)
