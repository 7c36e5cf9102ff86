"""Writes LLVM's vector instructions with Python's operators: the inner loops of the CPU backend consist of them.

A `Lanes` is a value of type <n x T> under construction: arithmetic on it appends instructions to a builder. So an
element's rounding is written once, as a Python function, and compiled for 16 lanes, for 8, and for the single elements
at the end of a row. LLVM fits the lanes to the processor (AVX-512, AVX2, NEON). There are no fast-math flags: sums
are neither reordered nor contracted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

F32, F64 = ir.FloatType(), ir.DoubleType()
I32, I64 = ir.IntType(32), ir.IntType(64)


class Lanes:
    """A vector value. Integers are taken as signed in comparisons, as unsigned in right shifts and conversions."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    @property
    def element(self) -> Any:
        return self.value.type.element

    @property
    def count(self) -> int:
        return int(self.value.type.count)

    @property
    def floating(self) -> bool:
        return isinstance(self.element, ir.FloatType | ir.DoubleType)

    def _operand(self, other: Any) -> ir.Value:
        """A Lanes as it is; a Python number as a constant in all lanes."""
        return other.value if isinstance(other, Lanes) else ir.Constant(self.value.type, [other] * self.count)

    def _binary(self, other: Any, integer: str, floating: str | None = None) -> Lanes:
        name = floating if self.floating and floating is not None else integer
        return Lanes(self.builder, getattr(self.builder, name)(self.value, self._operand(other)))

    def __add__(self, other: Any) -> Lanes:
        return self._binary(other, "add", "fadd")

    def __sub__(self, other: Any) -> Lanes:
        return self._binary(other, "sub", "fsub")

    def __mul__(self, other: Any) -> Lanes:
        return self._binary(other, "mul", "fmul")

    def __truediv__(self, other: Any) -> Lanes:
        return self._binary(other, "fdiv", "fdiv")

    def __and__(self, other: Any) -> Lanes:
        return self._binary(other, "and_")

    def __or__(self, other: Any) -> Lanes:
        return self._binary(other, "or_")

    def __xor__(self, other: Any) -> Lanes:
        return self._binary(other, "xor")

    def __lshift__(self, other: Any) -> Lanes:
        return self._binary(other, "shl")

    def __rshift__(self, other: Any) -> Lanes:
        return self._binary(other, "lshr")

    def _compare(self, other: Any, operator: str) -> Lanes:
        """NaN compares false with everything."""
        compare = self.builder.fcmp_ordered if self.floating else self.builder.icmp_signed
        return Lanes(self.builder, compare(operator, self.value, self._operand(other)))

    def __lt__(self, other: Any) -> Lanes:
        return self._compare(other, "<")

    def __le__(self, other: Any) -> Lanes:
        return self._compare(other, "<=")

    def __gt__(self, other: Any) -> Lanes:
        return self._compare(other, ">")

    def __ge__(self, other: Any) -> Lanes:
        return self._compare(other, ">=")

    def equals(self, other: Any) -> Lanes:
        return self._compare(other, "==")

    def differs(self, other: Any) -> Lanes:
        return self._compare(other, "!=")

    def constant(self, number: float) -> Lanes:
        """The number in all lanes, in this vector's type."""
        return Lanes(self.builder, self._operand(number))

    def select(self, yes: Lanes, no: Lanes) -> Lanes:
        """yes where self (a mask) is set, else no."""
        return Lanes(self.builder, self.builder.select(self.value, yes.value, no.value))

    def larger(self, other: Lanes) -> Lanes:
        """The larger of both, lane by lane."""
        return (self > other).select(self, other)

    def _as(self, operation: str, element: Any) -> Lanes:
        if element == self.element:
            return self
        return Lanes(self.builder, getattr(self.builder, operation)(self.value, ir.VectorType(element, self.count)))

    def bits(self) -> Lanes:
        """The bit patterns of floats, as integers; integers as they are."""
        return self._as("bitcast", I64 if self.element == F64 else I32)

    def as_float(self) -> Lanes:
        """The floats that have these bit patterns: the inverse of `bits`."""
        return self._as("bitcast", F64 if self.element == I64 else F32)

    def widen(self, element: Any) -> Lanes:
        """To a wider float, or to a wider integer, zeros on top."""
        return self._as("fpext" if self.floating else "zext", element)

    def narrow(self, element: Any) -> Lanes:
        """To a narrower float, rounded to nearest even, or to the lower bits of an integer."""
        return self._as("fptrunc" if self.floating else "trunc", element)

    def to_integer(self, element: Any) -> Lanes:
        """Truncated toward zero."""
        return self._as("fptosi", element)

    def to_float(self, element: Any) -> Lanes:
        """A signed integer as a float."""
        return self._as("sitofp", element)

    def shuffled(self, other: Lanes, places: list[int]) -> Lanes:
        """The elements at `places` of this vector and the other, one after the other."""
        mask = ir.Constant(ir.VectorType(I32, len(places)), places)
        return Lanes(self.builder, self.builder.shuffle_vector(self.value, other.value, mask))

    def halfwords(self) -> Lanes:
        """The same bits as 16-bit integers, lowest first."""
        count = self.count * self.element.width // 16
        return Lanes(self.builder, self.builder.bitcast(self.value, ir.VectorType(ir.IntType(16), count)))

    def magnitude(self) -> Lanes:
        """|x|, by its bits."""
        bits = self.bits()
        return (bits & ((1 << (bits.element.width - 1)) - 1)).as_float()

    def with_sign_of(self, other: Lanes) -> Lanes:
        """A magnitude with the sign of `other`."""
        bits = other.bits()
        return (self.bits() | (bits & -(1 << (bits.element.width - 1)))).as_float()

    def all(self) -> ir.Value:
        """Whether a mask is set everywhere, as an i1."""
        packed = self.builder.bitcast(self.value, ir.IntType(self.count))
        return self.builder.icmp_unsigned("==", packed, ir.Constant(packed.type, (1 << self.count) - 1))

    def largest(self) -> ir.Value:
        """The largest lane, of integers that are not negative."""
        if self.count == 1:
            return self.builder.extract_element(self.value, ir.Constant(I32, 0))
        name = f"llvm.vector.reduce.umax.v{self.count}i{self.element.width}"
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(self.element, [self.value.type]), name
        )
        return self.builder.call(function, [self.value])


def splat(builder: ir.IRBuilder, scalar: ir.Value, count: int) -> Lanes:
    """A scalar in all lanes."""
    nothing = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
    first = builder.insert_element(nothing, scalar, ir.Constant(I32, 0))
    everywhere = ir.Constant(ir.VectorType(I32, count), [0] * count)
    return Lanes(builder, builder.shuffle_vector(first, nothing, everywhere))


class Maximum:
    """A running maximum, from 0 on, of integers that are not negative, in vectors of `width` lanes or single ones."""

    def __init__(self, builder: ir.IRBuilder, element: Any, width: int) -> None:
        self.builder, self.element = builder, element
        types = [ir.VectorType(element, count) for count in {width, 1}]
        self.states = {t.count: cgutils.alloca_once_value(builder, ir.Constant(t, [0] * t.count)) for t in types}

    def include(self, lanes: Lanes) -> None:
        state = self.states[lanes.count]
        self.builder.store(lanes.larger(Lanes(self.builder, self.builder.load(state))).value, state)

    def value(self) -> ir.Value:
        found = [Lanes(self.builder, self.builder.load(state)).largest() for state in self.states.values()]
        return functools.reduce(lambda a, b: self.builder.select(self.builder.icmp_signed(">", a, b), a, b), found)


class Memory:
    """Numbers in memory, by index."""

    def __init__(self, builder: ir.IRBuilder, element: Any, base: ir.Value) -> None:
        """base: a pointer."""
        self.builder, self.element, self.base = builder, element, base
        self.size = element.width // 8 if isinstance(element, ir.IntType) else (4 if element == F32 else 8)

    @classmethod
    def at(cls, builder: ir.IRBuilder, element: Any, address: ir.Value) -> Memory:
        """What lies at an address, an i64."""
        return cls(builder, element, builder.inttoptr(address, element.as_pointer()))

    @classmethod
    def of(cls, context: Any, builder: ir.IRBuilder, array_type: Any, array: ir.Value) -> Memory:
        """The elements of a Numba array."""
        data = context.make_array(array_type)(context, builder, array).data
        return cls(builder, context.get_data_type(array_type.dtype), data)

    def _at(self, index: ir.Value) -> ir.Value:
        return self.builder.gep(self.base, [index], source_etype=self.element)

    def scalar(self, index: ir.Value | int) -> ir.Value:
        """The number at an index."""
        index = ir.Constant(I64, index) if isinstance(index, int) else index
        return self.builder.load(self._at(index), align=self.size, typ=self.element)

    def put(self, index: ir.Value, value: ir.Value) -> None:
        """Write one number to an index."""
        self.builder.store(value, self._at(index), align=self.size)

    def load(self, index: ir.Value, count: int) -> Lanes:
        """`count` numbers from an index on, at any address."""
        vector = ir.VectorType(self.element, count)
        return Lanes(self.builder, self.builder.load(self._at(index), align=self.size, typ=vector))

    def store(self, index: ir.Value, lanes: Lanes, stream: bool = False) -> None:
        """Write a vector from an index on. stream: past the cache, to an address that is a multiple of its size."""
        pointer = self.builder.bitcast(self._at(index), lanes.value.type.as_pointer())
        store = self.builder.store(lanes.value, pointer, align=self.size * lanes.count if stream else self.size)
        if stream:
            one = self.builder.module.add_metadata([ir.Constant(I32, 1)])
            store.set_metadata("nontemporal", one)

    def prefetch(self, index: ir.Value) -> None:
        """Ask for what will be read from there; any address is allowed."""
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), I32, I32, I32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        address = self.builder.bitcast(self._at(index), ir.IntType(8).as_pointer())
        self.builder.call(function, [address, I32(0), I32(2), I32(1)])  # to read; into the second cache; data

    def gather(self, index: Lanes) -> Lanes:
        """The elements at the places in `index`, one for each lane."""
        result: ir.Value = ir.Constant(ir.VectorType(self.element, index.count), ir.Undefined)
        for lane in range(index.count):
            at = ir.Constant(I32, lane)
            element = self.scalar(self.builder.zext(self.builder.extract_element(index.value, at), I64))
            result = self.builder.insert_element(result, element, at)
        return Lanes(self.builder, result)


def over(builder: ir.IRBuilder, count: ir.Value, width: int, body: Callable[[ir.Value, int], None]) -> None:
    """body(place, lanes) for all places below `count` (i64): `width` at a time, then one by one."""
    zero, one, step = (ir.Constant(I64, n) for n in (0, 1, width))
    rest = zero
    if width > 1:
        rest = builder.and_(count, ir.Constant(I64, -width))
        with cgutils.for_range_slice(builder, zero, rest, step, I64, inc=True) as (place, _):
            body(place, width)
    with cgutils.for_range_slice(builder, rest, count, one, I64, inc=True) as (place, _):
        body(place, 1)
