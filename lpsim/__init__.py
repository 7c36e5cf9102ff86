"""lpsim: number formats, rounding, and the simulation of low-precision hardware in PyTorch.

Importing it loads neither Numba nor Triton nor any other library's kernels; backends load on first use.
"""

from lpsim import accumulators, formats
from lpsim.accumulators import Accumulator, Alignment, Order
from lpsim.formats import BlockFormat, Codebook, FixedFormat, FloatFormat, Specials, codebooks
from lpsim.formats.rounding import Key, Overflow, Rounding, ScaleRule
from lpsim.machine.recipes import BackwardOperands, Gemm, Recipe
from lpsim.machine.simulate import EscapedProductError, EscapedProductWarning, UnknownOpError, simulate
from lpsim.quantization.quantizer import Quantizer, ScaleClipsWarning, available_backends
from lpsim.quantization.storage import Encoded, decode, encode

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "Alignment",
    "BackwardOperands",
    "BlockFormat",
    "Codebook",
    "Encoded",
    "EscapedProductError",
    "EscapedProductWarning",
    "FixedFormat",
    "FloatFormat",
    "Gemm",
    "Key",
    "Order",
    "Overflow",
    "Quantizer",
    "Recipe",
    "Rounding",
    "ScaleClipsWarning",
    "ScaleRule",
    "Specials",
    "UnknownOpError",
    "accumulators",
    "available_backends",
    "codebooks",
    "decode",
    "encode",
    "formats",
    "simulate",
]
