"""`lpsim formats`: the table of the number formats, and a format proved. Drawing them: formats_plot."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from lpsim import conformance, formats
from lpsim.formats import BlockFormat, Codebook, Element, FloatFormat, Format


def table(names: Sequence[str] = ()) -> pd.DataFrame:
    """One row a format, all of them or those named: bits, max, min normal, min subnormal, decades, codes, specials.

    Of a block format: bits with the scale's share, the range of element times scale, the element's codes.
    """
    chosen = [formats.get(name) for name in names] or list(formats.ALL_FORMATS.values())
    rows = {fmt.name: _row(fmt) for fmt in chosen}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")


def _row(fmt: Format) -> dict[str, float | int | str]:
    element = element_of(fmt)
    specials = [name for name, has in (("Inf", element.has_inf), ("NaN", element.has_nan)) if has]
    return {
        "bits": fmt.bits,
        "max": fmt.max,
        "min normal": element.min_normal * math.prod(scale.min_normal for scale in _scales(fmt)),
        "min subnormal": fmt.min_subnormal,
        "decades": math.log10(fmt.max) - math.log10(fmt.min_subnormal),
        "codes": len(element.values) if isinstance(element, Codebook) else 2**element.bits,
        "specials": "NaN by block" if isinstance(fmt, BlockFormat) else ", ".join(specials) or "-",
    }


def _scales(fmt: Format) -> list[FloatFormat]:
    """The formats of the block's and the tensor's scale."""
    return [s for s in (fmt.scale, fmt.tensor_scale) if s is not None] if isinstance(fmt, BlockFormat) else []


def text(frame: pd.DataFrame) -> str:
    """The table as aligned lines."""
    formats_of = {
        "bits": "g",
        "max": ".6g",
        "min normal": ".4g",
        "min subnormal": ".4g",
        "decades": ".1f",
        "codes": "d",
    }
    cells = [["name", *frame.columns]]
    for name, row in frame.iterrows():
        cells.append([str(name), *(format(row[c], formats_of.get(c, "")) for c in frame.columns)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(middle, widths[1:-1], strict=True)), last])
        for first, *middle, last in cells
    )


def check(name: str, exhaustive: bool = False) -> str:
    """The certificate of the named format. Raises conformance.ConformanceError with the first counterexample."""
    return str(conformance.check(formats.get(name), exhaustive=exhaustive, progress=True))


def element_of(fmt: Format) -> Element:
    return fmt.element if isinstance(fmt, BlockFormat) else fmt
