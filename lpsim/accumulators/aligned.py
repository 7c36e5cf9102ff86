"""Register tiles for tensor cores that truncate: the aligned terms are 32-bit integers, added up without error.

`cpu` picks this where every product is exact and normal in float32 and nothing overflows. One step: the
largest exponent e of the accumulator and the products, from exponents that were taken from the operands beforehand;
then every term times 2^(fraction bits − e), truncated to an integer; the sum of these, rounded toward zero to float32
and cut to the format's bits. WIDE units add up 8 products in each of two registers and join them in 64 bits.
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
from lpsim.accumulators.tiles import (
    BARE,
    BLOCK,
    F32,
    FINGERPRINT,
    I32,
    I64,
    LANES,
    NONE,
    PLAIN,
    TOWARD_ZERO,
    VI,
    Emitter,
    V,
    aligned_array,
    integer,
    pack,
)

_ROWS, _VECTORS = 2, WIDTH // LANES
WIDE_PRODUCTS = 8  # in each register


@intrinsic(prefer_literal=True)
def _step(
    typingctx: Any, wide: Any, lhs: Any, lhs_exponents: Any, batch: Any, row: Any, begin: Any, end: Any,
    panel: Any, at: Any, panel_exponents: Any, numbers: Any, sums: Any, place: Any,
) -> Any:  # fmt: skip
    """One step of two rows and WIDTH columns: the products of k in [begin, end) added to sums[place :].

    numbers: the fraction bits, the mask of the format. panel[at :] and panel_exponents: [K, WIDTH].
    """
    is_wide = wide.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Emitter(builder, PLAIN, NONE, BARE)
        each = emit.each
        a, ae, p, pe, n, r = (
            context.make_array(signature.args[i])(context, builder, args[i]) for i in (1, 2, 7, 9, 10, 11)
        )
        batch_at, first_row, low, high = (args[i] for i in (3, 4, 5, 6))
        panel_at, sums_at = args[8], args[12]
        byte = ir.IntType(8)

        def i64(value: int) -> ir.Constant:
            return ir.Constant(I64, value)

        def pointer(base: ir.Value, offset: ir.Value, kind: Any) -> ir.Value:
            """`offset` bytes behind `base`."""
            behind = builder.gep(builder.bitcast(base, byte.as_pointer()), [offset], source_etype=byte)
            return builder.bitcast(behind, kind.as_pointer())

        def load(base: ir.Value, offset: ir.Value, kind: Any) -> ir.Value:
            return builder.load(pointer(base, offset, kind), align=4, typ=kind)

        def signed(name: str, x: ir.Value, y: ir.Value) -> ir.Value:
            return emit.call(f"llvm.{name}.v16i32", x, y, result=VI)

        def power(e: ir.Value) -> ir.Value:
            return emit.float(builder.shl(builder.add(e, integer(127)), integer(23)))

        bits, mask = (emit.splat(load(n.data, i64(4 * i), I32), VI) for i in range(2))
        last = builder.sub(cgutils.unpack_tuple(builder, a.shape)[1], i64(1))
        starts: dict[Any, list[ir.Value]] = {}
        along = {}
        for array in (a, ae):
            strides = cgutils.unpack_tuple(builder, array.strides)
            along[array] = strides[2]
            starts[array] = []
            for i in range(_ROWS):
                this = builder.add(first_row, i64(i))
                this = builder.select(builder.icmp_signed("<", this, last), this, last)
                starts[array].append(builder.add(builder.mul(batch_at, strides[0]), builder.mul(this, strides[1])))
        cells = [(i, v) for i in range(_ROWS) for v in range(_VECTORS)]

        def cell_at(i: int, v: int) -> ir.Value:
            return pointer(r.data, builder.mul(builder.add(sums_at, i64(i * WIDTH + v * LANES)), i64(4)), V)

        def columns(base: ir.Value, k: ir.Value, shift: ir.Value, kind: Any) -> list[ir.Value]:
            first = builder.mul(builder.add(builder.mul(k, i64(WIDTH)), shift), i64(4))
            return [load(base, builder.add(first, i64(4 * LANES * v)), kind) for v in range(_VECTORS)]

        def rows(array: Any, k: ir.Value, element: Any, vector: Any) -> list[ir.Value]:
            offset = builder.mul(k, along[array])
            return [
                emit.splat(load(array.data, builder.add(start, offset), element), vector) for start in starts[array]
            ]

        before = {cell: builder.load(cell_at(*cell), align=4, typ=V) for cell in cells}
        least = builder.sub(bits, integer(126))  # then 2^(bits − e) and its inverse are normal
        largest = {}
        for cell in cells:
            field = builder.lshr(builder.and_(emit.bits(before[cell]), integer(0x7FFFFFFF)), integer(23))
            e = signed("smax", builder.sub(field, integer(127)), least)
            largest[cell] = cgutils.alloca_once_value(builder, e)
        with cgutils.for_range_slice(builder, low, high, i64(1), I64, inc=True) as (k, _):
            theirs = columns(pe.data, k, i64(0), VI)
            for i, own in enumerate(rows(ae, k, I32, VI)):
                found = each(builder.add, own, theirs)
                for v in range(_VECTORS):
                    e = signed("smax", builder.load(largest[i, v], typ=VI), found[v])
                    builder.store(e, largest[i, v])
        exponent = {cell: builder.load(largest[cell], typ=VI) for cell in cells}
        scale = {cell: power(builder.sub(bits, exponent[cell])) for cell in cells}
        own_terms = {cell: builder.fptosi(builder.fmul(before[cell], scale[cell]), VI) for cell in cells}
        halves = [{cell: cgutils.alloca_once_value(builder, own_terms[cell]) for cell in cells}]
        bounds = [low, high]
        if is_wide:
            middle = builder.add(low, i64(WIDE_PRODUCTS))
            bounds = [low, builder.select(builder.icmp_signed("<", middle, high), middle, high), high]
            halves.append({cell: cgutils.alloca_once_value(builder, integer(0)) for cell in cells})
        for part, kept in enumerate(halves):
            with cgutils.for_range_slice(builder, bounds[part], bounds[part + 1], i64(1), I64, inc=True) as (k, _):
                theirs = columns(p.data, k, panel_at, V)
                for i, own in enumerate(rows(a, k, F32, V)):
                    products = each(builder.fmul, own, theirs)
                    scaled = each(builder.fmul, products, [scale[i, v] for v in range(_VECTORS)])
                    terms = each(lambda x: builder.fptosi(x, VI), scaled)
                    for v in range(_VECTORS):
                        builder.store(builder.add(builder.load(kept[i, v], typ=VI), terms[v]), kept[i, v])

        def toward_zero(x: ir.Value, lanes: int) -> ir.Value:
            vector = ir.VectorType(F32, lanes)
            name = f"llvm.x86.avx512.sitofp.round.v{lanes}f32.v{lanes}i{x.type.element.width}"
            return emit.call(name, x, ir.Constant(I32, TOWARD_ZERO), result=vector)

        for cell in cells:
            parts = [builder.load(kept[cell], typ=VI) for kept in halves]
            if is_wide:
                long = ir.VectorType(I64, 8)
                ends = []
                for first in (0, 8):
                    lanes = ir.Constant(ir.VectorType(I32, 8), list(range(first, first + 8)))
                    x, y = (builder.sext(builder.shuffle_vector(part, part, lanes), long) for part in parts)
                    ends.append(toward_zero(builder.add(x, y), 8))
                every = ir.Constant(ir.VectorType(I32, 16), list(range(16)))
                result = builder.shuffle_vector(*ends, every)
            else:
                result = toward_zero(parts[0], LANES)
            result = emit.float(builder.and_(emit.bits(result), mask))
            result = builder.fmul(result, power(builder.sub(exponent[cell], bits)))
            builder.store(result, cell_at(*cell), align=4)
        return context.get_dummy_value()

    i64 = types.int64
    arguments = (wide, lhs, lhs_exponents, i64, i64, i64, i64, panel, i64, panel_exponents, numbers, sums, i64)
    return types.void(*arguments), codegen


_A3 = types.Array(types.float32, 3, "A")


@njit(types.int32(types.float32, types.int64), nogil=True, cache=True)
def _exponent(x, emin):
    """Its place among the codes: emin for subnormals, -126 for zero."""
    field = (np.float32(x).view(np.int32) & np.int32(0x7FFFFFFF)) >> np.int32(23)
    return np.int32(-126) if x == 0 else np.int32(max(np.int64(field) - 127, emin))


@njit(types.void(_A3, types.int64, types.int32[:, :, ::1]), nogil=True, cache=True)
def operand_exponents(x, emin, out):
    """The exponents of all operands."""
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                out[b, i, j] = _exponent(x[b, i, j], emin)


@functools.cache
def tiles(wide: bool) -> Any:
    """The kernel: tasks [first_task, last_task) of out = lhs · rhs."""
    is_wide, files = int(wide), FINGERPRINT
    i64 = types.int64
    exponents = types.int32[:, :, ::1]

    @njit(types.void(_A3, _A3, _A3, exponents, i64, i64, types.int32[::1], i64, i64), nogil=True, cache=True)
    def kernel(lhs, rhs, out, lhs_exponents, emin_rhs, chunk, numbers, first_task, last_task):
        _ = files
        height, depth, across = lhs.shape[1], lhs.shape[2], rhs.shape[2]
        row_blocks, panels = -(-height // BLOCK), -(-across // WIDTH)
        panel, start = aligned_array(depth * WIDTH, rhs)
        panel_exponents = np.empty(depth * WIDTH, np.int32)
        sums, place = aligned_array(BLOCK * WIDTH, rhs)
        packed = -1
        for task in range(first_task, last_task):
            batch, rest = task // (panels * row_blocks), task % (panels * row_blocks)
            low, top = (rest // row_blocks) * WIDTH, (rest % row_blocks) * BLOCK
            columns, bottom = min(WIDTH, across - low), min(top + BLOCK, height)
            if task // row_blocks != packed:
                pack(rhs, batch, low, columns, WIDTH, panel, start)
                for i in range(depth * WIDTH):
                    panel_exponents[i] = _exponent(panel[start + i], emin_rhs)
                packed = task // row_blocks
            sums[:] = 0
            for row in range(top, bottom, _ROWS):
                for begin in range(0, depth, chunk):
                    _step(
                        is_wide, lhs, lhs_exponents, batch, row, begin, min(begin + chunk, depth),
                        panel, start, panel_exponents, numbers, sums, place + (row - top) * WIDTH,
                    )  # fmt: skip
            for row in range(top, bottom):
                for j in range(columns):
                    out[batch, row, low + j] = sums[place + (row - top) * WIDTH + j]

    return kernel
