"""The compiled kernels of the CPU backend, equal to `reference` bit for bit.

How one element is rounded. Let a = |x| / scale and 2^e <= a the power of two below it, but at least the smallest normal
number. The numbers of the format around a are multiples of q = 2^(e − m). Adding C = 2^p·q, where p is the width of
the machine's own significand, pushes everything below q out of the sum, rounded to nearest even; subtracting C gives
the rounded value. The other roundings start from that value's truncation and the exact remainder. So all formats are
run-time parameters of one kernel; the rounding mode, the compute type and two rare properties are compiled in.

Loops over tiles are Numba; loops over the elements of a row are vectors of LLVM IR (`simd`), because LLVM's own
vectorizer leaves half of them scalar. Numba compiles on first use and keeps the result in its cache on disk.
"""

# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated"

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lpsim import reference
from lpsim.plan import MODES, Variant
from lpsim.simd import F32, F64, I32, I64, Lanes, Memory, over, splat

# what an element is: a float or fixed format, a table to count or to search in, a float format with a symmetric range
GRID, FEW, MANY, SYMMETRIC = range(4)
_EVEN, _AWAY, _ZERO, _POSITIVE, _NEGATIVE, _ODD, STOCHASTIC = range(len(MODES))


# ---------------------------------------------------------------------------------------------- random bits


_LOW = 0xFFFFFFFF


def _philox(counter: list[Lanes], key: tuple[Lanes, Lanes]) -> list[Lanes]:
    """reference.philox4x32 with PHILOX_ROUNDS rounds, on 32-bit words in 64-bit lanes: nothing is packed in between."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(reference.PHILOX_ROUNDS):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


@intrinsic
def _random_chunk(typingctx: Any, out: Any, at: Any, low: Any, high: Any, key: Any) -> Any:
    """out[at : at + 128]: 16 bits each for the elements of 16 Philox groups; low, high: counter words of the first."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, words = Memory(context, builder, out, args[0]), Memory(context, builder, key, args[4])
        key_words = [splat(builder, words.scalar(place), 8) & _LOW for place in range(4)]
        for first in (0, 8):
            lane = Lanes(builder, ir.Constant(ir.VectorType(I64, 8), list(range(first, first + 8))))
            begin, top = (splat(builder, value, 8) for value in (args[2], args[3]))
            result = _philox([(begin + lane) & _LOW, top & _LOW, *key_words[2:]], (key_words[0], key_words[1]))
            for slot in range(8):
                half = result[slot >> 1] if slot % 2 == 0 else result[slot >> 1] >> 16
                target.store(builder.add(args[1], ir.Constant(I64, 16 * slot + first)), half.narrow(ir.IntType(16)))
        return context.get_dummy_value()

    return types.void(out, types.int64, types.int64, types.int64, key), codegen


@njit(cache=True, nogil=True)
def _fill_random(out, start, count, selector, key):
    """The 16-bit halves (selector 0: upper) for elements start .. start + count; element i at i − (start & ~127)."""
    first = start >> 7
    for chunk in range(((start + count + 127) >> 7) - first):
        group = (first + chunk) * 16
        _random_chunk(out, chunk * 128, group, (group >> 32) | (selector << 31), key)


# ---------------------------------------------------------------------------------------------- elements


class _Element:
    """The parameters of an element format, in all lanes: see plan.plan. p is 23 or 52.

    plain: the range is symmetric and there is a negative zero, so that magnitudes are all that must be limited.
    """

    def __init__(self, builder: Any, floats: Any, integers: Any, lanes: int, plain: bool) -> None:
        self.plain = plain

        def f(place: int) -> Lanes:
            return splat(builder, builder.extract_value(floats, place), lanes)

        def i(place: int) -> Lanes:
            return splat(builder, builder.extract_value(integers, place), lanes)

        self.lowest, self.highest = f(0), f(1)  # what lies beyond becomes these before it is rounded
        self.zero = f(2)  # added to the result: -0.0 keeps the sign of zero, +0.0 drops it
        self.random_scale = f(3)  # 2^min(k, 16)
        self.min_normal = f(4)
        self.emin = i(0)  # the bits of the smallest normal number
        self.shift = i(1)  # p − m in the exponent field: from 2^e to C
        self.precision = i(2)  # p in the exponent field: from q to C
        self.exponent = i(3)  # mask of the exponent field
        self.field = i(4)  # p
        self.unit = i(5)  # the exponent field of 1.0, shifted down
        self.parity = i(6)  # the format's bias: the parity of its codes where it has no mantissa bits
        self.random_shift = i(8)  # 16 − min(k, 16)
        self.random_limit = i(9)  # 2^min(k, 16)

    def clamp(self, v: Lanes) -> tuple[Lanes, Lanes]:
        """v within the finite range, and its magnitude; NaN stays NaN."""
        if self.plain:
            a = v.magnitude()
            return v, (a > self.highest).select(self.highest, a)
        v = (v > self.highest).select(self.highest, v)
        v = (v < self.lowest).select(self.lowest, v)
        return v, v.magnitude()

    def signed(self, r: Lanes, v: Lanes) -> Lanes:
        """The magnitude r with the sign of v, zeros as the format has them."""
        return r.with_sign_of(v) if self.plain else r.with_sign_of(v) + self.zero

    def neighbours(self, a: Lanes, gap: bool) -> tuple[Lanes, Lanes, Lanes]:
        """(a rounded to nearest with ties to an even multiple of q, C, q). gap: see plan.Variant."""
        exponent = a.bits() & self.exponent
        exponent = (exponent > self.emin).select(exponent, self.emin)
        c = (exponent + self.shift).as_float()
        if gap:
            c = (a < self.min_normal).select((self.emin + self.precision).as_float(), c)
        return (a + c) - c, c, (c.bits() - self.precision).as_float()

    def even(self, t: Lanes, c: Lanes, a: Lanes, bare: bool) -> Lanes:
        """Whether the truncated magnitude t of a has an even code. bare: see plan.Variant."""
        if bare:
            code = (a.bits() >> self.field) - self.unit + self.parity
            return t.equals(0.0) | (code & 1).equals(0)
        return ((t + c).bits() & 1).equals(0)

    def round(self, v: Lanes, mode: int, gap: bool, bare: bool) -> Lanes:
        """The scaled value v rounded; NaN stays NaN. Every mode but STOCHASTIC."""
        v, a = self.clamp(v)
        r, c, q = self.neighbours(a, gap)
        if mode != _EVEN or bare:
            t = (r > a).select(r - q, r)
            rest = a - t
            if mode == _EVEN:
                r = ((rest + rest).equals(q) & self.even(t, c, a, bare)).select(t, r)
            elif mode == _AWAY:
                r = (rest + rest >= q).select(t + q, t)
            elif mode == _ZERO:
                r = t
            elif mode == _POSITIVE:
                r = ((rest > 0.0) & (v > 0.0)).select(t + q, t)
            elif mode == _NEGATIVE:
                r = ((rest > 0.0) & (v < 0.0)).select(t + q, t)
            else:
                r = ((rest > 0.0) & self.even(t, c, a, bare)).select(t + q, t)
        return self.signed(r, v)


def _up(
    g: _Element, fraction: Lanes, word: Lanes, exact: tuple[Lanes, Lanes, Lanes, Lanes] | None
) -> tuple[Lanes, Lanes | None]:
    """(whether the larger magnitude is taken, whether the upper 16 bits of the random word leave that open).

    fraction: r in [0, 1). word: the upper 16 bits. exact: the lower 16 bits, 2^k as a float and an integer, and
    32 − k, for k > 16: then the answer is final.
    """
    if exact is not None:
        low, power, limit, shift = exact
        drawn = (word.widen(I64) << 16 | low.widen(I64)) >> shift
        return (fraction.widen(F64) * power).to_integer(I64) + drawn >= limit, None
    steps = (fraction * g.random_scale.widen(fraction.element)).to_integer(g.emin.element)
    total = steps + (word.widen(g.emin.element) >> g.random_shift)
    return total >= g.random_limit, (total + 1).equals(g.random_limit)


def _stochastic(g: _Element, v: Lanes, word: Lanes, exact: Any, gap: bool) -> tuple[Lanes, Lanes | None]:
    """The scaled value v rounded stochastically, and where that is open: see _up."""
    v, a = g.clamp(v)
    r, _, q = g.neighbours(a, gap)
    t = (r > a).select(r - q, r)
    inverse = (((g.unit + g.unit) << g.field) - q.bits()).as_float()  # 1/q, a power of two
    fraction = (a - t) * inverse
    fraction = (fraction > 0.0).select(fraction, fraction.constant(0.0))  # NaN draws like 0
    up, undecided = _up(g, fraction, word, exact)
    return g.signed(up.select(t + q, t), v), undecided


class _Table:
    """A codebook's thresholds and values in memory. few: lanes run through all of them, else they search by halves."""

    def __init__(self, builder: Any, thresholds: Memory, values: Memory, length: Any, size: Any, few: bool) -> None:
        self.builder, self.thresholds, self.values, self.few = builder, thresholds, values, few
        self.length, self.size = length, size  # of thresholds and of values, i64

    def scan(self, v: Lanes, entries: Memory, begin: int, end: Any, results: list[tuple[Memory, int]]) -> list[Lanes]:
        """For each (memory, shift) the element at k + shift of the last k in [begin, end) whose entry v has reached.

        The element at begin + shift − 1 where v has reached none.
        """
        builder = self.builder

        def everywhere(memory: Memory, index: Any) -> Lanes:
            return splat(builder, memory.scalar(index), v.count)

        first = [everywhere(memory, begin + shift - 1) for memory, shift in results]
        states = [cgutils.alloca_once_value(builder, lanes.value) for lanes in first]
        with cgutils.for_range_slice(builder, ir.Constant(I64, begin), end, ir.Constant(I64, 1)) as (k, _):
            reached = v >= everywhere(entries, k)
            for state, (memory, shift) in zip(states, results, strict=True):
                other = everywhere(memory, builder.add(k, ir.Constant(I64, shift)))
                builder.store(reached.select(other, Lanes(builder, builder.load(state))).value, state)
        return [Lanes(builder, builder.load(state)) for state in states]

    def search(self, v: Lanes, entries: Memory, length: Any) -> Lanes:
        """How many of the ascending entries v has reached."""
        builder = self.builder
        state = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(I32, v.count), [0] * v.count))
        highest = ir.Constant(I64, 16)  # a table has at most 2^16 entries
        with cgutils.for_range(builder, ir.Constant(I64, 17)) as loop:
            step = builder.shl(ir.Constant(I64, 1), builder.sub(highest, loop.index))
            current = Lanes(builder, builder.load(state))
            candidate = current + splat(builder, builder.trunc(step, I32), v.count)
            inside = candidate <= splat(builder, builder.trunc(length, I32), v.count)
            entry = entries.gather(inside.select(candidate - 1, candidate.constant(0)))
            builder.store((inside & (v >= entry)).select(candidate, current).value, state)
        return Lanes(builder, builder.load(state))

    def round(self, v: Lanes) -> Lanes:
        """The table's value for v; NaN stays NaN."""
        if self.few:
            (result,) = self.scan(v, self.thresholds, 0, self.length, [(self.values, 1)])
        else:
            result = self.values.gather(self.search(v, self.thresholds, self.length))
        return v.equals(v).select(result, v)

    def around(self, v: Lanes) -> tuple[Lanes, Lanes]:
        """The neighbours of v in the table; the outermost pair where v lies beyond them."""
        builder = self.builder
        if self.few:
            last = builder.sub(self.size, ir.Constant(I64, 1))
            lo, hi = self.scan(v, self.values, 1, last, [(self.values, 0), (self.values, 1)])
            return lo, hi
        highest = splat(builder, builder.trunc(self.size, I32), v.count) - 2
        below = self.search(v, self.values, self.size) - 1
        below = (below < 0).select(below.constant(0), (below > highest).select(highest, below))
        return self.values.gather(below), self.values.gather(below + 1)

    def stochastic(self, g: _Element, v: Lanes, word: Lanes, exact: Any) -> tuple[Lanes, Lanes | None]:
        """As _stochastic, between the table's neighbours of v; r is computed in float64."""
        lo, hi = self.around(v)
        inside = (v > lo) & (v < hi)
        upward = lo.magnitude() <= hi.magnitude()
        inward, outward = upward.select(lo, hi).widen(F64), upward.select(hi, lo).widen(F64)
        fraction = (v.widen(F64) - inward) / (outward - inward)
        fraction = inside.select(fraction, fraction.constant(0.0))
        up, undecided = _up(g, fraction, word, exact)
        end = (v >= hi).select(hi, (v <= lo).select(lo, v))
        result = inside.select(up.select(outward, inward).narrow(v.element), end)
        return result, None if undecided is None else undecided & inside


# ---------------------------------------------------------------------------------------------- rows


@intrinsic
def _largest(typingctx: Any, x: Any, begin: Any, count: Any) -> Any:
    """The largest magnitude in x[begin : begin + count], as a bit pattern; NaN is the largest."""
    pattern = types.int64 if x.dtype == types.float64 else types.int32

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memory, integer = Memory(context, builder, x, args[0]), I64 if x.dtype == types.float64 else I32
        width = 8 if x.dtype == types.float64 else 16
        best = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(integer, width), [0] * width))
        single = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(integer, 1), [0]))

        def body(place: Any, lanes: int) -> None:
            bits = memory.load(builder.add(args[1], place), lanes).magnitude().bits()
            state = best if lanes > 1 else single
            so_far = Lanes(builder, builder.load(state))
            builder.store((bits > so_far).select(bits, so_far).value, state)

        over(builder, args[2], width, body)
        wide, rest = (Lanes(builder, builder.load(state)).largest() for state in (best, single))
        return builder.select(builder.icmp_signed(">", wide, rest), wide, rest)

    return pattern(x, types.int64, types.int64), codegen


@intrinsic
def _largest_each(typingctx: Any, x: Any, begin: Any, count: Any, m: Any) -> Any:
    """m[j] becomes at least the magnitude of x[begin + j], as a bit pattern, for j < count."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = Memory(context, builder, x, args[0]), Memory(context, builder, m, args[3])

        def body(place: Any, lanes: int) -> None:
            bits, so_far = source.load(builder.add(args[1], place), lanes).magnitude().bits(), target.load(place, lanes)
            target.store(place, (bits > so_far).select(bits, so_far))

        over(builder, args[2], 8 if x.dtype == types.float64 else 16, body)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, m), codegen


@intrinsic(prefer_literal=True)
def _largest_in_groups(typingctx: Any, vectors: Any, x: Any, begin: Any, groups: Any, m: Any) -> Any:
    """m[b]: the largest magnitude in the b-th group of x from `begin`; a group is so many vectors of 16 (64 bytes)."""
    size = vectors.literal_value
    width = 8 if x.dtype == types.float64 else 16

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = Memory(context, builder, x, args[1]), Memory(context, builder, m, args[4])
        with cgutils.for_range(builder, args[3]) as loop:
            start = builder.add(args[2], builder.mul(loop.index, ir.Constant(I64, size * width)))
            parts = [
                source.load(builder.add(start, ir.Constant(I64, width * part)), width).magnitude().bits()
                for part in range(size)
            ]
            best = functools.reduce(lambda a, b: (a > b).select(a, b), parts)
            target.put(loop.index, best.largest())
        return context.get_dummy_value()

    return types.void(vectors, x, types.int64, types.int64, m), codegen


@intrinsic
def _single_scales(typingctx: Any, m: Any, count: Any, s: Any, n: Any, rule: Any) -> Any:
    """_power_of_two_scales in lanes; rule: a tuple. False, and nothing done, unless maxima and scales are float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if m.dtype != types.int32 or s.dtype != types.float32:
            return cgutils.false_bit
        source, scale, inverse = (Memory(context, builder, t, args[place]) for t, place in ((m, 0), (s, 2), (n, 3)))

        def body(place: Any, lanes: int) -> None:
            def number(at: int) -> Lanes:
                return splat(builder, builder.trunc(builder.extract_value(args[4], at), I32), lanes)

            def power(e: Lanes) -> Lanes:  # 2^-127 is subnormal
                return (e < -126).select(e.constant(1 << 22), (e + 127) << 23).as_float()

            amax = source.load(place, lanes)
            small = amax < (1 << 23)  # subnormal: bring its leading one to the hidden bit
            lifted = (amax.as_float() * 2.0**23).bits()
            bits = small.select(lifted, amax)
            e = ((bits + number(0)) >> 23) - number(3) - small.select(amax.constant(127 + 23), amax.constant(127))
            e = (e < number(4)).select(number(4), e)
            e = (e > number(5)).select(number(5), e)
            finite = amax < (255 << 23)
            scale.store(place, finite.select(power(e), amax.as_float().constant(float("nan"))))
            inverse.store(place, finite.select(power(amax.constant(0) - e), amax.as_float().constant(float("nan"))))

        over(builder, args[1], 16, body)
        return cgutils.true_bit

    return types.boolean(m, types.int64, s, n, rule), codegen


@intrinsic(prefer_literal=True)
def _quantize_row(
    typingctx: Any,
    mode: Any,
    table: Any,
    gap: Any,
    bare: Any,
    each: Any,
    exact: Any,
    x: Any,
    out: Any,
    begin: Any,
    count: Any,
    scale: Any,
    inverse: Any,
    at: Any,
    f: Any,
    i: Any,
    thresholds: Any,
    values: Any,
    words: Any,
    word_at: Any,
    lows: Any,
    low_at: Any,
    bits: Any,
    shift: Any,
) -> Any:
    """Quantize x[begin : begin + count] into out; 1 where a stochastic decision needs the lower random bits, else 0.

    Compiled in: mode; table: GRID, FEW, MANY or SYMMETRIC; gap, bare as in plan.Variant; exact: the lower random bits
    are given; each: element j has the scale at + j, else at + (j >> shift), with groups of whole vectors.
    """
    m, kind, gaps, bares, own, final = (t.literal_value for t in (mode, table, gap, bare, each, exact))
    plain, kind = kind == SYMMETRIC, 0 if kind == SYMMETRIC else kind
    compute = F64 if f.dtype == types.float64 else F32  # f and i: tuples, so that nothing is read again in the loops

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = {6: x, 7: out, 10: scale, 11: inverse, 15: thresholds, 16: values, 17: words, 19: lows}
        memory = {place: Memory(context, builder, kind, args[place]) for place, kind in arrays.items()}
        begin, count, at, word_at, low_at, bits, group = (args[place] for place in (8, 9, 12, 18, 20, 21, 22))
        width = 1 if kind == 2 else (16 if compute == F32 else 8)
        undecided_at = cgutils.alloca_once_value(builder, ir.Constant(I32, 0))
        elements = {lanes: _Element(builder, args[13], args[14], lanes, plain) for lanes in {width, 1}}
        lengths = [context.make_array(arrays[p])(context, builder, args[p]).nitems for p in (15, 16)]
        look_up = _Table(builder, memory[15], memory[16], *lengths, kind == FEW)
        limit = builder.shl(ir.Constant(I64, 1), bits)
        power, unused = builder.sitofp(limit, F64), builder.sub(ir.Constant(I64, 32), bits)

        def body(place: Any, lanes: int) -> None:
            g, index = elements[lanes], builder.add(begin, place)
            source = memory[6].load(index, lanes)
            if own:
                where = builder.add(at, place)
                s, n = memory[10].load(where, lanes), memory[11].load(where, lanes)
            else:
                where = builder.add(at, builder.lshr(place, group))
                s, n = (splat(builder, memory[slot].scalar(where), lanes) for slot in (10, 11))
            v = (source.widen(n.element) * n).widen(compute)
            if kind or m in (_POSITIVE, _NEGATIVE, _ODD):  # an underflow keeps its side of zero
                least = (v.bits().constant(1)).as_float().with_sign_of(v)
                v = (v.equals(0.0) & source.differs(0.0)).select(least, v)
            undecided = None
            if m == STOCHASTIC:
                word = memory[17].load(builder.add(word_at, place), lanes)
                given = None
                if final:
                    low = memory[19].load(builder.add(low_at, place), lanes)
                    given = (low, *(splat(builder, value, lanes) for value in (power, limit, unused)))
                if kind:
                    r, undecided = look_up.stochastic(g, v, word, given)
                else:
                    r, undecided = _stochastic(g, v, word, given, gaps)
            else:
                r = look_up.round(v) if kind else g.round(v, m, gaps, bares)
            wide = F64 if F64 in (r.element, s.element) else F32
            memory[7].store(index, (r.widen(wide) * s.widen(wide)).narrow(memory[7].element))
            if undecided is not None:
                seen = builder.zext(undecided.any(), I32)
                builder.store(builder.or_(builder.load(undecided_at), seen), undecided_at)

        over(builder, count, width, body)
        return builder.load(undecided_at)

    i64 = types.int64
    arguments = (mode, table, gap, bare, each, exact, x, out, i64, i64, scale, inverse, i64, f, i, thresholds, values)
    return types.int32(*arguments, words, i64, lows, i64, i64, i64), codegen


# ---------------------------------------------------------------------------------------------- kernels


@njit(cache=True, nogil=True)
def _maxima(x, m, top, bottom, columns, tile_columns):
    """m[b]: the largest magnitude of tile b in the rows [top, bottom), as a bit pattern; NaN is the largest."""
    whole = 0
    vector = 64 // x.itemsize
    if bottom - top == 1 and tile_columns in (vector, 2 * vector, 4 * vector):
        whole = columns // tile_columns
        if tile_columns == vector:
            _largest_in_groups(1, x, top * columns, whole, m)
        elif tile_columns == 2 * vector:
            _largest_in_groups(2, x, top * columns, whole, m)
        else:
            _largest_in_groups(4, x, top * columns, whole, m)
    m[whole:] = 0
    for row in range(top, bottom):
        begin = row * columns
        if tile_columns == 1:
            _largest_each(x, begin, columns, m)
        else:
            for b in range(whole, len(m)):
                low = b * tile_columns
                m[b] = max(m[b], _largest(x, begin + low, min(tile_columns, columns - low)))


@intrinsic
def _power_of_two(typingctx: Any, e: Any) -> Any:
    """2^e as a float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        field = builder.add(args[0], ir.Constant(I64, 1023))
        return builder.bitcast(builder.shl(field, ir.Constant(I64, 52)), F64)

    return types.float64(types.int64), codegen


@njit(cache=True, nogil=True)
def _power_of_two_scales(m, s, n, rule):
    """The scales s and their inverses n from the maxima m; rule: see plan._rule."""
    if _single_scales(m, len(m), s, n, (rule[0], rule[1], rule[2], rule[3], rule[4], rule[5])):
        return
    add, field, unit, emax, lowest, highest = rule[0], rule[1], rule[2], rule[3], rule[4], rule[5]
    infinite = (unit + unit + 1) << field
    for b in range(len(m)):
        amax, lift = np.int64(m[b]), np.int64(0)
        while 0 < amax < (1 << field):  # subnormal: bring its leading one to the hidden bit
            amax, lift = amax << 1, lift + 1
        e = ((amax + add) >> field) - unit - emax - lift
        e = min(max(e, lowest), highest) if amax > 0 else lowest
        finite = m[b] < infinite
        s[b] = _power_of_two(e) if finite else np.nan
        n[b] = _power_of_two(-e) if finite else np.nan


_PIECE = 512  # elements whose undecided stochastic roundings are settled together


@functools.cache
def kernel_for(variant: Variant, table: int, wide: bool) -> Any:
    """The kernel of a plan's variant. table: GRID, FEW, MANY or SYMMETRIC. wide: float64 arithmetic."""
    mode, gap, bare = variant.mode, int(variant.gap), int(variant.bare)
    pattern = np.int64 if variant.double else np.int32
    lanes = 8 if wide else 16

    @njit(cache=True, nogil=True)
    def kernel(x, out, shape, tile, f, i, thresholds, values, rule, scale, inverse, key, offset, bits, first, last):
        """Quantize the rows of tiles [first, last) of x into out; both flat.

        rule: as plan._rule gives it, or empty: then the scales of all tiles are given, with their inverses.
        key: seed (2 words), stream, step; bits: k. A stochastic call must not have out = x.
        """
        ft = (f[0], f[1], f[2], f[3], f[4])
        it = (i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9])
        rows, columns = shape
        tile_rows, tile_columns = tile
        down, across = -(-rows // tile_rows), -(-columns // tile_columns)
        words = np.empty(columns + 256 if mode == STOCHASTIC else 0, np.uint16)
        lows = np.empty(_PIECE + 256 if mode == STOCHASTIC else 0, np.uint16)
        m = np.empty(across if len(rule) > 0 else 0, pattern)
        s, n, base = scale, inverse, 0
        if len(rule) > 0:
            s, n = np.empty(across, scale.dtype), np.empty(across, scale.dtype)
        # a stretch of a row has one scale, or groups of whole vectors with one scale each, or a scale an element
        sections, section, shift = across, tile_columns, 62
        if tile_columns == 1:
            sections, section = 1, columns
        else:
            for power in range(3, 9):
                if tile_columns == 1 << power and tile_columns >= lanes:
                    sections, section, shift = 1, columns, power
        for tile_row in range(first, last):
            top = (tile_row // down) * rows + (tile_row % down) * tile_rows
            bottom = min(top + tile_rows, (tile_row // down + 1) * rows)
            if len(rule) > 0:
                _maxima(x, m, top, bottom, columns, tile_columns)
                _power_of_two_scales(m, s, n, rule)
            else:
                base = tile_row * across
            for row in range(top, bottom):
                begin = row * columns
                skip = (offset + begin) & 127
                if mode == STOCHASTIC:
                    _fill_random(words, offset + begin, columns, 0, key)
                for part in range(sections):
                    end = min((part + 1) * section, columns)
                    for low in range(part * section, end, _PIECE):
                        count = min(_PIECE, end - low)
                        at = base + part + ((low - part * section) >> shift)
                        if tile_columns == 1:
                            undecided = _quantize_row(
                                mode, table, gap, bare, 1, 0, x, out, begin + low, count, s, n, base + low,
                                ft, it, thresholds, values, words, skip + low, lows, 0, bits, 0,
                            )  # fmt: skip
                        else:
                            undecided = _quantize_row(
                                mode, table, gap, bare, 0, 0, x, out, begin + low, count, s, n, at,
                                ft, it, thresholds, values, words, skip + low, lows, 0, bits, shift,
                            )  # fmt: skip
                        if mode == STOCHASTIC and bits > 16 and undecided != 0:
                            start = offset + begin + low
                            _fill_random(lows, start, count, 1, key)
                            if tile_columns == 1:
                                _quantize_row(
                                    mode, table, gap, bare, 1, 1, x, out, begin + low, count, s, n, base + low,
                                    ft, it, thresholds, values, words, skip + low, lows, start & 127, bits, 0,
                                )  # fmt: skip
                            else:
                                _quantize_row(
                                    mode, table, gap, bare, 0, 1, x, out, begin + low, count, s, n, at,
                                    ft, it, thresholds, values, words, skip + low, lows, start & 127, bits, shift,
                                )  # fmt: skip

    return kernel


@njit(cache=True, nogil=True)
def tile_maxima(x, shape, tile, maxima):
    """The largest magnitude of every tile, as a bit pattern."""
    rows, columns = shape
    tile_rows, tile_columns = tile
    down, across = -(-rows // tile_rows), -(-columns // tile_columns)
    for tile_row in range(len(maxima) // max(across, 1)):
        top = (tile_row // down) * rows + (tile_row % down) * tile_rows
        bottom = min(top + tile_rows, (tile_row // down + 1) * rows)
        m = maxima[tile_row * across : (tile_row + 1) * across]
        _maxima(x, m, top, bottom, columns, tile_columns)


@njit(cache=True, nogil=True)
def overflow_to_special(x, out, largest, special, for_positive, for_negative):
    """Overflow.SPECIAL after rounding on a grid that goes on to 2^(emax + 1)."""
    for j in range(len(x)):
        r = out[j]
        if abs(r) > largest:
            passes = for_positive if r > 0 else for_negative
            out[j] = np.copysign(special if passes or np.isinf(x[j]) else largest, r)
