"""float32 products done by a bfloat16 unit, where that changes nothing but the order of the sum.

Values of the narrow formats have at most 8 significant bits, so they are exactly bfloat16, and the product of two of
them is exactly float32. A bfloat16 matrix unit that accumulates in float32 then computes a dot product as a float32
unit does: the same exact products, added with float32 rounding, in an order of its own. Such units (AMX, AVX-512
BF16) take numbers below 2^-126 as zero; so nothing may be that small, neither an operand, nor a product, nor a sum.
Every sum of products is a multiple of ulp(lhs)·ulp(rhs): where that is at least 2^-126, no subnormal number occurs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lpsim.formats import Codebook, FixedFormat, FloatFormat, Format

MIN_EXPONENT = -126  # of a normal number, float32 and bfloat16 alike
SIGNIFICANT_BITS = 8  # of bfloat16
WORTHWHILE = 1 << 22  # multiplications; below, the switch costs what the faster product saves
WIDE = 32  # rows · columns / (rows + columns) of the result; below, looking for small numbers costs what is saved

_precision: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009, the stubs lack it


def significant_bits(fmt: Format) -> int | None:
    """How many significant bits any finite value of the format needs at most; None where there is no bound."""
    if isinstance(fmt, FloatFormat):
        return fmt.mantissa_bits + 1
    if isinstance(fmt, FixedFormat):
        return fmt.bits - 1  # the most negative value is a power of two
    if isinstance(fmt, Codebook):
        return max((_odd_part(v).bit_length() for v in fmt.values if v), default=1)
    if fmt.tensor_scale is not None:
        return None
    element = significant_bits(fmt.element)
    assert element is not None
    return element + fmt.scale.mantissa_bits


def _odd_part(value: float) -> int:
    numerator, _ = abs(value).as_integer_ratio()
    return numerator // (numerator & -numerator)


def bits_of_product(lhs: Format, rhs: Format) -> int | None:
    """How far below their leading bits the last bits of a value of each lie, added up; None if one is not bfloat16."""
    bits = [significant_bits(fmt) for fmt in (lhs, rhs)]
    if any(b is None or b > SIGNIFICANT_BITS for b in bits):
        return None
    return sum(b - 1 for b in bits if b is not None)


@functools.cache
def unit_available() -> bool:
    """Whether this CPU multiplies bfloat16 numbers natively, with float32 accumulation."""
    return torch.backends.mkldnn.is_available() and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def matmul(lhs: Tensor, rhs: Tensor, bits: int) -> Tensor:
    """torch.matmul of two float32 tensors whose values are bfloat16, by the bfloat16 unit where it is exact.

    NaN and Inf behave as in torch.matmul. bits: bits_of_product of the formats that the values are from.
    """
    rows, columns = lhs.shape[-2], rhs.shape[-1]
    if lhs.numel() * columns < WORTHWHILE or rows * columns < WIDE * (rows + columns):
        return torch.matmul(lhs, rhs)
    if lhs.dtype is not torch.float32 or not lhs.is_cpu or not unit_available():
        return torch.matmul(lhs, rhs)
    exponents = _min_exponent(lhs), _min_exponent(rhs)
    if min(exponents) < MIN_EXPONENT or sum(exponents) - bits < MIN_EXPONENT:
        return torch.matmul(lhs, rhs)
    before = _precision.fp32_precision
    _precision.fp32_precision = "bf16"
    try:
        return torch.matmul(lhs, rhs)
    finally:
        _precision.fp32_precision = before


def _min_exponent(x: Tensor) -> float:
    """⌊log2⌋ of the smallest non-zero magnitude; infinity where there is none, -127 where it is subnormal."""
    dense = x.detach()
    if dense.untyped_storage().nbytes() == 4 * x.numel():
        dense = dense.as_strided((x.numel(),), (1,), 0)
    bits = _smallest_bits()(dense.reshape(-1).numpy().view("uint32"))
    return (bits >> 23) - 127 if bits else math.inf


@functools.cache
def _smallest_bits() -> Callable[[Any], int]:
    """The bits of the smallest non-zero magnitude among float32 numbers given as bits; 0 where there is none."""
    import numba

    @numba.njit(cache=True, nogil=True)
    def smallest(words):  # type: ignore[no-untyped-def]
        result = numba.uint32(0xFFFFFFFF)
        one, magnitude = numba.uint32(1), numba.uint32(0x7FFFFFFF)
        for i in range(words.size):
            word = numba.uint32(numba.uint32(words[i] & magnitude) - one)  # zero becomes the largest
            result = min(result, word)
        return numba.uint32(result + one)

    return smallest
