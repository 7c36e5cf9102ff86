"""Accumulators of machines that exist, as far as measurements of them have been published.

The tensor cores' parameters are those of MMA-Sim (Xie, Wang, Yang, Yang, arXiv:2511.10909), which reproduces the
results of the GPUs bit for bit; Khattak and Mikaitis (arXiv:2512.07004) model the same units from tests of their own.
NVIDIA documents none of it. The formats of the operands are part of a unit, because of subnormal numbers.

What one instruction does is repeated along K, each continuing the sum of the one before. How a library splits K over
several accumulators, or moves partial sums into others (as DeepGEMM does every 128 products on Hopper), is not part of
these constants.
"""

from __future__ import annotations

from lpsim import formats
from lpsim.accumulators.unit import Accumulator, Alignment
from lpsim.formats import FloatFormat
from lpsim.formats.rounding import Rounding

float22_e8m13 = FloatFormat("float22_e8m13", 8, 13)
"""What Hopper's FP8 instructions keep of a float32 register: the upper 22 bits."""


def _tensor_core(operands: tuple[FloatFormat, FloatFormat], products: int, bits: int, out: FloatFormat) -> Accumulator:
    """`products` and the accumulator in one step, aligned to `bits` fraction bits, truncated, and again in `out`."""
    return Accumulator(out, products, alignment=Alignment(bits, operands=operands), rounding=Rounding.TOWARD_ZERO)


_e4m3, _e5m2 = formats.float8_e4m3fn, formats.float8_e5m2

AMPERE_FP16 = _tensor_core((formats.float16, formats.float16), 8, 24, formats.float32)
"""A100, mma.m16n8k16 (two steps) and m16n8k8, float16 operands, float32 results."""
AMPERE_BF16 = _tensor_core((formats.bfloat16, formats.bfloat16), 8, 24, formats.float32)
"""A100, mma.m16n8k16 (two steps) and m16n8k8, bfloat16 operands, float32 results."""
HOPPER_FP16 = _tensor_core((formats.float16, formats.float16), 16, 25, formats.float32)
"""H100, wgmma k16, float16 operands, float32 results."""
HOPPER_BF16 = _tensor_core((formats.bfloat16, formats.bfloat16), 16, 25, formats.float32)
"""H100, wgmma k16, bfloat16 operands, float32 results."""
HOPPER_FP8 = _tensor_core((_e4m3, _e4m3), 32, 13, float22_e8m13)
"""H100, wgmma k32, E4M3 · E4M3, float32 results: 13 fraction bits, in the aligned terms and in the sum."""
HOPPER_FP8_E4M3_E5M2 = _tensor_core((_e4m3, _e5m2), 32, 13, float22_e8m13)
"""As HOPPER_FP8, with E5M2 as the right operand: wgrad with gradients in E5M2."""
HOPPER_FP8_E5M2_E4M3 = _tensor_core((_e5m2, _e4m3), 32, 13, float22_e8m13)
"""As HOPPER_FP8, with E5M2 as the left operand: dgrad with gradients in E5M2."""
HOPPER_FP8_E5M2 = _tensor_core((_e5m2, _e5m2), 32, 13, float22_e8m13)
"""As HOPPER_FP8, with E5M2 on both sides."""
