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
from lpsim.accumulators.registers import (
    BLOCK,
    F32,
    FINGERPRINT,
    I32,
    I64,
    LANES,
    TOWARD_ZERO,
    VI,
    Cells,
    Emitter,
    Rows,
    V,
    aligned_array,
    i64,
    integer,
    pack,
    part_of,
    write_out,
)

_ROWS, _VECTORS = 2, WIDTH // LANES
WIDE_PRODUCTS = 8  # in each register


class _Step(Emitter):
    """The code of one step of two rows and WIDTH columns (see _step): `exponents`, then `integers`, then `finish`.

    Each product becomes the integer fptosi(product · 2^(fraction bits − e)), where e is the largest exponent of the
    cell's accumulator and products. With 25 fraction bits and e = 3, 5.5 becomes 5.5 · 2^22.
    """

    def __init__(self, builder: ir.IRBuilder, arrays: Any, places: Any) -> None:
        super().__init__(builder)
        lhs, lhs_exponents, self.panel, self.panel_exponents, numbers, sums = arrays
        batch, row, self.low, self.high, self.at_panel, place = places
        self.fraction_bits, self.mask = (self.splat(self.load(numbers.data, i64(4 * i), I32), VI) for i in range(2))
        self.lhs = Rows(self, lhs, batch, row, _ROWS)
        self.lhs_exponents = Rows(self, lhs_exponents, batch, row, _ROWS)
        self.cells = Cells(self, sums, place, _ROWS, _VECTORS)
        self.before = self.cells.load()

    def larger(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self.call("llvm.smax.v16i32", x, y, result=VI)

    def power(self, e: ir.Value) -> ir.Value:
        """2^e."""
        return self.float(self.b.shl(self.b.add(e, integer(127)), integer(23)))

    def columns(self, array: Any, k: ir.Value, shift: ir.Value, kind: Any) -> list[ir.Value]:
        """The vectors of row k of a panel [K, WIDTH] that begins at `shift`."""
        first = self.b.mul(self.b.add(self.b.mul(k, i64(WIDTH)), shift), i64(4))
        return [self.load(array.data, self.b.add(first, i64(4 * LANES * v)), kind) for v in range(_VECTORS)]

    def exponents(self) -> dict[Any, ir.Value]:
        """The largest exponent of each cell's accumulator and products."""
        b = self.b
        least = b.sub(self.fraction_bits, integer(126))  # then 2^(bits − e) and its inverse are normal
        start = {}
        for cell in self.cells.all:
            field = b.lshr(b.and_(self.bits(self.before[cell]), integer(0x7FFFFFFF)), integer(23))
            start[cell] = self.larger(b.sub(field, integer(127)), least)
        largest = self.cells.variables(start)
        with cgutils.for_range_slice(b, self.low, self.high, i64(1), I64, inc=True) as (k, _):
            theirs = self.columns(self.panel_exponents, k, i64(0), VI)
            for i, own in enumerate(self.lhs_exponents.load(k, I32, VI)):
                found = self.each(b.add, own, theirs)
                for v in range(_VECTORS):
                    b.store(self.larger(b.load(largest[i, v], typ=VI), found[v]), largest[i, v])
        return {cell: b.load(largest[cell], typ=VI) for cell in self.cells.all}

    def integers(self, exponent: dict[Any, ir.Value], wide: bool) -> list[dict[Any, ir.Value]]:
        """The sums of the truncated terms; of a wide unit in two registers, which hold WIDE_PRODUCTS each."""
        b = self.b
        scale = {cell: self.power(b.sub(self.fraction_bits, exponent[cell])) for cell in self.cells.all}
        own = {cell: b.fptosi(b.fmul(self.before[cell], scale[cell]), VI) for cell in self.cells.all}
        halves, bounds = [self.cells.variables(own)], [self.low, self.high]
        if wide:
            halves.append(self.cells.variables(dict.fromkeys(self.cells.all, integer(0))))
            bounds.insert(1, self.least(b.add(self.low, i64(WIDE_PRODUCTS)), self.high))
        for part, kept in enumerate(halves):
            with cgutils.for_range_slice(b, bounds[part], bounds[part + 1], i64(1), I64, inc=True) as (k, _):
                self.add_terms(kept, scale, k)
        return [{cell: b.load(kept[cell], typ=VI) for cell in self.cells.all} for kept in halves]

    def add_terms(self, kept: dict[Any, ir.Value], scale: dict[Any, ir.Value], k: ir.Value) -> None:
        """The products at k, scaled and truncated, added to the integers."""
        b = self.b
        theirs = self.columns(self.panel, k, self.at_panel, V)
        for i, own in enumerate(self.lhs.load(k, F32, V)):
            products = self.each(b.fmul, own, theirs)
            scaled = self.each(b.fmul, products, [scale[i, v] for v in range(_VECTORS)])
            terms = self.each(lambda x: b.fptosi(x, VI), scaled)
            for v in range(_VECTORS):
                b.store(b.add(b.load(kept[i, v], typ=VI), terms[v]), kept[i, v])

    def toward_zero(self, x: ir.Value, lanes: int) -> ir.Value:
        """Integers as float32, rounded toward zero."""
        name = f"llvm.x86.avx512.sitofp.round.v{lanes}f32.v{lanes}i{x.type.element.width}"
        return self.call(name, x, ir.Constant(I32, TOWARD_ZERO), result=ir.VectorType(F32, lanes))

    def joined(self, parts: list[ir.Value]) -> ir.Value:
        """The float32 of an integer in one register, or of the 64-bit sum of those in two."""
        if len(parts) == 1:
            return self.toward_zero(parts[0], LANES)
        b, long = self.b, ir.VectorType(I64, 8)
        ends = []
        for first in (0, 8):
            lanes = ir.Constant(ir.VectorType(I32, 8), list(range(first, first + 8)))
            x, y = (b.sext(b.shuffle_vector(part, part, lanes), long) for part in parts)
            ends.append(self.toward_zero(b.add(x, y), 8))
        return b.shuffle_vector(*ends, ir.Constant(ir.VectorType(I32, 16), list(range(16))))

    def finish(self, sums: list[dict[Any, ir.Value]], exponent: dict[Any, ir.Value]) -> None:
        """Cut to the format's bits, scale back, store."""
        b = self.b
        for cell in self.cells.all:
            result = self.joined([part[cell] for part in sums])
            result = self.float(b.and_(self.bits(result), self.mask))
            self.cells.store(cell, b.fmul(result, self.power(b.sub(exponent[cell], self.fraction_bits))))


@intrinsic(prefer_literal=True)
def _step(
    typingctx: Any, wide: Any, lhs: Any, lhs_exponents: Any, batch: Any, row: Any, begin: Any, end: Any,
    panel: Any, at: Any, panel_exponents: Any, numbers: Any, sums: Any, place: Any,
) -> Any:  # fmt: skip
    """One step of two rows and WIDTH columns: the products of k in [begin, end) added to sums[place :].

    numbers: the fraction bits, the mask of the format. panel[at :] and panel_exponents: [K, WIDTH].
    """
    is_wide = bool(wide.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = [context.make_array(signature.args[i])(context, builder, args[i]) for i in (1, 2, 7, 9, 10, 11)]
        step = _Step(builder, arrays, [args[i] for i in (3, 4, 5, 6, 8, 12)])
        exponent = step.exponents()
        step.finish(step.integers(exponent, is_wide), exponent)
        return context.get_dummy_value()

    number = types.int64
    places = (number, number, number, number, panel, number, panel_exponents, numbers, sums, number)
    return types.void(wide, lhs, lhs_exponents, *places), codegen


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
    number = types.int64
    integers = (types.int32[:, :, ::1], number, number, types.int32[::1], number, number)

    @njit(types.void(_A3, _A3, _A3, *integers), nogil=True, cache=True)
    def kernel(lhs, rhs, out, lhs_exponents, emin_rhs, chunk, numbers, first_task, last_task):
        _ = files
        height, depth, across = lhs.shape[1], lhs.shape[2], rhs.shape[2]
        panel, start = aligned_array(depth * WIDTH, rhs)
        panel_exponents = np.empty(depth * WIDTH, np.int32)
        sums, place = aligned_array(BLOCK * WIDTH, rhs)
        packed = -1, -1
        for task in range(first_task, last_task):
            batch, low, columns, top, bottom = part_of(task, height, across)
            if (batch, low) != packed:
                pack(rhs, batch, low, columns, WIDTH, panel, start)
                for i in range(depth * WIDTH):
                    panel_exponents[i] = _exponent(panel[start + i], emin_rhs)
                packed = batch, low
            sums[:] = 0
            for row in range(top, bottom, _ROWS):
                for begin in range(0, depth, chunk):
                    _step(
                        is_wide, lhs, lhs_exponents, batch, row, begin, min(begin + chunk, depth),
                        panel, start, panel_exponents, numbers, sums, place + (row - top) * WIDTH,
                    )  # fmt: skip
            write_out(out, batch, low, columns, top, bottom, sums, place)

    return kernel
