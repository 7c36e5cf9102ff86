"""The Triton kernels of the GPU backend. `cpu_kernels.elements` says how an element is rounded; so it is here.

All formats are run-time parameters, which lie in small arrays on the device. What is compiled in: the rounding, the
compute type, and how the tensor is cut.

A tensor is (outer, rows, columns) in tiles that share a scale. A program handles a block [T, R, K, C]: in T rows of
tiles, K neighbouring cells of at most R rows and C columns, powers of two. A cell is a whole tile where one fits; the
scale is then found and used in one pass over the memory. A larger tile is cut into several cells; its maximum comes
from a pass of its own.

The arithmetic relies on IEEE additions, multiplications and divisions in float32 and float64, subnormals included, and
on no contraction of a product and a sum (launch with enable_fp_fusion=False). Triton's div_rn flushed subnormals before
3.6. bfloat16 is converted by integer operations: the interpreter's own conversion rounds ties up.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from lpsim.quantization.gpu_bits import (
    bits_of,
    copysign,
    divide,
    float_of,
    half_words,
    half_words_of_rows,
    load,
    store,
    tl,
    triton,
)
from lpsim.quantization.plan import MODES

_EVEN, _AWAY, _ZERO, _POSITIVE, _NEGATIVE, _ODD, STOCHASTIC = (tl.constexpr(m) for m in range(len(MODES)))
NO_SCALE, POWER_OF_TWO, QUOTIENT, OWN_RULE = (tl.constexpr(r) for r in range(4))


# ---------------------------------------------------------------------------------------------- one element

# f and i: the floats and integers of a plan.Plan; with Overflow.SPECIAL f goes on with max and what lies beyond it.


@triton.jit
def _clamp(v, f):
    """v within the finite range; NaN stays NaN."""
    lowest, highest = tl.load(f), tl.load(f + 1)
    v = tl.where(v > highest, highest, v)
    return tl.where(v < lowest, lowest, v)


@triton.jit
def _magic(a, f, i, GAP: tl.constexpr):
    """(C, q) for the magnitude a. GAP: without subnormals a single step leads from 0 to min_normal."""
    P: tl.constexpr = 52 if a.dtype == tl.float64 else 23
    EXPONENT: tl.constexpr = 0x7FF0000000000000 if a.dtype == tl.float64 else 0x7F800000
    emin = tl.load(i)
    c = tl.maximum(bits_of(a) & EXPONENT, emin) + tl.load(i + 1)
    if GAP:
        c = tl.where(a < tl.load(f + 4), emin + (P << P), c)
    return float_of(c), float_of(c - (P << P))


@triton.jit
def _even_code(t, c, a, i, BARE: tl.constexpr):
    """Whether the truncated magnitude t of a has an even code. BARE: the format has no mantissa bits."""
    P: tl.constexpr = 52 if a.dtype == tl.float64 else 23
    UNIT: tl.constexpr = 1023 if a.dtype == tl.float64 else 127
    if BARE:
        return (t == 0) | ((((bits_of(a) >> P) - UNIT + tl.load(i + 6)) & 1) == 0)
    else:
        return (bits_of(t + c) & 1) == 0


@triton.jit
def _round(v, f, i, MODE: tl.constexpr, GAP: tl.constexpr, BARE: tl.constexpr):
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
    return copysign(r, v) + tl.load(f + 2)


@triton.jit
def _neighbours(v, f, i, GAP: tl.constexpr):
    """(the neighbour of v of smaller magnitude, the one of larger, r in [0, 1)) for stochastic rounding."""
    P: tl.constexpr = 52 if v.dtype == tl.float64 else 23
    UNIT: tl.constexpr = 1023 if v.dtype == tl.float64 else 127
    v = _clamp(v, f)
    a = tl.abs(v)
    c, q = _magic(a, f, i, GAP)
    r = (a + c) - c
    t = tl.where(r > a, r - q, r)
    fraction = (a - t) * float_of((2 * UNIT << P) - bits_of(q))  # times 1/q, a power of two
    zero = tl.load(f + 2)
    return copysign(t, v) + zero, copysign(t + q, v) + zero, fraction


@triton.jit
def _place(v, thresholds, size, STEPS: tl.constexpr):
    """How many of the ascending thresholds v has reached; 2^STEPS > size."""
    place = tl.zeros_like(v).to(tl.int32)
    for step in tl.static_range(STEPS):
        candidate = place + (1 << (STEPS - 1 - step))
        inside = candidate <= size
        threshold = tl.load(thresholds + candidate - 1, mask=inside, other=float("inf"))
        place = tl.where(inside & (v >= threshold), candidate, place)
    return place


@triton.jit
def _table_neighbours(v, values, size, STEPS: tl.constexpr):
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
def _power_of_two(e, DOUBLE: tl.constexpr):
    """2^e as a float64 or float32; in float32 down to its smallest subnormal."""
    if DOUBLE:
        return float_of((e.to(tl.int64) + 1023) << 52)
    else:
        e = e.to(tl.int32)
        return float_of(tl.where(e >= -126, (e + 127) << 23, 1 << tl.maximum(e + 149, 0)))


@triton.jit
def _scale_exponents(m, rule):
    """log2 of the scales for the maxima m, bit patterns; see plan._rule."""
    P: tl.constexpr = 52 if m.dtype == tl.int64 else 23
    UNIT: tl.constexpr = 1023 if m.dtype == tl.int64 else 127
    subnormal = m < (1 << P)  # bring its leading one to the hidden bit
    amax = tl.where(subnormal, bits_of(float_of(m) * (1 << P)), m)
    add, emax = tl.load(rule).to(m.dtype), tl.load(rule + 3).to(m.dtype)
    lowest, highest = tl.load(rule + 4).to(m.dtype), tl.load(rule + 5).to(m.dtype)
    e = ((amax + add) >> P) - tl.where(subnormal, UNIT + P, UNIT) - emax
    return tl.where(m > 0, tl.minimum(tl.maximum(e, lowest), highest), lowest)


@triton.jit
def _power_of_two_scales(m, parts, rule, DIVIDED: tl.constexpr, DOUBLE: tl.constexpr):
    """The scales and their inverses from the maxima m of the blocks, bit patterns. DOUBLE: in float64.

    DIVIDED: those of the sub-blocks, from their own maxima `parts`, a shape that m broadcasts to.
    """
    P: tl.constexpr = 52 if m.dtype == tl.int64 else 23
    UNIT: tl.constexpr = 1023 if m.dtype == tl.int64 else 127
    e = _scale_exponents(m, rule)
    if DIVIDED:
        e = tl.maximum(_scale_exponents(parts, rule), e - tl.load(rule + 9).to(m.dtype))
    finite = m < ((2 * UNIT + 1) << P)
    s, n = _power_of_two(e, DOUBLE), _power_of_two(-e, DOUBLE)
    return tl.where(finite, s, float("nan")), tl.where(finite, n, float("nan"))


@triton.jit
def _into_format(wanted, f, i, limits, GAP: tl.constexpr, BARE: tl.constexpr):
    """A scale rounded to the format of (f, i) and then clamped to [limits[1], limits[2]]; in wanted's type."""
    r = _round(wanted.to(f.dtype.element_ty), f, i, _EVEN, GAP, BARE).to(wanted.dtype)
    least, most = tl.load(limits + 1), tl.load(limits + 2)
    r = tl.where(r < least, least, r)
    return tl.where(r > most, most, r)


@triton.jit
def _quotient_scales(m, wanted, outer, f, i, limits, OWN: tl.constexpr, GAP: tl.constexpr, BARE: tl.constexpr):
    """reference.block_scale times the tensor's scale, and the inverse, for scales with a mantissa.

    m: maxima as bit patterns. wanted: what the user's own rule gives (OWN). outer: the tensor's scale, or None.
    limits: element.max, and the range of the scale. f, i: the format of the scale.
    """
    amax = float_of(m)
    one = tl.full(m.shape, 1, amax.dtype)
    wanted = wanted if OWN else divide(amax, one * tl.load(limits))
    inverse = one
    if outer is not None:
        second = one * tl.load(outer)
        wanted = divide(wanted, second)
        inverse = divide(inverse, second)
    s = _into_format(wanted, f, i, limits, GAP, BARE)
    inverse = divide(inverse, s)
    if outer is not None:
        s = s * tl.load(outer)
    finite = amax < float("inf")
    return tl.where(finite, s, float("nan")), tl.where(finite, inverse, float("nan"))


# ---------------------------------------------------------------------------------------------- kernels


@triton.jit
def cells(pid, where, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """Where program pid's block lies: (first index of its rows, indices, mask, numbers of its tiles, mask of these).

    Their shapes: [T, R, 1, 1], twice [T, R, K, C], twice [T, K]. where: see _Cut. What may exceed 2^31 is
    int64: a tensor's indices, its rows and its tiles.
    """
    strips, rows, columns, tile_rows, tile_columns, down, across, parts_down, parts_across = where
    groups = ((across + K - 1) // K) * parts_across
    unit, strip = pid % groups, pid // groups
    first, left_part = (unit // parts_across) * K, (unit % parts_across).to(tl.int64) * C
    tile_row = (strip // parts_down).to(tl.int64) * T + tl.arange(0, T)
    top_part = (strip % parts_down).to(tl.int64) * R
    r = top_part + tl.arange(0, R)[None, :, None, None]  # within the tile
    k = tl.arange(0, K)[None, None, :, None]
    c = tl.arange(0, C)[None, None, None, :]
    row = ((tile_row % down) * tile_rows)[:, None, None, None] + r  # within its matrix
    left = first.to(tl.int64) * tile_columns + left_part
    column = k * tile_columns + c  # from there
    mask = (row < rows) & (r < tile_rows) & (tile_row < strips)[:, None, None, None]
    mask = mask & (column < columns - left) & (c < tile_columns - left_part)
    matrix = (tile_row // down)[:, None, None, None]
    starts = (matrix * rows + row) * columns + left
    tiles = tile_row[:, None] * across + (first + tl.arange(0, K))[None, :]
    there = (tile_row < strips)[:, None] & (first + tl.arange(0, K) < across)[None, :]
    return starts, starts + column, mask, tiles, there


@triton.jit
def _magnitude_bits(x):
    """The magnitudes as bit patterns; NaN is the largest."""
    if x.dtype == tl.float64:
        return bits_of(x) & 0x7FFFFFFFFFFFFFFF
    else:
        return bits_of(x) & 0x7FFFFFFF


@triton.jit
def _largest(x):
    """The largest magnitude of every cell of a block [T, R, K, C] as a bit pattern."""
    return tl.max(tl.max(_magnitude_bits(x), 3), 1)


@triton.jit
def _largest_of_parts(
    x, DOWN: tl.constexpr, ACROSS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr
):
    """The largest magnitude of every sub-block, DOWN rows or ACROSS columns: [T, R // DOWN, K, C // ACROSS]."""
    m = _magnitude_bits(x)
    if DOWN > 1:
        m = tl.max(tl.reshape(m, (T, R // DOWN, DOWN, K, C)), 2)
    if ACROSS > 1:
        m = tl.max(tl.reshape(m, (T, R, K, C // ACROSS, ACROSS)), 4)
    return m


@triton.jit
def _over_parts(
    s, DOWN: tl.constexpr, ACROSS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr
):
    """What is known of the sub-blocks, for each of their elements: [T, R, K, C]."""
    if DOWN > 1:
        s = tl.reshape(tl.broadcast_to(s[:, :, None, :, :], (T, R // DOWN, DOWN, K, C)), (T, R, K, C))
    if ACROSS > 1:
        s = tl.reshape(tl.broadcast_to(s[:, :, :, :, None], (T, R, K, C // ACROSS, ACROSS)), (T, R, K, C))
    return s


@triton.jit
def _words(
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
        words = half_words_of_rows(tl.reshape(starts, (T * R, 1)), selector, k0, k1, stream, step, T * R, K * C // 128)
        return tl.reshape(words, (T, R, K, C))
    else:
        return half_words(positions, selector, k0, k1, stream, step)


@triton.jit
def tile_maxima(
    x, maxima, where, BFLOAT16: tl.constexpr, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr
):
    """The largest magnitude of every tile as a bit pattern, into `maxima`, which holds zeros."""
    _, indices, mask, tiles, there = cells(tl.program_id(0), where, T, R, K, C)
    tl.atomic_max(maxima + tiles, _largest(load(x + indices, mask, BFLOAT16)), mask=there)


@triton.jit
def tensor_scale(maxima, result, f, i, limits, GAP: tl.constexpr, BARE: tl.constexpr):
    """reference.tensor_scale of the tensor whose largest magnitude is maxima[0]; NaN if that is not finite.

    limits: element.max · scale.max, and the range of the result.
    """
    amax = float_of(tl.load(maxima + tl.arange(0, 1)))
    s = _into_format(divide(amax, tl.load(limits + tl.arange(0, 1))), f, i, limits, GAP, BARE)
    tl.store(result + tl.arange(0, 1), tl.where(amax < float("inf"), s, float("nan")))


@triton.jit(do_not_specialize=["seed_low", "seed_high", "stream", "step", "offset", "size"])
def quantize_tiles(
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
    DIVIDED: tl.constexpr,  # into sub-blocks of so many rows or columns
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
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
    starts, indices, mask, tiles, there = cells(tl.program_id(0), where, T, R, K, C)
    xs = load(x + indices, mask, BFLOAT16)
    if RULE != NO_SCALE:
        m = _largest(xs) if maxima is None else tl.load(maxima + tiles, mask=there, other=0)
        if RULE == POWER_OF_TWO:
            parts = _largest_of_parts(xs, DOWN, ACROSS, T, R, K, C) if DIVIDED else None
            s, n = _power_of_two_scales(m[:, None, :, None], parts, rule, DIVIDED, f.dtype.element_ty == tl.float64)
            if DIVIDED:
                s, n = _over_parts(s, DOWN, ACROSS, T, R, K, C), _over_parts(n, DOWN, ACROSS, T, R, K, C)
            v = xs.to(f.dtype.element_ty) * n
        else:
            own = tl.load(wanted + tiles, mask=there, other=1) if RULE == OWN_RULE else None
            s, n = _quotient_scales(m, own, outer, scale_f, scale_i, limits, RULE == OWN_RULE, SCALE_GAP, SCALE_BARE)
            s, n = s[:, None, :, None], n[:, None, :, None]
            v = (xs * n).to(f.dtype.element_ty)
        if STEPS > 0 or MODE == _POSITIVE or MODE == _NEGATIVE or MODE == _ODD:  # noqa: SIM109
            # an underflow stays on its side of zero
            v = tl.where((v == 0) & (xs != 0), copysign(float_of(bits_of(v) * 0 + 1), v), v)
    else:
        v = xs.to(f.dtype.element_ty)
    if MODE == STOCHASTIC:
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
    if RULE != NO_SCALE:
        y = y * s
    store(out + indices, y, mask, BFLOAT16)
