"""Define a number format, prove that every backend computes it as defined, and see what it does to a tensor."""

import torch

from lpsim import BlockFormat, FloatFormat, Quantizer, Specials, conformance, encode, formats

# 1 sign bit, 2 exponent bits, 2 mantissa bits, and no code spent on Inf or NaN
my5 = FloatFormat("my5", exponent_bits=2, mantissa_bits=2, bias=3, specials=Specials.NONE)
print(f"{my5.name}: {my5.bits} bits, largest {my5.max}, smallest positive {my5.min_subnormal}")

# 32 neighbours share one power-of-two scale, as in the OCP MX formats
mxmy5 = BlockFormat("mxmy5", my5, formats.float8_e8m0fnu)
print(conformance.check(mxmy5))  # raises ConformanceError with a counterexample if anything disagrees

x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
for fmt in (mxmy5, formats.mxfp6_e3m2, formats.mxfp4_e2m1):
    error = (Quantizer(fmt)(x) - x).norm() / x.norm()
    print(f"{fmt.name}: {encode(x, fmt).bits_per_element} bits an element, relative error {error:.3f}")
