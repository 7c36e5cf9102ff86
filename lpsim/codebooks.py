"""The public name of `lpsim.formats.codebooks`: formats that are tables of values."""

from lpsim.formats.codebooks import lns8, logarithmic, nf4, nf4_block64, posit, posit8

__all__ = ["lns8", "logarithmic", "nf4", "nf4_block64", "posit", "posit8"]
