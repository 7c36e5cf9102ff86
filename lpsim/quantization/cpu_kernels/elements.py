"""How one element is rounded, in vector lanes; equal to `reference.round_value` bit for bit.

Let a = |x| / scale and 2^e <= a the power of two below it, but at least the smallest normal number. The numbers of the
format around a are multiples of q = 2^(e − m). Adding C = 2^p·q, where p is the width of the machine's own
significand, pushes everything below q out of the sum, rounded to nearest even; subtracting C gives the rounded
value. The other roundings start from that value's truncation and the exact remainder; stochastic rounding from a / q
in fixed point. So all formats are run-time parameters of one kernel; the rounding mode, the compute type and two rare
properties are compiled in.

A scale that is a power of two need not be divided out: the format's numbers times the scale are a grid of the same
kind, with another smallest normal number and another range (`Element.scaled`).
"""

from __future__ import annotations

import copy
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from lpsim.quantization.cpu_kernels.simd import F64, I32, I64, Lanes, Memory, splat
from lpsim.quantization.plan import MODES

EVEN, AWAY, ZERO, POSITIVE, NEGATIVE, ODD, STOCHASTIC = range(len(MODES))
# what an element is: a float or fixed format, a table to count or to search in, a float format with a symmetric range
GRID, FEW, MANY, SYMMETRIC = range(4)
OPEN = 0xFFFF  # marks a stochastic decision that the upper 16 random bits alone do not make


class Element:
    """The parameters of an element format, in all lanes: see plan.plan. p is 23 or 52.

    plain: the range is symmetric and there is a negative zero, so that magnitudes are all that must be limited.
    """

    def __init__(self, builder: Any, floats: Memory, integers: Memory, lanes: int, plain: bool) -> None:
        self.plain = plain

        def f(place: int) -> Lanes:
            return splat(builder, floats.scalar(place), lanes)

        def i(place: int) -> Lanes:
            return splat(builder, integers.scalar(place), lanes)

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
        self.random_bits = i(7)  # min(k, 16)
        self.random_shift = i(8)  # 16 − min(k, 16)
        self.random_limit = i(9)  # 2^min(k, 16)
        self.lower_bits = i(10)  # 1 where k > 16

    def scaled(self, emin: Lanes, lowest: Lanes | None, highest: Lanes) -> Element:
        """The format times a power of two, given its smallest normal number, as bits, and the ends of its range.

        lowest: None if plain, where the highest says it all.
        """
        result = copy.copy(self)
        result.emin, result.highest = emin, highest
        if lowest is not None:
            result.lowest = lowest
        return result

    def clamp(self, v: Lanes) -> tuple[Lanes, Lanes]:
        """v within the finite range, and its magnitude; NaN stays NaN."""
        if self.plain:
            a = v.magnitude()
            return v, (a > self.highest).select(self.highest, a)
        v = (v > self.highest).select(self.highest, v)
        v = (v < self.lowest).select(self.lowest, v)
        return v, v.magnitude()

    def bounded(self, v: Lanes) -> tuple[Lanes, Lanes]:
        """As clamp, but the magnitude given for a NaN is that of an end of the range."""
        if self.plain:
            a = v.magnitude()
            return v, (a < self.highest).select(a, self.highest)
        v = (v < self.highest).select(v, self.highest)
        v = (v > self.lowest).select(v, self.lowest)
        return v, v.magnitude()

    def signed(self, r: Lanes, v: Lanes) -> Lanes:
        """The magnitude r with the sign of v, zeros as the format has them."""
        return r.with_sign_of(v) if self.plain else r.with_sign_of(v) + self.zero

    def binade(self, a: Lanes) -> Lanes:
        """The bits of 2^e: the exponent field where it stands in a float."""
        exponent = a.bits() & self.exponent
        return (exponent > self.emin).select(exponent, self.emin)

    def neighbours(self, a: Lanes, gap: bool) -> tuple[Lanes, Lanes, Lanes]:
        """(a rounded to nearest with ties to an even multiple of q, C, q). gap: see plan.Variant."""
        c = (self.binade(a) + self.shift).as_float()
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
        if mode != EVEN or bare:
            t = (r > a).select(r - q, r)
            rest = a - t
            if mode == EVEN:
                r = ((rest + rest).equals(q) & self.even(t, c, a, bare)).select(t, r)
            elif mode == AWAY:
                r = (rest + rest >= q).select(t + q, t)
            elif mode == ZERO:
                r = t
            elif mode == POSITIVE:
                r = ((rest > 0.0) & (v > 0.0)).select(t + q, t)
            elif mode == NEGATIVE:
                r = ((rest > 0.0) & (v < 0.0)).select(t + q, t)
            else:
                r = ((rest > 0.0) & self.even(t, c, a, bare)).select(t + q, t)
        return self.signed(r, v)

    def stochastic(self, v: Lanes, word: Lanes, gap: bool, nan: bool) -> tuple[Lanes, Lanes]:
        """(the scaled value v rounded by the upper 16 bits of the random word, OPEN where these do not decide).

        Where the second number is OPEN, the lower 16 bits may change the result, if k > 16 random bits are used. NaN
        stays NaN; nan: whether there may be some.
        """
        inside, a = self.bounded(v)
        binade = self.binade(a)
        if gap:
            binade = (a < self.min_normal).select(self.emin + self.precision - self.shift, binade)
        mantissa = self.precision - self.shift
        to_fixed = ((self.unit + self.unit + self.random_bits) << self.field) + mantissa - binade
        drawn = word.widen(binade.element) >> self.random_shift
        total = (a * to_fixed.as_float()).to_integer(binade.element) + drawn
        r = (total >> self.random_bits).to_float(a.element) * (binade - mantissa).as_float()
        r = self.signed(r, inside)
        return v.equals(v).select(r, v) if nan else r, total & OPEN

    def stochastic_exactly(self, v: Lanes, word: Lanes, low: Lanes, draw: Draw, gap: bool) -> Lanes:
        """The scaled value v rounded by both halves of the random word. NaN stays NaN."""
        v, a = self.clamp(v)
        r, _, q = self.neighbours(a, gap)
        t = (r > a).select(r - q, r)
        inverse = (((self.unit + self.unit) << self.field) - q.bits()).as_float()  # 1/q, a power of two
        fraction = (a - t) * inverse
        fraction = (fraction > 0.0).select(fraction, fraction.constant(0.0))  # NaN draws like 0
        return self.signed(draw.up(fraction, word, low).select(t + q, t), v)


class Draw:
    """k random bits of a word: `bits` is k, an i64."""

    def __init__(self, builder: Any, bits: Any, lanes: int) -> None:
        limit = builder.shl(ir.Constant(I64, 1), bits)
        self.power = splat(builder, builder.sitofp(limit, F64), lanes)
        self.limit = splat(builder, limit, lanes)
        self.unused = splat(builder, builder.sub(ir.Constant(I64, 32), bits), lanes)

    def up(self, fraction: Lanes, word: Lanes, low: Lanes) -> Lanes:
        """Whether the remainder, cut to k bits, and the random bits make a whole step. fraction: in [0, 1)."""
        drawn = (word.widen(I64) << 16 | low.widen(I64)) >> self.unused
        return (fraction.widen(F64) * self.power).to_integer(I64) + drawn >= self.limit


class Table:
    """A codebook's thresholds and values in memory. few: compare with all of them; otherwise search by halves."""

    def __init__(self, builder: Any, thresholds: Memory, values: Memory, length: Any, size: Any, few: bool) -> None:
        self.builder, self.thresholds, self.values, self.few = builder, thresholds, values, few
        self.length, self.size = length, size  # of thresholds and of values, i64

    def scan(self, v: Lanes, entries: Memory, begin: int, end: Any, results: list[tuple[Memory, int]]) -> list[Lanes]:
        """Looks for k, the last place in [begin, end) whose entry is at most v, or begin − 1 where there is none.

        Gives for each (memory, shift) of `results` the memory's element at k + shift.
        """
        builder = self.builder

        def everywhere(memory: Memory, index: Any) -> Lanes:
            return splat(builder, memory.scalar(index), v.count)

        states = [
            cgutils.alloca_once_value(builder, everywhere(memory, begin + shift - 1).value) for memory, shift in results
        ]

        def one(k: Any) -> None:
            reached = v >= everywhere(entries, k)
            for state, (memory, shift) in zip(states, results, strict=True):
                other = everywhere(memory, builder.add(k, ir.Constant(I64, shift)))
                builder.store(reached.select(other, Lanes(builder, builder.load(state))).value, state)

        start = ir.Constant(I64, begin)
        fours = builder.add(start, builder.and_(builder.sub(end, start), ir.Constant(I64, -4)))
        with cgutils.for_range_slice(builder, start, fours, ir.Constant(I64, 4)) as (k, _):
            for place in range(4):
                one(builder.add(k, ir.Constant(I64, place)))
        with cgutils.for_range_slice(builder, fours, end, ir.Constant(I64, 1)) as (k, _):
            one(k)
        return [Lanes(builder, builder.load(state)) for state in states]

    def search(self, v: Lanes, entries: Memory, length: Any) -> Lanes:
        """How many of the ascending entries are at most v."""
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

    def stochastic(self, g: Element, v: Lanes, word: Lanes) -> tuple[Lanes, Lanes]:
        """(v rounded to one of its neighbours, OPEN where that needs the exact numbers).

        Up where r·2^16 + w >= 2^16, with r the share of the gap between the neighbours that lies behind v, and w the
        random word. The oracle divides in float64; here both sides are multiplied by the gap, in float32, which is off
        by less than an eighth of the gap: where that could decide, the exact numbers must.
        """
        inside, inward, outward, ends = self._between(v)
        gap = inside.select((outward - inward).magnitude(), v.constant(1.0))
        behind = inside.select((v - inward).magnitude(), v.constant(0.0))
        drawn = (word.widen(g.random_shift.element) >> g.random_shift).to_float(v.element)
        excess = behind * g.random_scale - gap * (g.random_scale - drawn)
        margin = gap * g.random_scale * 2.0**-19
        near = (excess > v.constant(0.0) - margin - gap * g.lower_bits.to_float(v.element)) & (excess < margin)
        openness = (inside & near).select(g.random_limit.constant(OPEN), g.random_limit.constant(0))
        return inside.select((excess >= 0.0).select(outward, inward), ends), openness

    def stochastic_exactly(self, v: Lanes, word: Lanes, low: Lanes, draw: Draw) -> Lanes:
        """v rounded by both halves of the random word; the remainder is computed in float64."""
        inside, inward, outward, ends = self._between(v)
        begin, end = inward.widen(F64), outward.widen(F64)
        fraction = (v.widen(F64) - begin) / (end - begin)
        up = draw.up(inside.select(fraction, fraction.constant(0.0)), word, low)
        return inside.select(up.select(outward, inward), ends)

    def _between(self, v: Lanes) -> tuple[Lanes, Lanes, Lanes, Lanes]:
        """(whether v lies between two values, the one nearer to zero, the other, what v becomes where it does not)."""
        lo, hi = self.around(v)
        upward = lo.magnitude() <= hi.magnitude()
        ends = (v >= hi).select(hi, (v <= lo).select(lo, v))
        return (v > lo) & (v < hi), upward.select(lo, hi), upward.select(hi, lo), ends
