"""The CPU backend: cuts a tensor into tiles that share a scale, and runs the kernels over them on several threads.

A tensor is seen as (outer, rows, columns), row-major, cut into tiles of (tile_rows, tile_columns) that share a scale:
(1, 32) for blocks of 32 along the last axis, (32, 1) along any other, (r, c) for tiles, everything for one scale a
tensor. The threads are as many as torch uses, but this module's own: Numba's OpenMP pool would share a runtime with
torch's.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch

from lpsim.formats import BlockFormat, FloatFormat, Format, float32, reference
from lpsim.formats.rounding import Key, Overflow, Rounding, ScaleRule
from lpsim.quantization.cpu_kernels import (
    ACROSS,
    DOWN,
    FEW,
    GRID,
    MANY,
    NUMBERS,
    STOCHASTIC,
    SYMMETRIC,
    Field,
    Scales,
    Way,
    kernel_for,
    overflow_to_special,
    plain_row_at,
    row_at,
    tensor_scale_for,
    tile_maxima,
)
from lpsim.quantization.plan import SPAN, Plan, geometry, plan, sub_tile

_SERIAL = 1 << 18  # below this many elements a second thread costs more than it gains
_NONE = np.zeros(10, np.int64)  # where a record has no use for an array
_LARGE = 1 << 25  # from so many bytes on a tensor is taken to be larger than the cache
_KEPT = 1024  # calls of a plan that are kept


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lpsim")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process inherits the pool without its threads


class _Call:
    """A plan, a shape and where its scales come from, as a kernel and the record that it reads."""

    def __init__(
        self,
        p: Plan,
        shape: tuple[int, int, int],
        tile: tuple[int, int],
        elements: int,
        scales: Scales,
        given: tuple[np.ndarray, np.ndarray] | None = None,
        rounded: tuple[np.ndarray, Plan] | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        """given: the scales and their inverses. rounded: see cpu_kernels.scales.rounded_scales. part: plan.sub_tile."""
        part = part or tile
        outer, rows, columns = shape
        self.limits = 0  # their address, where numbers depend on the tensor: see cpu_kernels.TensorScale
        self.rounded_scale: tuple[BlockFormat, np.ndarray] | None = None  # the limits of a scale that is no float32
        self.double = p.variant.double
        self.tile_rows = outer * -(-rows // tile[0])
        self.tiles = self.tile_rows * -(-columns // tile[1])
        self.bytes = elements * (8 if p.variant.double else 4)
        self.serial = elements < _SERIAL  # the kernel itself may be called for all rows
        fields: dict[Field, int | np.ndarray] = {
            Field.ROWS: rows, Field.COLUMNS: columns, Field.TILE_ROWS: tile[0], Field.TILE_COLUMNS: tile[1],
            Field.AHEAD: tile[0] * columns if self.bytes >= _LARGE else 0,
            Field.SUB_ROWS: part[0], Field.SUB_COLUMNS: part[1],
            Field.ELEMENTS: elements, Field.BITS: p.bits, Field.SCALES: scales,
            Field.FLOATS_AT: p.floats, Field.INTEGERS_AT: p.integers,
            Field.THRESHOLDS_AT: p.thresholds, Field.THRESHOLDS: len(p.thresholds),
            Field.VALUES_AT: p.values, Field.VALUES: len(p.values),
            Field.RULE_AT: p.rule if len(p.rule) > 0 else _NONE, Field.NUMBERS_AT: _NONE,
        }  # fmt: skip
        wide = p.floats.itemsize == 8
        scale_wide = p.variant.double if scales is Scales.ROUNDED else wide
        rule_wide = p.variant.double
        if given is not None:
            fields |= {Field.SCALE_AT: given[0], Field.INVERSE_AT: given[1]}
            scale_wide = given[0].itemsize == 8
        if rounded is not None:
            numbers, q = rounded
            fields |= {Field.NUMBERS_AT: numbers, Field.SCALE_FLOATS_AT: q.floats, Field.SCALE_INTEGERS_AT: q.integers}
            rule_wide = q.floats.itemsize == 8
        mode, _, double, gap, bare = p.variant
        lanes = 8 if wide else 16
        split = part[1].bit_length() - 1 if part[1] in (2, 4, 8) and part[1] < lanes else 0
        way = Way(mode, _kind(p), gap, bare, double, wide, scale_wide, part[1] == 1, scales is Scales.SAME, split)
        fields |= {Field.LANES: 1 << split if split else lanes, Field.ROW_AT: row_at(way, False)}
        plain = way.plain
        if part != tile:
            upright, power = tile[1] == 1, tile[1].bit_length() - 1
            plain = plain and (upright or (tile[1] == 1 << power and 16 <= tile[1] <= 256))
            way = way._replace(divided=DOWN if upright else ACROSS)
            fields[Field.BLOCK_SHIFT] = power
        if mode == STOCHASTIC:
            fields[Field.EXACT_ROW_AT] = row_at(way, True)
        if plain:
            fields[Field.PLAIN_ROW_AT] = plain_row_at(way, False)
            if self.bytes >= _LARGE:
                fields[Field.LARGE_ROW_AT] = plain_row_at(way, True)
        record = np.zeros(len(Field), np.int64)
        for place, value in fields.items():
            record[place] = value.ctypes.data if isinstance(value, np.ndarray) else value
        self.arrays = [record, *(value for value in fields.values() if isinstance(value, np.ndarray))]
        self.record = record.ctypes.data
        self.kernel = kernel_for(double, wide, scale_wide, rule_wide)

    def depend_on_tensor(self, fmt: BlockFormat, numbers: np.ndarray) -> None:
        """Let the numbers depend on the tensor, by the format's tensor_scale."""
        assert fmt.tensor_scale is not None
        divisor, least = fmt.element.max * fmt.scale.max, reference.least_tensor_scale(fmt)
        with np.errstate(over="ignore"):
            limits = np.array([divisor, least, fmt.tensor_scale.max, *numbers[[0, 3, 4]]], numbers.dtype)
        self.arrays.append(limits)
        self.limits = limits.ctypes.data
        self.rounded_scale = None if fmt.tensor_scale == float32 else (fmt, limits)

    def _limits_for(self, bits: int) -> np.ndarray | None:
        """Limits that leave the tensor's scale no choice, where that is rounded to another format than float32. bits:
        the pattern of the tensor's largest magnitude.
        """
        if self.rounded_scale is None:
            return None
        fmt, limits = self.rounded_scale
        largest = np.array(bits, np.int64 if self.double else np.int32).view(limits.dtype)[()]
        with np.errstate(all="ignore"):
            scale = reference.tensor_scale(float(largest), fmt, limits.dtype.type) if np.isfinite(largest) else 1.0
        return np.array([1.0, scale, scale, *limits[3:]], limits.dtype)

    def for_tensor(self, x: int) -> tuple[np.ndarray, int]:
        """The memory of the record for the tensor at this address, where numbers depend on it; and its address."""
        kernels, own = tensor_scale_for(self.double), len(Field) + NUMBERS
        memory = np.empty(own + (self.tiles if self.double else -(-self.tiles // 2)), np.int64)
        record = memory.ctypes.data
        arguments = (self.record, x, record + 8 * own)
        if self.serial:
            largest = kernels.maxima(*arguments, 0, self.tile_rows)
        else:
            largest = max(_in_parts(kernels.maxima, arguments, self.tile_rows))
        limits = self._limits_for(largest)
        kernels.record(
            self.record, record + 8 * own, largest, self.limits if limits is None else limits.ctypes.data, record
        )
        return memory, record


def _in_parts(kernel: Any, arguments: tuple[int, ...], count: int) -> list[Any]:
    """kernel(*arguments, first, last) on torch's number of threads, for equal parts of the numbers below `count`."""
    threads = min(torch.get_num_threads(), count)
    if threads == 1:
        return [kernel(*arguments, 0, count)]
    bounds = [count * t // threads for t in range(threads + 1)]
    parts: list[Future[Any]] = []
    try:
        for span in itertools.pairwise(bounds):
            parts.append(_pool(threads).submit(kernel, *arguments, *span))
        return [part.result() for part in parts]
    finally:
        wait(parts)  # also when interrupted: kernels write to memory that the caller then frees


def _signed(word: int) -> int:
    """64 bits as a signed integer."""
    return (word ^ 1 << 63) - (1 << 63)


def _kind(p: Plan) -> int:
    """What an element is: see cpu_kernels.elements."""
    lowest, highest, zero = p.floats[:3]
    if p.variant.table:
        return FEW if len(p.values) <= 32 else MANY
    return SYMMETRIC if lowest == -highest and np.signbit(zero) else GRID


def quantize(x: torch.Tensor, fmt: Format, axis: int, p: Plan, key: Key | None, out: torch.Tensor) -> None:
    """reference.quantize of a contiguous float32 or float64 tensor x, into the contiguous `out`, which may overlap x.

    p: the plan of the format and rounding for x's width.

    Raises TypeError for a tensor that has no memory.
    """
    source, target = x.data_ptr(), out.data_ptr()
    if not (source and target) and x.numel() > 0:
        raise TypeError(f"{type(x).__name__} has no memory of its own to quantize; pass the plain tensor behind it")
    place = (x.shape, axis)
    call: _Call | None = p.kept.get(place)
    if call is None:
        if x.numel() == 0:
            return
        call = _prepared(x.shape, fmt, axis, p)
        if call is not None:
            if len(p.kept) >= _KEPT:
                p.kept.clear()
            p.kept[place] = call
    if call is None:
        assert isinstance(fmt, BlockFormat)
        call = _with_scales(x, fmt, axis, p)
    distance = abs(target - source)
    if distance < call.bytes and (distance > 0 or p.variant.mode == STOCHASTIC or p.overflow is not None):
        x = x.clone()  # results would be written over what is still to be read
        source = x.data_ptr()
    seed = stream_step = offset = 0
    if key is not None:
        seed, stream_step, offset = _signed(key.seed), _signed(key.stream | key.step << 32), key.offset
    _memory, record = call.for_tensor(source) if call.limits else (None, call.record)
    arguments = (record, source, target, seed, stream_step, offset)
    if call.serial:
        call.kernel(*arguments, 0, call.tile_rows)
    else:
        _in_parts(call.kernel, arguments, call.tile_rows)
    if p.overflow is not None:
        overflow_to_special(x.view(-1).numpy(), out.view(-1).numpy(), *p.overflow)


def _prepared(shape: torch.Size, fmt: Format, axis: int, p: Plan) -> _Call | None:
    """The call that serves every tensor of a shape; None where scales depend on more than their block's maximum."""
    elements = math.prod(shape)
    if not isinstance(fmt, BlockFormat):
        return _same(elements, p, np.ones(1, p.floats.dtype), np.ones(1, p.floats.dtype))
    rows, tile = geometry(shape, fmt, axis)
    part = sub_tile(tile, fmt)
    if tile == (1, elements) and elements > SPAN and part == tile:
        return None
    if len(p.rule) > 0:
        return _Call(p, rows, tile, elements, Scales.POWER_OF_TWO, part=part)
    if fmt.scale_rule is ScaleRule.ROUND and fmt.scale.mantissa_bits > 0 and fmt.scale.subnormals:
        dtype = np.float64 if p.variant.double else np.float32
        numbers = np.array([fmt.element.max, 1.0, 1.0, fmt.scale.min_normal, fmt.scale.max], dtype)
        call = _Call(p, rows, tile, elements, Scales.ROUNDED, rounded=(numbers, _scale_plan(fmt.scale, p)))
        if fmt.tensor_scale is not None:
            call.depend_on_tensor(fmt, numbers)
        return call
    return None


def _same(elements: int, p: Plan, scale: np.ndarray, inverse: np.ndarray) -> _Call:
    """The call for one scale for all elements: they are cut into rows of SPAN, the last one short."""
    columns = min(elements, SPAN)
    shape = (1, -(-elements // columns), columns)
    return _Call(p, shape, (1, columns), elements, Scales.SAME, (scale, inverse))


def _scale_plan(scale: FloatFormat, p: Plan) -> Plan:
    """The plan by which scales of this format are rounded, for tensors of p's width."""
    return plan(scale, Rounding.TIES_TO_EVEN, Overflow.SATURATE, None, p.variant.double)


def _maxima(x: np.ndarray, shape: tuple[int, int, int], tile: tuple[int, int]) -> np.ndarray:
    """The largest magnitude of every tile."""
    outer, rows, columns = shape
    bits = np.empty(outer * -(-rows // tile[0]) * -(-columns // tile[1]), np.int64 if x.itemsize == 8 else np.int32)
    tile_maxima(x, (rows, columns), tile, bits)
    return bits.view(x.dtype)


def _tensor_scale(x: torch.Tensor, fmt: BlockFormat) -> float:
    """reference.tensor_scale of a tensor; NaN where its largest magnitude is not finite."""
    array = x.view(-1).numpy()
    largest = float(_maxima(array, (1, 1, array.size), (1, array.size))[0])
    with np.errstate(all="ignore"):
        return reference.tensor_scale(largest, fmt, array.dtype.type) if math.isfinite(largest) else math.nan


def _with_scales(tensor: torch.Tensor, fmt: BlockFormat, axis: int, p: Plan) -> _Call:
    """The call for one tensor whose scales depend on all of it, or on a rule of the user."""
    x = tensor.view(-1).numpy()
    shape, tile = geometry(tensor.shape, fmt, axis)
    outer = 1.0 if fmt.tensor_scale is None else _tensor_scale(tensor, fmt)
    scale, inverse = _given_scales(_maxima(x, shape, tile), fmt, outer, p)
    if tile == (1, x.size):
        return _same(x.size, p, scale, inverse)
    return _Call(p, shape, tile, x.size, Scales.GIVEN, (scale, inverse))


def _given_scales(amax: np.ndarray, fmt: BlockFormat, outer: float, p: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The scale of every tile and its inverse, from the maxima: reference.block_scale, vectorized."""
    finite, dtype = np.isfinite(amax), amax.dtype.type
    if not finite.any():
        return np.full_like(amax, np.nan), np.full_like(amax, np.nan)
    amax = np.where(finite, amax, amax[finite][0])  # a rule sees finite maxima alone
    distinct, where = np.unique(amax, return_inverse=True)
    if isinstance(fmt.scale_rule, ScaleRule) and fmt.scale_rule is not ScaleRule.ROUND:
        scale = np.array([reference.block_scale(float(a), fmt) for a in distinct], p.floats.dtype)[where]
        return np.where(finite, scale, np.nan), np.where(finite, 1 / scale, np.nan)
    with np.errstate(all="ignore"):
        if fmt.scale_rule is ScaleRule.ROUND:
            wanted = amax / dtype(fmt.element.max)
        else:
            wanted = np.array([fmt.scale_by_rule(float(a)) for a in distinct], dtype)[where]
        wanted = np.ascontiguousarray(wanted / dtype(outer))
        rounded = np.empty_like(wanted)
        q = _scale_plan(fmt.scale, p)
        one = np.ones(1, q.floats.dtype)
        call = _same(wanted.size, q, one, one)
        _in_parts(call.kernel, (call.record, wanted.ctypes.data, rounded.ctypes.data, 0, 0, 0), call.tile_rows)
        scale = np.clip(rounded, dtype(fmt.scale.min_normal), dtype(fmt.scale.max))
        inverse = (dtype(1.0) / dtype(outer)) / scale
        scale = scale * dtype(outer)
        return np.where(finite, scale, dtype(np.nan)), np.where(finite, inverse, dtype(np.nan))
