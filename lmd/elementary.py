"""float32 arithmetic for the Numba kernels: bits, fused multiply-add, memory by address, and exp, log and rotation.

Every function is a fixed sequence of IEEE operations without branches or calls, so LLVM vectorizes the loops that use
it and a value does not depend on where in a vector, a tile or a thread it was computed.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils

f32, i32 = np.float32, np.int32
intrinsic: Any = extending.intrinsic
inlined: Any = njit(forceinline=True, error_model="numpy")  # Python's division raises, which stops vectorization


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once."""
    return types.float32(types.float32, types.float32, types.float32), lambda _, builder, __, args: builder.fma(*args)


@intrinsic
def sqrt(typing_context: Any, a: Any) -> Any:
    """The square root, correctly rounded; numpy's carries a branch that stops vectorization."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.sqrt", [ir.FloatType()]), args)

    return types.float32(types.float32), emit


@intrinsic
def to_bits(typing_context: Any, a: Any) -> Any:
    return types.int32(types.float32), lambda _, builder, __, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def from_bits(typing_context: Any, a: Any) -> Any:
    return types.float32(types.int32), lambda _, builder, __, args: builder.bitcast(args[0], ir.FloatType())


def _element(builder: Any, address: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(address, ir.FloatType().as_pointer()), [index])


@intrinsic
def load(typing_context: Any, address: Any, index: Any) -> Any:
    """The float32 at `index` elements after `address`. Plain arrays would bring a sign check on the index."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_element(builder, *args), typ=ir.FloatType())

    return types.float32(types.int64, types.int64), emit


@intrinsic
def store(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _element(builder, args[0], args[1]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), emit


@intrinsic
def prefetch(typing_context: Any, address: Any, index: Any) -> Any:
    """Asks for the cache line of a float32 that will be used soon; any address may be given."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.bitcast(_element(builder, *args), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, *[ir.IntType(32)] * 3])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, *(ir.Constant(ir.IntType(32), i) for i in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def use_wide_vectors(typing_context: Any) -> Any:
    """Lets the function that calls it use 512-bit vectors, which LLVM avoids on Intel by default; 1.4 times as fast
    here.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        attributes = builder.function.attributes
        if isinstance(attributes, set):  # llvmlite's add() refuses attributes with a value
            set.add(attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), emit


# --- elementary functions, float32 ---
# The polynomials are minimax fits, made for this file, in the relative error of the function; 1 ulp is 2^-24 or so.

ROUND = f32(1.5 * 2**23)  # y + ROUND has rint(y) in its low bits
LOG2_E = f32(1.4426950408889634)
LN_2 = f32(0.6931471805599453)
SIGN = i32(-(2**31))


@inlined
def with_sign(magnitude: Any, bits: Any) -> Any:
    """A magnitude, at least +0, with the sign bit of an int32."""
    return from_bits(to_bits(magnitude) | (bits & SIGN))


@inlined
def exp2(y: Any) -> Any:
    """2^y for -126 <= y <= 128 (128 gives Inf), to 2 ulp; NaN for NaN."""
    k = y + ROUND
    f = y - (k - ROUND)
    q = fma(f32(0.0013407259248197079), f, f32(0.009671875275671482))
    q = fma(fma(fma(q, f, f32(0.055503085255622864)), f, f32(0.24022234976291656)), f, f32(0.6931472420692444))
    return from_bits(i32(to_bits(fma(q, f, f32(1.0))) + i32(to_bits(k) << i32(23))))


@inlined
def exp(x: Any) -> Any:
    """e^x to 2 + |x| ulp; at least 2^-126, Inf from 88.7 on; NaN for NaN."""
    y = x * LOG2_E
    y = f32(128.0) if y > f32(128.0) else y
    return exp2(f32(-126.0) if y < f32(-126.0) else y)


@inlined
def log(x: Any) -> Any:
    """log x for normal x, to 20 ulp; 0 for 1."""
    b = to_bits(x)
    e = i32(i32(b - i32(0x3F3504F3)) >> i32(23))  # x = 2^e m with sqrt(1/2) <= m < sqrt 2
    f = from_bits(i32(b - i32(e << i32(23)))) - f32(1.0)
    p = fma(f32(0.11896094679832458), f, f32(-0.18667849898338318))
    p = fma(fma(fma(p, f, f32(0.2049633115530014)), f, f32(-0.24909745156764984)), f, f32(0.3331450819969177))
    p = fma(fma(p, f, f32(-0.500011146068573)), f, f32(1.0000009536743164))
    return fma(f32(e), LN_2, p * f)


@inlined
def bounded(y: Any, bound: Any) -> Any:
    """y, at most `bound` in magnitude; NaN for NaN."""
    y = bound if y > bound else y
    return -bound if y < -bound else y


@inlined
def rotate(x: Any, s: Any, y: Any) -> Any:
    """x cosh y - s sinh y for |y| <= 87.

    y = k ln 2 + r; with the even and the odd part of exp(r), cosh y and sinh y are sums of products with (2^k +-
    2^-k) / 2, so that nothing cancels for small y.
    """
    k = fma(y, LOG2_E, ROUND)
    n = to_bits(k)
    r = fma(ROUND - k, LN_2, y)
    z = r * r
    odd = fma(fma(f32(0.008366645313799381), z, f32(0.16666541993618011)) * z, r, r)
    even = fma(fma(f32(0.04189998283982277), z, f32(0.4999912977218628)), z, f32(1.0))
    up = from_bits(i32(i32(n + i32(126)) << i32(23)))  # 2^(k-1); the high bits of n fall out
    down = from_bits(i32(i32(i32(126) - n) << i32(23)))  # 2^(-k-1)
    sinh = fma(up - down, even, (up + down) * odd)
    cosh = fma(up + down, even, (up - down) * odd)
    return fma(x, cosh, -s * sinh)
