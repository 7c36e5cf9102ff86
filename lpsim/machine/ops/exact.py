"""float32 matrix products computed by the CPU's bfloat16 unit, where that changes nothing but the order of the sums.

A value with at most 8 significant bits, as the narrow formats have, is exactly a bfloat16 number, and the product of
two such values is exactly a float32 number. So a bfloat16 unit that accumulates in float32 computes a dot product as a
float32 unit does: the same exact products, added with float32 rounding, only in another order. But such units (AMX,
AVX-512 BF16) treat numbers below 2^-126 as zero, so no operand, product or sum may be that small. Every sum of products
is a multiple of ulp(lhs)·ulp(rhs), the last bits of the operands: if that is at least 2^-126, no such number occurs.
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
WORTHWHILE = 1 << 22  # multiplications; with fewer, switching the precision costs more than the faster product saves
WIDE = 32  # rows · columns / (rows + columns) of the result; below, the search for small numbers costs too much

_precision: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009, the stubs lack it


def significant_bits(fmt: Format) -> int | None:
    """How many significant bits a finite value of the format needs at most; None if there is no bound."""
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
    """How far the last bit of a product lies below the leading bits of its operands, at most: the sum of their
    significant bits less one. None if a format's values are not all exactly bfloat16.
    """
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
    """torch.matmul of two float32 tensors whose values are exactly bfloat16, by the bfloat16 unit where that is exact.

    NaN and Inf behave as in torch.matmul. bits: bits_of_product of the formats that the values belong to.
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
    """A function: float32 bit patterns -> the bit pattern of the smallest non-zero magnitude; 0 if all are zero."""
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
