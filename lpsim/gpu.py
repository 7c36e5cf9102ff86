"""The GPU backend: Triton kernels on bit patterns, equal to `reference` bit for bit. The sibling of `cpu`.

One element is rounded as there: with the constant C of its binade, (a + C) − C; all formats are run-time parameters,
which lie in small arrays on the device. What is compiled in: the rounding, the compute type, and how the tensor is cut.

A tensor is (outer, rows, columns) in tiles that share a scale, as in `cpu`. A program handles a block
[T, R, K, C]: in T rows of tiles, K neighbouring cells of at most R rows and C columns, powers of two. A cell is a whole
tile where one fits; the scale is then found and used in one pass over the memory. A larger tile is cut into several
cells; its maximum comes from a pass of its own.

The arithmetic relies on: IEEE additions, multiplications and divisions in float32 and float64, subnormals included, and
no contraction of a product and a sum (enable_fp_fusion=False). Triton has them since 3.6 on NVIDIA (its div_rn flushed
subnormals before). bfloat16 is converted by integer operations.

Under TRITON_INTERPRET=1, set before Triton is imported, the kernels run in Triton's interpreter, on CPU tensors too.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from lpsim.formats import BlockFormat, FloatFormat, Format
from lpsim.plan import MODES, Plan, exact, geometry, memory_order, plan
from lpsim.rounding import Key, Overflow, Rounding, ScaleRule

try:
    import triton
    import triton.language as tl
except ImportError as absent:
    raise ImportError("the backend triton needs Triton, which is not installed: pip install triton") from absent

if TYPE_CHECKING:
    from lpsim.quantizer import Quantizer

_EVEN, _AWAY, _ZERO, _POSITIVE, _NEGATIVE, _ODD, _STOCHASTIC = (tl.constexpr(m) for m in range(len(MODES)))
_NO_SCALE, _POWER_OF_TWO, _QUOTIENT, _OWN = (tl.constexpr(r) for r in range(4))


# ---------------------------------------------------------------------------------------------- bits


@triton.jit
def _bits(x):  # type: ignore[no-untyped-def]
    """The bit pattern of a float32 or float64 as an int32 or int64."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True)
    else:
        return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(i):  # type: ignore[no-untyped-def]
    """The float32 or float64 with the bit pattern i, an int32 or int64."""
    if i.dtype == tl.int64:
        return i.to(tl.float64, bitcast=True)
    else:
        return i.to(tl.float32, bitcast=True)


@triton.jit
def _copysign(magnitude, sign):  # type: ignore[no-untyped-def]
    """A magnitude that is not negative, with the sign of `sign`."""
    if magnitude.dtype == tl.float64:
        return _float(_bits(magnitude) | (_bits(sign) & -0x8000000000000000))
    else:
        return _float(_bits(magnitude) | (_bits(sign) & -0x80000000))


@triton.jit
def _divide(a, b):  # type: ignore[no-untyped-def]
    """a / b rounded to nearest even; `/` is that for float64 only."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _load(x, mask, BFLOAT16: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tensor's elements as float64 if they are, else as float32. bfloat16 comes as int16."""
    value = tl.load(x, mask=mask, other=0)
    if BFLOAT16:
        return _float(value.to(tl.int32) << 16)
    elif value.dtype == tl.float16:
        return value.to(tl.float32)
    else:
        return value


@triton.jit
def _store(out, y, mask, BFLOAT16: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inverse of _load; rounds to nearest even where the tensor's type is narrower."""
    if BFLOAT16:
        b = _bits(y.to(tl.float32))
        even = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
        tl.store(out, tl.where(y == y, even, (b >> 16) | 0x40).to(tl.int16), mask=mask)
    elif out.dtype.element_ty == tl.float16:
        tl.store(out, y.to(tl.float32).to(tl.float16), mask=mask)
    else:
        tl.store(out, y.to(out.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------- random bits


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """reference.philox4x32 with 7 rounds, on uint32."""
    for _ in tl.static_range(7):
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        low0, low1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _four_words(group, selector, k0, k1, stream, step):  # type: ignore[no-untyped-def]
    """The Philox call of an int64 group of eight elements; selector 0: upper halves, 1: lower halves."""
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32) | (selector << 31)
    zero = c0 ^ c0  # all counters in the shape of the group
    return _philox(c0, c1, zero + stream, zero + step, zero + k0, zero + k1)


@triton.jit
def _half_words(position, selector, k0, k1, stream, step):  # type: ignore[no-untyped-def]
    """The 16-bit halves of the words at any int64 positions: a Philox call an element."""
    group = (position >> 7) * 16 + (position & 15)
    slot = ((position >> 4) & 7).to(tl.int32)
    w0, w1, w2, w3 = _four_words(group, selector, k0, k1, stream, step)
    word = tl.where(slot < 4, tl.where(slot < 2, w0, w1), tl.where(slot < 6, w2, w3))
    return ((word >> ((slot & 1) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit
def _half_words_of_rows(  # type: ignore[no-untyped-def]
    first, selector, k0, k1, stream, step, R: tl.constexpr, G: tl.constexpr
):
    """The halves [R, 128·G] for R rows of consecutive elements that start at multiples of 128: a call for eight."""
    group = (first >> 7) * 16 + tl.arange(0, 16 * G)[None, :]  # [R, 16·G]
    w0, w1, w2, w3 = _four_words(group, selector, k0, k1, stream, step)
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [R, 16·G, 2, 2], word 2·i + j at [..., i, j]
    half = tl.join(word & 0xFFFF, word >> 16).to(tl.uint16)  # [R, 16·G, 2, 2, 2]: slot = 4·i + 2·j + h
    by_lane = tl.reshape(half, (R, G, 16, 8))
    return tl.reshape(tl.permute(by_lane, (0, 1, 3, 2)), (R, 128 * G)).to(tl.int32)


# ---------------------------------------------------------------------------------------------- one element

# f and i: the floats and integers of a plan.Plan; with Overflow.SPECIAL f goes on with max and what lies beyond it.


@triton.jit
def _clamp(v, f):  # type: ignore[no-untyped-def]
    """v within the finite range; NaN stays NaN."""
    lowest, highest = tl.load(f), tl.load(f + 1)
    v = tl.where(v > highest, highest, v)
    return tl.where(v < lowest, lowest, v)


@triton.jit
def _magic(a, f, i, GAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(C, q) for the magnitude a. GAP: without subnormals a single step leads from 0 to min_normal."""
    P: tl.constexpr = 52 if a.dtype == tl.float64 else 23
    EXPONENT: tl.constexpr = 0x7FF0000000000000 if a.dtype == tl.float64 else 0x7F800000
    emin = tl.load(i)
    c = tl.maximum(_bits(a) & EXPONENT, emin) + tl.load(i + 1)
    if GAP:
        c = tl.where(a < tl.load(f + 4), emin + (P << P), c)
    return _float(c), _float(c - (P << P))


@triton.jit
def _even_code(t, c, a, i, BARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether the truncated magnitude t of a has an even code. BARE: the format has no mantissa bits."""
    P: tl.constexpr = 52 if a.dtype == tl.float64 else 23
    UNIT: tl.constexpr = 1023 if a.dtype == tl.float64 else 127
    if BARE:
        return (t == 0) | ((((_bits(a) >> P) - UNIT + tl.load(i + 6)) & 1) == 0)
    else:
        return (_bits(t + c) & 1) == 0


@triton.jit
def _round(v, f, i, MODE: tl.constexpr, GAP: tl.constexpr, BARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scaled value v rounded; every mode but STOCHASTIC."""
    v = _clamp(v, f)
    a = tl.abs(v)
    c, q = _magic(a, f, i, GAP)
    r = (a + c) - c
    if MODE != _EVEN or BARE:
        t = tl.where(r > a, r - q, r)
        rest = a - t
        if MODE == _EVEN:
            r = tl.where((rest + rest == q) & _even_code(t, c, a, i, BARE), t, r)
        elif MODE == _AWAY:
            r = tl.where(rest + rest >= q, t + q, t)
        elif MODE == _ZERO:
            r = t
        elif MODE == _POSITIVE:
            r = tl.where((rest > 0) & (v > 0), t + q, t)
        elif MODE == _NEGATIVE:
            r = tl.where((rest > 0) & (v < 0), t + q, t)
        else:
            r = tl.where((rest > 0) & _even_code(t, c, a, i, BARE), t + q, t)
    return _copysign(r, v) + tl.load(f + 2)


@triton.jit
def _neighbours(v, f, i, GAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(the neighbour of v of smaller magnitude, the one of larger, r in [0, 1)) for stochastic rounding."""
    P: tl.constexpr = 52 if v.dtype == tl.float64 else 23
    UNIT: tl.constexpr = 1023 if v.dtype == tl.float64 else 127
    v = _clamp(v, f)
    a = tl.abs(v)
    c, q = _magic(a, f, i, GAP)
    r = (a + c) - c
    t = tl.where(r > a, r - q, r)
    fraction = (a - t) * _float((2 * UNIT << P) - _bits(q))  # times 1/q, a power of two
    zero = tl.load(f + 2)
    return _copysign(t, v) + zero, _copysign(t + q, v) + zero, fraction


@triton.jit
def _place(v, thresholds, size, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of the ascending thresholds v has reached; 2^STEPS > size."""
    place = tl.zeros_like(v).to(tl.int32)
    for step in tl.static_range(STEPS):
        candidate = place + (1 << (STEPS - 1 - step))
        inside = candidate <= size
        threshold = tl.load(thresholds + candidate - 1, mask=inside, other=float("inf"))
        place = tl.where(inside & (v >= threshold), candidate, place)
    return place


@triton.jit
def _table_neighbours(v, values, size, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """As _neighbours, in float64, between the table's entries around v; beyond its ends both are the end."""
    below = tl.minimum(tl.maximum(_place(v, values, size, STEPS) - 1, 0), size - 2)
    lo, hi = tl.load(values + below).to(tl.float64), tl.load(values + below + 1).to(tl.float64)
    outward = tl.where(tl.abs(lo) <= tl.abs(hi), hi, lo)
    inward = tl.where(tl.abs(lo) <= tl.abs(hi), lo, hi)
    v = v.to(tl.float64)
    fraction = (v - inward) / (outward - inward)
    inward = tl.where(fraction == 1, outward, inward)  # the quotient of a v just below rounds to 1
    end = tl.where(v <= lo, lo, hi)
    within = (v > lo) & (v < hi)
    inward, outward = tl.where(within, inward, end), tl.where(within, outward, end)
    fraction = tl.where(within & (fraction < 1), fraction, 0)
    return tl.where(v == v, inward, v), tl.where(v == v, outward, v), fraction


# ---------------------------------------------------------------------------------------------- scales


@triton.jit
def _power_of_two(e, DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """2^e as a float64 or float32; in float32 down to its smallest subnormal."""
    if DOUBLE:
        return _float((e.to(tl.int64) + 1023) << 52)
    else:
        e = e.to(tl.int32)
        return _float(tl.where(e >= -126, (e + 127) << 23, 1 << tl.maximum(e + 149, 0)))


@triton.jit
def _power_of_two_scales(m, rule, DOUBLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scales and their inverses from the maxima m, bit patterns; see plan._rule. DOUBLE: in float64."""
    P: tl.constexpr = 52 if m.dtype == tl.int64 else 23
    UNIT: tl.constexpr = 1023 if m.dtype == tl.int64 else 127
    subnormal = m < (1 << P)  # bring its leading one to the hidden bit
    amax = tl.where(subnormal, _bits(_float(m) * (1 << P)), m)
    add, emax = tl.load(rule).to(m.dtype), tl.load(rule + 3).to(m.dtype)
    lowest, highest = tl.load(rule + 4).to(m.dtype), tl.load(rule + 5).to(m.dtype)
    e = ((amax + add) >> P) - tl.where(subnormal, UNIT + P, UNIT) - emax
    e = tl.where(m > 0, tl.minimum(tl.maximum(e, lowest), highest), lowest)
    finite = m < ((2 * UNIT + 1) << P)
    s, n = _power_of_two(e, DOUBLE), _power_of_two(-e, DOUBLE)
    return tl.where(finite, s, float("nan")), tl.where(finite, n, float("nan"))


@triton.jit
def _into_format(wanted, f, i, limits, GAP: tl.constexpr, BARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A scale rounded to the format of (f, i) and then clamped to [limits[1], limits[2]]; in wanted's type."""
    r = _round(wanted.to(f.dtype.element_ty), f, i, _EVEN, GAP, BARE).to(wanted.dtype)
    least, most = tl.load(limits + 1), tl.load(limits + 2)
    r = tl.where(r < least, least, r)
    return tl.where(r > most, most, r)


@triton.jit
def _quotient_scales(  # type: ignore[no-untyped-def]
    m, wanted, outer, f, i, limits, OWN: tl.constexpr, GAP: tl.constexpr, BARE: tl.constexpr
):
    """reference.block_scale times the tensor's scale, and the inverse, for scales with a mantissa.

    m: maxima as bit patterns. wanted: what the user's own rule gives (OWN). outer: the tensor's scale, or None.
    limits: element.max, and the range of the scale. f, i: the format of the scale.
    """
    amax = _float(m)
    one = tl.full(m.shape, 1, amax.dtype)
    wanted = wanted if OWN else _divide(amax, one * tl.load(limits))
    inverse = one
    if outer is not None:
        tensor_scale = one * tl.load(outer)
        wanted = _divide(wanted, tensor_scale)
        inverse = _divide(inverse, tensor_scale)
    s = _into_format(wanted, f, i, limits, GAP, BARE)
    inverse = _divide(inverse, s)
    if outer is not None:
        s = s * tl.load(outer)
    finite = amax < float("inf")
    return tl.where(finite, s, float("nan")), tl.where(finite, inverse, float("nan"))


# ---------------------------------------------------------------------------------------------- kernels


@triton.jit
def _cells(where, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a program's block lies: (first index of its rows, indices, mask, numbers of its tiles, mask of these).

    Their shapes: [T, R, 1, 1], twice [T, R, K, C], twice [T, K]. where: see _Cut.
    """
    strips, rows, columns, tile_rows, tile_columns, down, across, parts_down, parts_across = where
    pid = tl.program_id(0)
    groups = ((across + K - 1) // K) * parts_across
    unit, strip = pid % groups, pid // groups
    first, left_part = (unit // parts_across) * K, (unit % parts_across).to(tl.int64) * C
    tile_row, top_part = (strip // parts_down) * T + tl.arange(0, T), (strip % parts_down) * R
    r = top_part + tl.arange(0, R)[None, :, None, None]  # within the tile
    k = tl.arange(0, K)[None, None, :, None]
    c = tl.arange(0, C)[None, None, None, :]
    row = ((tile_row % down) * tile_rows)[:, None, None, None] + r  # within its matrix
    left = first.to(tl.int64) * tile_columns + left_part
    column = k * tile_columns + c  # from there
    mask = (row < rows) & (r < tile_rows) & (tile_row < strips)[:, None, None, None]
    mask = mask & (column < columns - left) & (c < tile_columns - left_part)
    matrix = (tile_row // down).to(tl.int64)[:, None, None, None]
    starts = (matrix * rows + row) * columns + left
    tiles = tile_row.to(tl.int64)[:, None] * across + (first + tl.arange(0, K))[None, :]
    there = (tile_row < strips)[:, None] & (first + tl.arange(0, K) < across)[None, :]
    return starts, starts + column, mask, tiles, there


@triton.jit
def _largest(x):  # type: ignore[no-untyped-def]
    """The largest magnitude of every cell of a block [T, R, K, C] as a bit pattern; NaN is the largest."""
    if x.dtype == tl.float64:
        m = _bits(x) & 0x7FFFFFFFFFFFFFFF
    else:
        m = _bits(x) & 0x7FFFFFFF
    return tl.max(tl.max(m, 3), 1)


@triton.jit
def _words(  # type: ignore[no-untyped-def]
    starts,
    positions,
    selector,
    k0,
    k1,
    stream,
    step,
    ALIGNED: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
):
    """The 16-bit halves of the random words of a block, whose rows start at `starts`; ALIGNED: see _Cut."""
    if ALIGNED:
        words = _half_words_of_rows(tl.reshape(starts, (T * R, 1)), selector, k0, k1, stream, step, T * R, K * C // 128)
        return tl.reshape(words, (T, R, K, C))
    else:
        return _half_words(positions, selector, k0, k1, stream, step)


@triton.jit
def _tile_maxima(  # type: ignore[no-untyped-def]
    x, maxima, where, BFLOAT16: tl.constexpr, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr
):
    """The largest magnitude of every tile as a bit pattern, into `maxima`, which holds zeros."""
    _, indices, mask, tiles, there = _cells(where, T, R, K, C)
    tl.atomic_max(maxima + tiles, _largest(_load(x + indices, mask, BFLOAT16)), mask=there)


@triton.jit
def _tensor_scale(maxima, result, f, i, limits, GAP: tl.constexpr, BARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """reference.tensor_scale of the tensor whose largest magnitude is maxima[0]; NaN if that is not finite.

    limits: element.max · scale.max, and the range of the result.
    """
    amax = _float(tl.load(maxima + tl.arange(0, 1)))
    s = _into_format(_divide(amax, tl.load(limits + tl.arange(0, 1))), f, i, limits, GAP, BARE)
    tl.store(result + tl.arange(0, 1), tl.where(amax < float("inf"), s, float("nan")))


@triton.jit(do_not_specialize=["seed_low", "seed_high", "stream", "step", "offset", "size"])
def _quantize_tiles(  # type: ignore[no-untyped-def]
    x,
    out,
    f,
    i,
    thresholds,
    values,
    size,
    rule,
    maxima,
    wanted,
    outer,
    scale_f,
    scale_i,
    limits,
    where,
    seed_low: tl.uint32,
    seed_high: tl.uint32,
    stream: tl.uint32,
    step: tl.uint32,
    offset: tl.int64,
    MODE: tl.constexpr,
    STEPS: tl.constexpr,  # > 0: a codebook; binary search in that many steps
    GAP: tl.constexpr,
    BARE: tl.constexpr,
    SPECIAL: tl.constexpr,  # Overflow.SPECIAL
    RULE: tl.constexpr,
    SCALE_GAP: tl.constexpr,
    SCALE_BARE: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row of a block is consecutive and starts at a multiple of 128
    BFLOAT16: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
):
    """Quantize x into out (x itself is allowed); both row-major.

    f, i: the element's grid; thresholds, values, size: a codebook's. rule: plan._rule. maxima: of all tiles, or None:
    then each cell is a tile. wanted: the scales of the user's own rule. outer, scale_f, scale_i, limits: see
    _quotient_scales.
    """
    starts, indices, mask, tiles, there = _cells(where, T, R, K, C)
    xs = _load(x + indices, mask, BFLOAT16)
    if RULE != _NO_SCALE:
        m = _largest(xs) if maxima is None else tl.load(maxima + tiles, mask=there, other=0)
        if RULE == _POWER_OF_TWO:
            s, n = _power_of_two_scales(m, rule, f.dtype.element_ty == tl.float64)
            v = xs.to(f.dtype.element_ty) * n[:, None, :, None]
        else:
            own = tl.load(wanted + tiles, mask=there, other=1) if RULE == _OWN else None
            s, n = _quotient_scales(m, own, outer, scale_f, scale_i, limits, RULE == _OWN, SCALE_GAP, SCALE_BARE)
            v = (xs * n[:, None, :, None]).to(f.dtype.element_ty)
        if STEPS > 0 or MODE == _POSITIVE or MODE == _NEGATIVE or MODE == _ODD:  # noqa: SIM109
            # an underflow stays on its side of zero
            v = tl.where((v == 0) & (xs != 0), _copysign(_float(_bits(v) * 0 + 1), v), v)
    else:
        v = xs.to(f.dtype.element_ty)
    if MODE == _STOCHASTIC:
        if STEPS > 0:
            inward, outward, fraction = _table_neighbours(v, values, size, STEPS)
        else:
            inward, outward, fraction = _neighbours(v, f, i, GAP)
        k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
        c2, c3 = stream.to(tl.uint32), step.to(tl.uint32)
        upper = _words(starts + offset, indices + offset, 0, k0, k1, c2, c3, ALIGNED, T, R, K, C)
        KEPT: tl.constexpr = 16 if BITS > 16 else BITS
        high = (fraction * (1 << KEPT)).to(tl.int32)
        total = high + (upper >> (16 - KEPT))
        up = total >= (1 << KEPT)
        if BITS > 16:
            REST: tl.constexpr = BITS - 16
            undecided = total == (1 << KEPT) - 1
            if tl.max(tl.reshape(undecided.to(tl.int32), (T * R * K * C,)), 0) > 0:  # once in 2^16 elements
                lower = _words(starts + offset, indices + offset, 1, k0, k1, c2, c3, ALIGNED, T, R, K, C)
                low = ((fraction * (1 << KEPT) - high.to(fraction.dtype)) * (1 << REST)).to(tl.int32)  # exact
                up = up | (undecided & (low + (lower >> (16 - REST)) >= (1 << REST)))
        y = tl.where(up, outward, inward)
    elif STEPS > 0:
        y = tl.where(v == v, tl.load(values + _place(v, thresholds, size, STEPS)), v)
    else:
        y = _round(v, f, i, MODE, GAP, BARE)
    if SPECIAL:  # the grid went on to 2^(emax + 1)
        largest = tl.load(f + 5)
        if MODE == _ZERO or MODE == _ODD:  # noqa: SIM109
            passes = tl.abs(xs) == float("inf")
        elif MODE == _POSITIVE:
            passes = (y > 0) | (tl.abs(xs) == float("inf"))
        elif MODE == _NEGATIVE:
            passes = (y < 0) | (tl.abs(xs) == float("inf"))
        else:
            passes = y == y
        bound = tl.where(passes, tl.load(f + 6), largest)
        y = tl.where(tl.abs(y) > largest, tl.where(y < 0, -bound, bound), y)
    if RULE != _NO_SCALE:
        y = y * s[:, None, :, None]
    _store(out + indices, y, mask, BFLOAT16)


INTERPRETED = not isinstance(_quantize_tiles, triton.JITFunction)


# ---------------------------------------------------------------------------------------------- cutting a tensor

_BLOCK = 4096  # elements a program handles where the tiles allow it
_LARGEST = 16384  # elements of a tile, padded to powers of two, that a program can hold
_SEGMENT = 32  # columns side by side that make a full memory transaction


class _Cut(NamedTuple):
    """A tensor cut into blocks of cells.

    where: the number of rows of tiles, the rows and columns of a matrix and of a tile, the tiles down and across a
    matrix, and the cells down and across a tile.
    """

    where: tuple[int, int, int, int, int, int, int, int, int]
    block: tuple[int, int, int, int]  # T, R, K, C
    programs: int
    tiles: int
    aligned: bool  # every row of a block is consecutive and starts at a multiple of 128 in the tensor

    @property
    def whole(self) -> bool:
        """Each cell is a tile."""
        return self.where[-2:] == (1, 1)


@functools.lru_cache(maxsize=4096)
def _cut(shape: tuple[int, int, int], tile: tuple[int, int], scaled: bool) -> _Cut:
    """How programs share a tensor (outer, rows, columns) in tiles; `scaled`: a tile fits a program where it can."""
    outer, rows, columns = shape
    tile_rows, tile_columns = min(tile[0], rows), min(tile[1], columns)
    if tile_rows == 1 and columns % tile_columns == 0:  # tiles one after another
        outer, rows, columns = 1, 1, outer * rows * columns
    r, c = triton.next_power_of_2(tile_rows), triton.next_power_of_2(tile_columns)
    down, across = triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns)
    strips, neighbours = outer * down, triton.next_power_of_2(across)
    t, k = 1, min(max(_SEGMENT // c, 1), neighbours)
    if r * k * c > (_LARGEST if scaled else _BLOCK):
        c = min(c, _BLOCK)
        r = min(r, max(_BLOCK // (k * c), 1))
    else:
        k = min(max(_BLOCK // (r * c), k), neighbours)
        t = min(max(_BLOCK // (r * k * c), 1), triton.next_power_of_2(strips))
    parts_down, parts_across = triton.cdiv(tile_rows, r), triton.cdiv(tile_columns, c)
    consecutive = k == 1 or c == tile_columns
    if parts_across > 1:
        starts = c % 128 == 0 and (across == 1 or tile_columns % 128 == 0)
    else:
        starts = across <= k or k * tile_columns % 128 == 0
    return _Cut(
        where=(strips, rows, columns, tile_rows, tile_columns, down, across, parts_down, parts_across),
        block=(t, r, k, c),
        programs=triton.cdiv(strips, t) * parts_down * triton.cdiv(across, k) * parts_across,
        tiles=strips * across,
        aligned=consecutive and starts and k * c % 128 == 0 and (outer * rows == 1 or columns % 128 == 0),
    )


# ---------------------------------------------------------------------------------------------- tensors


class _Numbers(NamedTuple):
    """A plan's arrays on a device, and what is compiled in."""

    f: torch.Tensor
    i: torch.Tensor
    thresholds: torch.Tensor | None
    values: torch.Tensor | None
    rule: torch.Tensor | None
    size: int
    compiled: dict[str, Any]


_on_device: dict[tuple[int, torch.device], tuple[Plan, _Numbers]] = {}  # by identity, for which the plan is kept


def _numbers(p: Plan, device: torch.device) -> _Numbers:
    known = _on_device.get((id(p), device))
    if known is not None:
        return known[1]
    stochastic = p.variant.mode == _STOCHASTIC.value
    size = len(p.values if stochastic else p.thresholds)
    overflows = np.array(p.overflow[:2] if p.overflow is not None else (), p.floats.dtype)

    def there(array: np.ndarray) -> torch.Tensor | None:
        return torch.from_numpy(array).to(device) if len(array) > 0 else None

    numbers = _Numbers(
        f=torch.from_numpy(np.append(p.floats, overflows)).to(device),
        i=torch.from_numpy(p.integers).to(device),
        thresholds=there(p.thresholds),
        values=there(p.values),
        rule=there(p.rule),
        size=size,
        compiled={
            "MODE": p.variant.mode,
            "STEPS": size.bit_length() if p.variant.table else 0,
            "GAP": p.variant.gap,
            "BARE": p.variant.bare,
            "SPECIAL": p.overflow is not None,
            "BITS": p.bits if stochastic else 0,
        },
    )
    _on_device[id(p), device] = p, numbers
    return numbers


def _scale_numbers(scale: FloatFormat, x: torch.Tensor) -> _Numbers:
    """For rounding scales of x's width to nearest even."""
    double = x.dtype is torch.float64
    return _numbers(plan(scale, Rounding.TIES_TO_EVEN, Overflow.SATURATE, None, double), x.device)


@functools.lru_cache(maxsize=1024)
def _limits(divisor: float, least: float, most: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor([divisor, least, most], dtype=dtype, device=device)


def _integers(x: torch.Tensor) -> torch.Tensor:
    """bfloat16 as int16; any other tensor as it is."""
    return x.view(torch.int16) if x.dtype is torch.bfloat16 else x


def _launch(kernel: Any, cut: _Cut, *arguments: Any, stochastic: bool = False, **compiled: Any) -> None:
    threads = math.prod(cut.block) // (8 if stochastic else 16)  # as many elements each as the registers hold
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns of NaN, Inf and overflow
        kernel[(cut.programs,)](
            *arguments,
            **dict(zip("TRKC", cut.block, strict=True)),
            num_warps=min(max(threads // 32, 1), 16),
            enable_fp_fusion=False,
            **compiled,
        )


def _maxima(x: torch.Tensor, cut: _Cut) -> torch.Tensor:
    """The largest magnitude of every tile, as bit patterns of float64 for float64 tensors, else of float32."""
    patterns = torch.int64 if x.dtype is torch.float64 else torch.int32
    result = torch.zeros(cut.tiles, dtype=patterns, device=x.device)
    _launch(_tile_maxima, cut, _integers(x), result, cut.where, BFLOAT16=x.dtype is torch.bfloat16)
    return result


def _own_scales(maxima: torch.Tensor, fmt: BlockFormat, dtype: torch.dtype) -> torch.Tensor:
    """The user's rule for every tile, computed once for each distinct finite maximum, on the host."""
    amax = maxima.view(dtype)
    distinct, where = torch.unique(torch.where(amax.isfinite(), amax, 0), return_inverse=True)
    scales = [fmt.scale_rule(a, fmt.element) for a in distinct.tolist()]  # type: ignore[operator]
    return torch.tensor(scales, dtype=dtype, device=maxima.device)[where]


def _scale_of_tensor(x: torch.Tensor, fmt: BlockFormat, dtype: torch.dtype) -> torch.Tensor | None:
    """reference.tensor_scale, a tensor of one element on x's device; None where the format has none."""
    second = fmt.tensor_scale
    if second is None:
        return None
    all_of_it = _cut((1, 1, x.numel()), (1, x.numel()), False)
    numbers = _scale_numbers(second, x)
    least = max(second.min_normal, math.ldexp(1.0, -126 - fmt.scale.emin))
    limits = _limits(fmt.element.max * fmt.scale.max, least, second.max, dtype, x.device)
    result = torch.empty(1, dtype=dtype, device=x.device)
    gap, bare = numbers.compiled["GAP"], numbers.compiled["BARE"]
    with np.errstate(all="ignore"):
        _tensor_scale[(1,)](
            _maxima(x, all_of_it), result, numbers.f, numbers.i, limits, gap, bare, num_warps=1, enable_fp_fusion=False
        )
    return result


def quantize(x: torch.Tensor, fmt: Format, axis: int, p: Plan, key: Key | None, out: torch.Tensor) -> None:
    """reference.quantize of a contiguous float tensor x, into the contiguous `out` of its dtype (x itself is allowed).

    p: the plan of the format and rounding for x's width.
    """
    if x.numel() == 0:
        return
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    numbers = _numbers(p, x.device)
    if isinstance(fmt, BlockFormat):
        shape, tile = geometry(x.shape, fmt, axis)
    else:
        shape, tile = (1, 1, x.numel()), (1, x.numel())
    cut = _cut(shape, tile, isinstance(fmt, BlockFormat))
    key = key or Key(0)
    rule, scale_gap, scale_bare = _NO_SCALE, False, False
    maxima = wanted = outer = scale_f = scale_i = limits = None
    if isinstance(fmt, BlockFormat):
        rule = _POWER_OF_TWO
        if numbers.rule is None:
            rule = _QUOTIENT if fmt.scale_rule is ScaleRule.ROUND else _OWN
            scale = _scale_numbers(fmt.scale, x)
            scale_f, scale_i = scale.f, scale.i
            scale_gap, scale_bare = scale.compiled["GAP"], scale.compiled["BARE"]
            limits = _limits(fmt.element.max, fmt.scale.min_normal, fmt.scale.max, dtype, x.device)
            outer = _scale_of_tensor(x, fmt, dtype)
        if not cut.whole or rule == _OWN:
            maxima = _maxima(x, cut)
        if rule == _OWN and maxima is not None:
            wanted = _own_scales(maxima, fmt, dtype)
    _launch(
        _quantize_tiles,
        cut,
        _integers(x),
        _integers(out),
        numbers.f,
        numbers.i,
        numbers.thresholds,
        numbers.values,
        numbers.size,
        numbers.rule,
        maxima,
        wanted,
        outer,
        scale_f,
        scale_i,
        limits,
        cut.where,
        key.seed & 0xFFFFFFFF,
        key.seed >> 32,
        key.stream,
        key.step,
        key.offset,
        RULE=rule,
        SCALE_GAP=scale_gap,
        SCALE_BARE=scale_bare,
        ALIGNED=cut.aligned and key.offset % 128 == 0,
        BFLOAT16=x.dtype is torch.bfloat16,
        stochastic=numbers.compiled["BITS"] > 0,
        **numbers.compiled,
    )


class TritonBackend:
    """Triton kernels for CUDA and ROCm tensors; for CPU tensors too where Triton's interpreter runs."""

    name = "triton"

    def supports(self, quantizer: Quantizer, device: torch.device) -> bool:
        served = device.type == "cuda" or (INTERPRETED and device.type == "cpu")
        return served and exact(quantizer.format, quantizer.overflow)

    def quantize(
        self, x: torch.Tensor, quantizer: Quantizer, axis: int, key: Key | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        q = quantizer
        order = None if x.is_contiguous() else memory_order(x, q.format, q.rounding)
        source = x.contiguous() if order is None else x.permute(order)
        in_place = out is not None and order is None and out.is_contiguous()
        target = out if in_place and out is not None else torch.empty_like(source)
        double = x.dtype is torch.float64
        if double not in q.plans:
            q.plans[double] = plan(q.format, q.rounding, q.overflow, q.random_bits, double)
        with torch.cuda.device_of(x):
            quantize(source, q.format, axis if order is None else order.index(axis), q.plans[double], key, target)
        if order is not None:
            target = target.permute([order.index(d) for d in range(len(order))])
        if out is not None:
            return out if in_place else out.copy_(target)
        return target
