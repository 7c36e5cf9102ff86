"""What the kernels find out about operands: their extremes, and the codes that `pinned` reads.

The place of a number is the place of its last bit: log2 of the largest power of two that divides it, plus 150. The
field of a number is its exponent plus 127, as float32 holds it.
"""

# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated, assignment"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lpsim.accumulators.registers import I32, I64, LANES, VI, Emitter, i64, integer

VECTORS = 4  # whose bytes make one vector of codes
CODES = 3 * LANES  # words of codes for each k of a panel
PLACE_OF_ONE = 150
_NOWHERE = 2000  # the place of zero, for a minimum


class _Words(Emitter):
    """Emits what is known of vectors of numbers, as bit patterns."""

    def __init__(self, builder: ir.IRBuilder, words: ir.Value) -> None:
        super().__init__(builder)
        b = builder
        self.words, self.magnitude = words, b.and_(words, integer(0x7FFFFFFF))
        self.zero = b.icmp_signed("==", self.magnitude, integer(0))
        self.field = b.lshr(self.magnitude, integer(23))
        hidden = b.shl(self.smaller(self.field, integer(1)), integer(23))
        self.whole = b.or_(b.and_(words, integer(0x7FFFFF)), hidden)
        self.below = self.count("cttz", self.whole)  # zeros below the last bit
        self.place = b.add(self.larger(self.field, integer(1)), self.below)

    def count(self, what: str, x: ir.Value) -> ir.Value:
        return self.call(f"llvm.{what}.v16i32", x, ir.Constant(ir.IntType(1), 0), result=VI)

    def larger(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.call("llvm.smax.v16i32", x, y, result=VI)

    def smaller(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.call("llvm.smin.v16i32", x, y, result=VI)

    def unless(self, exception: ir.Value, x: ir.Value, otherwise: int) -> ir.Value:
        return self.b.select(exception, integer(otherwise), x)


def _array(context: Any, builder: Any, signature: Any, args: Any, n: int) -> Any:
    return context.make_array(signature.args[n])(context, builder, args[n]).data


@intrinsic
def _vector_extremes(typingctx: Any, words: Any, vectors: Any, found: Any) -> Any:
    """found[:48]: the largest magnitudes, the least places, the most significant bits of words[: 16 · vectors]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data, result = (_array(context, builder, signature, args, n) for n in (0, 2))
        emit = Emitter(builder)
        start = integer(0), integer(_NOWHERE), integer(0)
        kept = [cgutils.alloca_once_value(builder, value) for value in start]
        with cgutils.for_range_slice(builder, i64(0), args[1], i64(1), I64, inc=True) as (i, _):
            x = _Words(builder, emit.load(data, builder.mul(i, i64(4 * LANES)), VI))
            top = builder.sub(integer(32), x.count("ctlz", x.whole))
            largest, least, most = (builder.load(k, typ=VI) for k in kept)
            builder.store(x.larger(largest, x.magnitude), kept[0])
            builder.store(x.smaller(least, x.unless(x.zero, x.place, _NOWHERE)), kept[1])
            builder.store(x.larger(most, builder.sub(top, x.below)), kept[2])
        for n, k in enumerate(kept):
            builder.store(builder.load(k, typ=VI), emit.at(result, i64(64 * n), VI), align=4)
        return context.get_dummy_value()

    return types.void(words, types.int64, found), codegen


@intrinsic
def _vector_lhs(typingctx: Any, words: Any, vectors: Any, numbers: Any, exponents: Any, places: Any) -> Any:
    """lhs_codes of words[: 16 · vectors]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, given, *targets = (_array(context, builder, signature, args, n) for n in (0, 2, 3, 4))
        emit, b = Emitter(builder), builder
        least, factor, offset, of_zero, bottom = (emit.splat(emit.load(given, i64(4 * n), I32), VI) for n in range(5))
        with cgutils.for_range_slice(b, i64(0), args[1], i64(1), I64, inc=True) as (i, _):
            at = b.mul(i, i64(4 * LANES))
            x = _Words(b, emit.load(source, at, VI))
            exponent = b.add(b.mul(factor, x.larger(x.field, least)), offset)
            codes = b.select(x.zero, of_zero, exponent), x.unless(x.zero, b.sub(x.place, bottom), 255)
            for code, target in zip(codes, targets, strict=True):
                b.store(b.mul(code, integer(0x01010101)), emit.at(target, at, VI), align=4)
        return context.get_dummy_value()

    return types.void(words, types.int64, numbers, exponents, places), codegen


@intrinsic
def _vector_rhs(
    typingctx: Any, panel: Any, begin: Any, depth: Any, least: Any, shift: Any, rise: Any, codes: Any, at: Any
) -> Any:
    """See rhs_codes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = (_array(context, builder, signature, args, n) for n in (0, 6))
        emit, b = Emitter(builder), builder
        least, shift, rise = (emit.splat(b.trunc(args[n], I32), VI) for n in (3, 4, 5))
        with cgutils.for_range_slice(b, i64(0), args[2], i64(1), I64, inc=True) as (k, _):
            packed = [integer(0)] * 3
            for v in range(VECTORS):
                first = b.add(args[1], b.add(b.mul(k, i64(VECTORS * LANES)), i64(v * LANES)))
                x = _Words(b, emit.load(source, b.mul(first, i64(4)), VI))
                field = x.unless(x.zero, b.add(x.larger(x.field, least), shift), 0)
                place = x.unless(x.zero, x.smaller(b.add(x.place, rise), integer(255)), 255)
                negative = b.icmp_signed("<", x.words, integer(0))
                signed = x.unless(b.not_(negative), place, 255), x.unless(negative, place, 255)
                packed = [b.or_(p, b.shl(c, integer(8 * v))) for p, c in zip(packed, (field, *signed), strict=True)]
            for n, words in enumerate(packed):
                place_of_words = b.add(args[7], b.add(b.mul(k, i64(CODES)), i64(n * LANES)))
                b.store(words, emit.at(target, b.mul(place_of_words, i64(4)), VI), align=4)
        return context.get_dummy_value()

    number = types.int64
    return types.void(panel, number, number, number, number, number, codes, number), codegen


_WORDS = types.int32[::1]
_SIGNATURE = types.void(_WORDS, _WORDS, _WORDS, _WORDS)


@njit(_SIGNATURE, nogil=True, cache=True)
def lhs_codes(words, numbers, exponents, places):
    """Of each number, in all bytes: factor · its field + offset; its place − bottom, 255 for zero.

    numbers: the least field, factor, offset, the exponent's code of zero, bottom.
    """
    whole = words.size // LANES
    _vector_lhs(words, whole, numbers, exponents, places)
    rest = words.size - whole * LANES
    if rest > 0:
        source, first, second = np.zeros(LANES, np.int32), np.empty(LANES, np.int32), np.empty(LANES, np.int32)
        source[:rest] = words[whole * LANES :]
        _vector_lhs(source, 1, numbers, first, second)
        exponents[whole * LANES :], places[whole * LANES :] = first[:rest], second[:rest]


@njit(nogil=True, cache=True)
def rhs_codes(panel, begin, depth, least, shift, rise, codes, at):
    """Of a panel [depth, 64], for each row 3 vectors of bytes, in which byte v of word l is of column 16·v + l.

    The fields, at least `least`, + shift, 0 for zero; the places of the negative numbers + rise, at most 255, which
    others have; the same of the positive ones.
    """
    _vector_rhs(panel, begin, depth, least, shift, rise, codes, at)


@njit(types.UniTuple(types.int64, 3)(_WORDS), nogil=True, cache=True)
def extremes(words):
    """The largest magnitude as bits; the smallest exponent of a last bit; the most significant bits.

    words: float32 numbers as bit patterns. Zeros count for nothing.
    """
    whole = words.size // LANES
    found, last = np.empty(3 * LANES, np.int32), np.empty(3 * LANES, np.int32)
    rest = np.zeros(LANES, np.int32)
    rest[: words.size - whole * LANES] = words[whole * LANES :]
    _vector_extremes(words, whole, found)
    _vector_extremes(rest, 1, last)
    largest, least, most = np.int64(0), np.int64(_NOWHERE), np.int64(0)
    for i in range(LANES):
        largest = max(largest, np.int64(found[i]), np.int64(last[i]))
        least = min(least, np.int64(found[LANES + i]), np.int64(last[LANES + i]))
        most = max(most, np.int64(found[2 * LANES + i]), np.int64(last[2 * LANES + i]))
    return largest, least - PLACE_OF_ONE, most
