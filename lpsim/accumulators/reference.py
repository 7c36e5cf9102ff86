"""The oracle of Accumulator: dot products in exact rational arithmetic. Slow, and meant to be read.

Finite numbers are Fractions; an accumulator's state is a Python float, which holds NaN, Inf and the sign of zero too.
Sources: IEEE 754-2019 §4.3, §6.3 and §7.4; MMA-Sim (Xie et al., arXiv:2511.10909) for the aligned sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from lpsim import formats
from lpsim.accumulators.unit import Accumulator, Order
from lpsim.formats.rounding import Rounding

_FLOAT32 = Accumulator(formats.float32)


def exponent(x: Fraction) -> int:
    """⌊log2 |x|⌋ of a number other than zero."""
    guess = abs(x.numerator).bit_length() - x.denominator.bit_length()
    return guess if abs(x) >= Fraction(2) ** guess else guess - 1


def nearest_integer(x: Fraction) -> int:
    """x rounded to nearest, ties to even (Python's round of a Fraction)."""
    return round(x)


def round_exact(x: Fraction, zero: float, unit: Accumulator) -> float:
    """x rounded once to a value of unit.format; `zero` is the result for x = 0."""
    fmt = unit.format
    negative = x < 0 or (x == 0 and math.copysign(1, zero) < 0)
    magnitude = Fraction(0)
    if x != 0:
        quantum = Fraction(2) ** (max(exponent(x), fmt.emin) - fmt.mantissa_bits)
        steps = abs(x) / quantum
        magnitude = quantum * (math.floor(steps) if unit.rounding is Rounding.TOWARD_ZERO else nearest_integer(steps))
    result = unit.beyond if magnitude > Fraction(fmt.max) else float(magnitude)
    if result == 0 and not fmt.has_negative_zero:
        return 0.0
    return -result if negative else result


def special(x: float, unit: Accumulator) -> float:
    """NaN and ±Inf as the unit holds them."""
    return x if math.isnan(x) else math.copysign(unit.infinite, x)


def add(c: float, term: Fraction, term_as_float: float, unit: Accumulator) -> float:
    """c + term, rounded once. term_as_float: NaN or ±Inf instead of the term, or its zero with its sign."""
    total = c + term_as_float  # IEEE's rules of NaN, Inf and signs of zeros
    if not math.isfinite(c) or not math.isfinite(term_as_float):
        return special(total, unit)
    exact = Fraction(c) + term
    return round_exact(exact, total if exact == 0 else 0.0, unit)


def multiply_add(c: float, a: float, b: float, unit: Accumulator) -> float:
    """c + a·b, rounded once."""
    product = a * b  # in float64: an exact zero, a finite number, Inf or NaN as for real numbers
    return add(c, Fraction(a) * Fraction(b) if math.isfinite(product) else Fraction(0), product, unit)


def chunk_sum(a: Sequence[float], b: Sequence[float], unit: Accumulator) -> float:
    """The products of one chunk added up in float32."""
    if unit.order is Order.SEQUENTIAL:
        c = 0.0
        for x, y in zip(a, b, strict=True):
            c = multiply_add(c, x, y, _FLOAT32)
        return c
    level = [multiply_add(-0.0, x, y, _FLOAT32) for x, y in zip(a, b, strict=True)]
    level += [0.0] * ((1 << (unit.chunk - 1).bit_length()) - len(level))
    while len(level) > 1:
        level = [add(x, _finite(y), y, _FLOAT32) for x, y in zip(level[::2], level[1::2], strict=True)]
    return level[0]


def _finite(x: float) -> Fraction:
    return Fraction(x) if math.isfinite(x) else Fraction(0)


def operand_exponent(x: float, emin: int) -> int:
    """The exponent a tensor core reads from an operand's code: emin for subnormals, -126 for zero."""
    return -126 if x == 0 else max(exponent(Fraction(x)), emin)


def aligned_add(c: float, a: Sequence[float], b: Sequence[float], unit: Accumulator) -> float:
    """c and the products aligned at the largest exponent, cut, added exactly and rounded; see Alignment."""
    alignment = unit.alignment
    assert alignment is not None
    total = c + sum(x * y for x, y in zip(a, b, strict=True))
    if not math.isfinite(total):
        return special(total, unit)
    terms = [Fraction(c)] + [Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)]
    exponents = [operand_exponent(c, unit.format.emin)]
    emin_lhs, emin_rhs = alignment.emin
    exponents += [operand_exponent(x, emin_lhs) + operand_exponent(y, emin_rhs) for x, y in zip(a, b, strict=True)]
    quantum = Fraction(2) ** (max(exponents) - alignment.fraction_bits)
    cuts: dict[Rounding, Callable[[Fraction], int]] = {
        Rounding.TOWARD_ZERO: math.trunc,
        Rounding.TOWARD_NEGATIVE: math.floor,
        Rounding.TIES_TO_EVEN: nearest_integer,
    }
    cut = cuts[alignment.rounding]
    result = round_exact(quantum * sum(cut(term / quantum) for term in terms), 0.0, unit)
    return result if result != 0 else 0.0


def dot(a: Sequence[float], b: Sequence[float], unit: Accumulator) -> float:
    """The dot product of two vectors of float32 numbers as the unit forms it."""
    c = 0.0
    for start in range(0, len(a), unit.chunk):
        x, y = a[start : start + unit.chunk], b[start : start + unit.chunk]
        if unit.alignment is not None:
            c = aligned_add(c, x, y, unit)
        elif unit.chunk == 1:
            c = multiply_add(c, x[0], y[0], unit)
        else:
            s = chunk_sum(x, y, unit)
            c = add(c, _finite(s), s, unit)
    return c


def matmul(lhs: np.ndarray, rhs: np.ndarray, unit: Accumulator) -> np.ndarray:
    """lhs [M, K] times rhs [K, N]: float32 [M, N]."""
    columns = [column.tolist() for column in rhs.T]
    return np.array([[dot(row.tolist(), column, unit) for column in columns] for row in lhs], np.float32)
