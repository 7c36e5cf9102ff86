"""What telemetry counts and sums over the elements of a tensor, in Numba: one pass each, on the calling thread.

The compiler may reorder sums, to use vector registers. So results are the same in every run and for every number of
threads, but may differ between kinds of processors.
"""

from __future__ import annotations

import math
from typing import Any

import numba

_compiled: Any = numba.njit(cache=True, nogil=True, fastmath={"reassoc"})


@_compiled
def census(x):  # type: ignore[no-untyped-def]
    """(NaN, +Inf, −Inf, the largest finite magnitude)."""
    nan = inf = minus = 0
    largest = 0.0
    for i in range(x.size):
        nan += math.isnan(x[i])
        inf += x[i] == math.inf
        minus += x[i] == -math.inf
        if math.isfinite(x[i]):
            largest = max(largest, abs(numba.float64(x[i])))
    return nan, inf, minus, largest


@_compiled
def rounding(x, q):  # type: ignore[no-untyped-def]
    """(Σx², Σ(q − x)², Σ(q − x), Σ|x|, how many q are 0 where x is not), over the places where both are finite."""
    signal = noise = error = magnitude = 0.0
    underflowed = 0
    for i in range(x.size):
        finite = math.isfinite(x[i]) & math.isfinite(q[i])
        a = numba.float64(x[i]) if finite else 0.0
        b = numba.float64(q[i]) if finite else 0.0
        e = b - a
        signal += a * a
        noise += e * e
        error += e
        magnitude += abs(a)
        underflowed += (b == 0) & (a != 0)
    return signal, noise, error, magnitude, underflowed


@_compiled
def above(x, limit):  # type: ignore[no-untyped-def]
    """How many |x| lie above their limit."""
    count = 0
    for i in range(x.size):
        count += abs(x[i]) > limit[i]
    return count


@_compiled
def products(a, b):  # type: ignore[no-untyped-def]
    """(Σa², Σb², Σab)."""
    aa = bb = ab = 0.0
    for i in range(a.size):
        x, y = numba.float64(a[i]), numba.float64(b[i])
        aa += x * x
        bb += y * y
        ab += x * y
    return aa, bb, ab
