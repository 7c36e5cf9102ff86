"""Figures to files: SVG for the page, at the width of a screen and of a phone, and PDF for a paper; vector text in all.

The same figure gives the same bytes: no date is written, and identifiers are hashes.
"""

from __future__ import annotations

import gc
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import matplotlib
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from analysis.figures.plots import STYLE

WIDTH, NARROW = 11.0, 5.2  # inches: 1056 CSS pixels, the width of the page; and what a phone shows legibly
DPI = 200  # of what is an image inside a figure
PAGE_FORMS = ("svg", "narrow")  # of a Drawing: those that stand in the page
FORMS = (*PAGE_FORMS, "pdf")
Build = Callable[[float], Figure]  # the figure for a width in inches


@dataclass(frozen=True)
class Drawing:
    """One figure: the name of its files, what it is called, what it shows and leaves out, and the figure for a page and
    for a phone. Its forms are made when they are first asked for; the PDF is the slowest.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    slim: Figure

    @cached_property
    def svg(self) -> bytes:
        with _drawing():
            picture = svg(self.figure)
            self.figure.set_layout_engine("none")  # the places are computed
            return picture

    @cached_property
    def narrow(self) -> bytes:
        """The SVG for a phone."""
        with _drawing():
            return svg(self.slim)

    @cached_property
    def pdf(self) -> bytes:
        _ = self.svg  # computes the places
        with _drawing():
            return pdf(self.figure)


def drawn(name: str, title: str, caption: str, build: Build) -> Drawing:
    """The figure that `build` makes, called for both widths in our style."""
    with _drawing():
        return Drawing(name, title, caption, build(WIDTH), build(NARROW))


@contextmanager
def _drawing() -> Iterator[None]:
    with no_garbage_search(), matplotlib.rc_context(STYLE):
        yield


@contextmanager
def no_garbage_search() -> Iterator[None]:
    """Among the many small objects of figures and tables, looking for unreachable ones takes a tenth of the time."""
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()


def pdf(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.dpi = DPI
    FigureCanvasPdf(figure).print_pdf(buffer, metadata={"CreationDate": None})
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """The figure as SVG; its paths to a hundredth of a point, which halves the file and nobody sees."""
    buffer = io.BytesIO()
    figure.dpi = DPI
    # not savefig, which would draw it twice, since it has a layout engine; the second time alone gives the same bytes
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return re.sub(rb' d="[^"]*"', lambda path: re.sub(rb"(\.\d\d)\d+", rb"\1", path[0]), buffer.getvalue())
