"""What the register tiles of `tiles` and `aligned` share: vectors of LLVM IR, memory, the tasks of a product.

A tile keeps the accumulators of a few rows and up to WIDTH columns in vector registers while k runs. `Emitter` appends
the instructions of a tile to a builder. For example `Rows.load(k, F32, V)` emits for each row

    %along = mul i64 %k, %stride
    %at = getelementptr i8, ptr %lhs, i64 (%start + %along)
    %x = load float, ptr %at
    %v = shufflevector <16 x float> (insertelement undef, %x, 0), undef, zeroinitializer    ; x in all lanes
"""

# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated, assignment"

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lpsim.accumulators.kernels import WIDTH
from lpsim.quantization.cpu_kernels.cache import fingerprint

BLOCK = 48  # rows of a task
FINGERPRINT = fingerprint(*sorted(Path(__file__).parent.glob("*.py")))
BYTE, F32, I32, I64 = ir.IntType(8), ir.FloatType(), ir.IntType(32), ir.IntType(64)
LANES = 16
V, VI = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
DOWN, UP, TOWARD_ZERO = 9, 10, 11  # embedded rounding, exceptions suppressed


def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def constant(number: float) -> ir.Constant:
    return ir.Constant(V, [number] * LANES)


def integer(number: int) -> ir.Constant:
    return ir.Constant(VI, [number] * LANES)


class Emitter:
    """Emits instructions; vectors are <16 x float> unless said otherwise."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def call(self, name: str, *args: ir.Value, result: Any = V) -> ir.Value:
        kind = ir.FunctionType(result, [a.type for a in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), args)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        name = f"llvm.fma.v{a.type.count}f{'32' if a.type.element == F32 else '16'}"
        return self.call(name, a, b, c, result=a.type)

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

    def at(self, base: ir.Value, offset: ir.Value, kind: Any) -> ir.Value:
        """A pointer `offset` bytes behind `base`."""
        pointer = self.b.gep(self.b.bitcast(base, BYTE.as_pointer()), [offset], source_etype=BYTE)
        return self.b.bitcast(pointer, kind.as_pointer())

    def load(self, base: ir.Value, offset: ir.Value, kind: Any, size: int = 4) -> ir.Value:
        return self.b.load(self.at(base, offset, kind), align=size, typ=kind)

    def least(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The smaller of two integers."""
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)


class Rows:
    """`height` rows of array[batch] from first_row on, its last row again where it ends; k counts from `begin`."""

    def __init__(
        self, emit: Emitter, array: Any, batch: ir.Value, first_row: ir.Value, height: int, begin: Any = None
    ) -> None:
        self._emit, self.data, b = emit, array.data, emit.b
        strides, shape = cgutils.unpack_tuple(b, array.strides), cgutils.unpack_tuple(b, array.shape)
        last = b.sub(shape[1], i64(1))
        self.along = strides[2]
        self.starts = []
        for i in range(height):
            row = emit.least(b.add(first_row, i64(i)), last)
            start = b.add(b.mul(batch, strides[0]), b.mul(row, strides[1]))
            self.starts.append(start if begin is None else b.add(start, b.mul(begin, self.along)))

    def load(self, k: ir.Value, element: Any, vector: Any, size: int = 4) -> list[ir.Value]:
        """The number at k of each row, in all lanes."""
        b = self._emit.b
        offset = b.mul(k, self.along)
        return [
            self._emit.splat(self._emit.load(self.data, b.add(start, offset), element, size), vector)
            for start in self.starts
        ]


class Cells:
    """The accumulators of `height` rows and `width` vectors in sums[place :], WIDTH numbers to a row."""

    def __init__(
        self, emit: Emitter, sums: Any, place: ir.Value, height: int, width: int, vector: Any = V, size: int = 4
    ) -> None:
        self._emit, self._data, self._place, self._vector, self._size = emit, sums.data, place, vector, size
        self.all = [(i, v) for i in range(height) for v in range(width)]

    def _at(self, cell: tuple[int, int]) -> ir.Value:
        b, (i, v) = self._emit.b, cell
        number = b.add(self._place, i64(i * WIDTH + v * self._vector.count))
        return self._emit.at(self._data, b.mul(number, i64(self._size)), self._vector)

    def load(self) -> dict[tuple[int, int], ir.Value]:
        b = self._emit.b
        return {cell: b.load(self._at(cell), align=self._size, typ=self._vector) for cell in self.all}

    def store(self, cell: tuple[int, int], value: ir.Value) -> None:
        self._emit.b.store(value, self._at(cell), align=self._size)

    def variables(self, values: dict[tuple[int, int], ir.Value]) -> dict[tuple[int, int], ir.Value]:
        """A variable for each cell, which LLVM keeps in a register."""
        return {cell: cgutils.alloca_once_value(self._emit.b, values[cell]) for cell in self.all}


@njit(nogil=True, cache=True)
def aligned_array(numbers, like):
    """An array with that many numbers from the first multiple of 64 bytes on, and where that is."""
    array = np.empty(numbers + 64, like.dtype)
    return array, (-array.ctypes.data % 64) // like.itemsize


@intrinsic(prefer_literal=True)
def _copy(typingctx: Any, source: Any, batch: Any, k: Any, first: Any, count: Any, target: Any, at: Any) -> Any:
    """source[batch, k, first : first + count] to target[at :], where neighbours lie side by side; count: a literal."""
    numbers = count.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit, b = Emitter(builder), builder
        read, write = (context.make_array(signature.args[n])(context, builder, args[n]) for n in (0, 5))
        strides = cgutils.unpack_tuple(b, read.strides)
        offset = b.add(b.mul(args[1], strides[0]), b.add(b.mul(args[2], strides[1]), b.mul(args[3], strides[2])))
        size = signature.args[0].dtype.bitwidth // 8
        step = 64 // size
        kind = ir.VectorType(context.get_data_type(signature.args[0].dtype), step)
        for v in range(numbers // step):
            value = emit.load(read.data, b.add(offset, i64(64 * v)), kind, size)
            b.store(value, emit.at(write.data, b.add(b.mul(args[6], i64(size)), i64(64 * v)), kind), align=size)
        return context.get_dummy_value()

    number = types.int64
    return types.void(source, number, number, number, count, target, number), codegen


@njit(nogil=True, cache=True)
def copy_rows(x, batch, top, bottom, rows):
    """x[batch, top : bottom] into rows, one behind the other."""
    depth = x.shape[2]
    whole = depth // WIDTH * WIDTH if x.strides[2] == x.itemsize else 0
    for i in range(top, bottom):
        at = (i - top) * depth
        for k in range(0, whole, WIDTH):
            _copy(x, batch, i, k, WIDTH, rows, at + k)
        for k in range(whole, depth):
            rows[at + k] = x[batch, i, k]


@njit(nogil=True, cache=True)
def pack(rhs, batch, first, columns, width, panel, at):
    """rhs[batch, :, first : first + columns] into panel[at :], [WIDTH / width, K, width], zeros beyond."""
    depth = rhs.shape[1]
    side_by_side = rhs.strides[2] == rhs.itemsize and width == WIDTH and columns == width
    for begin in range(0, columns, width):
        for k in range(depth):
            if side_by_side:
                _copy(rhs, batch, k, first, WIDTH, panel, at)
                at += width
                continue
            for j in range(min(width, columns - begin)):
                panel[at + j] = rhs[batch, k, first + begin + j]
            for j in range(columns - begin, width):
                panel[at + j] = 0
            at += width


@njit(nogil=True, cache=True)
def part_of(task, height, across):
    """The part of out [batches, height, across] that is a task's: batch, low, columns from there on, top, bottom."""
    row_blocks, panels = -(-height // BLOCK), -(-across // WIDTH)
    batch, rest = task // (panels * row_blocks), task % (panels * row_blocks)
    low, top = (rest // row_blocks) * WIDTH, (rest % row_blocks) * BLOCK
    return batch, low, min(WIDTH, across - low), top, min(top + BLOCK, height)


@njit(nogil=True, cache=True)
def write_out(out, batch, low, columns, top, bottom, sums, place):
    """The sums of a task to their place in `out`."""
    for row in range(top, bottom):
        for j in range(columns):
            out[batch, row, low + j] = sums[place + (row - top) * WIDTH + j]
