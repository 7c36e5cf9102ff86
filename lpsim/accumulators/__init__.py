"""Dot products as a low-precision machine adds them up: see `unit.Accumulator`, and `presets` for machines that exist.

reference: the definition, in exact arithmetic; cpu, with kernels, tiles and aligned: Numba; gpu, gpu_kernels: Triton.
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
