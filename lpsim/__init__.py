"""lpsim: number formats, rounding, and the simulation of low-precision hardware in PyTorch.

Importing it loads neither Numba nor Triton nor any other library's kernels; backends load on first use.
"""

from lpsim import formats
from lpsim.formats import BlockFormat, Codebook, FixedFormat, FloatFormat, Specials
from lpsim.quantizer import Quantizer, available_backends
from lpsim.rounding import Key, Overflow, Rounding, ScaleRule
from lpsim.simulate import Gemm, Recipe, simulate

__version__ = "0.1.0"

__all__ = [
    "BlockFormat",
    "Codebook",
    "FixedFormat",
    "FloatFormat",
    "Gemm",
    "Key",
    "Overflow",
    "Quantizer",
    "Recipe",
    "Rounding",
    "ScaleRule",
    "Specials",
    "available_backends",
    "formats",
    "simulate",
]
