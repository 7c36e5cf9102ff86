"""Register tiles for tensor cores that truncate, at one or two instructions a vector of products.

`cpu` picks this where the exponents of the operands span few enough powers of two. A sum that is pinned to one power of
two, as 1.5 · 2^23 quanta + x is in float32, has the quantum as its last bit; so a fused multiply-add that rounds down
adds exactly ⌊a·b⌋ in quanta. What a truncating unit adds to that is one quantum for each product that is negative and
no multiple of the quantum. These are counted, 64 columns at once in bytes: a product is a multiple of 2^(sum of the
places of its operands' last bits), and of no higher power of two.

One step: the largest exponent of the accumulator and the products, in bytes; the count; the sums, in float32 where all
of a step fits 2^22 quanta, else in float64, of which the low 32 bits are the integer; then cut and scaled back.

Bytes lie in 16 words of 32 bits: column 16·v + l is byte v of word l.
"""

# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated, assignment"

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lpsim.accumulators.kernels import WIDTH
from lpsim.accumulators.operands import CODES, lhs_codes, rhs_codes
from lpsim.accumulators.registers import (
    BLOCK,
    DOWN,
    F32,
    FINGERPRINT,
    I32,
    I64,
    LANES,
    TOWARD_ZERO,
    UP,
    VI,
    Cells,
    Emitter,
    Rows,
    V,
    aligned_array,
    copy_rows,
    i64,
    integer,
    pack,
    part_of,
    write_out,
)

ROWS, VECTORS = 4, WIDTH // LANES
DEPTH = 32  # of the columns that stay in the nearest cache while all rows of a task pass by
_PANELS = 1 << 12  # how many k of columns, with their codes, stay in the second cache: 256 · 3 bytes each
F64 = ir.DoubleType()
V64, VB = ir.VectorType(F64, 8), ir.VectorType(ir.IntType(8), WIDTH)
_TOP = 0xFF000000 - (1 << 32)
# the columns of a vector that the first and the second vector of float64 hold
_HALVES = tuple([4 * i + 2 * half + j for i in range(4) for j in range(2)] for half in range(2))


class _Step(Emitter):
    """The code of one step of ROWS rows and WIDTH columns (see _step)."""

    def __init__(self, builder: ir.IRBuilder, kinds: Any, arrays: Any, places: Any) -> None:
        super().__init__(builder)
        self.double, self.checked, self.saturating = kinds
        lhs, exponents, lasts, self.panel, self.codes, numbers, sums, self.overflows = arrays
        batch, row, self.low, self.high, self.at_panel, self.at_codes, place = places
        self.least_exponent, self.pin, self.mask, self.upward, self.downward, self.ones = (
            self.splat(self.load(numbers.data, i64(4 * n), I32), VI) for n in range(6)
        )
        self.lhs, self.lhs_exponents, self.lhs_lasts = (
            Rows(self, array, batch, row, ROWS) for array in (lhs, exponents, lasts)
        )
        self.cells = Cells(self, sums, place, ROWS, VECTORS)
        self.before = self.cells.load()
        self.overflow: ir.Value = integer(0)

    def bytes(self, x: ir.Value) -> ir.Value:
        return self.b.bitcast(x, VB)

    def steps(self) -> Any:
        return cgutils.for_range_slice(self.b, self.low, self.high, i64(1), I64, inc=True)

    def codes_at(self, k: ir.Value) -> ir.Value:
        """Where the codes of row k of the panel begin, in bytes."""
        b = self.b
        return b.mul(b.add(self.at_codes, b.mul(k, i64(CODES))), i64(4))

    def minus(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Bytes, where a negative difference is 0."""
        return self.call("llvm.usub.sat.v64i8", x, y, result=VB)

    def larger(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.call("llvm.umax.v64i8", x, y, result=VB)

    def exponents(self) -> list[ir.Value]:
        """The largest exponent of each cell's accumulator and products plus 127, as the bytes of each row."""
        b = self.b
        together = self.minus if self.saturating else b.add
        largest = [cgutils.alloca_once_value(b, self.bytes(self.own_exponents(i))) for i in range(ROWS)]
        with self.steps() as (k, _):
            theirs = self.load(self.codes.data, self.codes_at(k), VB)
            for kept, own in zip(largest, self.lhs_exponents.load(k, I32, VI), strict=True):
                b.store(self.larger(b.load(kept, typ=VB), together(theirs, self.bytes(own))), kept)
        return [b.load(kept, typ=VB) for kept in largest]

    def own_exponents(self, i: int) -> ir.Value:
        """Those of the accumulators of row i, and the least one."""
        b, words = self.b, integer(0)
        for v in range(VECTORS):
            bits = self.bits(self.before[i, v])
            turned = self.call("llvm.fshl.v16i32", bits, bits, integer(9 + 8 * v & 31), result=VI)
            words = b.or_(words, b.and_(turned, integer((0xFF << 8 * v) - (v // 3 << 32))))
        return b.bitcast(self.larger(self.bytes(words), self.bytes(self.least_exponent)), VI)

    def counts(self, exponents: list[ir.Value]) -> list[ir.Value]:
        """How many products of each cell are negative and no multiples of the quantum."""
        b, none = self.b, ir.Constant(VB, [0] * WIDTH)
        one = self.bytes(self.ones)  # not a constant: LLVM would not add under a mask then
        counts = [cgutils.alloca_once_value(b, none) for _ in range(ROWS)]
        with self.steps() as (k, _):
            at = self.codes_at(k)
            for i, own in enumerate(self.lhs_lasts.load(k, I32, VI)):
                high = b.add(self.lhs.starts[i], b.mul(k, self.lhs.along))
                bits = self.load(self.lhs.data, b.add(high, i64(4)) if self.double else high, I32)
                opposite = b.shl(b.add(b.zext(b.lshr(bits, ir.Constant(I32, 31)), I64), i64(1)), i64(6))
                theirs = self.load(self.codes.data, b.add(at, opposite), VB)
                lost = b.icmp_unsigned(">", self.minus(exponents[i], self.bytes(own)), theirs)
                count = b.load(counts[i], typ=VB)
                b.store(b.select(lost, b.add(count, one), count), counts[i])
        return [b.load(count, typ=VB) for count in counts]

    def word(self, words: ir.Value, v: int) -> ir.Value:
        """The bytes of vector v as the highest of each word, zeros below."""
        b = self.b
        words = b.shl(b.bitcast(words, VI), integer(24 - 8 * v))
        return words if v == 0 else b.and_(words, integer(_TOP))

    def pinned(self, power: ir.Value) -> list[ir.Value]:
        """The vectors that are pinned zeros; power: what `word` gives."""
        b = self.b
        if not self.double:
            return [self.float(b.add(b.lshr(power, integer(1)), self.pin))]
        high = b.add(b.lshr(power, integer(4)), self.pin)
        halves = []
        for columns in _HALVES:
            lanes = [lane for column in columns for lane in (16, column)]
            mixed = b.shuffle_vector(high, integer(0), ir.Constant(VI, lanes))
            halves.append(b.bitcast(mixed, V64))
        return halves

    def add_products(self, totals: dict[Any, Any]) -> None:
        """⌊products⌋ added to the totals of cells (row, vector)."""
        b = self.b
        kind, element, size = (V64, F64, 8) if self.double else (V, F32, 4)
        name = f"llvm.x86.avx512.vfmadd.p{'d' if self.double else 's'}.512"
        vectors = sorted({v for _, v in totals})
        with self.steps() as (k, _):
            down = b.add(self.at_panel, b.mul(k, i64(WIDTH)))
            theirs = {
                v: self.load(self.panel.data, b.mul(b.add(down, i64(v * kind.count)), i64(size)), kind) for v in vectors
            }
            for i, own in enumerate(self.lhs.load(k, element, kind)):
                for v in vectors:
                    total = b.load(totals[i, v], typ=kind)
                    b.store(self.call(name, own, theirs[v], total, ir.Constant(I32, DOWN), result=kind), totals[i, v])

    def all(self) -> None:
        """The whole step."""
        exponents = self.exponents()
        counts = self.counts(exponents)
        finish = self.finish_double if self.double else self.finish_single
        group = 2 if self.double else VECTORS
        for first in range(0, VECTORS, group):
            cells = [(i, v) for i in range(ROWS) for v in range(first, first + group)]
            power = {(i, v): self.word(exponents[i], v) for i, v in cells}
            start = {}
            for i, v in cells:
                pins = self.pinned(power[i, v])
                if not self.double:
                    pins = [self.with_own(pins[0], self.before[i, v])]
                start |= {(i, v * len(pins) + n): pin for n, pin in enumerate(pins)}
            totals = {cell: cgutils.alloca_once_value(self.b, value) for cell, value in start.items()}
            self.add_products(totals)
            for i, v in cells:
                count = self.b.lshr(self.word(counts[i], v), integer(24))
                finish((i, v), power[i, v], totals, count)

    def with_own(self, pin: ir.Value, own: ir.Value) -> ir.Value:
        """The accumulator, truncated, added to a pinned zero."""
        name = "llvm.x86.avx512.add.ps.512"
        down, up = (self.call(name, pin, own, ir.Constant(I32, mode)) for mode in (DOWN, UP))
        return self.b.select(self.b.icmp_signed("<", self.bits(own), integer(0)), up, down)

    def finish_single(self, cell: Any, power: ir.Value, totals: dict[Any, Any], count: ir.Value) -> None:
        b = self.b
        total = self.float(b.add(self.bits(b.load(totals[cell], typ=V)), count))
        result = b.fsub(total, self.pinned(power)[0])
        self.cells.store(cell, self.float(b.and_(self.bits(result), self.mask)))

    def finish_double(self, cell: Any, power: ir.Value, totals: dict[Any, Any], count: ir.Value) -> None:
        b, (i, v) = self.b, cell
        halves = [b.bitcast(b.load(totals[i, 2 * v + half], typ=V64), VI) for half in range(2)]
        where = [
            16 * half + 2 * columns.index(c)
            for c in range(LANES)
            for half, columns in enumerate(_HALVES)
            if c in columns
        ]
        products = b.add(b.shuffle_vector(*halves, ir.Constant(VI, where)), count)
        exponent = b.lshr(power, integer(1))
        own = b.fptosi(b.fmul(self.before[cell], self.float(b.sub(self.upward, exponent))), VI)
        total = b.add(products, own)
        if self.checked:
            wrong = b.and_(b.xor(products, total), b.xor(own, total))
            self.overflow = b.or_(self.overflow, wrong)
        name = "llvm.x86.avx512.sitofp.round.v16f32.v16i32"
        result = self.call(name, total, ir.Constant(I32, TOWARD_ZERO))
        result = self.float(b.and_(self.bits(result), self.mask))
        self.cells.store(cell, b.fmul(result, self.float(b.sub(exponent, self.downward))))

    def report(self) -> None:
        """The signs of sums that 32 bits do not hold."""
        at = self.at(self.overflows.data, i64(0), VI)
        self.b.store(self.b.or_(self.b.load(at, align=4, typ=VI), self.overflow), at, align=4)


@intrinsic(prefer_literal=True)
def _step(
    typingctx: Any, double: Any, checked: Any, saturating: Any, lhs: Any, exponents: Any, lasts: Any, batch: Any,
    row: Any, begin: Any, end: Any, panel: Any, at: Any, codes: Any, at_codes: Any, numbers: Any, sums: Any, place: Any,
    overflows: Any,
) -> Any:  # fmt: skip
    """One step of ROWS rows and WIDTH columns: the products of k in [begin, end) added to sums[place :].

    exponents, lasts: see lhs_codes. panel[at :]: [K, WIDTH]; codes[at_codes :]: see rhs_codes. numbers: cpu's.
    overflows: 16 words, of which one becomes negative where a sum does not fit 32 bits.
    """
    kinds = [bool(t.literal_value) for t in (double, checked, saturating)]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        which = (3, 4, 5, 10, 12, 14, 15, 17)
        arrays = [context.make_array(signature.args[i])(context, builder, args[i]) for i in which]
        step = _Step(builder, kinds, arrays, [args[i] for i in (6, 7, 8, 9, 11, 13, 16)])
        step.all()
        if step.checked:
            step.report()
        return context.get_dummy_value()

    number = types.int64
    places = (number, number, number, number, panel, number, codes, number, numbers, sums, number, overflows)
    return types.void(double, checked, saturating, lhs, exponents, lasts, *places), codegen


_A3 = types.Array(types.float32, 3, "A")


@njit(nogil=True, cache=True)
def _widened(panel, start, wide, begin, depth):
    """The panel as float64, columns in the order of _HALVES."""
    for k in range(depth):
        for group in range(WIDTH // 4):
            source = start + k * WIDTH + 4 * group
            target = begin + k * WIDTH + group // 4 * LANES + 2 * (group % 4)
            for j in range(2):
                wide[target + j] = panel[source + j]
                wide[target + 8 + j] = panel[source + 2 + j]


@njit(nogil=True, cache=True)
def _in_groups(task, height, across, group):
    """The task that comes in this place if a block of rows meets `group` panels before the next block does."""
    row_blocks, panels = -(-height // BLOCK), -(-across // WIDTH)
    batch, at = task // (panels * row_blocks), task % (panels * row_blocks)
    first = at // (group * row_blocks) * group
    width, within = min(group, panels - first), at % (group * row_blocks)
    return (batch * panels + first + within % width) * row_blocks + within // width


@functools.cache
def tiles(double: bool, checked: bool, saturating: bool) -> Any:
    """The kernel: tasks [first_task, last_task) of out = lhs · rhs."""
    is_double, is_checked, is_saturating, files = int(double), int(checked), int(saturating), FINGERPRINT
    number = types.int64
    words = types.int32[::1]
    integers = (words, number, number, number, number, words, words, number, number)

    @njit(types.void(_A3, _A3, _A3, *integers), nogil=True, cache=True)
    def kernel(lhs, rhs, out, own, least, shift, rise, chunk, numbers, failed, first_task, last_task):
        _ = files
        height, depth, across = lhs.shape[1], lhs.shape[2], rhs.shape[2]
        group = max(1, min(_PANELS // max(depth * (2 + is_double), 1), -(-across // WIDTH)))
        panel, start = aligned_array(depth * WIDTH * (1 if is_double else group), rhs)
        numbers64 = np.empty(1 if is_double else 0, np.float64)
        wide, begin_wide = aligned_array(depth * WIDTH * group * is_double, numbers64)
        codes, begin_codes = aligned_array(depth * CODES * group, numbers)
        sums, place = aligned_array(BLOCK * WIDTH, rhs)
        overflows = np.zeros(LANES, np.int32)
        step = max(DEPTH // chunk, 1) * chunk
        rows, rows64 = np.zeros(BLOCK * depth, np.float32), np.zeros(BLOCK * depth * is_double, np.float64)
        exponents, lasts = np.zeros(BLOCK * depth, np.int32), np.zeros(BLOCK * depth, np.int32)
        shape = 1, BLOCK, depth
        tile_rows = (rows64 if is_double else rows).reshape(shape)
        tile_exponents, tile_lasts = exponents.reshape(shape), lasts.reshape(shape)
        tile_panel, row_words = wide if is_double else panel, rows.view(np.int32)
        at_hand, packed = -1, np.full(group, -1, np.int64)
        for task in range(first_task, last_task):
            number = _in_groups(task, height, across, group)
            batch, low, columns, top, bottom = part_of(number, height, across)
            this, slot = number // -(-height // BLOCK), low // WIDTH % group
            at_codes, at = begin_codes + slot * depth * CODES, slot * depth * WIDTH
            at_numbers, at_panel = begin_wide + at, start + (0 if is_double else at)
            if packed[slot] != this:
                pack(rhs, batch, low, columns, WIDTH, panel, at_panel)
                rhs_codes(panel, at_panel, depth, least, shift, rise, codes, at_codes)
                if is_double:
                    _widened(panel, at_panel, wide, at_numbers, depth)
                packed[slot] = this
            if at_hand != batch * height + top:
                copy_rows(lhs, batch, top, bottom, rows)
                lhs_codes(row_words, own, exponents, lasts)
                if is_double:
                    rows64[:] = rows
                at_hand = batch * height + top
            sums[:] = 0
            for block in range(0, depth, step):
                for row in range(top, bottom, ROWS):
                    for begin in range(block, min(block + step, depth), chunk):
                        end = min(begin + chunk, depth)
                        _step(
                            is_double, is_checked, is_saturating, tile_rows, tile_exponents, tile_lasts,
                            0, row - top, begin, end, tile_panel, at_numbers if is_double else at_panel,
                            codes, at_codes, numbers, sums, place + (row - top) * WIDTH, overflows,
                        )  # fmt: skip
            write_out(out, batch, low, columns, top, bottom, sums, place)
        for lane in range(LANES):
            if overflows[lane] < 0:
                failed[0] = 1

    return kernel
