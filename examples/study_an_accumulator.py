"""How far do long dot products drift when the unit that sums has few bits?"""

import torch

from lpsim import Accumulator, Quantizer, Rounding, accumulators, formats

generator = torch.Generator().manual_seed(0)
to_fp8 = Quantizer(formats.float8_e4m3fn)
units = {
    "float16 after every multiply-add": Accumulator(formats.float16),
    "float16 after every 32": Accumulator(formats.float16, chunk=32),
    "bfloat16 after every multiply-add": Accumulator(formats.bfloat16),
    "bfloat16, toward zero": Accumulator(formats.bfloat16, rounding=Rounding.TOWARD_ZERO),
    "Hopper tensor core, FP8": accumulators.HOPPER_FP8,
}

for length in (256, 1024, 4096):
    lhs = to_fp8(torch.rand(16, length, generator=generator))  # positive numbers: the sums only grow
    rhs = to_fp8(torch.rand(length, 16, generator=generator))
    exact = lhs.double() @ rhs.double()  # both operands are FP8: float64 holds these sums exactly
    print(f"sums of {length} products")
    for name, unit in units.items():
        error = (unit.matmul(lhs, rhs).double() - exact) / exact
        print(f"  {name}: mean relative error {error.mean().item():+.1e}, largest {error.abs().max().item():.1e}")
