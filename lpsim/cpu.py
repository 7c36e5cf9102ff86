"""The CPU backend: tensors cut into tiles, tiles into scales, and the kernels run over them on torch's threads.

A tensor is seen as (outer, rows, columns), row-major, cut into tiles of (tile_rows, tile_columns) that share a scale:
(1, 32) for blocks of 32 along the last axis, (32, 1) along any other, (r, c) for tiles, everything for one scale a
tensor. The threads are this module's own, not Numba's: its OpenMP pool and torch's would share one runtime.
"""

from __future__ import annotations

import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from lpsim import reference
from lpsim.formats import BlockFormat, Format
from lpsim.kernels import FEW, GRID, MANY, STOCHASTIC, SYMMETRIC, kernel_for, overflow_to_special, tile_maxima
from lpsim.plan import SPAN, Plan, geometry, plan
from lpsim.rounding import Key, Overflow, Rounding, ScaleRule

_NO_KEY = np.zeros(4, np.uint64)
_WIDTHS: tuple[np.dtype, ...] = (np.dtype(np.float32), np.dtype(np.float64))
_NO_SCALE = {width: np.empty(0, width) for width in _WIDTHS}
_ONE = {width: np.ones(1, width) for width in _WIDTHS}
_NO_RULE = np.empty(0, np.int64)
_SERIAL = 1 << 18  # below this many elements a second thread costs more than it gains


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lpsim")


def _kernel(p: Plan) -> Any:
    """The kernel that a plan needs."""
    lowest, highest, zero = p.floats[:3]
    if p.variant.table:
        kind = FEW if len(p.values) <= 32 else MANY
    else:
        kind = SYMMETRIC if lowest == -highest and np.signbit(zero) else GRID
    return kernel_for(p.variant, kind, p.floats.itemsize == 8)


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
    threads = 1 if x.size < _SERIAL else min(torch.get_num_threads(), tile_rows)
    kernel = p.kept.get("numba") or p.kept.setdefault("numba", _kernel(p))
    fixed = (x, out, (rows, columns), tile, p.floats, p.integers, p.thresholds, p.values, rule, scale, inverse)

    if threads == 1:
        kernel(*fixed, key, offset, p.bits, 0, tile_rows)
        return

    def part(first: int, last: int) -> None:
        kernel(*fixed, key, offset, p.bits, first, last)

    bounds = [tile_rows * t // threads for t in range(threads + 1)]
    for done in [_pool(threads).submit(part, *span) for span in itertools.pairwise(bounds)]:
        done.result()


def quantize(x: torch.Tensor, fmt: Format, axis: int, p: Plan, key: Key | None, out: torch.Tensor) -> None:
    """reference.quantize of a contiguous float32 or float64 tensor x, into the contiguous `out` (x itself is allowed).

    p: the plan of the format and rounding for x's width.
    """
    if x.numel() == 0:
        return
    if (p.variant.mode == STOCHASTIC or p.overflow is not None) and x.data_ptr() == out.data_ptr():
        x = x.clone()
    source, target = x.view(-1).numpy(), out.view(-1).numpy()
    words, offset = _NO_KEY, 0
    if key is not None:
        words, offset = np.array([key.seed & 0xFFFFFFFF, key.seed >> 32, key.stream, key.step], np.uint64), key.offset
    none = _NO_SCALE[p.floats.dtype]
    if not isinstance(fmt, BlockFormat):
        one = _ONE[p.floats.dtype]
        _flat(p, source, target, one, one, words, offset)
        if p.overflow is not None:
            overflow_to_special(source, target, *p.overflow)
        return
    shape, tile = geometry(x.shape, fmt, axis)
    if len(p.rule) > 0 and tile != (1, x.numel()):
        _run(p, source, target, shape, tile, none, none, p.rule, words, offset)
        return
    scale, inverse = _given_scales(source, fmt, shape, tile, p)
    if tile == (1, x.numel()):
        _flat(p, source, target, scale, inverse, words, offset)
    else:
        _run(p, source, target, shape, tile, scale, inverse, _NO_RULE, words, offset)


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
    tile_maxima(x, (rows, columns), tile, maxima)
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
            wanted = np.array([fmt.scale_rule(float(a), fmt.element) for a in distinct], x.dtype)[where]
        wanted = np.ascontiguousarray(wanted / outer_scale)
        rounded = np.empty_like(wanted)
        scale_plan = plan(fmt.scale, Rounding.TIES_TO_EVEN, Overflow.SATURATE, None, x.itemsize == 8)
        one = _ONE[scale_plan.floats.dtype]
        _flat(scale_plan, wanted, rounded, one, one, _NO_KEY, 0)
        scale = np.clip(rounded, dtype(fmt.scale.min_normal), dtype(fmt.scale.max))
        inverse = (dtype(1.0) / outer_scale) / scale
        scale = scale * outer_scale
        return np.where(finite, scale, dtype(np.nan)), np.where(finite, inverse, dtype(np.nan))
