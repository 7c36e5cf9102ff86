"""Dot products as a low-precision machine adds them up: `unit.Accumulator`, and `presets` for machines that exist.

`reference` defines every result in exact arithmetic; `cpu` (Numba, with `kernels`, `tiles`, `pinned`, `aligned`) and
`gpu` (Triton) equal it. In: two matrices, and how the unit rounds. Out: their product. It imports formats and
quantization; machine uses it.
"""

from lpsim.accumulators.presets import (
    AMPERE_BF16,
    AMPERE_FP16,
    HOPPER_BF16,
    HOPPER_FP8,
    HOPPER_FP8_E4M3_E5M2,
    HOPPER_FP8_E5M2,
    HOPPER_FP8_E5M2_E4M3,
    HOPPER_FP16,
    float22_e8m13,
)
from lpsim.accumulators.unit import Accumulator, Alignment, Order

__all__ = [
    "AMPERE_BF16",
    "AMPERE_FP16",
    "HOPPER_BF16",
    "HOPPER_FP8",
    "HOPPER_FP8_E4M3_E5M2",
    "HOPPER_FP8_E5M2",
    "HOPPER_FP8_E5M2_E4M3",
    "HOPPER_FP16",
    "Accumulator",
    "Alignment",
    "Order",
    "float22_e8m13",
]
