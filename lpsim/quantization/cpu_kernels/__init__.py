"""The compiled kernels of the CPU backend, equal to `reference` bit for bit.

`simd`: vectors of LLVM IR with Python's operators; `random`: random bits; `elements`: how one element is rounded;
`scales`: maxima and scales; `rows`: a stretch of a row; `loops`: the kernels; `cache`: the key of what stays on disk.
In: addresses and numbers. Out: a quantized tensor in memory. `quantization.cpu` alone calls them; accumulators borrow
`cache`.
"""

from lpsim.quantization.cpu_kernels.elements import FEW, GRID, MANY, STOCHASTIC, SYMMETRIC
from lpsim.quantization.cpu_kernels.loops import (
    NUMBERS,
    Scales,
    kernel_for,
    overflow_to_special,
    tensor_scale_for,
    tile_maxima,
)
from lpsim.quantization.cpu_kernels.rows import ACROSS, DOWN, Field, Way, plain_row_at, row_at

__all__ = [
    "ACROSS",
    "DOWN",
    "FEW",
    "GRID",
    "MANY",
    "NUMBERS",
    "STOCHASTIC",
    "SYMMETRIC",
    "Field",
    "Scales",
    "Way",
    "kernel_for",
    "overflow_to_special",
    "plain_row_at",
    "row_at",
    "tensor_scale_for",
    "tile_maxima",
]
