"""The kernels of Accumulator for CPUs: any unit on any numbers, in float64. Equal to `reference`.

The product of two float32 numbers is exact in float64. A sum that is not is rounded to odd there (its last bit says
"inexact"), after which one more rounding to at most 24 bits gives what a single rounding of the exact sum gives (Boldo
and Melquiond 2008). `tiles` has faster kernels for numbers that are known to be harmless.

A task is a block of BLOCK rows and WIDTH columns of one matrix of the batch; its columns of rhs are copied together
first. Each element is computed by one thread, k ascending, whatever the cut.
"""

# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated, assignment"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

WIDTH = 64
BLOCK = 48
_EXPONENT = 0x7FF0000000000000


@intrinsic
def _bits(typingctx: Any, x: Any) -> Any:
    """The bit pattern of a float64."""
    return types.int64(types.float64), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.IntType(64)
    )


@intrinsic
def _float(typingctx: Any, x: Any) -> Any:
    """The float64 of a bit pattern."""
    return types.float64(types.int64), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.DoubleType()
    )


@njit(inline="always")
def _power(e):
    """2^e."""
    return _float((e + 1023) << 52)


@njit(inline="always")
def _add_to_odd(c, t):
    """c + t; where that is inexact, the one of its two neighbours that has an odd last bit."""
    u = c + t
    w = u - c
    rest = (c - (u - w)) + (t - w)  # the error of u (Knuth's two-sum); NaN where u is not finite
    bits = _bits(u)
    toward = 1 if (rest > 0) == (u > 0) else -1
    return _float(bits + (toward if (rest < 0 or rest > 0) and (bits & 1) == 0 else 0))


@njit(inline="always")
def _round(u, m, emin, toward_zero, top, beyond, infinite, zero):
    """u rounded to the format with m mantissa bits; emin: the bits of its smallest normal number. See round_exact."""
    a = abs(u)
    e = max(_bits(a) & _EXPONENT, emin)
    magic = _float(e + ((52 - m) << 52))
    r = (a + magic) - magic
    r = r - _float(e - (m << 52)) if toward_zero and r > a else r
    r = beyond if r > top else r
    r = infinite if a == np.inf else r
    return np.copysign(r, u) + zero


@njit(inline="always")
def _exponent(x, emin):
    """The exponent of x in a format whose smallest is emin; -126 for zero."""
    return np.int64(-126) if x == 0 else max((_bits(abs(x)) >> 52) - 1023, emin)


@njit(inline="always")
def _cut(x, mode):
    if mode == 0:
        return np.trunc(x)
    if mode == 1:
        return np.floor(x)
    return np.rint(x)


@njit(nogil=True, cache=True)
def pack(rhs, batch, first, columns, panel):
    """rhs[batch, :, first : first + columns] into panel [K, WIDTH], zeros beyond."""
    for k in range(rhs.shape[1]):
        for j in range(columns):
            panel[k, j] = rhs[batch, k, first + j]
        for j in range(columns, WIDTH):
            panel[k, j] = 0


_A3 = types.Array(types.float32, 3, "A")
_SIGNATURE = types.void(_A3, _A3, _A3, types.int64[::1], types.float64[::1], types.int64, types.int64)


@njit(_SIGNATURE, nogil=True, cache=True)
def any_unit(lhs, rhs, out, integers, floats, first_task, last_task):
    """The tasks [first_task, last_task) of out = lhs · rhs; integers, floats: see cpu.numbers."""
    rows, depth, width = lhs.shape[1], lhs.shape[2], rhs.shape[2]
    m, emin, toward_zero, chunk, pairwise, bits, cut, emin_lhs, emin_rhs, emin_out = integers
    top, beyond, infinite, zero = floats
    row_blocks, panels = -(-rows // BLOCK), -(-width // WIDTH)
    panel = np.empty((depth, WIDTH), np.float32)
    exponents = np.empty((depth if bits > 0 else 0, WIDTH), np.int64)
    levels = 0
    while pairwise and (1 << levels) < chunk:
        levels += 1
    tree = np.empty((levels + 1, WIDTH), np.float32)
    c, s, total = np.empty(WIDTH), np.empty(WIDTH), np.empty(WIDTH)
    e = np.empty(WIDTH, np.int64)
    value = np.empty(WIDTH, np.float32)
    for task in range(first_task, last_task):
        batch, at = task // (panels * row_blocks), task % (panels * row_blocks)
        low, top_row = (at // row_blocks) * WIDTH, (at % row_blocks) * BLOCK
        columns = min(WIDTH, width - low)
        pack(rhs, batch, low, columns, panel)
        if bits > 0:
            for k in range(depth):
                for j in range(WIDTH):
                    exponents[k, j] = _exponent(np.float64(panel[k, j]), emin_rhs)
        for i in range(top_row, min(top_row + BLOCK, rows)):
            c[:] = 0
            for begin in range(0, depth, chunk):
                end = min(begin + chunk, depth)
                if bits > 0:
                    for j in range(WIDTH):
                        e[j] = _exponent(c[j], emin_out)
                    for k in range(begin, end):
                        own = _exponent(np.float64(lhs[batch, i, k]), emin_lhs)
                        for j in range(WIDTH):
                            e[j] = max(e[j], own + exponents[k, j])
                    for j in range(WIDTH):
                        total[j] = c[j]
                        s[j] = _cut(c[j] * _power(bits - e[j]), cut)
                    for k in range(begin, end):
                        a = np.float64(lhs[batch, i, k])
                        for j in range(WIDTH):
                            product = a * np.float64(panel[k, j])
                            total[j] += product
                            s[j] += _cut(product * _power(bits - e[j]), cut)
                    for j in range(WIDTH):
                        finite = abs(total[j]) < np.inf
                        u = s[j] * _power(e[j] - bits) if finite else total[j]
                        r = _round(u, m, emin, toward_zero, top, beyond, infinite, zero)
                        c[j] = r if r != 0 else 0.0
                    continue
                if chunk == 1:
                    a = np.float64(lhs[batch, i, begin])
                    for j in range(WIDTH):
                        u = _add_to_odd(c[j], a * np.float64(panel[begin, j]))
                        c[j] = _round(u, m, emin, toward_zero, top, beyond, infinite, zero)
                    continue
                if pairwise:
                    for place in range(1 << levels):
                        k = begin + place
                        a = lhs[batch, i, k] if k < end else np.float32(0)
                        for j in range(WIDTH):
                            value[j] = a * panel[k, j] if k < end else np.float32(0)
                        level = 0
                        while (place >> level) & 1:
                            for j in range(WIDTH):
                                value[j] = tree[level, j] + value[j]
                            level += 1
                        tree[level, :] = value
                    for j in range(WIDTH):
                        s[j] = tree[levels, j]
                else:
                    s[:] = 0
                    for k in range(begin, end):
                        a = np.float64(lhs[batch, i, k])
                        for j in range(WIDTH):
                            s[j] = np.float32(_add_to_odd(s[j], a * np.float64(panel[k, j])))
                for j in range(WIDTH):
                    u = _add_to_odd(c[j], s[j])
                    c[j] = _round(u, m, emin, toward_zero, top, beyond, infinite, zero)
            for j in range(columns):
                out[batch, i, low + j] = c[j]
