"""The oracle: what every backend must return, bit for bit. Slow, and meant to be read.

One value at a time, in Python floats (float64), by operations that are exact: scaling by powers of two, floor, and
differences of neighbours; tables are compared as fractions. The only rounded arithmetic is that of scales with a
mantissa, which is float32 by definition (float64 for float64 tensors), as on the hardware that has such scales.
Sources: OCP OFP8 v1.0, OCP MX v1.0, IEEE 754-2019, Salmon et al. 2011 (Philox).
"""

from __future__ import annotations

import bisect
import itertools
import math
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from lpsim.formats import BlockFormat, Codebook, Element, FixedFormat, FloatFormat, Format, Specials
from lpsim.formats.rounding import Key, Overflow, Rounding, ScaleRule

Axis = int | None


# ---------------------------------------------------------------------------------------------- random bits


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int) -> tuple[int, int, int, int]:
    """The Philox4x32 block cipher (Salmon, Moraes, Dror, Shaw, SC 2011, §4.3): four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


PHILOX_ROUNDS = 7  # the fewest that pass BigCrush (Salmon et al. 2011, table 2)


def random_word(key: Key, index: int) -> int:
    """The 32 random bits of element `index` (row-major) under `key`.

    The upper and the lower 16 bits come from two Philox calls that differ in the top bit of the counter's second word:
    rounding needs the lower half once in 2^16 elements. A call serves 8 elements, 16 places apart, so that 16
    neighbours lie in the 16 lanes of a vector.
    """
    position = index + key.offset
    group = (position >> 7) * 16 + (position & 15)  # position = 128·a + 16·slot + lane  ->  group = 16·a + lane
    slot = (position >> 4) & 7

    def half(selector: int) -> int:
        counter = (group & 0xFFFFFFFF, (group >> 32) | (selector << 31), key.stream, key.step)
        word = philox4x32(counter, (key.seed & 0xFFFFFFFF, key.seed >> 32), PHILOX_ROUNDS)[slot >> 1]
        return (word >> (16 * (slot & 1))) & 0xFFFF

    return half(0) << 16 | half(1)


# ---------------------------------------------------------------------------------------------- codes


def decode(code: int, fmt: Element) -> float:
    """The value of a code; NaN and ±Inf for the special codes.

    Raises ValueError for a code outside [0, 2^bits) or, in a codebook, beyond its table.
    """
    if not 0 <= code < (len(fmt.values) if isinstance(fmt, Codebook) else 1 << fmt.bits):
        raise ValueError(f"{fmt.name} has no code {code}")
    if isinstance(fmt, Codebook):
        return fmt.values[code]
    if isinstance(fmt, FixedFormat):
        return math.ldexp(code - (code >> (fmt.bits - 1) << fmt.bits), -fmt.frac_bits)
    width = fmt.exponent_bits + fmt.mantissa_bits
    negative, magnitude = bool(code >> width), code & ((1 << width) - 1)
    if fmt.specials in (Specials.FNUZ, Specials.EXTENDED) and negative and magnitude == 0:
        return math.nan
    if magnitude > fmt._max_code():
        infinite = fmt.has_inf and magnitude == fmt._max_code() + 1
        return (-math.inf if negative else math.inf) if infinite else math.nan
    value = fmt._magnitude(magnitude)
    return -value if negative else value


def encode(value: float, fmt: Element) -> int:
    """The code of a representable value; the inverse of `decode`. A NaN gets the quiet, positive NaN code.

    Raises ValueError for a value that the format does not hold.
    """
    refusal = ValueError(f"{value!r} is not a value of {fmt.name}")
    if isinstance(fmt, Codebook):
        if value not in fmt.values:
            raise refusal
        return fmt.values.index(value)
    if isinstance(fmt, FixedFormat):
        if not (math.isfinite(value) and fmt.min <= value <= fmt.max):
            raise refusal
        steps = math.ldexp(value, fmt.frac_bits)
        if not steps.is_integer():
            raise refusal
        return int(steps) & ((1 << fmt.bits) - 1)
    width = fmt.exponent_bits + fmt.mantissa_bits
    if math.isnan(value):
        if not fmt.has_nan:
            raise ValueError(f"{fmt.name} has no NaN")
        if fmt.signed and fmt.specials in (Specials.FNUZ, Specials.EXTENDED):
            return 1 << width
        quiet = 1 << max(fmt.mantissa_bits - 1, 0)
        return fmt._max_code() + 1 + quiet if fmt.specials is Specials.IEEE else (1 << width) - 1
    negative = math.copysign(1.0, value) < 0
    sign = int(negative) << width if fmt.signed else 0
    if math.isinf(value):
        if not fmt.has_inf or (negative and not fmt.signed):
            raise refusal
        return sign | (fmt._max_code() + 1)
    magnitude = abs(value)
    if magnitude == 0:
        if not fmt.zero:
            raise refusal
        return sign if fmt.has_negative_zero else 0
    exponent = max(math.frexp(magnitude)[1] - 1, fmt.emin)
    steps = math.ldexp(magnitude, fmt.mantissa_bits - exponent)
    normal = magnitude >= fmt.min_normal
    if not steps.is_integer() or magnitude > fmt.max or not (normal or fmt.subnormals) or (negative and not fmt.signed):
        raise refusal
    field = exponent + fmt._bias if normal else 0
    return sign | (field << fmt.mantissa_bits) | (int(steps) & ((1 << fmt.mantissa_bits) - 1))


def values(fmt: Element) -> list[float]:
    """All finite values in ascending order, zero once."""
    if isinstance(fmt, Codebook):
        return list(fmt.sorted_values)
    decoded = (decode(code, fmt) for code in range(1 << fmt.bits))
    kept = {v + 0.0 for v in decoded if math.isfinite(v) and fmt.min <= v <= fmt.max}
    return sorted(kept)


# ---------------------------------------------------------------------------------------------- rounding


def _away_from_zero(
    fraction: Fraction | float, lower_is_even: bool, negative: bool, rounding: Rounding, word: int, bits: int | None
) -> bool:
    """Whether the neighbour of larger magnitude is taken; `fraction` in (0, 1) is the way from the smaller to it."""
    if rounding is Rounding.TIES_TO_EVEN:
        return fraction > 0.5 or (fraction == 0.5 and not lower_is_even)
    if rounding is Rounding.TIES_TO_AWAY:
        return fraction >= 0.5
    if rounding is Rounding.TOWARD_ZERO:
        return False
    if rounding is Rounding.TOWARD_POSITIVE:
        return not negative
    if rounding is Rounding.TOWARD_NEGATIVE:
        return negative
    if rounding is Rounding.TO_ODD:
        return lower_is_even
    k = 32 if bits is None else bits
    return math.floor(fraction * 2**k) + (word >> (32 - k)) >= 2**k


def round_value(
    x: float,
    fmt: Element,
    rounding: Rounding = Rounding.TIES_TO_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    word: int = 0,
    random_bits: int | None = None,
) -> float:
    """x rounded to a value of the format, in one step.

    NaN stays NaN, in formats without one too. ±Inf and values beyond the largest magnitude follow `overflow`. Zero
    keeps its sign where the format has a negative zero. In a format without a zero, 0 becomes the smallest value
    (SATURATE) or NaN (SPECIAL); so does what is below the range of an unsigned format.

    word: the element's 32 random bits; random_bits: how many of them STOCHASTIC uses (None: all).
    """
    if math.isnan(x):
        return x
    if isinstance(fmt, Codebook):
        return _round_to_table(x, fmt, rounding, word, random_bits)
    negative = math.copysign(1.0, x) < 0
    special = overflow is Overflow.SPECIAL and (fmt.has_inf or fmt.has_nan)
    beyond = math.inf if fmt.has_inf else math.nan  # the special result, before its sign
    if math.isinf(x):
        result = beyond if special else math.inf
    else:
        result = _round_magnitude(abs(x), fmt, negative, rounding, word, random_bits)
        if special and result > fmt.max:
            toward_zero = {Rounding.TOWARD_ZERO, Rounding.TO_ODD}
            toward_zero |= {Rounding.TOWARD_NEGATIVE, Rounding.TOWARD_POSITIVE} - {
                Rounding.TOWARD_NEGATIVE if negative else Rounding.TOWARD_POSITIVE
            }
            result = fmt.max if rounding in toward_zero else beyond
    if isinstance(fmt, FloatFormat):
        below = not fmt.signed and negative and result > 0
        if below or (result == 0 and not fmt.zero):
            return math.nan if special else fmt.min
    if negative and result == 0:
        return -0.0 if fmt.has_negative_zero else 0.0
    if math.isnan(result) or (special and math.isinf(result)):
        return -result if negative else result
    return max(-result, fmt.min) if negative else min(result, fmt.max)


def _round_magnitude(
    a: float, fmt: FloatFormat | FixedFormat, negative: bool, rounding: Rounding, word: int, bits: int | None
) -> float:
    """The finite magnitude a >= 0 rounded on the grid of the format, the exponent not bounded above."""
    if isinstance(fmt, FixedFormat):
        a = min(a, 4 * fmt.max)  # as good as any number beyond
        step_exponent, lower_even_at = -fmt.frac_bits, 0
    else:
        if not fmt.zero and a < fmt.min_normal:
            return fmt.min_normal if a > 0 else 0.0
        if not fmt.subnormals and a < fmt.min_normal:  # a single step leads from 0 to min_normal
            step_exponent, lower_even_at = fmt.emin, 0
        else:
            exponent = max(math.frexp(a)[1] - 1, fmt.emin) if a > 0 else fmt.emin
            step_exponent = exponent - fmt.mantissa_bits
            # without mantissa bits the codes of neighbouring powers of two alternate with the exponent
            lower_even_at = exponent + fmt._bias + 1 if fmt.mantissa_bits == 0 and a >= fmt.min_normal else 0
    steps = math.ldexp(a, -step_exponent)
    if a > 0:
        steps = max(steps, sys.float_info.min)  # what is smaller is far below a half; but it must not become 0
    lower = math.floor(steps)
    if lower != steps:
        lower_is_even = (lower + lower_even_at) % 2 == 0
        lower += _away_from_zero(steps - lower, lower_is_even, negative, rounding, word, bits)
    try:
        return math.ldexp(lower, step_exponent)
    except OverflowError:  # rounded past the largest float64
        return math.inf


def _round_to_table(x: float, fmt: Codebook, rounding: Rounding, word: int, bits: int | None) -> float:
    """x rounded to an entry of the table; beyond its ends the end. STOCHASTIC computes r in float64."""
    ordered = fmt.sorted_values
    above = bisect.bisect_left(ordered, x)
    if above == len(ordered) or above == 0 or ordered[above] == x:
        return ordered[min(above, len(ordered) - 1)]
    lo, hi = ordered[above - 1], ordered[above]
    inward, outward = (lo, hi) if abs(lo) <= abs(hi) else (hi, lo)
    if rounding is Rounding.STOCHASTIC:
        fraction: Fraction | float = (x - inward) / (outward - inward)
    else:
        fraction = (Fraction(x) - Fraction(inward)) / (Fraction(outward) - Fraction(inward))
    inward_is_even = ((above - 1 if inward is lo else above) - fmt.origin) % 2 == 0
    return outward if _away_from_zero(fraction, inward_is_even, outward is lo, rounding, word, bits) else inward


# ---------------------------------------------------------------------------------------------- scales


def _clamp_exponent(exponent: int, scale: FloatFormat) -> float:
    return math.ldexp(1.0, min(max(exponent, scale.emin), scale.emax))


def block_scale(amax: float, fmt: BlockFormat, tensor_scale: float = 1.0, dtype: Any = np.float32) -> float:
    """The scale of a block whose largest magnitude is the finite amax (MX v1.0 §6.3, and `ScaleRule`).

    ROUND and rules of the user give amax / max (or the rule's value) over `tensor_scale`, each division rounded in
    `dtype`, then rounded to the scale's format and clamped to its normal numbers. A zero block gets the smallest scale.
    """
    element, scale, rule = fmt.element, fmt.scale, fmt.scale_rule
    if rule is ScaleRule.ROUND or not isinstance(rule, ScaleRule):
        wanted = dtype(amax) / dtype(element.max) if rule is ScaleRule.ROUND else dtype(fmt.scale_by_rule(amax))
        rounded = round_value(float(dtype(wanted) / dtype(tensor_scale)), scale)
        return min(max(rounded, scale.min_normal), scale.max)
    if amax == 0:
        return _clamp_exponent(scale.emin, scale)
    significand, exponent = math.frexp(amax)  # significand in [1/2, 1)
    exponent -= 1
    if rule is ScaleRule.CEIL:
        exponent += significand > 0.5
    elif rule is ScaleRule.RCEIL:
        exponent += significand > math.frexp(element.max)[0]
    elif rule is ScaleRule.EVEN:
        steps = math.ldexp(significand, element.mantissa_bits + 1)  # in [2^m, 2^(m+1))
        exponent += math.floor(steps + 0.5) == 2 ** (element.mantissa_bits + 1)
    return _clamp_exponent(exponent - element.emax, scale)


def sub_block_scale(amax: float, block: float, fmt: BlockFormat) -> float:
    """The scale of a sub-block whose largest magnitude is the finite amax, in a block of the scale `block`.

    Between `block` and `block` over 2^most_lowered what the rule gives for amax: see BlockFormat.sub_block_size.
    """
    lowest = max(math.ldexp(block, -fmt.most_lowered), math.ldexp(1.0, fmt.scale.emin))
    return min(max(block_scale(amax, fmt), lowest), block)


def tensor_scale(amax: float, fmt: BlockFormat, dtype: Any = np.float32) -> float:
    """The second scale: amax of the tensor over (element.max · scale.max), in the format `fmt.tensor_scale`.

    1 where the format has none. Kept large enough that tensor_scale · scale is a normal float32.
    """
    if fmt.tensor_scale is None:
        return 1.0
    wanted = float(dtype(amax) / dtype(fmt.element.max * fmt.scale.max))
    return min(max(round_value(wanted, fmt.tensor_scale), least_tensor_scale(fmt)), fmt.tensor_scale.max)


def least_tensor_scale(fmt: BlockFormat) -> float:
    """The smallest second scale of a format that has one."""
    assert fmt.tensor_scale is not None
    return max(fmt.tensor_scale.min_normal, math.ldexp(1.0, -126 - fmt.scale.emin))


# ---------------------------------------------------------------------------------------------- tensors


def block_indices(shape: tuple[int, ...], fmt: BlockFormat, axis: int) -> Iterator[np.ndarray]:
    """The row-major element indices of each block of a tensor; the last block along an axis may be short.

    A tile (rows, columns) covers the last two axes; a 0-d tensor is one block, a 1-d tensor one row.
    """
    if 0 in shape:
        return
    index = np.arange(math.prod(shape)).reshape(shape if shape else (1,))
    size = fmt.block_size
    if size is None:
        yield index.reshape(-1)
    elif isinstance(size, tuple):
        matrices = index.reshape((-1, *np.atleast_2d(index).shape[-2:]))
        for matrix in matrices:
            for row, column in itertools.product(*(range(0, matrix.shape[d], size[d]) for d in (0, 1))):
                yield matrix[row : row + size[0], column : column + size[1]].reshape(-1)
    else:
        lines = np.moveaxis(index, axis, -1)
        for line in lines.reshape(-1, lines.shape[-1]):
            for start in range(0, len(line), size or len(line)):
                yield line[start : start + (size or len(line))]


def quantize(
    x: np.ndarray,
    fmt: Format,
    axis: int = -1,
    rounding: Rounding = Rounding.TIES_TO_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    random_bits: int | None = None,
    key: Key | None = None,
) -> np.ndarray:
    """A float array of the same shape and dtype whose entries are the nearest (by `rounding`) values of the format.

    Each result is rounded once, from x's own precision, and then stored in x's dtype. In a BlockFormat a block with a
    NaN or Inf becomes NaN (MX v1.0 §6.3: scale 0xFF), and with a tensor scale the whole tensor does.

    x: float16, float32 or float64, any shape. axis: the axis that 1-d blocks lie along. random_bits, key: of STOCHASTIC
    alone, see Rounding.

    Raises ValueError for STOCHASTIC without a key.
    """
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    flat = x.astype(dtype).reshape(-1)
    words = [0] * flat.size
    if rounding is Rounding.STOCHASTIC:
        if key is None:
            raise ValueError("stochastic rounding needs a key: pass key=Key(seed=...)")
        words = [random_word(key, i) for i in range(flat.size)]
    result = np.empty_like(flat)
    if not isinstance(fmt, BlockFormat):
        with np.errstate(over="ignore"):  # a number of the format may be beyond float32
            for i, value in enumerate(flat.tolist()):
                result[i] = round_value(value, fmt, rounding, overflow, words[i], random_bits)
        return result.astype(x.dtype).reshape(x.shape)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        amax = float(np.max(np.abs(flat), initial=0.0))
        second = dtype(tensor_scale(amax, fmt, dtype)) if math.isfinite(amax) else None
        for block in block_indices(x.shape, fmt, axis):
            part = flat[block]
            if not np.isfinite(part).all() or (second is None and fmt.tensor_scale is not None):
                result[block] = np.nan
                continue
            outer = dtype(1.0) if second is None else second
            whole = block_scale(float(np.max(np.abs(part), initial=0.0)), fmt, float(outer), dtype)
            scales: Any = np.full(len(part), whole, dtype)
            for start in range(0, len(part), fmt.sub_block_size) if fmt.sub_block_size else ():
                sub = slice(start, start + fmt.sub_block_size)
                scales[sub] = sub_block_scale(float(np.max(np.abs(part[sub]))), whole, fmt)
            for i, value, scale in zip(block.tolist(), part, scales, strict=True):
                if fmt.scale_rule is ScaleRule.ROUND or not isinstance(fmt.scale_rule, ScaleRule):
                    scaled = float(value * ((dtype(1.0) / outer) / scale))
                else:
                    scaled = float(value) / float(scale)  # a power of two: exact in float64
                if scaled == 0 and value != 0:  # an underflow stays on its side of zero
                    scaled = math.copysign(float(np.nextafter(dtype(0), dtype(1))), float(value))
                rounded = round_value(scaled, fmt.element, rounding, Overflow.SATURATE, words[i], random_bits)
                result[i] = dtype(rounded) * (scale * outer)
    return result.astype(x.dtype).reshape(x.shape)
