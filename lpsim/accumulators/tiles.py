"""Register tiles for Accumulator: float32 vectors, where the numbers allow them; else `kernels` serves.

A tile holds the accumulators of ROWS rows and 16·VECTORS columns in registers while k runs. `cpu` knows the
exponents that occur in lhs and rhs, and picks here only what is then exact:

How a multiply-add is computed (`add`): PLAIN, a float32 fused multiply-add, where it is exact or a second rounding is
harmless; ODD, rounded to odd by AVX-512 (it rounds down and up; unless these are equal, one is odd); CUT, rounded
toward zero by AVX-512; TWO_SUM, rounded to odd without AVX-512, of products that are exact in float32; HALF, a float16
fused multiply-add by AVX-512 FP16, of operands that are float16: lhs, rhs and out are then float16, passed as int16.

How the result goes into the format (`into`): NONE; NEAR, to nearest even: with E the power of two below |x|, the sum
x + 2^(23 − m)·E has no room for more than m bits below E, so adding that and subtracting it rounds; TRUNCATE, by
masking bits; INTEGER, to nearest even on the bits, for formats with float32's exponents, whatever happens.
`guard`: GUARDED formats may underflow (E is at least the smallest normal number) and overflow; SATURATED ones end at
max.
"""

# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated, assignment"

from __future__ import annotations

import functools
from functools import partial
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lpsim.accumulators.kernels import WIDTH
from lpsim.accumulators.registers import (
    BLOCK,
    BYTE,
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
    constant,
    i64,
    integer,
    pack,
    part_of,
    write_out,
)

PLAIN, ODD, CUT, TWO_SUM, HALF = range(5)
NONE, NEAR, TRUNCATE, INTEGER = range(4)
BARE, GUARDED, SATURATED = range(3)

LEAVES = 8  # products of a block of an adder tree
_LEVELS = 8  # blocks of a tree of 1024 products, as a power of two, and one
_DEPTH = 128  # of the columns that stay in the nearest cache while all rows of a task pass by


class _Steps(Emitter):
    """Emits the steps of a tile; vectors are <16 x float>."""

    def __init__(self, builder: ir.IRBuilder, add: int, into: int, guard: int) -> None:
        super().__init__(builder)
        self.add, self.into, self.guard = add, into, guard
        self.numbers: list[ir.Value] = []

    def directed(self, a: ir.Value, b: ir.Value, c: ir.Value, mode: int) -> ir.Value:
        return self.call("llvm.x86.avx512.vfmadd.ps.512", a, b, c, ir.Constant(I32, mode))

    def multiply_add(self, a: ir.Value, b: list[ir.Value], c: list[ir.Value]) -> list[ir.Value]:
        """Step by step for all vectors, so that neighbouring instructions do not wait for each other."""
        each, build = self.each, self.b
        if self.add in (PLAIN, HALF):
            return each(self.fma, a, b, c)
        if self.add == CUT:
            return each(self.directed, a, b, c, TOWARD_ZERO)
        if self.add == ODD:
            low, high = each(self.directed, a, b, c, DOWN), each(self.directed, a, b, c, UP)
            return each(build.select, each(self.even, each(self.bits, low)), high, low)
        t = each(build.fmul, a, b)
        u = each(build.fadd, c, t)
        w = each(build.fsub, u, c)
        rest = each(build.fadd, each(build.fsub, c, each(build.fsub, u, w)), each(build.fsub, t, w))
        bits = each(self.bits, u)
        # away from zero where the rest has the sign of u
        differ = each(build.ashr, each(build.xor, each(self.bits, rest), bits), integer(31))
        moved = each(build.add, bits, each(build.or_, differ, integer(1)))
        inexact = each(partial(build.fcmp_ordered, "!="), rest, constant(0))
        return each(self.float, each(build.select, each(build.and_, each(self.even, bits), inexact), moved, bits))

    def even(self, bits: ir.Value) -> ir.Value:
        return self.b.icmp_signed("==", self.b.and_(bits, integer(1)), integer(0))

    def rounded(self, x: list[ir.Value]) -> list[ir.Value]:
        """numbers: 2^(23 − m), 1.5 times that, max, what a larger one is multiplied by; bits: emin, mask, 23 − m."""
        each, build = self.each, self.b
        if self.into == NONE:
            return x
        bits = each(self.bits, x)
        if self.into == TRUNCATE:
            return each(self.float, each(build.and_, bits, self.numbers[5]))
        if self.into == INTEGER:
            mask, unused = self.numbers[5], self.numbers[6]
            half = build.lshr(build.xor(mask, integer(-1)), integer(1))
            odd = each(build.and_, each(build.lshr, bits, unused), integer(1))
            r = each(build.and_, each(build.add, each(build.add, bits, half), odd), mask)
            nan = each(partial(build.fcmp_unordered, "uno"), x, x)
            return each(build.select, nan, x, each(self.float, r))
        if self.guard == BARE:
            e = each(self.float, each(build.and_, bits, integer(0xFF800000 - (1 << 32))))
            return each(self.fma, e, build.fneg(self.numbers[0]), each(self.fma, e, self.numbers[0], x))
        e = each(build.and_, bits, integer(0x7F800000))
        e = each(self.float, each(lambda y: self.call("llvm.umax.v16i32", y, self.numbers[4], result=VI), e))
        r = each(self.fma, e, build.fneg(self.numbers[1]), each(self.fma, e, self.numbers[1], x))
        magnitude = each(partial(self.call, "llvm.fabs.v16f32"), r)
        if self.guard == SATURATED:
            over = each(partial(build.fcmp_ordered, ">"), magnitude, self.numbers[2])
            magnitude = each(build.select, over, self.numbers[2], magnitude)
            return each(partial(self.call, "llvm.copysign.v16f32"), magnitude, x)
        r = each(partial(self.call, "llvm.copysign.v16f32"), magnitude, x)
        over = each(partial(build.fcmp_unordered, ">"), magnitude, self.numbers[2])
        return each(build.select, over, each(build.fmul, x, self.numbers[3]), r)


class _Tile:
    """The code of one tile: `rows` rows, `vectors` vectors of columns, over k from `begin` on (see _tile)."""

    def __init__(self, steps: _Steps, rows: int, vectors: int, arrays: Any, places: Any) -> None:
        lhs, panel, numbers, sums = arrays
        batch, row, begin, at, place = places
        half = steps.add == HALF
        self.emit, self.b, self.width = steps, steps.b, vectors
        self.element, self.lanes, self.size = (ir.HalfType(), 32, 2) if half else (F32, LANES, 4)
        self.vector = ir.VectorType(self.element, self.lanes)
        for i in range(0 if half else 7):
            value = steps.splat(steps.load(numbers.data, i64(4 * i), F32))
            steps.numbers.append(value if i < 4 else steps.bits(value))
        self.lhs = Rows(steps, lhs, batch, row, rows, begin)
        self.cells = Cells(steps, sums, place, rows, vectors, self.vector, self.size)
        self.totals = self.cells.variables(self.cells.load())
        self.columns = steps.at(panel.data, self.b.mul(at, i64(self.size)), BYTE)

    def products(self, sums: Any, k: ir.Value, one: Any) -> None:
        """The products at k into `sums`, by one(number of lhs, vectors of rhs, vectors of sums)."""
        b, size = self.b, self.size
        down = b.mul(k, i64(size * self.lanes * self.width))
        theirs = [
            self.emit.load(self.columns, b.add(down, i64(size * self.lanes * v)), self.vector, size)
            for v in range(self.width)
        ]
        for i, own in enumerate(self.lhs.load(k, self.element, self.vector, size)):
            before = [b.load(sums[i, v], typ=self.vector) for v in range(self.width)]
            for v, after in enumerate(one(own, theirs, before)):
                b.store(after, sums[i, v])

    def each_product(self, count: ir.Value) -> None:
        """Rounded after every multiply-add."""
        emit = self.emit
        with cgutils.for_range_slice(self.b, i64(0), count, i64(1), I64, inc=True) as (k, _):
            self.products(self.totals, k, lambda x, y, c: emit.rounded(emit.multiply_add(x, y, c)))

    def chunks(self, count: ir.Value, chunk: ir.Value) -> None:
        """Float32 sums of `chunk` products, each added to the total and rounded."""
        emit, b = self.emit, self.b
        zero = ir.Constant(self.vector, [0.0] * self.lanes)
        parts = self.cells.variables(dict.fromkeys(self.cells.all, zero))
        with cgutils.for_range_slice(b, i64(0), count, chunk, I64, inc=True) as (low, _):
            end = emit.least(b.add(low, chunk), count)
            for cell in self.cells.all:
                b.store(constant(0), parts[cell])
            with cgutils.for_range_slice(b, low, end, i64(1), I64, inc=True) as (k, _):
                self.products(parts, k, lambda x, ys, cs: emit.each(emit.fma, x, ys, cs))
            for cell in self.cells.all:
                part, total = (b.load(kept[cell], typ=V) for kept in (parts, self.totals))
                b.store(emit.rounded(emit.multiply_add(constant(1), [part], [total]))[0], self.totals[cell])

    def pairwise(self, count: ir.Value, chunk: ir.Value, leaves: int) -> None:
        """Adder trees of `chunk` products each, whose sums are added to the totals and rounded.

        A tree is cut into blocks of `leaves` products, of which the sums are joined as a binary counter carries: block
        5 = 101b meets one sum of one block before it, which waits on level 0, block 3 = 11b those of levels 0 and 1.
        """
        emit, b = self.emit, self.b
        kind = ir.ArrayType(self.vector, len(self.cells.all))
        waiting = cgutils.alloca_once(b, kind, size=ir.Constant(I32, _LEVELS))
        sums = [b.gep(cgutils.alloca_once(b, kind), [i64(0), i64(n)]) for n in range(len(self.cells.all))]
        zeros = emit.call("llvm.ctlz.i64", b.sub(chunk, i64(1)), ir.Constant(ir.IntType(1), 0), result=I64)
        blocks = b.udiv(b.shl(i64(1), b.sub(i64(64), zeros)), i64(leaves))
        with cgutils.for_range_slice(b, i64(0), count, chunk, I64, inc=True) as (low, _):
            end = emit.least(b.add(low, chunk), count)
            with cgutils.for_range_slice(b, i64(0), blocks, i64(1), I64, inc=True) as (block, _):
                first = b.add(low, b.mul(block, i64(leaves)))
                whole = b.icmp_signed("<=", b.add(first, i64(leaves)), end)
                with b.if_else(whole) as (all_of_it, ragged):
                    with all_of_it:
                        self.trees(first, None, leaves, sums)
                    with ragged:
                        self.trees(first, end, leaves, sums)
                self.carry(block, waiting, sums)
            for cell, kept in zip(self.cells.all, sums, strict=True):
                part, total = b.load(kept, typ=V), b.load(self.totals[cell], typ=V)
                b.store(emit.rounded(emit.multiply_add(constant(1), [part], [total]))[0], self.totals[cell])

    def trees(self, first: ir.Value, end: Any, leaves: int, sums: list[ir.Value]) -> None:
        """The sums of `leaves` products from k = first on, of which those from `end` on are +0."""
        b, size = self.b, self.size
        places, there = [b.add(first, i64(j)) for j in range(leaves)], [None] * leaves
        if end is not None:
            there = [b.icmp_signed("<", k, end) for k in places]
            places = [b.select(inside, k, i64(0)) for inside, k in zip(there, places, strict=True)]
        own = [self.lhs.load(k, self.element, self.vector, size) for k in places]
        for v in range(self.width):
            theirs = []
            for k in places:
                down = b.mul(k, i64(size * self.lanes * self.width))
                theirs.append(self.emit.load(self.columns, b.add(down, i64(size * self.lanes * v)), self.vector, size))
            for n, (i, vector) in enumerate(self.cells.all):
                if vector == v:
                    level = [b.fmul(own[j][i], theirs[j]) for j in range(leaves)]
                    if end is not None:
                        level = [b.select(inside, x, constant(0)) for inside, x in zip(there, level, strict=True)]
                    while len(level) > 1:
                        level = [b.fadd(x, y) for x, y in zip(level[::2], level[1::2], strict=True)]
                    b.store(level[0], sums[n])

    def carry(self, block: ir.Value, waiting: ir.Value, sums: list[ir.Value]) -> None:
        """The sums that wait on the levels below the lowest 0 of `block` added to `sums`, which then wait there."""
        b = self.b
        inverse = b.xor(block, i64(-1))
        level = self.emit.call("llvm.cttz.i64", inverse, ir.Constant(ir.IntType(1), 0), result=I64)
        with cgutils.for_range_slice(b, i64(0), level, i64(1), I64, inc=True) as (done, _):
            for n, kept in enumerate(sums):
                before = b.load(b.gep(waiting, [done, i64(n)]), typ=V)
                b.store(b.fadd(before, b.load(kept, typ=V)), kept)
        for n, kept in enumerate(sums):
            b.store(b.load(kept, typ=V), b.gep(waiting, [level, i64(n)]))

    def finish(self) -> None:
        for cell in self.cells.all:
            self.cells.store(cell, self.b.load(self.totals[cell], typ=self.vector))


@intrinsic(prefer_literal=True)
def _tile(
    typingctx: Any, add: Any, into: Any, guard: Any, chunked: Any, leaves: Any, rows: Any, vectors: Any,
    lhs: Any, batch: Any, row: Any, begin: Any, count: Any, panel: Any, at: Any, chunk: Any, numbers: Any,
    sums: Any, place: Any,
) -> Any:  # fmt: skip
    """Go on with the sums of `rows` rows and 16·vectors columns, over `count` products from k = begin on.

    lhs[batch, row : row + rows], its last row again where it ends. panel[at :]: the columns of rhs, 16·vectors for each
    k. sums[place :]: the accumulators, WIDTH to a row. numbers: see _Steps.rounded.
    """
    literals = [t.literal_value for t in (add, into, guard, chunked, leaves, rows, vectors)]
    add_kind, into_kind, guard_kind, by_chunks, block, height, width = literals

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        steps = _Steps(builder, add_kind, into_kind, guard_kind)
        arrays = [context.make_array(signature.args[i])(context, builder, args[i]) for i in (7, 12, 15, 16)]
        tile = _Tile(steps, height, width, arrays, [args[i] for i in (8, 9, 10, 13, 17)])
        if block:
            tile.pairwise(args[11], args[14], block)
        elif by_chunks:
            tile.chunks(args[11], args[14])
        else:
            tile.each_product(args[11])
        tile.finish()
        return context.get_dummy_value()

    number = types.int64
    kinds = (add, into, guard, chunked, leaves, rows, vectors)
    places = (number, number, number, number, panel, number, number, numbers, sums, number)
    return types.void(*kinds, lhs, *places), codegen


@functools.cache
def tiles(add: int, into: int, guard: int, chunked: bool, leaves: int = 0) -> Any:
    """The kernel: tasks [first_task, last_task) of out = lhs · rhs. leaves: 0, or how many products of an adder tree
    make a block, LEAVES, or all of a smaller tree's."""
    half, by_chunks, files = add == HALF, int(chunked), FINGERPRINT
    rows, vectors = (8, 2) if half else (6, 4) if chunked or into == NONE else (4, 4)
    width = vectors * (32 if half else LANES)
    array = types.Array(types.int16 if half else types.float32, 3, "A")
    signature = types.void(array, array, array, types.int64, types.float32[::1], types.int64, types.int64)

    @njit(signature, nogil=True, cache=True)
    def kernel(lhs, rhs, out, chunk, numbers, first_task, last_task):
        _ = files
        height, depth, across = lhs.shape[1], lhs.shape[2], rhs.shape[2]
        panel, start = aligned_array(depth * WIDTH, rhs)
        sums, place = aligned_array(BLOCK * WIDTH, rhs)
        step = max(_DEPTH // chunk, 1) * chunk
        packed = -1, -1
        for task in range(first_task, last_task):
            batch, low, columns, top, bottom = part_of(task, height, across)
            if (batch, low) != packed:
                pack(rhs, batch, low, columns, width, panel, start)
                packed = batch, low
            sums[:] = 0
            for begin in range(0, depth, step):
                count = min(step, depth - begin)
                for column in range(0, columns, width):
                    at = start + column * depth + begin * width
                    for row in range(top, bottom, rows):
                        _tile(
                            add, into, guard, by_chunks, leaves, rows, vectors, lhs, batch, row, begin, count,
                            panel, at, chunk, numbers, sums, place + (row - top) * WIDTH + column,
                        )  # fmt: skip
            write_out(out, batch, low, columns, top, bottom, sums, place)

    return kernel
