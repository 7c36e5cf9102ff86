"""The compiled kernels: loops over a tensor's rows of tiles.

A kernel takes addresses and numbers only: unpacking arrays takes longer than quantizing a small tensor. What belongs to
a format and a shape stands in a record (`rows.Field`) that calls use again, the addresses of the rows among it.

Numba compiles on first use and keeps the result in its cache on disk.
"""

# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated"

from __future__ import annotations

import enum
import functools
from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from lpsim.quantization.cpu_kernels.random import fill_random
from lpsim.quantization.cpu_kernels.rows import FINGERPRINT, Field, call_row
from lpsim.quantization.cpu_kernels.scales import fill_maxima, power_of_two_scales, rounded_scales


class Scales(enum.IntEnum):
    """Where scales come from: given for every tile, or one for all, with their inverses; a power-of-two rule; ROUND."""

    GIVEN, SAME, POWER_OF_TWO, ROUNDED = range(4)


_GIVEN, _SAME, _POWER_OF_TWO, _ROUNDED = (int(s) for s in Scales)
(
    _ROWS, _COLUMNS, _TILE_ROWS, _TILE_COLUMNS, _ELEMENTS, _BITS, _SCALES, _LANES,
    _FLOATS_AT, _INTEGERS_AT, _THRESHOLDS_AT, _THRESHOLDS, _VALUES_AT, _VALUES,
    _RULE_AT, _SCALE_AT, _INVERSE_AT, _NUMBERS_AT, _SCALE_FLOATS_AT, _SCALE_INTEGERS_AT,
    _ROW_AT, _EXACT_ROW_AT, _PLAIN_ROW_AT, _LARGE_ROW_AT, _,
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
        """Quantize the rows of tiles [first, last) of the flat x into out; the addresses of a record and of both.

        stream_step: the stream in the lower 32 bits, the step in the upper ones. A stochastic call must not have
        out = x.
        """
        _ = files
        c = _array(call, _FIELDS, np.int64)
        rows, columns, tile_rows, tile_columns = c[_ROWS], c[_COLUMNS], c[_TILE_ROWS], c[_TILE_COLUMNS]
        elements, source, exact_row = c[_ELEMENTS], c[_SCALES], c[_EXACT_ROW_AT]
        x = _array(x_at, elements, element)
        f, rule = _array(c[_FLOATS_AT], 5, compute), _array(c[_RULE_AT], 9, np.int64)
        down, across = -(-rows // tile_rows), -(-columns // tile_columns)
        key = (seed & _LOW, (seed >> 32) & _LOW, stream_step & _LOW, (stream_step >> 32) & _LOW)
        stochastic, table, own = exact_row != 0, c[_VALUES] > 0, tile_columns == 1
        # what is known of the blocks in a row of tiles, and random bits: pieces of one memory
        computed = across if source >= _POWER_OF_TWO else 1
        drawn = 2 * (_PIECE + 256) if stochastic else 0
        memory = np.empty(6 * computed + drawn // 4 + 8, np.int64)
        free = memory.ctypes.data
        m, emin = _array(free, computed, pattern), _array(free + 8 * computed, computed, np.int32)
        scale_at, inverse_at = free + 16 * computed, free + 24 * computed
        emin_at, lowest_at, highest_at = free + 8 * computed, free + 32 * computed, free + 40 * computed
        s, n = _array(scale_at, computed, scaling), _array(inverse_at, computed, scaling)
        lowest, highest = _array(lowest_at, computed, np.float32), _array(highest_at, computed, np.float32)
        words = (free + 48 * computed + 63) & -64
        lows = words + 2 * (_PIECE + 256)
        piece = _PIECE if stochastic else columns
        base, ordinary, plain_row = 0, False, c[_PLAIN_ROW_AT]
        if source <= _SAME:
            scale_at, inverse_at = c[_SCALE_AT], c[_INVERSE_AT]
            if plain_row != 0 and source == _SAME and _array(scale_at, 1, scaling)[0] == 1:
                emin[0], ordinary = _array(c[_INTEGERS_AT], 11, integer)[0], True
                lowest[0], highest[0] = f[0], f[1]
        # a stretch of a row has one scale, or groups of whole vectors with one scale each, or a scale an element
        sections, section, shift = across, tile_columns, 62
        if own:
            sections, section = 1, columns
        else:
            for power in range(3, 9):
                if tile_columns == 1 << power and tile_columns >= c[_LANES]:
                    sections, section, shift = 1, columns, power
        if c[_LARGE_ROW_AT] != 0 and out_at % 64 == 0 and columns % 16 == 0 and section % 16 == 0:
            plain_row = c[_LARGE_ROW_AT]
        for tile_row in range(first, last):
            top = (tile_row // down) * rows + (tile_row % down) * tile_rows
            bottom = min(top + tile_rows, (tile_row // down + 1) * rows)
            if source == _GIVEN:
                base = tile_row * across
            elif source == _POWER_OF_TWO:
                fill_maxima(x, m, top, bottom, columns, tile_columns)
                ordinary = power_of_two_scales(m, s, n, rule, f, emin, lowest, highest) and plain_row != 0
            elif source == _ROUNDED:
                fill_maxima(x, m, top, bottom, columns, tile_columns)
                g = _array(c[_SCALE_FLOATS_AT], 5, rule_compute)
                h = _array(c[_SCALE_INTEGERS_AT], 11, rule_integer)
                rounded_scales(m, computed, s, n, _array(c[_NUMBERS_AT], 5, element), g, h)
            for row in range(top, bottom):
                begin = row * columns
                length = min(columns, elements - begin)
                for part in range(sections):
                    end = min((part + 1) * section, length)
                    for low in range(part * section, end, piece):
                        count = min(piece, end - low)
                        at = base + low if own else base + part + ((low - part * section) >> shift)
                        x_here, out_here = x_at + size * (begin + low), out_at + size * (begin + low)
                        skip = 2 * ((offset + begin + low) & 127)
                        if stochastic:
                            fill_random(words, offset + begin + low, count, 0, key)
                        s_here, n_here = scale_at + scale_size * at, inverse_at + scale_size * at
                        if ordinary:
                            undecided = call_row(
                                plain_row, x_here, out_here, count, emin_at + 4 * at, lowest_at + 4 * at,
                                highest_at + 4 * at, shift, words + skip, lows + skip, call,
                            )  # fmt: skip
                        else:
                            undecided = call_row(
                                c[_ROW_AT], x_here, out_here, count, s_here, n_here, 0,
                                shift, words + skip, lows + skip, call,
                            )  # fmt: skip
                        if undecided != 0 and stochastic and (table or c[_BITS] > 16):
                            fill_random(lows, offset + begin + low, count, 1, key)
                            call_row(
                                exact_row, x_here, out_here, count, s_here, n_here, 0,
                                shift, words + skip, lows + skip, call,
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
            top = (tile_row // down) * rows + (tile_row % down) * tile_rows
            bottom = min(top + tile_rows, (tile_row // down + 1) * rows)
            m = maxima[tile_row * across : (tile_row + 1) * across]
            fill_maxima(x, m, top, bottom, columns, tile_columns)

    return tile_maxima


tile_maxima = _tile_maxima(FINGERPRINT)


@njit(cache=True, nogil=True)
def overflow_to_special(x, out, largest, special, for_positive, for_negative):
    """Overflow.SPECIAL after rounding on a grid that goes on to 2^(emax + 1)."""
    for j in range(len(x)):
        r = out[j]
        if abs(r) > largest:
            passes = for_positive if r > 0 else for_negative
            out[j] = np.copysign(special if passes or np.isinf(x[j]) else largest, r)
