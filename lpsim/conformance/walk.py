"""The exhaustive walk: all 2^32 float32 inputs through the kernels, against paths that share no code with them.

Rounding is monotone, so the oracle is a step function of the magnitude's bit pattern: its steps are found by bisection
with the oracle itself, and every input between two steps must give one and the same result. Where ml_dtypes has the
type, its cast is a second, wholly independent path for ties to even.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from lpsim.conformance.inputs import Array
from lpsim.conformance.laws import DETERMINISTIC, demand, quantizers
from lpsim.formats import ALL_FORMATS, BlockFormat, Element, Format, reference
from lpsim.formats.rounding import Overflow
from lpsim.quantization.quantizer import Quantizer

CHUNK = 1 << 19  # inputs at a time: few enough for the cache, many enough to outweigh a call
INFINITY = 0x7F800000  # the bit pattern; above it lie the NaNs
NEGATIVE = 0x80000000


def refuse_unless_walkable(fmt: Format) -> None:
    """Raises ValueError for a format whose inputs or steps are too many."""
    if isinstance(fmt, BlockFormat):
        raise ValueError(
            f"{fmt.name}: the exhaustive walk serves scalar formats; walk its element: check({fmt.element.name}, ...)"
        )
    if fmt.bits > 16:
        raise ValueError(f"{fmt.name}: the exhaustive walk serves formats of up to 16 bits, this one has {fmt.bits}")


def walk(fmt: Format, progress: bool) -> dict[str, int]:
    """law -> inputs walked: the oracle's steps in every deterministic rounding and policy, and the cast of a peer."""
    from tqdm import tqdm  # which only a walk needs

    assert not isinstance(fmt, BlockFormat)
    chosen = list(quantizers(fmt, DETERMINISTIC))
    peer = peer_dtype(fmt)
    with tqdm(
        total=(len(chosen) + (peer is not None)) << 32,
        desc=fmt.name,
        unit=" inputs",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for q in chosen:
            _walk_steps(q, bar)
        cases = {f"2^32 inputs, {len(chosen)} quantizers": len(chosen) << 32}
        if peer is not None:
            _walk_cast(fmt, peer, bar)
            cases[f"2^32 inputs, cast of {peer.type.__module__.partition('.')[0]}"] = 1 << 32
    return cases


# ---------------------------------------------------------------------------------------------- the oracle's steps


def steps(q: Quantizer, sign: int) -> tuple[Array, Array]:
    """(bit patterns where the oracle's result changes, ascending from 0; the results), up to and with infinity."""

    def result(pattern: int) -> np.float32:
        x = float(np.uint32(sign | pattern).view(np.float32))
        return np.float32(reference.round_value(x, q.format, q.rounding, q.overflow))  # type: ignore[arg-type]

    starts, results = [0], [result(0)]
    pending = [(0, results[0], INFINITY, result(INFINITY))]
    while pending:  # the left half on top, so that steps come in order
        low, below, high, above = pending.pop()
        if below.tobytes() == above.tobytes():
            continue
        if high == low + 1:
            starts.append(high)
            results.append(above)
            continue
        middle = (low + high) // 2
        value = result(middle)
        pending += [(middle, value, high, above), (low, below, middle, value)]
    return np.array(starts), np.array(results, np.float32)


def _walk_steps(q: Quantizer, bar: Any) -> None:
    for sign in (0, NEGATIVE):
        starts, results = steps(q, sign)

        def wanted(first: int, x: Array, starts: Array = starts, results: Array = results) -> Array:
            low, high = np.searchsorted(starts, [first, first + len(x) - 1], side="right") - 1
            ends = np.append(starts[low + 1 : high + 1], first + len(x)) - first
            return (
                results[low : low + 1] if low == high else np.repeat(results[low : high + 1], np.diff(ends, prepend=0))
            )

        _walk(q, sign, wanted, bar)


# ---------------------------------------------------------------------------------------------- a peer's cast


def peer_dtype(fmt: Element) -> np.dtype[Any] | None:
    """The type of numpy or ml_dtypes that is the named format `fmt`, or None.

    float8_e8m0fnu is left out: its cast rounds ties up, where we and torch go to the even code.
    """
    if ALL_FORMATS.get(fmt.name) != fmt or fmt.name == "float8_e8m0fnu":
        return None
    if fmt.name == "float16":
        return np.dtype(np.float16)
    if importlib.util.find_spec("ml_dtypes") is None:
        return None
    import ml_dtypes

    found = getattr(ml_dtypes, fmt.name, None)
    return None if found is None else np.dtype(found)


def _walk_cast(fmt: Element, peer: np.dtype[Any], bar: Any) -> None:
    """Ties to even. The casts overflow to what the type has: Inf, else NaN, else the largest number."""
    q = Quantizer(fmt, overflow=Overflow.SPECIAL if fmt.has_inf or fmt.has_nan else Overflow.SATURATE)
    code = np.dtype(f"u{peer.itemsize}")
    with np.errstate(all="ignore"):
        table = np.arange(1 << (8 * peer.itemsize)).astype(code).view(peer).astype(np.float32)
    for sign in (0, NEGATIVE):
        _walk(q, sign, lambda first, x: table[x.astype(peer).view(code)], bar)


# ---------------------------------------------------------------------------------------------- the walk


def _walk(q: Quantizer, sign: int, wanted: Callable[[int, Array], Array], bar: Any) -> None:
    """Every input of a sign becomes `wanted`, bit for bit; a NaN, which `wanted` is not asked for, stays NaN.

    On torch's number of threads. wanted: from the first bit pattern, without its sign, and the inputs.
    """
    pattern = np.arange(CHUNK, dtype=np.uint32)
    nan = np.full(1, np.nan, np.float32)

    def check(first: int, size: int) -> None:
        x = (pattern[:size] + np.uint32(sign | first)).view(np.float32)
        y = q.quantize(torch.from_numpy(x)).numpy()
        with np.errstate(all="ignore"):
            must = wanted(first, x) if first <= INFINITY else nan
        apart = y.view(np.int32) != must.view(np.int32)
        if apart.any():
            apart &= ~(np.isnan(y) & np.isnan(must))
            demand(~apart, "all inputs", q.format, q, x, y, np.broadcast_to(must, y.shape))
        bar.update(size)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        spans = [
            (first, min(CHUNK, end - first))
            for start, end in ((0, INFINITY + 1), (INFINITY + 1, 1 << 31))
            for first in range(start, end, CHUNK)
        ]
        for _ in pool.map(lambda span: check(*span), spans):
            pass
