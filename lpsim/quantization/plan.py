"""Turns a format, a rounding and an overflow policy into the numbers that a kernel takes, and a shape into tiles.

Shared by the backends `cpu` and `gpu`; knows neither Numba nor Triton.
"""

from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch

from lpsim.formats import BlockFormat, Codebook, Element, FixedFormat, FloatFormat, Format, reference
from lpsim.formats.rounding import Overflow, Rounding, ScaleRule

MODES = list(Rounding)  # the compiled-in number of a rounding is its place here
SPAN = 2048  # elements of a row that a kernel takes at a time: read for the maxima, still near when they are rounded


class Variant(NamedTuple):
    """What is compiled into a kernel."""

    mode: int
    table: bool  # the element is a codebook
    double: bool  # float64 tensors
    gap: bool  # no subnormals
    bare: bool  # no mantissa bits


def _smallest_at_least(bound: Fraction, dtype: Any, strict: bool) -> Any:
    """The smallest float of `dtype` that is >= bound (> bound if strict)."""
    near = dtype(float(bound))
    while Fraction(float(near)) > bound:
        near = np.nextafter(near, dtype(-np.inf))
    while Fraction(float(near)) < bound or (strict and Fraction(float(near)) == bound):
        near = np.nextafter(near, dtype(np.inf))
    return near


def _thresholds(fmt: Codebook, rounding: Rounding, dtype: Any) -> np.ndarray:
    """For each pair of neighbours the smallest number that rounds to the upper one, from the oracle's rules."""
    ordered = fmt.sorted_values
    result = []
    for lo, hi in itertools.pairwise(ordered):
        middle = (Fraction(lo) + Fraction(hi)) / 2
        if rounding in (Rounding.TIES_TO_EVEN, Rounding.TIES_TO_AWAY):
            at_middle = reference.round_value(float(middle), fmt, rounding) == hi
            result.append(_smallest_at_least(middle, dtype, strict=not at_middle))
        else:  # the same neighbour everywhere between the two
            inside = np.nextafter(dtype(lo), dtype(np.inf))
            up = float(inside) == hi or reference.round_value(float(inside), fmt, rounding) == hi
            result.append(inside if up else dtype(hi))
    return np.array(result, dtype)


class Plan(NamedTuple):
    """A format and a rounding as kernel arguments, for one width of tensor, in the compute type (p = 23 or 52).

    floats: lowest and highest (what lies beyond becomes these before it is rounded); the zero that is added to a result
    (-0.0 keeps the sign of zero, 0.0 drops it); 2^min(k, 16); min_normal.
    integers: the bit pattern of 2^emin; p − m in the exponent field (leads from 2^e to C); p in the exponent field
    (from q to C); the mask of the exponent field; p; the exponent of 1.0 (as stored); the format's bias (the parity of
    codes without mantissa bits); min(k, 16); 16 − min(k, 16); 2^min(k, 16); whether k > 16.
    thresholds[j]: the smallest number that rounds to values[j + 1] or beyond. rule: see _rule. bits: k.
    overflow: max, what lies beyond it, and whether a positive and a negative overflow go there; None: saturate.
    kept: what a backend keeps with the plan: its prepared calls, by shape and axis.
    """

    variant: Variant
    floats: np.ndarray
    integers: np.ndarray
    thresholds: np.ndarray
    values: np.ndarray
    rule: np.ndarray
    bits: int
    overflow: tuple[float, float, bool, bool] | None
    kept: dict[Any, Any]


def _fits_float32(element: Element, rounding: Rounding) -> bool:
    """Whether float32 arithmetic rounds exactly: C and q are normal, and what underflows is far below any tie.

    Stochastic rounding counts in 32-bit fixed point: m + 1 bits before the point and 16 after it.
    """
    if isinstance(element, Codebook):
        return element.min_subnormal >= 2.0**-60 and element.max <= 2.0**60
    widest = 13 if rounding is Rounding.STOCHASTIC else 20
    return element.min_subnormal >= 2.0**-60 and element.emax <= 60 and element.mantissa_bits <= widest


@functools.lru_cache(maxsize=1024)
def plan(fmt: Format, rounding: Rounding, overflow: Overflow, random_bits: int | None, double: bool) -> Plan:
    """What a kernel is compiled for, and its arguments. random_bits: of a Quantizer. double: for float64 tensors."""
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    far = isinstance(fmt, BlockFormat) and fmt.scale.emin < -127  # the inverse of its smallest scale is no float32
    wide = double or far or not _fits_float32(element, rounding)
    p, float_type, int_type = (52, np.float64, np.int64) if wide else (23, np.float32, np.int32)
    unit = 1023 if wide else 127
    bits = 32 if random_bits is None else random_bits
    special = overflow is Overflow.SPECIAL and (element.has_inf or element.has_nan)
    lowest, highest = element.min, element.max
    emin = mantissa = parity = 0
    gap = bare = False
    if isinstance(element, FloatFormat):
        emin, mantissa, parity = _smallest_binade(element), element.mantissa_bits, element._bias
        gap = not element.subnormals and mantissa > 0
        bare = mantissa == 0
        if special:
            lowest, highest = -math.ldexp(1.0, element.emax + 1), math.ldexp(1.0, element.emax + 1)
    elif isinstance(element, FixedFormat):  # one binade of "subnormals", wide enough for every value
        emin, mantissa = _smallest_binade(element), element.bits - 1
    floats = [lowest, highest, -0.0 if element.has_negative_zero else 0.0, 2.0 ** min(bits, 16), element.min_normal]
    integers = [(emin + unit) << p, (p - mantissa) << p, p << p, (2 * unit + 1) << p, p, unit, parity]
    integers += [min(bits, 16), 16 - min(bits, 16), 2 ** min(bits, 16), int(bits > 16)]
    thresholds = values = np.empty(0, float_type)
    if isinstance(element, Codebook):
        values = np.array(element.sorted_values, float_type)
        if rounding is not Rounding.STOCHASTIC:
            thresholds = _thresholds(element, rounding, float_type)
    largest_special = None
    if special:
        beyond = math.inf if element.has_inf else math.nan
        nearest = rounding in (Rounding.TIES_TO_EVEN, Rounding.TIES_TO_AWAY, Rounding.STOCHASTIC)
        up, down = nearest or rounding is Rounding.TOWARD_POSITIVE, nearest or rounding is Rounding.TOWARD_NEGATIVE
        largest_special = (element.max, beyond, up, down)
    return Plan(
        variant=Variant(MODES.index(rounding), isinstance(element, Codebook), double, gap, bare),
        floats=np.array(floats, float_type),
        integers=np.array(integers, int_type),
        thresholds=thresholds,
        values=values,
        rule=_rule(fmt, double) if isinstance(fmt, BlockFormat) else np.empty(0, np.int64),
        bits=bits,
        overflow=largest_special,
        kept={},
    )


def _rule(fmt: BlockFormat, double: bool) -> np.ndarray:
    """A power-of-two scale rule as numbers; empty for other rules.

    (add, p, bias, emax, lowest and highest exponent, emin, lowest and highest exponent of the middle, the largest
    microexponent). The exponent of the scale is the exponent field of (bits of amax) + add, minus bias and emax.

    Scales with exponents in the middle are normal in float32 and bring no number of the element's format near
    float32's ends, with 16 bits to spare. With sub-blocks the middle is narrower: there a block's scale is not clamped
    to its format, and its sub-blocks' scales, which may be lower, lie in the wider middle.
    """
    p, unit = (52, 1023) if double else (23, 127)
    element, ones = fmt.element, (1 << p) - 1
    if fmt.scale_rule is ScaleRule.FLOOR:
        add = 0
    elif fmt.scale_rule is ScaleRule.CEIL:
        add = ones
    elif fmt.scale_rule is ScaleRule.RCEIL:
        add = ones - math.floor((math.frexp(element.max)[0] * 2 - 1) * 2**p)
    elif fmt.scale_rule is ScaleRule.EVEN:
        add = 1 << (p - 1 - element.mantissa_bits) if element.mantissa_bits < p else 0
    else:
        return np.empty(0, np.int64)
    emin, middle = 0, (1, 0)  # no exponent lies between these
    if not isinstance(element, Codebook) and element.min <= 0 <= element.max:
        emin = _smallest_binade(element)
        middle = (max(-90 - emin, -126), 90 - max(emin, element.emax))
        if fmt.sub_block_size:
            middle = (max(middle[0], fmt.scale.emin) + fmt.most_lowered, min(middle[1], fmt.scale.emax - 1))
    ends = fmt.scale.emin, fmt.scale.emax
    return np.array([add, p, unit, element.emax, *ends, emin, *middle, fmt.most_lowered], np.int64)


def _smallest_binade(element: FloatFormat | FixedFormat) -> int:
    """The exponent of the smallest normal number; a fixed format is one binade of subnormals, with all its values."""
    return element.emin if isinstance(element, FloatFormat) else element.bits - 1 - element.frac_bits


def geometry(shape: tuple[int, ...], fmt: BlockFormat, axis: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """A row-major tensor as (outer, rows, columns), and the (rows, columns) of a tile, whose elements share a scale."""
    return _geometry(shape, fmt.block_size, axis, fmt.sub_block_size or 1)


def sub_tile(tile: tuple[int, int], fmt: BlockFormat) -> tuple[int, int]:
    """The part of a tile that shares a microexponent; the tile itself without sub-blocks."""
    if not fmt.sub_block_size:
        return tile
    return (min(fmt.sub_block_size, tile[0]), 1) if tile[1] == 1 else (1, min(fmt.sub_block_size, tile[1]))


@functools.lru_cache(maxsize=4096)
def _geometry(
    shape: tuple[int, ...], size: int | tuple[int, int] | None, axis: int, unit: int
) -> tuple[tuple[int, int, int], tuple[int, int]]:
    numel = math.prod(shape)
    if size is None or not shape:
        return (1, 1, numel), (1, numel)
    if isinstance(size, tuple):
        rows, columns = (shape[-2], shape[-1]) if len(shape) > 1 else (1, shape[-1])
        return (numel // (rows * columns), rows, columns), size
    length, inner = shape[axis], math.prod(shape[axis + 1 :]) if axis != -1 else 1
    size = min(size or length, length)
    if inner > 1:
        return (numel // (length * inner), length, inner), (size, 1)
    if length % size == 0 and size < SPAN and size % unit == 0:  # rows end with a block: cut them as suits the cache
        span = size * math.gcd(numel // size, max(SPAN // size, 1))
        return (1, numel // span, span), (1, size)
    return (1, numel // length, length), (1, size)


def exact(fmt: Format, overflow: Overflow) -> bool:
    """Whether the arithmetic of the kernels is exact for a format; where it is not, the oracle serves.

    It is not for exponents or significands near those of float64; for integers above 24 bits; for elements of blocks
    beyond float32, which a float32 tensor rounds before they are scaled; and for Overflow.SPECIAL in two kinds of
    formats: those beyond float32, where a float32 tensor shows Inf for numbers within the range, and those without a
    sign or a zero, where what lies below the range overflows too.
    """
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    if isinstance(element, FixedFormat) and element.bits > 24:
        return False
    if isinstance(fmt, BlockFormat) and (element.emax > 127 or element.mantissa_bits > 23):
        return False
    if overflow is Overflow.SPECIAL and element.emax > 127:
        return False
    if overflow is Overflow.SPECIAL and isinstance(element, FloatFormat) and not (element.signed and element.zero):
        return False
    scales = (fmt.scale, fmt.tensor_scale) if isinstance(fmt, BlockFormat) else ()
    floats = [f for f in (element, *scales) if isinstance(f, FloatFormat)]
    return all(f.emax <= 500 and f.emin >= -500 and f.mantissa_bits <= 40 for f in floats)


def memory_order(x: torch.Tensor, fmt: Format, rounding: Rounding) -> list[int] | None:
    """The permutation of axes that makes a dense tensor contiguous; None where none does or the axes must stay.

    Tiles lie in the last two axes, and random bits belong to the row-major index of an element.
    """
    if rounding is Rounding.STOCHASTIC or (isinstance(fmt, BlockFormat) and isinstance(fmt.block_size, tuple)):
        return None
    strides = list(x.stride())
    order = sorted(range(x.dim()), key=lambda d: (-strides[d], d))
    return order if x.permute(order).is_contiguous() else None
