"""Formats that are tables: constructors of posits and logarithmic numbers, and the named tables.

Sources: Posit Working Group, Standard for Posit Arithmetic (2022); Dettmers et al. 2023 (QLoRA), appendix E; Zhao et
al. 2022 (LNS-Madam).
"""

from __future__ import annotations

import math

import numpy as np

from lpsim.formats import BlockFormat, Codebook, float32, register
from lpsim.formats.rounding import ScaleRule

__all__ = ["lns8", "logarithmic", "nf4", "nf4_block64", "posit", "posit8"]


def posit(bits: int, es: int = 2, name: str | None = None) -> Codebook:
    """The posits of `bits` bits with `es` exponent bits, without NaR (the Posit Standard 2022, §3, has es = 2).

    A positive posit's code is its bit pattern; a negative one's is its bit pattern minus 1, as NaR's place is left out.
    Only the values are the standard's. Rounding here is to the arithmetically nearest value; the standard rounds the
    bit string, which differs where the regime leaves no room for all exponent bits, and takes no number to zero.

    Raises ValueError where values fall outside float32, or bits and es outside 2 to 16 and 0 to 4.
    """
    name = name or f"posit{bits}_es{es}"
    if not (2 <= bits <= 16 and 0 <= es <= 4):
        raise ValueError(f"{name}: posits here have 2 to 16 bits and 0 to 4 exponent bits, got {bits} and {es}")
    positive = [_positive_posit(pattern, bits - 1, es) for pattern in range(1, 1 << (bits - 1))]
    return Codebook(name, (0.0, *positive, *(-value for value in reversed(positive))))


def _positive_posit(body: int, width: int, es: int) -> float:
    """2^(2^es·r + e)·(1 + f) from the `width` bits below the sign: regime r, then e and f as far as there is room."""
    first = body >> (width - 1)
    run = width - (body if not first else body ^ ((1 << width) - 1)).bit_length()
    regime = run - 1 if first else -run
    rest_bits = max(width - run - 1, 0)
    rest = body & ((1 << rest_bits) - 1)
    fraction_bits = max(rest_bits - es, 0)
    exponent = (rest >> fraction_bits) << max(es - rest_bits, 0)
    significand = (1 << fraction_bits) + (rest & ((1 << fraction_bits) - 1))
    return math.ldexp(significand, (regime << es) + exponent - fraction_bits)


def logarithmic(name: str, bits: int, base: float = math.sqrt(2), largest: float = 1.0) -> Codebook:
    """Logarithmic numbers: zero and ±largest·base^-k for k = 0, 1, ..., 2^(bits − 1) − 2, each rounded to float32.

    Positive codes count up from zero's 0 by size, negative codes go on from there: one code of 2^bits is not used.

    bits: of a code, 2 to 16. base: the ratio of neighbouring magnitudes. largest: the largest magnitude.

    Raises ValueError for bits out of range, a base that is not above 1, or magnitudes that are not distinct and
    positive in float32.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"{name}: a logarithmic code has 2 to 16 bits, got {bits}")
    if not (base > 1 and largest > 0):
        raise ValueError(f"{name}: base must be above 1 and largest above 0, got {base} and {largest}")
    steps = range((1 << (bits - 1)) - 2, -1, -1)
    magnitudes = [float(np.float32(largest * math.exp2(-step * math.log2(base)))) for step in steps]
    return Codebook(name, (0.0, *magnitudes, *(-value for value in magnitudes)))


posit8 = posit(8, name="posit8")
lns8 = logarithmic("lns8", 8, base=2 ** (1 / 8))  # LNS-Madam: 8 bits, base factor 8

# quantiles of the normal distribution (QLoRA, appendix E), ascending
nf4 = Codebook(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)
nf4_block64 = BlockFormat("nf4_block64", nf4, float32, block_size=64, scale_rule=ScaleRule.ROUND)  # QLoRA's weights

for _fmt in (posit8, lns8, nf4, nf4_block64):
    register(_fmt)
