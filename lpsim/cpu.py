"""The CPU backend: Numba kernels on bit patterns, equal to `reference` bit for bit.

How one element is rounded. Let a = |x| / scale and 2^e <= a the power of two below it, but at least the smallest normal
number. The numbers of the format around a are multiples of q = 2^(e − m). Adding C = 2^p·q, where p is the width of
the machine's own significand, pushes everything below q out of the sum, rounded to nearest even; subtracting C gives
the rounded value. The other roundings start from that value's truncation and the exact remainder. So all formats are
run-time parameters of one kernel; the rounding mode, the compute type and two rare properties are compiled in.

The kernels see a tensor as (outer, rows, columns), row-major, cut into tiles of (tile_rows, tile_columns) that share
a scale: (1, 32) for blocks of 32 along the last axis, (32, 1) along any other, (r, c) for tiles, everything for one
scale a tensor. Numba compiles on first use and keeps the result in its cache on disk.
"""

from __future__ import annotations

import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from lpsim import reference
from lpsim.formats import BlockFormat, Format
from lpsim.plan import MODES, SPAN, Plan, Variant, geometry, plan
from lpsim.rounding import Key, Overflow, Rounding, ScaleRule

_EVEN, _AWAY, _ZERO, _POSITIVE, _NEGATIVE, _ODD, _STOCHASTIC = range(len(MODES))


@intrinsic
def _bits(typingctx: Any, x: Any) -> Any:
    """The bit pattern of a float32 or float64 as an int32 or int64."""
    width = x.bitwidth

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(width))

    return (types.int32 if width == 32 else types.int64)(x), codegen


@intrinsic
def _float(typingctx: Any, i: Any, like: Any) -> Any:
    """The float of `like`'s type with the bit pattern i (Numba widens int32 sums to int64; the top half is dropped)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        narrow = ir.IntType(like.bitwidth)
        value = args[0] if i.bitwidth == like.bitwidth else builder.trunc(args[0], narrow)
        return builder.bitcast(value, ir.FloatType() if like.bitwidth == 32 else ir.DoubleType())

    return like(i, like), codegen


@intrinsic
def _as(typingctx: Any, x: Any, like: Any) -> Any:
    """x in the float type of `like`, which is not narrower."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if x.bitwidth == like.bitwidth else builder.fpext(args[0], ir.DoubleType())

    return like(x, like), codegen


# ---------------------------------------------------------------------------------------------- random bits


@njit(forceinline=True)
def _philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """reference.philox4x32 with 7 rounds, on uint32 in uint64 registers."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    for _ in range(7):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low, (p0 >> half) ^ c3 ^ k1, p0 & low
        k0 = (k0 + np.uint64(0x9E3779B9)) & low
        k1 = (k1 + np.uint64(0xBB67AE85)) & low
    return c0, c1, c2, c3


@njit(cache=True, nogil=True)
def _fill_random(out, start, count, selector, key):  # type: ignore[no-untyped-def]
    """The 16-bit halves (selector 0: upper) for elements start .. start + count; element i lies at i − (start & ~127)."""
    k0, k1, stream, step = key[0], key[1], key[2], key[3]
    first = start >> 7
    for chunk in range(((start + count + 127) >> 7) - first):
        group = np.uint64((first + chunk) * 16)
        c1 = (group >> np.uint64(32)) | np.uint64(selector << 31)
        base = chunk * 128
        for lane in range(16):
            c0 = (group & np.uint64(0xFFFFFFFF)) + np.uint64(lane)
            w0, w1, w2, w3 = _philox(c0, c1, stream, step, k0, k1)
            low, half = np.uint64(0xFFFF), np.uint64(16)
            out[base + lane] = w0 & low
            out[base + 16 + lane] = w0 >> half
            out[base + 32 + lane] = w1 & low
            out[base + 48 + lane] = w1 >> half
            out[base + 64 + lane] = w2 & low
            out[base + 80 + lane] = w2 >> half
            out[base + 96 + lane] = w3 & low
            out[base + 112 + lane] = w3 >> half


# ---------------------------------------------------------------------------------------------- one element


class Grid(NamedTuple):
    """The parameters of an element format, floats and integers in the width of the compute type (p = 23 or 52)."""

    lowest: Any  # what lies below becomes this before it is rounded
    highest: Any
    zero: Any  # added to the result: -0.0 keeps the sign of zero, +0.0 drops it
    random_scale: Any  # 2^min(k, 16)
    min_normal: Any
    emin: Any  # the bit pattern of the smallest normal number
    shift: Any  # p − m in the exponent field: from 2^e to C
    precision: Any  # p in the exponent field: from q to C
    exponent: Any  # mask of the exponent field
    field: Any  # p
    unit: Any  # the exponent field of 1.0, shifted down
    parity: Any  # the format's bias: the parity of its codes where it has no mantissa bits
    one: Any
    random_shift: Any  # 16 − min(k, 16)
    random_limit: Any  # 2^min(k, 16)


@njit(forceinline=True)
def _grid(f, i):  # type: ignore[no-untyped-def]
    return Grid(f[0], f[1], f[2], f[3], f[4], i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9])


@njit(forceinline=True)
def _scaled(x, inverse, g, mode, table):  # type: ignore[no-untyped-def]
    """x over the scale. Where only the side of zero counts, an underflow keeps it."""
    v = _as(x * inverse, g.highest)
    if (table or mode == _POSITIVE or mode == _NEGATIVE or mode == _ODD) and v == 0 and x != 0:
        v = math.copysign(_float(g.one, v), v)
    return v


@njit(forceinline=True)
def _magic(a, g, gap):  # type: ignore[no-untyped-def]
    """C for the magnitude a. `gap`: without subnormals a single step leads from 0 to min_normal."""
    c = _float(max(_bits(a) & g.exponent, g.emin) + g.shift, a)
    if gap and a < g.min_normal:
        c = _float(g.emin + g.precision, a)
    return c


@njit(forceinline=True)
def _even_code(t, c, a, g, bare):  # type: ignore[no-untyped-def]
    """Whether the truncated magnitude t of a has an even code. `bare`: the format has no mantissa bits."""
    if bare:
        return t == 0 or (((_bits(a) >> g.field) - g.unit + g.parity) & g.one) == 0
    return (_bits(t + c) & g.one) == 0


@njit(forceinline=True)
def _clamp(v, g):  # type: ignore[no-untyped-def]
    """v within the finite range; NaN stays NaN."""
    v = g.highest if v > g.highest else v
    return g.lowest if v < g.lowest else v


@njit(forceinline=True)
def _round(v, g, mode, gap, bare):  # type: ignore[no-untyped-def]
    """The scaled value v rounded; every mode but STOCHASTIC."""
    v = _clamp(v, g)
    a = abs(v)
    c = _magic(a, g, gap)
    r = (a + c) - c
    if mode != _EVEN or bare:
        q = _float(_bits(c) - g.precision, a)
        t = r - q if r > a else r
        rest = a - t
        if mode == _EVEN:
            r = t if rest + rest == q and _even_code(t, c, a, g, bare) else r
        elif mode == _AWAY:
            r = t + q if rest + rest >= q else t
        elif mode == _ZERO:
            r = t
        elif mode == _POSITIVE:
            r = t + q if rest > 0 and v > 0 else t
        elif mode == _NEGATIVE:
            r = t + q if rest > 0 and v < 0 else t
        elif mode == _ODD:
            r = t + q if rest > 0 and _even_code(t, c, a, g, bare) else t
    return math.copysign(r, v) + g.zero


@njit(forceinline=True)
def _round_stochastic(v, word, g, gap):  # type: ignore[no-untyped-def]
    """(v rounded with the upper 16 bits of its word, the sum that decided, r in [0, 1), the other neighbour)."""
    v = _clamp(v, g)
    a = abs(v)
    c = _magic(a, g, gap)
    r = (a + c) - c
    q = _float(_bits(c) - g.precision, a)
    t = r - q if r > a else r
    fraction = (a - t) * _float(((g.unit + g.unit) << g.field) - _bits(q), a)  # 1/q, a power of two
    total = np.int32(fraction * g.random_scale) + np.int32(word >> g.random_shift)
    r = t + q if total >= g.random_limit else t
    return math.copysign(r, v) + g.zero, total, fraction, math.copysign(t + q, v) + g.zero


@njit(cache=True, nogil=True)
def _carries(fraction, index, upper, key, bits):  # type: ignore[no-untyped-def]
    """Whether ⌊r·2^k⌋ + R reaches 2^k for k > 16: asked only where the upper 16 bits add up to 2^16 − 1."""
    scratch = np.empty(128, np.uint16)
    _fill_random(scratch, index & ~127, 128, 1, key)
    word = (np.int64(upper) << 16) | np.int64(scratch[index & 127])
    return np.int64(fraction * float(1 << bits)) + (word >> (32 - bits)) >= (1 << bits)


@njit(forceinline=True)
def _place(v, thresholds):  # type: ignore[no-untyped-def]
    """How many thresholds v has reached."""
    place = 0
    if len(thresholds) <= 16:
        for k in range(len(thresholds)):
            place += v >= thresholds[k]
        return place
    size = len(thresholds)
    while size > 0:
        half = size >> 1
        if v >= thresholds[place + half]:
            place += half + 1
            size -= half + 1
        else:
            size = half
    return place


@njit(forceinline=True)
def _look_up(v, thresholds, values):  # type: ignore[no-untyped-def]
    """The table's value for v: thresholds[j] is the smallest number that rounds to values[j + 1] or beyond."""
    return values[_place(v, thresholds)] if v == v else v


@njit(forceinline=True)
def _look_up_stochastic(v, word, g, values):  # type: ignore[no-untyped-def]
    """As _round_stochastic, between the table's neighbours of v; r is computed in float64."""
    if not (v > values[0] and v < values[-1]):
        end = np.float64(v if v != v else (values[0] if v <= values[0] else values[-1]))
        return end, np.int32(0), 0.0, end
    below = _place(v, values) - 1
    lo, hi = np.float64(values[below]), np.float64(values[below + 1])
    outward, inward = (hi, lo) if abs(lo) <= abs(hi) else (lo, hi)
    fraction = (np.float64(v) - inward) / (outward - inward)
    if fraction == 1.0:
        return outward, np.int32(0), 0.0, outward
    total = np.int32(fraction * g.random_scale) + np.int32(word >> g.random_shift)
    return (outward if total >= g.random_limit else inward), total, fraction, outward


# ---------------------------------------------------------------------------------------------- kernels


@njit(forceinline=True)
def _maxima(x, m, top, bottom, columns, tile_columns, absolute):  # type: ignore[no-untyped-def]
    """m[b]: the largest magnitude of tile b in the rows [top, bottom), as a bit pattern; NaN is the largest."""
    m[:] = 0
    for row in range(top, bottom):
        xs = x[row * columns : (row + 1) * columns]
        if tile_columns == 1:
            for j in range(len(xs)):
                m[j] = max(m[j], _bits(xs[j]) & absolute)
        else:
            for b in range(len(m)):
                part = xs[b * tile_columns : min((b + 1) * tile_columns, columns)]
                largest = m[b]
                for j in range(len(part)):
                    largest = max(largest, _bits(part[j]) & absolute)
                m[b] = largest


@njit(forceinline=True)
def _power_of_two(e):  # type: ignore[no-untyped-def]
    return _float((np.int64(e) + 1023) << 52, 1.0)


@njit(forceinline=True)
def _power_of_two_scales(m, s, n, rule, x):  # type: ignore[no-untyped-def]
    """The scales s and their inverses n from the maxima m; see _rule."""
    add, field, unit, emax, lowest, highest = rule[0], rule[1], rule[2], rule[3], rule[4], rule[5]
    infinite = (unit + unit + 1) << field
    for b in range(len(m)):
        amax, lift = m[b], 0
        if amax < (1 << field):  # subnormal: bring its leading one to the hidden bit
            lift = field
            amax = _bits(_float(amax, x[0]) * _float((unit + field) << field, x[0])) if amax > 0 else amax
        e = ((amax + add) >> field) - unit - lift - emax
        e = min(max(e, lowest), highest) if amax > 0 else lowest
        finite = m[b] < infinite
        s[b] = _power_of_two(e) if finite else np.nan
        n[b] = _power_of_two(-e) if finite else np.nan


@functools.cache
def _kernel(variant: Variant) -> Any:
    mode, table, double, gap, bare = variant
    pattern = np.int64 if double else np.int32

    @njit(cache=True, nogil=True)
    def kernel(  # type: ignore[no-untyped-def]
        x, out, shape, tile, f, i, thresholds, values, rule, scale, inverse, key, offset, bits, first, last
    ):
        """Quantize the rows of tiles [first, last) of x into out; both flat.

        rule: as _rule gives it, or empty: then the scales of all tiles are given, with their inverses.
        key: seed (2 words), stream, step; bits: k. A stochastic call must not have out = x.
        """
        g = _grid(f, i)
        rows, columns = shape
        tile_rows, tile_columns = tile
        down, across = -(-rows // tile_rows), -(-columns // tile_columns)
        words = np.empty(columns + 256 if mode == _STOCHASTIC else 0, np.uint16)
        m = np.empty(across if len(rule) > 0 else 0, pattern)
        fresh_s, fresh_n = np.empty(len(m), scale.dtype), np.empty(len(m), scale.dtype)
        for tile_row in range(first, last):
            top = (tile_row // down) * rows + (tile_row % down) * tile_rows
            bottom = min(top + tile_rows, (tile_row // down + 1) * rows)
            if len(rule) > 0:
                _maxima(x, m, top, bottom, columns, tile_columns, rule[6])
                _power_of_two_scales(m, fresh_s, fresh_n, rule, x)
                s, n = fresh_s, fresh_n
            else:
                s = scale[tile_row * across : (tile_row + 1) * across]
                n = inverse[tile_row * across : (tile_row + 1) * across]
            for row in range(top, bottom):
                begin = row * columns
                xs, os = x[begin : begin + columns], out[begin : begin + columns]
                ws = words[(offset + begin) & 127 :]
                undecided = 0
                if mode == _STOCHASTIC:
                    _fill_random(words, offset + begin, columns, 0, key)
                if tile_columns == 1:
                    for j in range(columns):
                        v = _scaled(xs[j], n[j], g, mode, table)
                        if mode == _STOCHASTIC:
                            r, total, _, _ = (
                                _look_up_stochastic(v, ws[j], g, values)
                                if table
                                else _round_stochastic(v, ws[j], g, gap)
                            )
                            undecided += total == g.random_limit - 1
                        else:
                            r = _look_up(v, thresholds, values) if table else _round(v, g, mode, gap, bare)
                        os[j] = r * s[j]
                else:
                    for b in range(across):
                        low, high = b * tile_columns, min((b + 1) * tile_columns, columns)
                        xb, ob, wb = xs[low:high], os[low:high], ws[low:high]
                        inv, sc = n[b], s[b]
                        for j in range(len(xb)):
                            v = _scaled(xb[j], inv, g, mode, table)
                            if mode == _STOCHASTIC:
                                r, total, _, _ = (
                                    _look_up_stochastic(v, wb[j], g, values)
                                    if table
                                    else _round_stochastic(v, wb[j], g, gap)
                                )
                                undecided += total == g.random_limit - 1
                            else:
                                r = _look_up(v, thresholds, values) if table else _round(v, g, mode, gap, bare)
                            ob[j] = r * sc
                if mode == _STOCHASTIC and bits > 16 and undecided > 0:
                    for j in range(columns):
                        v = _scaled(xs[j], n[j // tile_columns], g, mode, table)
                        _, total, fraction, upper = (
                            _look_up_stochastic(v, ws[j], g, values) if table else _round_stochastic(v, ws[j], g, gap)
                        )
                        if total == g.random_limit - 1 and _carries(fraction, offset + begin + j, ws[j], key, bits):
                            os[j] = upper * s[j // tile_columns]

    return kernel


@njit(cache=True, nogil=True)
def _tile_maxima(x, shape, tile, absolute, maxima):  # type: ignore[no-untyped-def]
    """The largest magnitude of every tile, as a bit pattern."""
    rows, columns = shape
    tile_rows, tile_columns = tile
    down, across = -(-rows // tile_rows), -(-columns // tile_columns)
    for tile_row in range(len(maxima) // max(across, 1)):
        top = (tile_row // down) * rows + (tile_row % down) * tile_rows
        bottom = min(top + tile_rows, (tile_row // down + 1) * rows)
        m = maxima[tile_row * across : (tile_row + 1) * across]
        _maxima(x, m, top, bottom, columns, tile_columns, absolute)


@njit(cache=True, nogil=True)
def _overflow_to_special(x, out, largest, special, for_positive, for_negative):  # type: ignore[no-untyped-def]
    """Overflow.SPECIAL after rounding on a grid that goes on to 2^(emax + 1)."""
    for j in range(len(x)):
        r = out[j]
        if abs(r) > largest:
            passes = for_positive if r > 0 else for_negative
            out[j] = math.copysign(special if passes or np.isinf(x[j]) else largest, r)


# ---------------------------------------------------------------------------------------------- tensors

_NO_KEY = np.zeros(4, np.uint64)
_NO_SCALE = {np.dtype(np.float32): np.empty(0, np.float32), np.dtype(np.float64): np.empty(0, np.float64)}
_SERIAL = 1 << 18  # below this many elements a second thread costs more than it gains


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lpsim")


def _run(
    p: Plan,
    x: np.ndarray,
    out: np.ndarray,
    shape: tuple[int, int, int],
    tile: tuple[int, int],
    scale: np.ndarray,
    inverse: np.ndarray,
    rule: np.ndarray,
    key: np.ndarray,
    offset: int,
) -> None:
    """The kernel over all rows of tiles, on torch's number of threads. Scales per tile, or an empty pair."""
    outer, rows, columns = shape
    tile_rows = outer * -(-rows // tile[0])
    threads = min(torch.get_num_threads(), tile_rows, x.size // _SERIAL + 1)
    kernel = _kernel(p.variant)
    fixed = (x, out, (rows, columns), tile, p.floats, p.integers, p.thresholds, p.values, rule, scale, inverse)
    if threads == 1:
        kernel(*fixed, key, offset, p.bits, 0, tile_rows)
        return
    bounds = [tile_rows * t // threads for t in range(threads + 1)]
    pending = [
        _pool(threads).submit(kernel, *fixed, key, offset, p.bits, first, last)
        for first, last in itertools.pairwise(bounds)
    ]
    for future in pending:
        future.result()


def quantize(
    x: torch.Tensor,
    fmt: Format,
    axis: int,
    rounding: Rounding,
    overflow: Overflow,
    random_bits: int | None,
    key: Key | None,
    out: torch.Tensor,
) -> None:
    """reference.quantize of a contiguous float32 or float64 tensor x, into the contiguous `out` (x itself is allowed)."""
    if x.numel() == 0:
        return
    double = x.dtype is torch.float64
    p = plan(fmt, rounding, overflow, random_bits, double)
    if rounding is Rounding.STOCHASTIC or p.overflow is not None:
        x = x.clone() if x.data_ptr() == out.data_ptr() else x
    source, target = x.view(-1).numpy(), out.view(-1).numpy()
    words, offset = _NO_KEY, 0
    if key is not None:
        words, offset = np.array([key.seed & 0xFFFFFFFF, key.seed >> 32, key.stream, key.step], np.uint64), key.offset
    none = _NO_SCALE[p.floats.dtype]
    if not isinstance(fmt, BlockFormat):
        one = np.ones(1, p.floats.dtype)
        _flat(p, source, target, one, one, words, offset)
        if p.overflow is not None:
            _overflow_to_special(source, target, *p.overflow)
        return
    shape, tile = geometry(tuple(x.shape), fmt, axis)
    if len(p.rule) > 0 and tile != (1, x.numel()):
        _run(p, source, target, shape, tile, none, none, p.rule, words, offset)
        return
    scale, inverse = _given_scales(source, fmt, shape, tile, p)
    if tile == (1, x.numel()):
        _flat(p, source, target, scale, inverse, words, offset)
    else:
        _run(p, source, target, shape, tile, scale, inverse, _NO_RULE, words, offset)


_NO_RULE = np.empty(0, np.int64)


def _flat(
    p: Plan, x: np.ndarray, out: np.ndarray, scale: np.ndarray, inverse: np.ndarray, key: np.ndarray, offset: int
) -> None:
    """One scale for all elements: rows of a span, and the rest."""
    rows = x.size // SPAN
    head = rows * SPAN
    if rows:
        many = np.repeat(scale, rows), np.repeat(inverse, rows)
        _run(p, x[:head], out[:head], (1, rows, SPAN), (1, SPAN), *many, _NO_RULE, key, offset)
    if head < x.size:
        rest = x.size - head
        tail = (1, 1, rest), (1, max(rest, 2))
        _run(p, x[head:], out[head:], *tail, scale, inverse, _NO_RULE, key, offset + head)


def _given_scales(
    x: np.ndarray, fmt: BlockFormat, shape: tuple[int, int, int], tile: tuple[int, int], p: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """The scale of every tile and its inverse, from the maxima: reference.tensor_scale and block_scale, vectorized."""
    outer, rows, columns = shape
    maxima = np.empty(outer * -(-rows // tile[0]) * -(-columns // tile[1]), np.int64 if x.itemsize == 8 else np.int32)
    absolute = (1 << (8 * x.itemsize - 1)) - 1
    _tile_maxima(x, (rows, columns), tile, maxima.dtype.type(absolute), maxima)
    amax = maxima.view(x.dtype)
    finite = np.isfinite(amax)
    dtype = x.dtype.type
    if isinstance(fmt.scale_rule, ScaleRule) and fmt.scale_rule is not ScaleRule.ROUND:
        distinct, where = np.unique(np.where(finite, amax, 0), return_inverse=True)
        scale = np.array([reference.block_scale(float(a), fmt) for a in distinct], p.floats.dtype)[where]
        return np.where(finite, scale, np.nan), np.where(finite, 1 / scale, np.nan)
    outer_scale = dtype(1.0)
    with np.errstate(all="ignore"):
        if fmt.tensor_scale is not None:
            largest = float(amax.max())
            outer_scale = dtype(reference.tensor_scale(largest, fmt, dtype) if math.isfinite(largest) else np.nan)
        if fmt.scale_rule is ScaleRule.ROUND:
            wanted = np.where(finite, amax, 0) / dtype(fmt.element.max)
        else:
            distinct, where = np.unique(np.where(finite, amax, 0), return_inverse=True)
            wanted = np.array([fmt.scale_rule(float(a), fmt.element) for a in distinct], x.dtype)[where]  # type: ignore[operator]
        wanted = np.ascontiguousarray(wanted / outer_scale)
        rounded = np.empty_like(wanted)
        one = np.ones(1, np.float64)
        scale_plan = plan(fmt.scale, Rounding.TIES_TO_EVEN, Overflow.SATURATE, None, x.itemsize == 8)
        one = np.ones(1, scale_plan.floats.dtype)
        _flat(scale_plan, wanted, rounded, one, one, _NO_KEY, 0)
        scale = np.clip(rounded, dtype(fmt.scale.min_normal), dtype(fmt.scale.max))
        inverse = (dtype(1.0) / outer_scale) / scale
        scale = scale * outer_scale
        return np.where(finite, scale, dtype(np.nan)), np.where(finite, inverse, dtype(np.nan))
