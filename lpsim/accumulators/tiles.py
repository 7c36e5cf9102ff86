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
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lpsim.accumulators.kernels import WIDTH
from lpsim.quantization.cpu_kernels.cache import fingerprint

PLAIN, ODD, CUT, TWO_SUM, HALF = range(5)
NONE, NEAR, TRUNCATE, INTEGER = range(4)
BARE, GUARDED, SATURATED = range(3)

BLOCK = 48  # rows of a task
_DEPTH = 128  # of the columns that stay in the nearest cache while all rows of a task pass by
FINGERPRINT = fingerprint(*sorted(Path(__file__).parent.glob("*.py")))
F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
LANES = 16
V, VI = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_DOWN, _UP, TOWARD_ZERO = 9, 10, 11  # embedded rounding, exceptions suppressed


def _constant(number: float) -> ir.Constant:
    return ir.Constant(V, [number] * LANES)


def integer(number: int) -> ir.Constant:
    return ir.Constant(VI, [number] * LANES)


class Emitter:
    """Emits the steps of a tile; vectors are <16 x float>."""

    def __init__(self, builder: ir.IRBuilder, add: int, into: int, guard: int) -> None:
        self.b, self.add, self.into, self.guard = builder, add, into, guard
        self.numbers: list[ir.Value] = []

    def call(self, name: str, *args: ir.Value, result: Any = V) -> ir.Value:
        kind = ir.FunctionType(result, [a.type for a in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), args)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        name = f"llvm.fma.v{a.type.count}f{'32' if a.type.element == F32 else '16'}"
        return self.call(name, a, b, c, result=a.type)

    def directed(self, a: ir.Value, b: ir.Value, c: ir.Value, mode: int) -> ir.Value:
        return self.call("llvm.x86.avx512.vfmadd.ps.512", a, b, c, ir.Constant(I32, mode))

    def bits(self, x: ir.Value) -> ir.Value:
        return self.b.bitcast(x, VI)

    def float(self, x: ir.Value) -> ir.Value:
        return self.b.bitcast(x, V)

    def splat(self, x: ir.Value, kind: Any = V) -> ir.Value:
        nothing = ir.Constant(kind, ir.Undefined)
        first = self.b.insert_element(nothing, x, ir.Constant(I32, 0))
        everywhere = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
        return self.b.shuffle_vector(first, nothing, everywhere)

    def each(self, function: Any, *operands: Any) -> list[ir.Value]:
        """function for each of several vectors at once; an operand that is no list is the same for all."""
        count = next(len(o) for o in operands if isinstance(o, list))
        return [function(*(o[i] if isinstance(o, list) else o for o in operands)) for i in range(count)]

    def multiply_add(self, a: ir.Value, b: list[ir.Value], c: list[ir.Value]) -> list[ir.Value]:
        """Step by step for all vectors, so that neighbouring instructions do not wait for each other."""
        each, build = self.each, self.b
        if self.add in (PLAIN, HALF):
            return each(self.fma, a, b, c)
        if self.add == CUT:
            return each(self.directed, a, b, c, TOWARD_ZERO)
        if self.add == ODD:
            low, high = each(self.directed, a, b, c, _DOWN), each(self.directed, a, b, c, _UP)
            return each(build.select, each(self.even, each(self.bits, low)), high, low)
        t = each(build.fmul, a, b)
        u = each(build.fadd, c, t)
        w = each(build.fsub, u, c)
        rest = each(build.fadd, each(build.fsub, c, each(build.fsub, u, w)), each(build.fsub, t, w))
        bits = each(self.bits, u)
        # away from zero where the rest has the sign of u
        differ = each(build.ashr, each(build.xor, each(self.bits, rest), bits), integer(31))
        moved = each(build.add, bits, each(build.or_, differ, integer(1)))
        inexact = each(partial(build.fcmp_ordered, "!="), rest, _constant(0))
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


@intrinsic(prefer_literal=True)
def _tile(
    typingctx: Any, add: Any, into: Any, guard: Any, chunked: Any, rows: Any, vectors: Any,
    lhs: Any, batch: Any, row: Any, begin: Any, count: Any, panel: Any, at: Any, chunk: Any, numbers: Any,
    sums: Any, place: Any,
) -> Any:  # fmt: skip
    """Go on with the sums of `rows` rows and 16·vectors columns, over `count` products from k = begin on.

    lhs[batch, row : row + rows], its last row again where it ends. panel[at :]: the columns of rhs, 16·vectors for each
    k. sums[place :]: the accumulators, WIDTH to a row. numbers: see Emitter.rounded.
    """
    literals = [t.literal_value for t in (add, into, guard, chunked, rows, vectors)]
    add_kind, into_kind, guard_kind, by_chunks, height, width = literals

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emitter(builder, add_kind, into_kind, guard_kind)
        half = add_kind == HALF
        element, lanes, size = (ir.HalfType(), 32, 2) if half else (F32, LANES, 4)
        vector = ir.VectorType(element, lanes)
        zero = ir.Constant(vector, [0.0] * lanes)
        a, p, n, r = (context.make_array(signature.args[i])(context, builder, args[i]) for i in (6, 11, 14, 15))
        batch_at, first_row, first_k, deep = (args[i] for i in (7, 8, 9, 10))
        panel_at, step, sums_at = (args[i] for i in (12, 13, 16))
        strides, shape = cgutils.unpack_tuple(builder, a.strides), cgutils.unpack_tuple(builder, a.shape)
        byte = ir.IntType(8)

        def i64(value: int) -> ir.Constant:
            return ir.Constant(I64, value)

        def at(base: ir.Value, offset: ir.Value, kind: Any) -> ir.Value:
            """`offset` bytes behind `base`."""
            pointer = builder.gep(builder.bitcast(base, byte.as_pointer()), [offset], source_etype=byte)
            return builder.bitcast(pointer, kind.as_pointer())

        def load(base: ir.Value, offset: ir.Value, kind: Any) -> ir.Value:
            return builder.load(at(base, offset, kind), align=size, typ=kind)

        for i in range(0 if half else 7):
            value = emit.splat(load(n.data, i64(4 * i), F32))
            emit.numbers.append(value if i < 4 else emit.bits(value))
        last = builder.sub(shape[1], i64(1))
        starts = []
        for i in range(height):
            this = builder.add(first_row, i64(i))
            this = builder.select(builder.icmp_signed("<", this, last), this, last)
            start = builder.add(builder.mul(batch_at, strides[0]), builder.mul(this, strides[1]))
            starts.append(builder.add(start, builder.mul(first_k, strides[2])))
        cells = [(i, v) for i in range(height) for v in range(width)]

        def cell_at(i: int, v: int) -> ir.Value:
            offset = builder.mul(builder.add(sums_at, i64(i * WIDTH + v * lanes)), i64(size))
            return at(r.data, offset, vector)

        before = {cell: builder.load(cell_at(*cell), align=size, typ=vector) for cell in cells}
        totals = {cell: cgutils.alloca_once_value(builder, value) for cell, value in before.items()}
        parts = {cell: cgutils.alloca_once_value(builder, zero) for cell in cells} if by_chunks else totals
        columns = at(p.data, builder.mul(panel_at, i64(size)), byte)

        def multiply(k: ir.Value, one: Any) -> None:
            along, down = builder.mul(k, strides[2]), builder.mul(k, i64(size * lanes * width))
            bs = [load(columns, builder.add(down, i64(size * lanes * v)), vector) for v in range(width)]
            for i in range(height):
                scalar = emit.splat(load(a.data, builder.add(starts[i], along), element), vector)
                before = [builder.load(parts[i, v], typ=vector) for v in range(width)]
                for v, after in enumerate(one(scalar, bs, before)):
                    builder.store(after, parts[i, v])

        if by_chunks:
            with cgutils.for_range_slice(builder, i64(0), deep, step, I64, inc=True) as (low, _):
                end = builder.add(low, step)
                end = builder.select(builder.icmp_signed("<", end, deep), end, deep)
                for cell in cells:
                    builder.store(_constant(0), parts[cell])
                with cgutils.for_range_slice(builder, low, end, i64(1), I64, inc=True) as (k, _):
                    multiply(k, lambda x, ys, cs: emit.each(emit.fma, x, ys, cs))
                for cell in cells:
                    part, total = (builder.load(kept[cell], typ=V) for kept in (parts, totals))
                    builder.store(emit.rounded(emit.multiply_add(_constant(1), [part], [total]))[0], totals[cell])
        else:
            with cgutils.for_range_slice(builder, i64(0), deep, i64(1), I64, inc=True) as (k, _):
                multiply(k, lambda x, y, c: emit.rounded(emit.multiply_add(x, y, c)))
        for cell in cells:
            builder.store(builder.load(totals[cell], typ=vector), cell_at(*cell), align=size)
        return context.get_dummy_value()

    i64 = types.int64
    kinds = (add, into, guard, chunked, rows, vectors)
    return types.void(*kinds, lhs, i64, i64, i64, i64, panel, i64, i64, numbers, sums, i64), codegen


@njit(nogil=True, cache=True)
def aligned_array(numbers, like):
    """An array with that many numbers from the first multiple of 64 bytes on, and where that is."""
    array = np.empty(numbers + 64, like.dtype)
    return array, (-array.ctypes.data % 64) // like.itemsize


@njit(nogil=True, cache=True)
def pack(rhs, batch, first, columns, width, panel, at):
    """rhs[batch, :, first : first + columns] into panel[at :], [WIDTH / width, K, width], zeros beyond."""
    depth = rhs.shape[1]
    for begin in range(0, columns, width):
        for k in range(depth):
            for j in range(min(width, columns - begin)):
                panel[at + j] = rhs[batch, k, first + begin + j]
            for j in range(columns - begin, width):
                panel[at + j] = 0
            at += width


@functools.cache
def tiles(add: int, into: int, guard: int, chunked: bool) -> Any:
    """The kernel: tasks [first_task, last_task) of out = lhs · rhs."""
    half, by_chunks, files = add == HALF, int(chunked), FINGERPRINT
    rows, vectors = (8, 2) if half else (6, 4) if chunked or into == NONE else (4, 4)
    width = vectors * (32 if half else LANES)
    array = types.Array(types.int16 if half else types.float32, 3, "A")
    signature = types.void(array, array, array, types.int64, types.float32[::1], types.int64, types.int64)

    @njit(signature, nogil=True, cache=True)
    def kernel(lhs, rhs, out, chunk, numbers, first_task, last_task):
        _ = files
        height, depth, across = lhs.shape[1], lhs.shape[2], rhs.shape[2]
        row_blocks, panels = -(-height // BLOCK), -(-across // WIDTH)
        panel, start = aligned_array(depth * WIDTH, rhs)
        sums, place = aligned_array(BLOCK * WIDTH, rhs)
        step = max(_DEPTH // chunk, 1) * chunk
        packed = -1
        for task in range(first_task, last_task):
            batch, rest = task // (panels * row_blocks), task % (panels * row_blocks)
            low, top = (rest // row_blocks) * WIDTH, (rest % row_blocks) * BLOCK
            columns, bottom = min(WIDTH, across - low), min(top + BLOCK, height)
            if task // row_blocks != packed:
                pack(rhs, batch, low, columns, width, panel, start)
                packed = task // row_blocks
            sums[:] = 0
            for begin in range(0, depth, step):
                count = min(step, depth - begin)
                for column in range(0, columns, width):
                    at = start + column * depth + begin * width
                    for row in range(top, bottom, rows):
                        _tile(
                            add, into, guard, by_chunks, rows, vectors, lhs, batch, row, begin, count,
                            panel, at, chunk, numbers, sums, place + (row - top) * WIDTH + column,
                        )  # fmt: skip
            for row in range(top, bottom):
                for j in range(columns):
                    out[batch, row, low + j] = sums[place + (row - top) * WIDTH + j]

    return kernel


@njit(types.UniTuple(types.int64, 3)(types.int32[::1]), nogil=True, cache=True)
def extremes(words):
    """The largest magnitude as bits; the smallest exponent of a last bit; the most significant bits.

    words: float32 numbers as bit patterns. The last bit of a number is the largest power of two that divides it; zeros
    count for nothing.
    """
    one = np.int32(1)
    largest, smallest, most = np.int32(0), np.int32(2000), np.int32(0)
    for i in range(words.size):
        word = np.int32(words[i] & np.int32(0x7FFFFFFF))
        field = np.int32(word >> np.int32(23))
        hidden = np.int32(min(field, one) << np.int32(23))
        whole = np.int32((word & np.int32(0x7FFFFF)) | hidden)
        last = np.int32(np.float32(np.int32(whole & np.int32(-whole))).view(np.int32) >> np.int32(23))
        top = np.int32(np.float32(whole).view(np.int32) >> np.int32(23))
        place = np.int32(max(field, one) + last + (np.int32(2000) if word == 0 else np.int32(0)))
        largest = max(largest, word)
        smallest = min(smallest, place)
        most = max(most, np.int32(top - last + one))
    return np.int64(largest), np.int64(smallest) - (127 + 127 + 23), np.int64(most)
