"""lpsim: number formats, rounding, and the simulation of low-precision hardware in PyTorch.

Importing it loads neither Numba nor Triton nor any other library's kernels; backends load on first use.
"""

from lpsim import accumulators, formats
from lpsim.accumulators import Accumulator, Alignment, Order
from lpsim.formats import BlockFormat, Codebook, FixedFormat, FloatFormat, Specials, codebooks
from lpsim.formats.rounding import Key, Overflow, Rounding, ScaleRule
from lpsim.machine.simulate import Gemm, Recipe, simulate
from lpsim.quantization.quantizer import Quantizer, available_backends
from lpsim.quantization.storage import Encoded, decode, encode

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "Alignment",
    "BlockFormat",
    "Codebook",
    "Encoded",
    "FixedFormat",
    "FloatFormat",
    "Gemm",
    "Key",
    "Order",
    "Overflow",
    "Quantizer",
    "Recipe",
    "Rounding",
    "ScaleRule",
    "Specials",
    "accumulators",
    "available_backends",
    "codebooks",
    "decode",
    "encode",
    "formats",
    "simulate",
]
