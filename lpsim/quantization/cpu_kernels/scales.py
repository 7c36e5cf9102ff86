"""The largest magnitude of every block, and from it the block's scale.

Magnitudes are handled as bit patterns: integers that have the same order, in which Inf and then NaN are the largest.
"""

# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lpsim.quantization.cpu_kernels.elements import EVEN, Element
from lpsim.quantization.cpu_kernels.simd import F64, I32, I64, Lanes, Maximum, Memory, over, splat

# ---------------------------------------------------------------------------------------------- maxima


@intrinsic
def _largest(typingctx: Any, x: Any, begin: Any, count: Any) -> Any:
    """The largest magnitude in x[begin : begin + count], as a bit pattern; NaN is the largest."""
    pattern = types.int64 if x.dtype == types.float64 else types.int32

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memory, integer = Memory.of(context, builder, x, args[0]), I64 if x.dtype == types.float64 else I32
        width = 8 if x.dtype == types.float64 else 16
        best = Maximum(builder, integer, width)

        def body(place: Any, lanes: int) -> None:
            best.include(memory.load(builder.add(args[1], place), lanes).magnitude().bits())

        over(builder, args[2], width, body)
        return best.value()

    return pattern(x, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def _largest_each(typingctx: Any, first: Any, x: Any, begin: Any, other: Any, count: Any, m: Any) -> Any:
    """m[j] becomes the larger magnitude of x[begin + j] and x[other + j], as a bit pattern, for j < count.

    first = 0: and of what m[j] was.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = Memory.of(context, builder, x, args[1]), Memory.of(context, builder, m, args[5])

        def body(place: Any, lanes: int) -> None:
            a, b = (source.load(builder.add(start, place), lanes).magnitude().bits() for start in args[2:4])
            bits = a.larger(b)
            target.store(place, bits if first.literal_value else bits.larger(target.load(place, lanes)))

        over(builder, args[4], 8 if x.dtype == types.float64 else 16, body)
        return context.get_dummy_value()

    return types.void(first, x, types.int64, types.int64, types.int64, m), codegen


@intrinsic(prefer_literal=True)
def _largest_in_groups(typingctx: Any, vectors: Any, x: Any, begin: Any, groups: Any, m: Any) -> Any:
    """m[b]: the largest magnitude in the b-th group of x from `begin`; a group is `vectors` vectors of 64 bytes.

    As many groups as a vector has lanes are reduced together. Two vectors become one, half of whose lanes hold the
    maxima of the first and half those of the second; then quarters, and so on, until every lane holds a group's.
    """
    size = vectors.literal_value
    width = 8 if x.dtype == types.float64 else 16

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = Memory.of(context, builder, x, args[1]), Memory.of(context, builder, m, args[4])

        def elementwise(start: Any, group: int) -> Lanes:
            places = (ir.Constant(I64, width * (group * size + part)) for part in range(size))
            parts = [source.load(builder.add(start, place), width).magnitude().bits() for place in places]
            return functools.reduce(Lanes.larger, parts)

        def together(start: Any, group: int, stride: int) -> Lanes:
            """Lane L: the maximum over lanes = L modulo `stride` of the group `group` + L // stride * stride."""
            if stride == width:
                return elementwise(start, group)
            a, b = together(start, group, 2 * stride), together(start, group + stride, 2 * stride)
            second = [lane & stride != 0 for lane in range(width)]  # these lanes are b's
            own = a.shuffled(b, [lane + width * second[lane] for lane in range(width)])
            other = a.shuffled(b, [(lane ^ stride) + width * second[lane] for lane in range(width)])
            return own.larger(other)

        def start(group: Any) -> Any:
            return builder.add(args[2], builder.mul(group, ir.Constant(I64, size * width)))

        zero, one, step = (ir.Constant(I64, n) for n in (0, 1, width))
        rest = builder.and_(args[3], ir.Constant(I64, -width))
        with cgutils.for_range_slice(builder, zero, rest, step, I64, inc=True) as (group, _):
            target.store(group, together(start(group), 0, 1))
        with cgutils.for_range_slice(builder, rest, args[3], one, I64, inc=True) as (group, _):
            target.put(group, elementwise(start(group), 0).largest())
        return context.get_dummy_value()

    return types.void(vectors, x, types.int64, types.int64, m), codegen


@intrinsic(prefer_literal=True)
def _largest_in_small_groups(typingctx: Any, size: Any, x: Any, begin: Any, groups: Any, m: Any) -> Any:
    """m[b]: the largest magnitude in the b-th group of x from `begin`; a group is `size` elements, less than a vector.

    `groups` is a multiple of a vector's lanes. Two vectors become one, of the larger of every two neighbours.
    """
    width = 8 if x.dtype == types.float64 else 16

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = Memory.of(context, builder, x, args[1]), Memory.of(context, builder, m, args[4])

        def folded(place: Any, elements: int) -> Lanes:
            """The maxima of groups of so many elements from `place` on, one a lane."""
            if elements == 1:
                return source.load(place, width).magnitude().bits()
            a = folded(place, elements // 2)
            b = folded(builder.add(place, ir.Constant(I64, width * elements // 2)), elements // 2)
            return a.shuffled(b, list(range(0, 2 * width, 2))).larger(a.shuffled(b, list(range(1, 2 * width, 2))))

        def body(place: Any, lanes: int) -> None:
            at = builder.add(args[2], builder.mul(place, ir.Constant(I64, size.literal_value)))
            target.store(place, folded(at, size.literal_value))

        zero, step = ir.Constant(I64, 0), ir.Constant(I64, width)
        with cgutils.for_range_slice(builder, zero, args[3], step, I64, inc=True) as (place, _):
            body(place, width)
        return context.get_dummy_value()

    return types.void(size, x, types.int64, types.int64, m), codegen


@njit(nogil=True)
def fill_maxima(x, m, top, bottom, columns, tile_columns):
    """m[b]: the largest magnitude of tile b in the rows [top, bottom), as a bit pattern; NaN is the largest."""
    if tile_columns == 1:
        for row in range(top, bottom, 2):
            begin, other = row * columns, min(row + 1, bottom - 1) * columns
            if row == top:
                _largest_each(1, x, begin, other, columns, m)
            else:
                _largest_each(0, x, begin, other, columns, m)
        return
    whole = 0
    vector = 64 // x.itemsize
    if bottom - top == 1 and tile_columns < vector and tile_columns in (2, 4, 8):
        whole = columns // tile_columns & -vector
        if tile_columns == 2:
            _largest_in_small_groups(2, x, top * columns, whole, m)
        elif tile_columns == 4:
            _largest_in_small_groups(4, x, top * columns, whole, m)
        else:
            _largest_in_small_groups(8, x, top * columns, whole, m)
    if bottom - top == 1 and tile_columns in (vector, 2 * vector, 4 * vector):
        whole = columns // tile_columns
        if tile_columns == vector:
            _largest_in_groups(1, x, top * columns, whole, m)
        elif tile_columns == 2 * vector:
            _largest_in_groups(2, x, top * columns, whole, m)
        else:
            _largest_in_groups(4, x, top * columns, whole, m)
    for b in range(whole, len(m)):
        m[b] = 0
    if whole == len(m):
        return
    for row in range(top, bottom):
        begin = row * columns
        for b in range(whole, len(m)):
            low = b * tile_columns
            m[b] = max(m[b], _largest(x, begin + low, min(tile_columns, columns - low)))


@intrinsic
def _largest_of_neighbours(typingctx: Any, m: Any, whole: Any, count: Any, ratio: Any) -> Any:
    """fill_group_maxima for a count that is a multiple of a vector's lanes and a power of two up to them as ratio."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = Memory.of(context, builder, m, args[0]), Memory.of(context, builder, whole, args[1])
        width = 8 if m.dtype == types.int64 else 16

        def body(place: Any) -> None:
            best = source.load(place, width)
            for stride in (1, 2, 4, 8)[: width.bit_length() - 1]:
                both = best.larger(best.shuffled(best, [lane ^ stride for lane in range(width)]))
                wider = builder.icmp_signed(">", args[3], ir.Constant(I64, stride))
                best = Lanes(builder, builder.select(wider, both.value, best.value))
            target.store(place, best)

        zero, step = ir.Constant(I64, 0), ir.Constant(I64, width)
        with cgutils.for_range_slice(builder, zero, args[2], step, I64, inc=True) as (place, _):
            body(place)
        return context.get_dummy_value()

    return types.void(m, whole, types.int64, types.int64), codegen


@njit(nogil=True)
def fill_group_maxima(m, whole, ratio):
    """whole[b]: the largest of the group of `ratio` neighbours in m that b is in; the last group may be short."""
    vector = 64 // m.itemsize
    done = len(m) & -vector if ratio <= vector and ratio & (ratio - 1) == 0 else 0
    _largest_of_neighbours(m, whole, done, ratio)
    for first in range(done, len(m), ratio):
        best = m[first]
        last = min(first + ratio, len(m))
        for b in range(first, last):
            best = max(best, m[b])
        for b in range(first, last):
            whole[b] = best


# ---------------------------------------------------------------------------------------------- powers of two


def _in_lanes(builder: Any, numbers: Memory, lanes: int) -> Callable[[int], Lanes]:
    """A rule's numbers, in all lanes."""
    return lambda at: splat(builder, builder.trunc(numbers.scalar(at), I32), lanes)


def _exponents(amax: Lanes, number: Callable[[int], Lanes]) -> Lanes:
    """log2 of the scales that a power-of-two rule gives for maxima, bit patterns of float32."""
    small = amax < (1 << 23)  # subnormal: bring its leading one to the hidden bit
    lifted = (amax.as_float() * 2.0**23).bits()
    bits = small.select(lifted, amax)
    e = ((bits + number(0)) >> 23) - number(3) - small.select(amax.constant(127 + 23), amax.constant(127))
    e = (amax.equals(0) | (e < number(4))).select(number(4), e)
    return (e > number(5)).select(number(5), e)


def _store_powers(finite: Lanes, e: Lanes, place: Any, scales: Memory, inverses: Memory) -> None:
    """2^e and 2^-e as float32; NaN where not finite."""
    nan = e.as_float().constant(float("nan"))
    for memory, power in ((scales, e), (inverses, e.constant(0) - e)):
        value = (power < -126).select(e.constant(1 << 22), (power + 127) << 23)  # 2^-127 is subnormal
        memory.store(place, finite.select(value.as_float(), nan))


@intrinsic
def _single_scales(
    typingctx: Any, m: Any, count: Any, s: Any, n: Any, rule: Any, ends: Any, emin: Any, lowest: Any, highest: Any
) -> Any:
    """power_of_two_scales in lanes, for float32 alone: 1 for True, 0 for False; 2, nothing done, for other types."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if types.float64 in (s.dtype, ends.dtype) or m.dtype != types.int32:
            return ir.Constant(I32, 2)
        arrays = {place: Memory.of(context, builder, kind, args[place]) for place, kind in memory.items()}
        numbers, floats = (Memory.of(context, builder, kind, args[place]) for place, kind in ((4, rule), (5, ends)))
        odd = cgutils.alloca_once_value(builder, ir.Constant(I32, 0))

        def body(place: Any, lanes: int) -> None:
            number = _in_lanes(builder, numbers, lanes)

            def end(at: int) -> Lanes:
                return splat(builder, floats.scalar(at), lanes)

            amax = arrays[0].load(place, lanes)
            e, finite = _exponents(amax, number), amax < (255 << 23)
            _store_powers(finite, e, place, arrays[2], arrays[3])
            near = amax.equals(0).select(amax.constant(0), e)  # zeros become zero with any scale
            plain = finite & (near >= number(7)) & (near <= number(8))
            seen = builder.zext(builder.not_(plain.all()), I32)
            builder.store(builder.or_(builder.load(odd), seen), odd)
            one = (near + 127) << 23
            arrays[6].store(place, one + (number(6) << 23))
            arrays[7].store(place, end(0) * one.as_float())
            arrays[8].store(place, end(1) * one.as_float())

        over(builder, args[1], 16, body)
        return builder.xor(builder.load(odd), ir.Constant(I32, 1))

    memory = {0: m, 2: s, 3: n, 6: emin, 7: lowest, 8: highest}
    return types.int32(m, types.int64, s, n, rule, ends, emin, lowest, highest), codegen


@intrinsic
def _power_of_two(typingctx: Any, e: Any) -> Any:
    """2^e as a float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        field = builder.add(args[0], ir.Constant(I64, 1023))
        return builder.bitcast(builder.shl(field, ir.Constant(I64, 52)), F64)

    return types.float64(types.int64), codegen


@njit(nogil=True)
def _exponent(largest, rule):
    """log2 of the scale that a power-of-two rule gives for a maximum, a bit pattern."""
    add, field, unit, emax, least, most = rule[0], rule[1], rule[2], rule[3], rule[4], rule[5]
    amax, lift = np.int64(largest), np.int64(0)
    while 0 < amax < (1 << field):  # subnormal: bring its leading one to the hidden bit
        amax, lift = amax << 1, lift + 1
    e = ((amax + add) >> field) - unit - emax - lift
    return min(max(e, least), most) if amax > 0 else least


@njit(nogil=True)
def power_of_two_scales(m, s, n, rule, ends, emin, lowest, highest):
    """Computes the scales s and their inverses n from the maxima m, and where it can the scaled grids of the blocks.

    Returns True where every block's grid, the element's numbers times the scale, lies in the middle of float32's range.
    Then emin (as bits), lowest and highest are the grids', and nothing in these blocks is NaN or infinite.

    rule: see plan._rule. ends: the lowest and the highest number of the element.
    """
    done = _single_scales(m, len(m), s, n, rule, ends, emin, lowest, highest)
    if done != 2:
        return done == 1
    infinite = (rule[2] + rule[2] + 1) << rule[1]
    for b in range(len(m)):
        e = _exponent(m[b], rule)
        finite = m[b] < infinite
        s[b] = _power_of_two(e) if finite else np.nan
        n[b] = _power_of_two(-e) if finite else np.nan
    return False


@intrinsic
def _single_sub_block_scales(typingctx: Any, m: Any, whole: Any, count: Any, s: Any, n: Any, rule: Any) -> Any:
    """sub_block_scales in lanes, for float32 alone: 1; 2, nothing done, for other types."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if s.dtype == types.float64 or m.dtype != types.int32:
            return ir.Constant(I32, 2)
        own, blocks, scales, inverses, numbers = (
            Memory.of(context, builder, kind, args[place])
            for place, kind in ((0, m), (1, whole), (3, s), (4, n), (5, rule))
        )

        def body(place: Any, lanes: int) -> None:
            number = _in_lanes(builder, numbers, lanes)
            largest = blocks.load(place, lanes)
            e = _exponents(own.load(place, lanes), number).larger(_exponents(largest, number) - number(9))
            _store_powers(largest < (255 << 23), e, place, scales, inverses)

        over(builder, args[2], 16, body)
        return ir.Constant(I32, 1)

    return types.int32(m, whole, types.int64, s, n, rule), codegen


@njit(nogil=True)
def sub_block_scales(m, whole, s, n, rule):
    """The scales s of the parts of blocks and their inverses n; m, whole: the maxima of the parts and the blocks."""
    if _single_sub_block_scales(m, whole, len(m), s, n, rule) == 1:
        return
    infinite = (rule[2] + rule[2] + 1) << rule[1]
    for b in range(len(m)):
        e = max(_exponent(m[b], rule), _exponent(whole[b], rule) - rule[9])
        finite = whole[b] < infinite
        s[b] = _power_of_two(e) if finite else np.nan
        n[b] = _power_of_two(-e) if finite else np.nan


# ---------------------------------------------------------------------------------------------- rounded scales


@intrinsic
def rounded_scales(typingctx: Any, m: Any, count: Any, s: Any, n: Any, numbers: Any, f: Any, i: Any) -> Any:
    """ScaleRule.ROUND: the scales s and their inverses n from the maxima m, in the tensor's own arithmetic.

    numbers: the element's largest magnitude, the tensor's scale and its inverse, the smallest normal and the largest
    number of the scale's format; f, i: that format's plan. NaN where a maximum is not finite.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = [Memory.of(context, builder, kind, args[place]) for place, kind in enumerate((m, None, s, n)) if kind]
        double, compute = m.dtype == types.int64, f.dtype
        given = Memory.of(context, builder, numbers, args[4])
        width = 8 if double or compute == types.float64 else 16
        floats, integers = (Memory.of(context, builder, kind, args[place]) for place, kind in ((5, f), (6, i)))
        formats = {lanes: Element(builder, floats, integers, lanes, False) for lanes in (width, 1)}

        def body(place: Any, lanes: int) -> None:
            def number(at: int) -> Lanes:
                return splat(builder, given.scalar(at), lanes)

            bits = arrays[0].load(place, lanes)
            finite = bits < ((2047 << 52) if double else (255 << 23))
            amax = finite.select(bits, bits.constant(0)).as_float()
            wanted = amax / number(0) / number(1)
            g = formats[lanes]
            scale = g.round(wanted.widen(g.highest.element), EVEN, False, False).narrow(wanted.element)
            scale = (scale < number(3)).select(number(3), scale)
            scale = (scale > number(4)).select(number(4), scale)
            nan = scale.constant(float("nan"))
            arrays[1].store(place, finite.select(scale * number(1), nan))
            arrays[2].store(place, finite.select(number(2) / scale, nan))

        over(builder, args[1], width, body)
        return context.get_dummy_value()

    return types.void(m, types.int64, s, n, numbers, f, i), codegen
