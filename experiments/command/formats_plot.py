"""`lpsim formats --plot`: the value lines of number formats side by side, and their relative errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis.figures.plots import STYLE, colours
from experiments.command.formats_table import element_of
from lpsim import Quantizer, formats
from lpsim.conformance.inputs import ladder
from lpsim.formats import BlockFormat, Format

DRAWN = ("float8_e4m3fn", "float8_e5m2", "float6_e3m2fn", "float4_e2m1fn", "int8_q6", "posit8", "nf4")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def plot(names: Sequence[str], path: Path) -> None:
    """Draw the named formats into a file (.png, .svg, .pdf): value lines, logarithmic and linear, and relative errors.

    Raises ValueError for an unknown name or kind of file.
    """
    chosen = [formats.get(name) for name in names or DRAWN]
    shade = colours([fmt.name for fmt in chosen])
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(12, 4.6 + 0.34 * len(chosen)), layout="constrained")
        halves: Any = figure.subfigures(2, 1, height_ratios=(0.9 + 0.34 * len(chosen), 3.7))
        above, below = halves
        left, right = above.subplots(1, 2, width_ratios=(3, 2))
        error = below.subplots()
        for place, fmt in enumerate(chosen):
            _value_lines(fmt, place, shade[fmt.name], left, right)
            _relative_error(fmt, shade[fmt.name], error)
        for ax in (left, right):
            ax.set_ylim(len(chosen) - 0.4, -0.6)
            ax.set_yticks(range(len(chosen)), [fmt.name for fmt in chosen] if ax is left else [])
            ax.tick_params(axis="y", length=0)
        _octaves(left)
        left.set_title("positive values (dots: the smallest normal number)")
        right.set_xlim(-1.02, 1.02)
        right.set_title("all values, over the largest")
        _octaves(error)
        error.set_yscale("log")
        error.set_ylim(top=1.5)
        error.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
        error.yaxis.set_minor_locator(NullLocator())
        error.grid(axis="y")
        error.set_ylabel("relative error")
        blocks = any(isinstance(fmt, BlockFormat) for fmt in chosen)
        error.set_xlabel("magnitude" + (", in units of the scale of its block" if blocks else ""))
        error.set_title("rounded to nearest: the largest relative error in each octave")
        error.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path, dpi=150)


def _octaves(ax: Axes) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(LogLocator(base=2, numticks=14))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "2" + str(round(math.log2(x))).translate(SUPERSCRIPTS)))
    ax.xaxis.set_minor_locator(NullLocator())


def _value_lines(fmt: Format, place: int, colour: str, logarithmic: Axes, linear: Axes) -> None:
    """A tick for every value (of the element, in a block format), at the height `place`."""
    element = element_of(fmt)
    values = ladder(element).value
    for ax, drawn in ((logarithmic, values[values > 0]), (linear, values / element.max)):
        ax.eventplot(drawn, linelengths=0.62, lineoffsets=place, colors=[colour], linewidths=0.7, rasterized=True)
    logarithmic.plot(element.min_normal, place + 0.42, marker=".", markersize=4, color=colour)


def _relative_error(fmt: Format, colour: str, ax: Axes) -> None:
    """The largest |round(x) − x| / x in each octave, from below the smallest value to above the largest."""
    element = element_of(fmt)
    octaves = np.arange(math.floor(math.log2(element.min_subnormal)) - 2, math.floor(math.log2(element.max)) + 2)
    x = np.exp2(octaves[:, None] + np.linspace(0, 1, 1 << 12, endpoint=False))
    y = Quantizer(element).quantize(torch.from_numpy(x)).numpy()
    largest = (np.abs(y - x) / x).max(1)
    ax.stairs(
        largest, np.exp2(np.append(octaves, octaves[-1] + 1)), baseline=None, color=colour, label=fmt.name, lw=1.4
    )
