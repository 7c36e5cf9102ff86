"""The compiled kernels: loops over a tensor's rows of tiles. A tile is a piece of a matrix with one scale.

A kernel takes addresses and numbers only: unpacking arrays takes longer than quantizing a small tensor. What belongs to
a format and a shape stands in a record (`rows.Field`) that calls use again, the addresses of the rows among it.

Numba compiles on first use and keeps the result in its cache on disk.
"""

# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated"

from __future__ import annotations

import enum
import functools
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from lpsim.quantization.cpu_kernels.random import fill_random
from lpsim.quantization.cpu_kernels.rows import FINGERPRINT, Field, call_row
from lpsim.quantization.cpu_kernels.scales import (
    fill_group_maxima,
    fill_maxima,
    power_of_two_scales,
    rounded_scales,
    sub_block_scales,
)


class Scales(enum.IntEnum):
    """Where scales come from: given, for every tile or one for all; a power-of-two rule; ScaleRule.ROUND."""

    GIVEN, SAME, POWER_OF_TWO, ROUNDED = range(4)


_GIVEN, _SAME, _POWER_OF_TWO, _ROUNDED = (int(s) for s in Scales)
(
    _ROWS, _COLUMNS, _TILE_ROWS, _TILE_COLUMNS, _ELEMENTS, _BITS, _SCALES, _LANES,
    _FLOATS_AT, _INTEGERS_AT, _THRESHOLDS_AT, _THRESHOLDS, _VALUES_AT, _VALUES,
    _RULE_AT, _SCALE_AT, _INVERSE_AT, _NUMBERS_AT, _SCALE_FLOATS_AT, _SCALE_INTEGERS_AT,
    _ROW_AT, _EXACT_ROW_AT, _PLAIN_ROW_AT, _LARGE_ROW_AT, _, _SUB_ROWS, _SUB_COLUMNS, _BLOCK_SHIFT,
    _MAXIMA_AT,
) = (int(field) for field in Field)  # fmt: skip

_FIELDS = len(Field)
_LOW = 0xFFFFFFFF
_PIECE = 512  # elements whose undecided stochastic roundings are settled together


@intrinsic
def _array(typingctx: Any, address: Any, count: Any, dtype: Any) -> Any:
    """The numbers at an address, as an array of that type."""
    kind = types.Array(dtype.dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(kind)(context, builder)
        size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        populate_array(
            array,
            data=builder.inttoptr(args[0], context.get_data_type(kind.dtype).as_pointer()),
            shape=cgutils.pack_array(builder, [args[1]]),
            strides=cgutils.pack_array(builder, [size]),
            itemsize=size,
            meminfo=None,
        )
        return array._getvalue()

    return kind(types.int64, types.int64, dtype), codegen


@njit(nogil=True)
def _sections(columns, tile_columns, lanes):
    """A row as stretches: how many, how long, and log2 of the elements that share a scale in one.

    A stretch has one scale (then the last number is 62), a scale for each element, or groups of at least `lanes`
    elements with a scale each.
    """
    if tile_columns == 1:
        return 1, columns, 62
    for power in range(1, 9):
        if tile_columns == 1 << power and tile_columns >= lanes:
            return 1, columns, power
    return -(-columns // tile_columns), tile_columns, 62


@njit(nogil=True)
def _rows_of(tile_row, rows, tile_rows, down):
    """The rows [top, bottom) of a row of tiles. A matrix of `rows` rows has `down` rows of tiles."""
    top = (tile_row // down) * rows + (tile_row % down) * tile_rows
    return top, min(top + tile_rows, (tile_row // down + 1) * rows)


@njit(nogil=True)
def _quantize_stretch(call, c, key, place, x_at, out_at, count, shift, plain, scales, bits_at):
    """Quantizes a stretch, whose first element has the number `place`: at most _PIECE elements if stochastic.

    plain: 0, or the row for blocks whose scales are ordinary. scales: the addresses of the scales and their inverses,
    and where `plain` is not 0 of what that row takes of the blocks. bits_at: where random bits lie.
    """
    scale_at, inverse_at, emin_at, lowest_at, highest_at = scales
    stochastic = c[_EXACT_ROW_AT] != 0
    words, lows, skip = bits_at, bits_at + 2 * (_PIECE + 256), 2 * (place & 127)
    if stochastic:
        fill_random(words, place, count, 0, key)
    if plain != 0:
        undecided = call_row(
            plain, x_at, out_at, count, emin_at, lowest_at, highest_at, shift, words + skip, lows + skip, call
        )
    else:
        undecided = call_row(
            c[_ROW_AT], x_at, out_at, count, scale_at, inverse_at, 0, shift, words + skip, lows + skip, call
        )
    if undecided != 0 and stochastic and (c[_VALUES] > 0 or c[_BITS] > 16):
        fill_random(lows, place, count, 1, key)
        call_row(c[_EXACT_ROW_AT], x_at, out_at, count, scale_at, inverse_at, 0, shift, words + skip, lows + skip, call)


@functools.cache
def kernel_for(double: bool, wide: bool, scale_wide: bool, rule_wide: bool) -> Any:
    """The loops for tensors of a width.

    wide, scale_wide: whether the arithmetic and the scales are float64, not float32. rule_wide: whether ScaleRule.ROUND
    rounds in float64.
    """
    element, pattern, size = (np.float64, np.int64, 8) if double else (np.float32, np.int32, 4)
    compute, integer = (np.float64, np.int64) if wide else (np.float32, np.int32)
    rule_compute, rule_integer = (np.float64, np.int64) if rule_wide else (np.float32, np.int32)
    scaling, scale_size = (np.float64, 8) if scale_wide else (np.float32, 4)
    files = FINGERPRINT

    @njit(types.void(*[types.int64] * 8), cache=True, nogil=True)
    def kernel(call, x_at, out_at, seed, stream_step, offset, first, last):
        """Quantize the rows of tiles [first, last) of the flat x into out.

        call, x_at, out_at: the addresses of the record, of x and of out.
        stream_step: the stream in the lower 32 bits, the step in the upper ones. A stochastic call must not have
        out = x.
        """
        _ = files
        c = _array(call, _FIELDS, np.int64)
        rows, columns, tile_rows, tile_columns = c[_ROWS], c[_COLUMNS], c[_TILE_ROWS], c[_TILE_COLUMNS]
        elements, source, stochastic = c[_ELEMENTS], c[_SCALES], c[_EXACT_ROW_AT] != 0
        x = _array(x_at, elements, element)
        f, rule = _array(c[_FLOATS_AT], 5, compute), _array(c[_RULE_AT], 10, np.int64)
        sub_rows, sub_columns = c[_SUB_ROWS], c[_SUB_COLUMNS]
        divided, upright = sub_rows != tile_rows or sub_columns != tile_columns, tile_columns == 1
        parts = -(-tile_columns // sub_columns)
        down, across = -(-rows // tile_rows), -(-columns // sub_columns)
        key = (seed & _LOW, (seed >> 32) & _LOW, stream_step & _LOW, (stream_step >> 32) & _LOW)
        # what is known of the (sub-)blocks in a row of tiles, and random bits: pieces of one memory
        computed = across if source >= _POWER_OF_TWO else 1
        memory = np.empty(7 * computed + (2 * (_PIECE + 256) if stochastic else 0) // 4 + 8, np.int64)
        free = memory.ctypes.data
        m, emin = _array(free, computed, pattern), _array(free + 8 * computed, computed, np.int32)
        scale_at, inverse_at = free + 16 * computed, free + 24 * computed
        emin_at, lowest_at, highest_at = free + 8 * computed, free + 32 * computed, free + 40 * computed
        s, n = _array(scale_at, computed, scaling), _array(inverse_at, computed, scaling)
        lowest, highest = _array(lowest_at, computed, np.float32), _array(highest_at, computed, np.float32)
        whole = _array(free + 48 * computed, computed, pattern)
        bits_at = (free + 56 * computed + 63) & -64
        base, ordinary, plain_row = 0, False, c[_PLAIN_ROW_AT]
        if source <= _SAME:
            scale_at, inverse_at = c[_SCALE_AT], c[_INVERSE_AT]
            if plain_row != 0 and source == _SAME and _array(scale_at, 1, scaling)[0] == 1:
                emin[0], ordinary = _array(c[_INTEGERS_AT], 11, integer)[0], True
                lowest[0], highest[0] = f[0], f[1]
        sections, section, shift = _sections(columns, sub_columns, c[_LANES])
        piece = _PIECE if stochastic else columns
        if c[_LARGE_ROW_AT] != 0 and out_at % 64 == 0 and columns % 16 == 0 and section % 16 == 0:
            plain_row = c[_LARGE_ROW_AT]
        for tile_row in range(first, last):
            top, bottom = _rows_of(tile_row, rows, tile_rows, down)
            if source == _GIVEN:
                base = tile_row * across
            elif source == _POWER_OF_TWO and not divided:
                fill_maxima(x, m, top, bottom, columns, tile_columns)
                ordinary = power_of_two_scales(m, s, n, rule, f, emin, lowest, highest) and plain_row != 0
            elif source == _POWER_OF_TWO and upright:
                fill_maxima(x, whole, top, bottom, columns, 1)
                ordinary = power_of_two_scales(whole, s, n, rule, f, emin, lowest, highest) and plain_row != 0
            elif source == _ROUNDED:
                if c[_MAXIMA_AT] != 0:
                    m = _array(c[_MAXIMA_AT] + size * tile_row * across, across, pattern)
                else:
                    fill_maxima(x, m, top, bottom, columns, tile_columns)
                g = _array(c[_SCALE_FLOATS_AT], 5, rule_compute)
                h = _array(c[_SCALE_INTEGERS_AT], 11, rule_integer)
                rounded_scales(m, computed, s, n, _array(c[_NUMBERS_AT], 5, element), g, h)
            for row in range(top, bottom):
                if divided and (row - top) % sub_rows == 0:
                    fill_maxima(x, m, row, min(row + sub_rows, bottom), columns, sub_columns)
                    if not upright:
                        blocks = whole[: -(-columns // tile_columns)]
                        fill_maxima(_array(free, computed, element), blocks, 0, 1, computed, parts)
                        ordinary = power_of_two_scales(blocks, s, n, rule, f, emin, lowest, highest) and plain_row != 0
                    if stochastic or not ordinary:
                        if not upright:
                            fill_group_maxima(m, whole, parts)
                        sub_block_scales(m, whole, s, n, rule)
                begin = row * columns
                length = min(columns, elements - begin)
                for part in range(sections):
                    for low in range(part * section, min((part + 1) * section, length), piece):
                        count = min(piece, min((part + 1) * section, length) - low)
                        at = base + low if sub_columns == 1 else base + part + ((low - part * section) >> shift)
                        scales = (
                            scale_at + scale_size * at, inverse_at + scale_size * at,
                            emin_at + 4 * (low >> c[_BLOCK_SHIFT] if divided else at),
                            free + 4 * at if divided else lowest_at + 4 * at, highest_at + 4 * at,
                        )  # fmt: skip
                        here, plain = size * (begin + low), plain_row if ordinary else 0
                        _quantize_stretch(
                            call, c, key, offset + begin + low, x_at + here, out_at + here, count, shift, plain,
                            scales, bits_at,
                        )  # fmt: skip
        memory[0] = 0  # not to be freed before

    return kernel


def _tile_maxima(files: int) -> Any:
    @njit(cache=True, nogil=True)
    def tile_maxima(x, shape, tile, maxima):
        """The largest magnitude of every tile, as a bit pattern."""
        _ = files
        rows, columns = shape
        tile_rows, tile_columns = tile
        down, across = -(-rows // tile_rows), -(-columns // tile_columns)
        for tile_row in range(len(maxima) // max(across, 1)):
            top, bottom = _rows_of(tile_row, rows, tile_rows, down)
            m = maxima[tile_row * across : (tile_row + 1) * across]
            fill_maxima(x, m, top, bottom, columns, tile_columns)

    return tile_maxima


tile_maxima = _tile_maxima(FINGERPRINT)


class TensorScale(NamedTuple):
    """Kernels for what depends on the largest magnitude of a whole tensor: see reference.tensor_scale.

    maxima(call, x_at, m_at, first, last): fills m, the maxima of all tiles, for the rows of tiles [first, last), and
    gives the largest of these, as a bit pattern. record(call, m_at, bits, limits_at, record_at): writes the record of a
    call whose tensor has these maxima and that largest magnitude, and behind it the numbers that scales.rounded_scales
    takes. limits: by what the magnitude is divided, the least and the largest scale of a tensor, and then what
    `numbers` there has beside that scale.
    """

    maxima: Any
    record: Any


NUMBERS = 5  # what lies behind a record that TensorScale.record writes, each in 8 bytes


@functools.cache
def tensor_scale_for(double: bool) -> TensorScale:
    """The kernels for float32 or float64 tensors. They round a tensor's scale to float32, unless limits fix it."""
    element, pattern, size = (np.float64, np.int64, 8) if double else (np.float32, np.int32, 4)
    infinity = 2047 << 52 if double else 255 << 23
    files = FINGERPRINT

    @njit(types.int64(*[types.int64] * 5), cache=True, nogil=True)
    def maxima(call, x_at, m_at, first, last):
        _ = files
        c = _array(call, _FIELDS, np.int64)
        rows, columns, tile_rows, tile_columns = c[_ROWS], c[_COLUMNS], c[_TILE_ROWS], c[_TILE_COLUMNS]
        down, across = -(-rows // tile_rows), -(-columns // tile_columns)
        x, largest = _array(x_at, c[_ELEMENTS], element), pattern(0)
        for tile_row in range(first, last):
            top, bottom = _rows_of(tile_row, rows, tile_rows, down)
            m = _array(m_at + size * tile_row * across, across, pattern)
            fill_maxima(x, m, top, bottom, columns, tile_columns)
            for b in range(across):
                largest = max(largest, m[b])
        return largest

    @njit(types.void(*[types.int64] * 5), cache=True, nogil=True, error_model="numpy")
    def record(call, m_at, bits, limits_at, record_at):
        _ = files
        result, limits = _array(record_at, _FIELDS, np.int64), _array(limits_at, 6, element)
        result[:] = _array(call, _FIELDS, np.int64)
        result[_NUMBERS_AT], result[_MAXIMA_AT] = record_at + 8 * _FIELDS, m_at
        numbers, magnitude = _array(result[_NUMBERS_AT], NUMBERS, element), np.empty(1, pattern)
        magnitude[0] = bits
        scale = element(np.float32(magnitude.view(element)[0] / limits[0]))
        scale = min(max(scale, limits[1]), limits[2]) if bits < infinity else element(np.nan)
        numbers[0], numbers[1], numbers[2] = limits[3], scale, element(1) / scale
        numbers[3], numbers[4] = limits[4], limits[5]

    return TensorScale(maxima, record)


@njit(cache=True, nogil=True)
def overflow_to_special(x, out, largest, special, for_positive, for_negative):
    """Puts what Overflow.SPECIAL says for results in `out` above `largest`, the format's largest magnitude.

    They were rounded on a grid that goes on to 2^(emax + 1). special: what lies beyond `largest`. for_positive,
    for_negative: whether the rounding takes such a number there, or to ±largest; an infinity in x always goes there.
    """
    for j in range(len(x)):
        r = out[j]
        if abs(r) > largest:
            passes = for_positive if r > 0 else for_negative
            out[j] = np.copysign(special if passes or np.isinf(x[j]) else largest, r)
