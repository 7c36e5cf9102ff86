"""How a stretch of a row is quantized: vectors of elements, each with its block's scale.

A *row* here is a compiled function. There is one for each way of rounding, and the loops call it by its address, so
that they need not be compiled with each of them. Its arguments are all int64: the addresses of the first element and of
its result, how many elements, three addresses of what is known of their blocks, the shift from elements to blocks, the
addresses of the upper and the lower 16 random bits, and that of the call's record.
"""

# mypy: disable-error-code="no-untyped-def, call-arg"

from __future__ import annotations

import enum
import functools
from pathlib import Path
from typing import Any, NamedTuple

from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from lpsim.formats import reference
from lpsim.quantization.cpu_kernels.cache import fingerprint
from lpsim.quantization.cpu_kernels.elements import (
    FEW,
    GRID,
    MANY,
    NEGATIVE,
    ODD,
    OPEN,
    POSITIVE,
    STOCHASTIC,
    SYMMETRIC,
    Draw,
    Element,
    Table,
)
from lpsim.quantization.cpu_kernels.simd import F32, F64, I32, I64, Lanes, Maximum, Memory, over, splat

_FOLDER = Path(__file__).parent
FINGERPRINT = fingerprint(*sorted(_FOLDER.glob("*.py")), _FOLDER.parent / "plan.py", Path(reference.__file__))


ACROSS, DOWN = 1, 2  # how the parts of a block lie


class Field(enum.IntEnum):
    """What stands where in a call's record, an array of int64. Names that end with _AT are addresses."""

    ROWS, COLUMNS, TILE_ROWS, TILE_COLUMNS, ELEMENTS, BITS, SCALES, LANES = range(8)
    FLOATS_AT, INTEGERS_AT, THRESHOLDS_AT, THRESHOLDS, VALUES_AT, VALUES = range(8, 14)
    RULE_AT, SCALE_AT, INVERSE_AT, NUMBERS_AT, SCALE_FLOATS_AT, SCALE_INTEGERS_AT = range(14, 20)
    ROW_AT, EXACT_ROW_AT, PLAIN_ROW_AT, LARGE_ROW_AT = range(20, 24)
    AHEAD = 24  # where the tensor is larger than the cache, elements from one row of tiles to the next; else 0
    SUB_ROWS, SUB_COLUMNS = range(25, 27)  # of the part of a tile with one scale
    BLOCK_SHIFT = 27  # log2 of a block's columns, where blocks have parts
    MAXIMA_AT = 28  # of the largest magnitudes of all tiles, where they are known; else 0


class Way(NamedTuple):
    """What is compiled into a row.

    mode, gap, bare, double: as in plan.Variant. kind: GRID, FEW, MANY or SYMMETRIC. wide, scale_wide: whether the
    arithmetic and the scales are float64, not float32. each: every element has its own scale, else element j the one at
    j >> shift, with groups of whole vectors, or of 2^split elements where split > 0. scalar: there are no blocks, so
    that NaN may stand anywhere. divided: blocks have parts with exponents of their own, beside (ACROSS) or below (DOWN)
    each other.
    """

    mode: int
    kind: int
    gap: bool
    bare: bool
    double: bool
    wide: bool
    scale_wide: bool
    each: bool
    scalar: bool
    split: int = 0
    divided: int = 0

    @property
    def plain(self) -> bool:
        """Whether a scale that is a power of two need not be divided out."""
        return self.kind in (GRID, SYMMETRIC) and not (self.gap or self.bare or self.wide)

    def code(self) -> int:
        """The fields as bits of a number, which Numba takes for a literal."""
        flags = sum(int(flag) << place for place, flag in enumerate(self[2:9]))
        return flags | self.kind << 7 | self.mode << 9 | self.split << 12 | self.divided << 14

    @classmethod
    def of(cls, code: int) -> Way:
        """The inverse of `code`."""
        flags = (bool(code >> place & 1) for place in range(7))
        way = cls(code >> 9 & 7, code >> 7 & 3, *flags)
        return way._replace(split=code >> 12 & 3, divided=code >> 14)

    def of_block(self, builder: Any, memory: Memory, place: Any, shift: Any, lanes: int) -> Lanes:
        """For the elements from `place` on, what `memory` holds of their blocks."""
        if self.each:
            return memory.load(place, lanes)
        block = builder.lshr(place, shift)
        if self.split == 0 or lanes == 1:
            return splat(builder, memory.scalar(block), lanes)
        some = memory.load(block, max(lanes >> self.split, 1))
        return some.shuffled(some, [lane >> self.split for lane in range(lanes)])


class _Record:
    """What a row reads of its call's record."""

    def __init__(self, builder: Any, address: Any, wide: bool) -> None:
        self.builder, self.memory = builder, Memory.at(builder, I64, address)
        self.compute, self.integer = (F64, I64) if wide else (F32, I32)

    def __getitem__(self, field: Field) -> Any:
        return self.memory.scalar(int(field))

    def element(self, lanes: int, plain: bool) -> Element:
        floats = Memory.at(self.builder, self.compute, self[Field.FLOATS_AT])
        integers = Memory.at(self.builder, self.integer, self[Field.INTEGERS_AT])
        return Element(self.builder, floats, integers, lanes, plain)

    def table(self, few: bool) -> Table:
        thresholds = Memory.at(self.builder, self.compute, self[Field.THRESHOLDS_AT])
        values = Memory.at(self.builder, self.compute, self[Field.VALUES_AT])
        return Table(self.builder, thresholds, values, self[Field.THRESHOLDS], self[Field.VALUES], few)


def _result(builder: Any, openness: Maximum) -> Any:
    """1 where a stochastic decision is OPEN, else 0."""
    return builder.zext(builder.icmp_signed("==", openness.value(), ir.Constant(openness.element, OPEN)), I64)


@intrinsic(prefer_literal=True)
def _row(
    typingctx: Any, code: Any, exact: Any, x: Any, out: Any, count: Any, scale: Any, inverse: Any, unused: Any,
    shift: Any, words: Any, lows: Any, record: Any,
) -> Any:  # fmt: skip
    """Divides by the scale, rounds and multiplies. Gives 1 where a stochastic decision needs the exact numbers, else 0.

    Compiled in: code, that of a Way; exact: whether to decide by the exact numbers and all random bits.
    """
    way, final = Way.of(code.literal_value), bool(exact.literal_value)
    mode, grid, plain = way.mode, way.kind in (GRID, SYMMETRIC), way.kind == SYMMETRIC
    width = 1 if way.kind == MANY else (8 if way.wide else 16)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, out, count, scale, inverse, _, shift, words, lows, record = args[2:]
        given = _Record(builder, record, way.wide)
        source = Memory.at(builder, F64 if way.double else F32, x)
        target = Memory.at(builder, source.element, out)
        scales, inverses = (Memory.at(builder, F64 if way.scale_wide else F32, place) for place in (scale, inverse))
        upper, lower = (Memory.at(builder, ir.IntType(16), place) for place in (words, lows))
        openness, ahead = Maximum(builder, given.integer, width), given[Field.AHEAD]
        large = builder.icmp_signed("!=", ahead, ir.Constant(I64, 0))
        elements = {lanes: given.element(lanes, plain) for lanes in {width, 1}}
        draws = {lanes: Draw(builder, given[Field.BITS], lanes) for lanes in {width, 1}}
        look_up = given.table(way.kind == FEW)

        def body(place: Any, lanes: int) -> None:
            if lanes > 1:
                with builder.if_then(large):
                    source.prefetch(builder.add(place, ahead))
            g, value = elements[lanes], source.load(place, lanes)
            s, n = (way.of_block(builder, memory, place, shift, lanes) for memory in (scales, inverses))
            v = (value.widen(n.element) * n).widen(given.compute)
            if not grid or mode in (POSITIVE, NEGATIVE, ODD):  # an underflow keeps its side of zero
                least = (v.bits().constant(1)).as_float().with_sign_of(v)
                v = (v.equals(0.0) & value.differs(0.0)).select(least, v)
            if mode != STOCHASTIC:
                r = g.round(v, mode, way.gap, way.bare) if grid else look_up.round(v)
            else:
                word = upper.load(place, lanes)
                if final:
                    low, draw = lower.load(place, lanes), draws[lanes]
                    if grid:
                        r = g.stochastic_exactly(v, word, low, draw, way.gap)
                    else:
                        r = look_up.stochastic_exactly(v, word, low, draw)
                else:
                    r, how = g.stochastic(v, word, way.gap, True) if grid else look_up.stochastic(g, v, word)
                    openness.include(how)
            wide = F64 if F64 in (r.element, s.element) else F32
            target.store(place, (r.widen(wide) * s.widen(wide)).narrow(target.element))

        over(builder, count, width, body)
        return _result(builder, openness)

    return types.int64(code, exact, *[types.int64] * 10), codegen


@intrinsic(prefer_literal=True)
def _plain_row(
    typingctx: Any, code: Any, large: Any, x: Any, out: Any, count: Any, emin: Any, lowest: Any, highest: Any,
    shift: Any, words: Any, lows: Any, record: Any,
) -> Any:  # fmt: skip
    """Rounds x to the scaled format's numbers, without a division: see elements.Element.scaled. All is float32.

    The result is that of _row. emin, lowest, highest: of the scaled grid, by block; if divided, emin is a block's and
    lowest the address of its parts' maxima.

    Compiled in: code, that of a Way that is plain; large: whether the tensor is larger than the cache. Then what comes
    next is asked for ahead. Results are then written past the cache, to whole vectors at multiples of 64 bytes, unless
    random numbers leave the memory idle anyway.
    """
    way, far = Way.of(code.literal_value), bool(large.literal_value)
    plain, past = way.kind == SYMMETRIC, far and way.mode != STOCHASTIC

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, out, count, emin, lowest, highest, shift, words, _, record = args[2:]
        given = _Record(builder, record, False)
        source, target = (Memory.at(builder, F32, place) for place in (x, out))
        upper = Memory.at(builder, ir.IntType(16), words)
        blocks = [Memory.at(builder, I32, emin), Memory.at(builder, F32, highest)]
        if not plain:
            blocks.append(Memory.at(builder, F32, lowest))
        maxima = Memory.at(builder, I32, lowest)
        rule = Memory.at(builder, I64, given[Field.RULE_AT])
        openness, ahead = Maximum(builder, I32, 16), given[Field.AHEAD]
        elements = {lanes: given.element(lanes, plain) for lanes in (16, 1)}

        numbers = {
            lanes: [splat(builder, builder.trunc(rule.scalar(at), I32), lanes) for at in range(10)] for lanes in (16, 1)
        }
        block_shift = given[Field.BLOCK_SHIFT]

        def grid_of_part(place: Any, lanes: int) -> tuple[Lanes, Lanes, Lanes]:
            """What `blocks` holds where they are not divided."""
            add, _, _, emax, _, _, emin, _, _, most_lowered = numbers[lanes]
            if way.divided == ACROSS:
                whole = splat(builder, blocks[0].scalar(builder.lshr(place, block_shift)), lanes)
            else:
                whole = blocks[0].load(place, lanes)
            g, largest = elements[lanes], way.of_block(builder, maxima, place, shift, lanes)
            own = ((largest + add) & g.exponent) + ((emin - emax) << 23)
            least = own.larger(whole - (most_lowered << 23))
            scale = (least - (emin << 23)).as_float()
            return least, g.highest * scale, g.lowest * scale

        def body(place: Any, lanes: int) -> None:
            if way.divided:
                least, most, *rest = grid_of_part(place, lanes)[: 2 if plain else 3]
            else:
                least, most, *rest = (way.of_block(builder, memory, place, shift, lanes) for memory in blocks)
            if far and lanes > 1:
                source.prefetch(builder.add(place, ahead))
            g, v = elements[lanes].scaled(least, rest[0] if rest else None, most), source.load(place, lanes)
            if way.mode == STOCHASTIC:
                r, how = g.stochastic(v, upper.load(place, lanes), False, way.scalar)
                openness.include(how)
            else:
                r = g.round(v, way.mode, False, False)
            target.store(place, r, stream=past and lanes > 1)

        over(builder, count, 16, body)
        if past:
            builder.fence("seq_cst")
        return _result(builder, openness)

    return types.int64(code, large, *[types.int64] * 10), codegen


_SIGNATURE = types.int64(*[types.int64] * 10)


@functools.cache
def row_at(way: Way, exact: bool) -> int:
    """The address of a way's row. exact: the one for the open decisions of stochastic rounding."""
    code, final, files = way.code(), int(exact), FINGERPRINT

    @cfunc(_SIGNATURE, cache=True)
    def row(x, out, count, scale, inverse, unused, shift, words, lows, record):
        _ = files
        return _row(code, final, x, out, count, scale, inverse, unused, shift, words, lows, record)

    return _address(row)


@functools.cache
def plain_row_at(way: Way, large: bool) -> int:
    """The address of a plain way's row, which does not divide. large: the one for tensors larger than the cache."""
    code, far, files = way.code(), int(large), FINGERPRINT

    @cfunc(_SIGNATURE, cache=True)
    def plain_row(x, out, count, emin, lowest, highest, shift, words, lows, record):
        _ = files
        return _plain_row(code, far, x, out, count, emin, lowest, highest, shift, words, lows, record)

    return _address(plain_row)


_compiled: list[Any] = []  # keeps what lies at the addresses that were given out


def _address(row: Any) -> int:
    """The address of a compiled function, which is kept alive."""
    _compiled.append(row)
    return int(row.address)


@intrinsic
def call_row(
    typingctx: Any, at: Any, x: Any, out: Any, count: Any, a: Any, b: Any, c: Any, shift: Any, words: Any, lows: Any,
    record: Any,
) -> Any:  # fmt: skip
    """Calls the row at an address and gives its result."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I64, [I64] * 10)
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(*[types.int64] * 11), codegen
